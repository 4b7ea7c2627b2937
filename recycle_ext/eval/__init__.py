"""python -m recycle_ext.eval: acceptance, speed and quality of a module on prompts of several kinds.

`prompts` and `cloze` read the tasks (prompts.jsonl, cloze.jsonl), `decoding` runs a mode, `likelihood` scores text under the
base model, `measure` runs all of these, `intervals` gives confidence intervals, `report` and `plot` show the results.
"""
