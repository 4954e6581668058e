"""llamax: train Llama models on Trainium, GPUs and laptops from code one can read in an afternoon."""

__version__ = "0.1.0"
