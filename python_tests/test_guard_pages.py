"""No op loads or stores outside its tensors, whatever the instruction set and format (see guarded_memory.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ext import _C
from recycle_ext.checkpoint.config import DTYPES
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.weights.layout import FORMATS

HERE = Path(__file__).parent
SIDES = ("after", "before")  # of a tensor: where its inaccessible page lies


@pytest.fixture(scope="module")
def endings() -> dict[str, int]:
    """How the process of each case ended."""
    done = subprocess.run(
        [sys.executable, HERE / "guarded_memory.py"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return json.loads(done.stdout)


@pytest.mark.parametrize("side", SIDES)
def test_read_of_guarded_byte_is_a_fault(endings, side):
    """The controls: without them the tests below could not fail."""
    assert endings[f"control-byte-{side}"] == -signal.SIGSEGV
    for isa in _C.runnable_isas():
        assert endings[f"control-head-{isa}-{side}"] == -signal.SIGSEGV
        assert endings[f"control-attention-{isa}-{side}"] == -signal.SIGSEGV


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", _C.runnable_isas())
def test_recycle_head_stays_inside_its_tensors(endings, name, format, side):
    assert endings[f"head-{name}-{format}-{side}"] == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cache", CACHE_DTYPES)
@pytest.mark.parametrize("name", _C.runnable_isas())
def test_attention_decode_stays_inside_its_tensors(endings, name, cache, side):
    assert endings[f"attention-{name}-{cache}-{side}"] == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _C.runnable_isas())
def test_decode_step_stays_inside_its_tensors(endings, name, dtype, side):
    assert endings[f"steps-{name}-{dtype}-{side}"] == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", _C.runnable_isas())
def test_decode_step_with_a_damaged_plan_stays_inside_its_tensors(endings, name, side):
    assert endings[f"damaged-plans-{name}-{side}"] == 0


def test_every_case_is_looked_at(endings):
    isas = len(_C.runnable_isas())
    controls = 1 + 2 * isas
    cases = isas * (len(FORMATS) + len(CACHE_DTYPES) + len(DTYPES) + 1)
    assert len(endings) == len(SIDES) * (controls + cases)
