"""The models and ops in plain PyTorch: the independent oracle, for tests, training and evaluation."""

from recycle_ext.reference.model import BaseModel, KvCache, RecyclableModule

__all__ = ["BaseModel", "KvCache", "RecyclableModule"]
