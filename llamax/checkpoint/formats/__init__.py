"""Checkpoints of other trainers, read and written: one module per format.

::

    nxd       neuronx-distributed      save_checkpoint folders, ZeRO-1 state too     read, written
    optimum   optimum-neuron           the same with mp_metadata files               read
    nemo      NeMo, Megatron           mp_rank_XX / tp_rank_XX_pp_rank_XXX folders   read
    meta      Meta                     consolidated.XX.pth and params.json           read, written

They are pickles.  No pickle is ever executed: ``pickles`` runs a small machine that knows tensors
and plain containers, and ``archive`` finds the tensors' bytes in the file.  Only ``llamax import``
reads them, in a process that does nothing else.
"""
