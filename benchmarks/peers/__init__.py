"""Contenders of ``benchmarks/training.py``: each makes one training step of the same Llama.

A contender is ``module:function`` below this folder.  ``function(job)`` builds model and optimizer
and returns ``step(number) -> loss``, which is called with 1, 2, 3, ... and does all that a training
loop does between two batches.
"""
