"""Registration of torch.ops.recycle, and the parts of its ops that are written in PyTorch."""
