"""Data: from text to batches.

::

    text ──prepare──> NAME.tokens ──loader──> Batch(ids, labels, positions, documents)
              │            │
          tokenizer     token_file (the packed tokens), dataset (the folder that holds it)

Only the loaders need torch, so this package imports none of its modules.
"""
