"""AdamW over flat buckets: ZeRO 1 to 3, gradient clipping, and the learning rate over a run."""

from llamax.optim.groups import Owned
from llamax.optim.schedule import lr_at
from llamax.optim.zero import Zero

__all__ = ["Owned", "Zero", "lr_at"]
