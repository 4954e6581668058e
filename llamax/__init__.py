"""llamax: train Llama models on Trainium, GPUs and laptops, from code to read in an afternoon."""

__version__ = "0.1.0"
