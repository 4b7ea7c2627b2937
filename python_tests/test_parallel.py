"""The thread pool: any number of threads, forks, calls from several threads."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
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


def test_the_default_is_the_cores_of_this_process():
    assert _C.n_threads() == _C.available_cores()
    assert _C.available_cores() == len(os.sched_getaffinity(0))


def test_more_threads_than_cores_still_give_the_same_tokens(packed):
    expected = decode(packed)
    for threads in (1, 3, 8):
        _C.set_n_threads(threads)
        assert decode(packed) == expected


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_a_number_of_threads_out_of_range_is_refused(threads):
    with pytest.raises(ValueError, match=f"threads is {threads}; it must be 1 to 256"):
        _C.set_n_threads(threads)


def test_a_forked_child_decodes_too(packed):
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


def test_an_idle_decoder_uses_no_cpu(packed):
    decode(packed)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_read_bandwidth_is_a_plausible_number():
    assert 1e8 < _C.read_bandwidth(1 << 24, 2) < 1e13
    assert torch.get_num_threads() >= 1
