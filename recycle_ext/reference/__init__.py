"""The models and ops in plain PyTorch: the independent oracle of the tests, also used by training and evaluation."""

from recycle_ext.reference.model import BaseModel, KvCache, RecyclableModule

__all__ = ["BaseModel", "KvCache", "RecyclableModule"]
