"""Checkpoints of other trainers, read and written: one module per format.

::

    format    trainer               files                                        read   written
    nxd       neuronx-distributed   save_checkpoint folders, ZeRO-1 state too    yes    yes
    optimum   optimum-neuron        the same, with mp_metadata files             yes    no
    nemo      NeMo, Megatron, NNM   mp_rank_XX, tp_rank_XX_pp_rank_XXX folders   yes    no
    meta      Meta                  consolidated.XX.pth and params.json          yes    yes
    hf        transformers          a Hugging Face folder: ``hf_folder`` above

    convert (llamax import)  ->  nxd  optimum  nemo  meta  ->  rank_grid  ->  base
                                  |                              |
    export  (llamax export)  ->  nxd_writer  meta_writer       xser  ->  torch_zip  ->  torch_pickle

Read first ``base``, the interface, and ``rank_grid``, which joins the shares of ranks.

**Security boundary.**  These formats are pickles, and unpickling executes whatever a file asks for.
llamax never unpickles: no module calls ``torch.load`` or ``pickle``.  ``torch_pickle`` interprets
the instructions itself, keeps tensors and plain containers, replaces every other object by an inert
placeholder, and refuses a file that names functions which run code;
``torch_zip`` then finds the bytes of the tensors in the archive, with every size checked against
the file before memory is allocated.  Links that lead out of the folder are refused.  Nothing but
``llamax import`` reads these formats; what it writes holds no pickle.
"""
