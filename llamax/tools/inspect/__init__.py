"""``llamax inspect``: what lies at a path, and samples of a dataset as text."""
