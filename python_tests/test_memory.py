"""Memory in use stays near the packed weights: no second copy, at no time.

Only anonymous memory counts. The system takes pages of files back when memory is short.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MAX_RATIO = 1.1  # of peak memory over weights and caches

# The child measures its own peak (VmHWM): the ru_maxrss of a child includes its parent's. The baseline includes the heap
# of the libraries and of one tokenizer, which do not grow with the weights.
CODE = """
import json, re, sys
import recycle_ext
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.measuring.machine import peak_memory_bytes

def status(name):
    return int(re.search(rf"^{name}:\\s+(\\d+) kB", open("/proc/self/status").read(), re.M)[1]) * 1024

path, dtype, copies = sys.argv[1:]
open_checkpoint(path).tokenizer
before = status("RssAnon")
model = recycle_ext.load(path, dtype=dtype if dtype != "native" else None)
second_copies = [model.packed.weights.clone() for _ in range(int(copies))]
generation = recycle_ext.generate(model, "Once upon a time,", max_new_tokens=64)
"".join(generation)
decoder = generation._decoder
caches = decoder.base_cache.nbytes + decoder.module_cache.nbytes
print(json.dumps([peak_memory_bytes() - status("RssFile") - before, model.packed.weights.numel() + caches]))
"""


def used_and_needed(model: Path, dtype: str, copies: int = 0) -> tuple[int, int]:
    """Peak bytes of loading and generating in a process of their own, and bytes of weights and caches.

    copies: of the packed weights, made on purpose.
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE, model, dtype, str(copies)], capture_output=True, text=True, check=True
    )
    used, needed = json.loads(done.stdout)
    return used, needed


@pytest.mark.parametrize("dtype", ["native", "q8", "bf16", "f32"])
def test_peak_memory_is_under_1_1_times_weights_and_caches(default_model, dtype):
    used, needed = used_and_needed(default_model, dtype)
    assert needed < used < MAX_RATIO * needed, f"{used / 1e6:.0f} MB for {needed / 1e6:.0f} MB"


@pytest.mark.parametrize("dtype", ["native", "bf16"])
def test_second_copy_of_the_weights_exceeds_the_bound(default_model, dtype):
    used, needed = used_and_needed(default_model, dtype, copies=1)
    assert used > MAX_RATIO * needed, f"{used / 1e6:.0f} MB for {needed / 1e6:.0f} MB"
