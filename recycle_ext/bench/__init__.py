"""python -m recycle_ext.bench: the modes and dtypes of this engine, and other engines, measured side by side.

`runners` says what is measured, `systems` and `peers` how, `worker` runs one runner in its own process, `interleaved_runs`
lets the runners take turns, `report` and `plot` show the results, `page` makes docs/benchmarks.md of them.
`gpu_report` is the counterpart for a GPU.
"""
