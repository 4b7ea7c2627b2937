"""The thread pool: any number of threads, forks, calls from several threads, signals, limits."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from models import write_base

from recycle_ext import _C
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights.layout import pack_matrix
from recycle_ext.weights.pack import pack_model


@pytest.fixture
def packed(tmp_path):
    return pack_model(write_base(tmp_path), None, "q8")


def decode(packed) -> list[int]:
    stream = Decoder(packed, "standard", capacity=60).stream([1, 2, 3])
    return [next(stream) for _ in range(40)]


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


def test_models_have_their_own_number_of_threads(packed):
    """Neither number changes the other, nor that of the process, in whatever order the decoders run."""
    process = _C.n_threads()
    expected = decode(packed)
    models = [dataclasses.replace(packed, threads=threads) for threads in (1, 3)]
    decoders = [Decoder(model, "standard", capacity=60) for model in models]
    assert [len(decoder.scratch) for decoder in decoders] == [1, 3]
    streams = [decoder.stream([1, 2, 3]) for decoder in decoders]
    tokens = [[next(stream) for stream in streams] for _ in range(40)]
    assert tokens == [[token, token] for token in expected]
    assert _C.n_threads() == process


def test_number_of_threads_may_change_during_a_loop(packed):
    """The loop's scratch says how many threads run it, whatever another part of the program sets."""
    expected = decode(packed)
    decoder = Decoder(packed, "standard", capacity=60)
    state = decoder.arguments()
    torch.ops.recycle.prefill(*state, 0, torch.tensor([1, 2, 3]))
    tokens = [int(decoder.pending[0, 0])]
    while len(tokens) < 40:
        _C.set_n_threads(1 + len(tokens) % 4)
        tokens += torch.ops.recycle.decode_step(*state)[0][0].tolist()
    assert tokens == expected


def test_settings_of_the_process_may_change_during_steps(packed):
    """Another thread changes the instruction set, the profile and the number of threads as fast as it can."""
    _C.set_n_threads(2)
    expected = decode(packed)
    head = torch.zeros(1, 32), None, 1e-5, pack_matrix(torch.eye(32), "f32"), 0, 32, torch.tensor([0])
    head = (*head, 0.0, 0, 1.0, torch.tensor([0]))
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for isa in ("generic", None):
                _C.force_isa(isa)
                _C.profile(isa is None)
                _C.phase_times()
                _C.set_n_threads(3 if isa is None else 1)
                torch.ops.recycle.recycle_head(*head)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(3):
            assert decode(packed) == expected
    finally:
        done.set()
        thread.join()
        _C.force_isa(None)
        _C.profile(False)


@pytest.fixture(scope="module")
def long_packed(tmp_path_factory):
    """A model with a context for prompts that take minutes."""
    return pack_model(write_base(tmp_path_factory.mktemp("long"), n_layers=4, context=200_000), None, "f32")


class AskedError(Exception):
    """What a signal's handler raises."""


def ask(number, frame):
    raise AskedError(number)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGUSR1, AskedError)])
def test_signal_ends_a_long_prefill(long_packed, number, raised):
    decoder = Decoder(long_packed, "standard", capacity=200_000)
    first = decoder.prefill([1, 2, 3])
    sent = []

    def send() -> None:
        while decoder.pending[0, 0] >= 0:  # the op has not begun
            time.sleep(0.01)
        time.sleep(0.1)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), number)

    before = signal.signal(number, ask if raised is AskedError else signal.default_int_handler)
    threading.Thread(target=send).start()
    try:
        with pytest.raises(raised):
            decoder.prefill([1, 2] * 90_000)
    finally:
        signal.signal(number, before)
    assert time.perf_counter() - sent[0] < 10
    assert decoder.pending.tolist() == [[-1]]
    assert decoder.lengths.tolist() == [[0], [0]]
    assert decoder.prefill([1, 2, 3]) == first


def test_steps_of_another_thread_run_during_a_long_prefill(packed, long_packed):
    expected = decode(packed)
    prefill = threading.Thread(target=Decoder(long_packed, "standard", capacity=9000).prefill, args=([1, 2] * 4000,))
    prefill.start()
    assert decode(packed) == expected
    assert prefill.is_alive()  # 40 steps, each after one of the 125 passes of the prompt
    prefill.join()


NO_ROOM = """
import resource, sys
from pathlib import Path
import torch
from models import write_base
from recycle_ext import _C
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.weights import pack
packed = pack.pack_model(write_base(Path(sys.argv[1])), None, "q8")
_C.set_n_threads(1)
expected = list(Decoder(packed, "standard", capacity=60).stream([1, 2, 3]))
_C.set_n_threads(40)
decoder = Decoder(packed, "standard", capacity=60)
size = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[2]), resource.RLIM_INFINITY))
assert list(decoder.stream([1, 2, 3])) == expected
"""


@pytest.mark.parametrize("room", [1 << 20, 30 << 20])
def test_threads_that_cannot_be_started_are_done_without(tmp_path, room):
    """room: bytes of address space for the stacks of 39 threads, of 8 MB each."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", NO_ROOM, str(tmp_path), str(room)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_idle_decoder_uses_no_cpu(packed):
    decode(packed)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
