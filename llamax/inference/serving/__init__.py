"""A server of one model over HTTP: requests of different lengths share one batch and one cache.

::

    HTTP ─> app ─> openai | tgi ─> Formatter: text to ids ─> Scheduler ─> Llama and KVPool
              <── JSON or events <── one Step per new token <──┘

The main thread serves and formats; another computes.
"""
