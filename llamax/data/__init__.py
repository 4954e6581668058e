"""From text to batches.

::

    text ──prepare──> NAME.tokens ──loader──> Batch(ids, labels, positions, documents)
              │            │
          tokenizer     tokens (the packed file), dataset (the folder that holds it)

Nothing here but ``loader`` needs torch, so this package imports none of its modules.
"""
