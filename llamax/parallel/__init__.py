"""Tensor and sequence parallelism by hand: regions, layers, and the vocabulary-parallel loss."""
