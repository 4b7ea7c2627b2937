"""python -m recycle_ext.train: __main__.py says what it does."""
