"""The operators of torch.ops.recycle: their registration, and what of them is PyTorch."""
