"""Fuzzes the readers of files, the ops and the command line: `python python_tests/fuzz/run.py --seconds 60 --seed 1`.

Every input is right, or refused by an error that names the thing, in bounded time and memory. What else happens (another
exception, a crash, a hang) is printed with the command that repeats it, and ends in exit status 1. Input number n of a
target and a seed is always the same. A child process runs the inputs, so that a crash is a finding and not the end.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from pathlib import Path
from random import Random

import torch
from targets import TARGETS

MAX_SECONDS = 10  # of one input
MAX_BYTES = 2 << 30  # of all memory that the inputs take


class TooSlowError(Exception):
    """An input took too long."""


def _stop(*_) -> None:
    raise TooSlowError(f"over {MAX_SECONDS} seconds")


def _work(target: str, seed: int, inputs: int | None, end: float, shared: mmap.mmap, findings: int) -> None:
    """Runs the inputs up to number ``inputs`` or the time ``end``.

    shared: the number of the next input, and how many were accepted and refused. findings: a file, a line for each.
    """
    signal.signal(signal.SIGALRM, _stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES,) * 2)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        one = TARGETS[target](Path(folder))
        number, accepted, refused = struct.unpack_from("<qqq", shared)
        while time.monotonic() < end and (inputs is None or number < inputs):
            signal.alarm(MAX_SECONDS)
            try:
                good = one(Random(f"{target} {seed} {number}"))
                accepted, refused = accepted + good, refused + (not good)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
                text = {
                    "number": number,
                    "error": f"{type(error).__name__}: {error}"[:400],
                    "at": " ".join(frames[-4:]),
                }
                os.write(findings, json.dumps(text).encode() + b"\n")
            signal.alarm(0)
            number += 1
            struct.pack_into("<qqq", shared, 0, number, accepted, refused)


def fuzz(target: str, seed: int, seconds: float, inputs: int | None = None) -> tuple[int, int, list[dict]]:
    """Numbers of inputs accepted and refused, and the findings."""
    shared, end = mmap.mmap(-1, 24), time.monotonic() + seconds
    with tempfile.TemporaryFile() as findings:
        while time.monotonic() < end:
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    _work(target, seed, inputs, end, shared, findings.fileno())
                    status = 0
                finally:
                    os._exit(status)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 0:
                break
            number = struct.unpack_from("<q", shared)[0]
            text = {"number": number, "error": f"the process ended with {status}", "at": ""}
            os.write(findings.fileno(), json.dumps(text).encode() + b"\n")
            struct.pack_into("<q", shared, 0, number + 1)
        findings.seek(0)
        found = [json.loads(line) for line in findings]
    return (*struct.unpack_from("<qq", shared, 8), found)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together (default: 60)")
    parser.add_argument("--inputs", type=int, help="of each target, at most (default: as many as the time allows)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--target", choices=list(TARGETS), action="append", help="may be given several times (default: all)"
    )
    parser.add_argument("--number", type=int, help="only this input of the target, and its traceback")
    options = parser.parse_args(arguments)
    targets = options.target or list(TARGETS)
    if options.number is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            print(TARGETS[targets[0]](Path(folder))(Random(f"{targets[0]} {options.seed} {options.number}")))
        return 0
    total = 0
    for target in targets:
        accepted, refused, found = fuzz(target, options.seed, options.seconds / len(targets), options.inputs)
        total += len(found)
        print(f"{target}: {accepted} inputs accepted, {refused} refused, {len(found)} findings", flush=True)
        places: dict[str, list[dict]] = {}
        for each in found:
            places.setdefault(each["at"], []).append(each)
        for each in places.values():
            first = each[0]
            again = f"--target {target} --seed {options.seed} --number {first['number']}"
            print(f"  {len(each)} like {again}: {first['error']}\n    at {first['at']}", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
