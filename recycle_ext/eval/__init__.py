"""python -m recycle_ext.eval: what a module is worth, on prompts of several kinds.

`prompts` and `cloze` are what is asked (prompts.jsonl, cloze.jsonl), `decoding` runs a mode and counts, `likelihood` reads
text under the base, `measure` puts these in a row, `bootstrap` gives the intervals, `report` and `plot` show what came out.
"""
