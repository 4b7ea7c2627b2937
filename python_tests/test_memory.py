"""Memory in use stays near the packed weights: no second copy, at no time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
import torch
import recycle_ext
from recycle_ext import _C

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
model = recycle_ext.load(sys.argv[1], dtype=sys.argv[2] if sys.argv[2] != "own" else None)
generation = recycle_ext.generate(model, "Once upon a time,", max_new_tokens=64)
"".join(generation)
decoder = generation._decoder
caches = sum(t.numel() * t.element_size() for t in (decoder.base_cache, decoder.module_cache))
print(json.dumps([peak() - before, model.packed.weights.numel() + caches]))
"""


@pytest.mark.parametrize("dtype", ["own", "q8", "bf16", "f32"])
def test_peak_memory_is_under_1_3_times_weights_and_caches(default_model, dtype):
    done = subprocess.run(
        [sys.executable, "-c", CODE, default_model, dtype],
        capture_output=True,
        text=True,
        check=True,
    )
    used, needed = json.loads(done.stdout)
    assert used < 1.3 * needed, f"{used / 1e6:.0f} MB for {needed / 1e6:.0f} MB"
