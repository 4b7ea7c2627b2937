"""Training of recyclable modules. The command is `python -m recycle_ext.train` (__main__.py)."""
