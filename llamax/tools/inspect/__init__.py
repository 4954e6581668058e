"""``llamax inspect``: what lies at a path, and samples of a dataset as text."""

from llamax.tools.inspect.description import as_json, describe, table
from llamax.tools.inspect.samples import read_samples
from llamax.tools.inspect.show import show_samples

__all__ = ["as_json", "describe", "read_samples", "show_samples", "table"]
