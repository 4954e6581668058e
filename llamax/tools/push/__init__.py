"""Uploads an exported folder to the Hugging Face Hub, with a model card of its run."""

from llamax.tools.push.push import Pushed as Pushed
from llamax.tools.push.push import push as push
