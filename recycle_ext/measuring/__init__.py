"""The parts that bench, eval, train and info share; no file here knows a model.

`interleave` orders runs, `bandwidth` reads memory as fast as the machine can, `machine` describes the machine, `tables` and
`plots` draw results, `extras` asks for optional libraries.
"""
