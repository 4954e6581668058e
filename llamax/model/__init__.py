"""The network: Llama whole, its adapters, its quantised base, and recomputation."""
