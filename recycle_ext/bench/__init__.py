"""python -m recycle_ext.bench: the modes and dtypes of this engine, and other engines, measured side by side.

`runners` lists the runners, `systems` and `peers` measure one, `worker` runs one runner in its own process, `interleaved_runs`
orders the runs, `report` and `plot` show the results, `page` makes docs/benchmarks.md of committed results.
`gpu_report` is the counterpart for a GPU.
"""
