"""The thread pool: any number of threads, forks, calls from several threads."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from models import write_base

from recycle_ext import _C
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights.pack import pack_model


@pytest.fixture
def packed(tmp_path):
    return pack_model(write_base(tmp_path), None, "q8")


def decode(packed) -> list[int]:
    stream = Decoder(packed, "standard", capacity=60).stream([1, 2, 3])
    return [next(stream) for _ in range(40)]


def test_default_threads_are_the_cores_of_this_process():
    assert _C.n_threads() == _C.available_cores()
    assert _C.available_cores() == len(os.sched_getaffinity(0))


def test_any_number_of_threads_gives_the_same_tokens(packed):
    expected = decode(packed)
    for threads in (1, 3, 8):
        _C.set_n_threads(threads)
        assert decode(packed) == expected


def cpu_nanoseconds() -> dict[int, int]:
    """CPU time of each thread of this process, by thread id."""
    return {
        int(task.name): int((task / "schedstat").read_text().split()[0]) for task in Path("/proc/self/task").iterdir()
    }


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_set_n_threads_runs_as_many_threads(threads):
    """Each of the threads takes CPU time in a call of the kernels, and no other thread does."""
    _C.set_n_threads(threads)
    _C.read_bandwidth(1 << 20, 1)  # starts the threads, and ends surplus ones
    before = cpu_nanoseconds()
    _C.read_bandwidth(1 << 24, 20)
    after = cpu_nanoseconds()
    assert set(after) == set(before)
    worked = [task for task in after if after[task] - before[task] > 1_000_000]
    assert len(worked) == threads


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_number_of_threads_out_of_range_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; it must be 1 to 256"):
        _C.set_n_threads(threads)


def test_forked_child_decodes_the_same_tokens(packed):
    expected = decode(packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if decode(packed) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert decode(packed) == expected


def test_calls_from_several_threads_wait_for_each_other(packed):
    expected = decode(packed)
    results: list[list[int]] = []
    threads = [threading.Thread(target=lambda: results.append(decode(packed))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_idle_decoder_uses_no_cpu(packed):
    decode(packed)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
