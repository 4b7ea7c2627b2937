"""python -m recycle_ext.bench: this engine's modes and widths, and other engines, measured side by side.

`contenders` says what is measured, `systems` and `peers` how, `worker` puts one contender in a process of its own,
`race` takes the turns, `report` and `plot` show what came out.
"""
