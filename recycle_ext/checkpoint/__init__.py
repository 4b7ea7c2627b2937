"""Models on disk: base models, modules, and where they come from."""

from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
