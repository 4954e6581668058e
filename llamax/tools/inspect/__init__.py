"""``llamax inspect``: what lies at a path, and samples of a dataset as text."""

from llamax.tools.inspect.description import describe, table
from llamax.tools.inspect.samples import read_samples
from llamax.tools.inspect.show import show_samples

__all__ = ["describe", "read_samples", "show_samples", "table"]
