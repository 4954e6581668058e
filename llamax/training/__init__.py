"""The pieces of a training run on one rank; ``llamax.train`` puts them together."""
