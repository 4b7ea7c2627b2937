"""One contender in its own process, so that memory, thread pools and crashes are its own.

The two ends talk in lines of JSON. The parent sends the job, then "measure" or "phases" as often as it
likes. The worker answers each; the job, once it is loaded, with what is known of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import TextIO

from recycle_ext import _C
from recycle_ext.bench.contenders import Job
from recycle_ext.bench.peers import open_system
from recycle_ext.bench.systems import Decoded, System
from recycle_ext.errors import RecycleError

COMMAND = [sys.executable, "-m", "recycle_ext.bench.worker"]
_PROBE_REPEATS = 11


class WorkerDied(Exception):  # noqa: N818  (an event, not a mistake)
    """The process is gone; the message is its last word."""


class Worker:
    """The parent's end of a process, which is started at once and then loads the job's model."""

    def __init__(self, job: Job, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (until close)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Ctrl-C is for the parent, which then ends the workers.
            start_new_session=True,
        )
        self._send(job.as_dict())

    def ask(self, request: str) -> dict:
        """Sends "measure" or "phases" and waits. Raises WorkerDied."""
        self._send(request)
        return self.answer()

    def answer(self) -> dict:
        """The next answer. Raises WorkerDied."""
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise WorkerDied(self._last_word())
        return json.loads(line)

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        with suppress(BrokenPipeError):  # something that the process did not come to read
            self._process.stdin.close()

    def _send(self, message: dict | str) -> None:
        with suppress(BrokenPipeError):  # there will be no answer, and that says why
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _last_word(self) -> str:
        """The last line on standard error, and the signal if one ended the process."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        said = said.removeprefix("error: ")
        return said if status >= 0 else f"ended by signal {-status}: {said}"


def main() -> int:
    """The process: answers until standard input ends."""
    # What a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        _serve(sys.stdin, answers)
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _serve(requests: TextIO, answers: TextIO) -> None:
    def answer(value: dict) -> None:
        print(json.dumps(value), file=answers, flush=True)

    job = Job.from_dict(json.loads(requests.readline()))
    system = open_system(job)
    # Once around, so that memory has been touched and threads are there.
    system.prefill(job.prompt[:16])
    system.decode(min(4, job.new_tokens))
    names = ("weight_bytes", "step_bytes", "standard_step_bytes", "formats")
    answer({name: getattr(system, name) for name in names})

    peak = 0
    for line in requests:
        if json.loads(line) == "phases":
            answer({"phases": system.phases()})
            continue
        first_token_seconds = system.prefill(job.prompt)
        if not peak:  # before a probe takes a buffer as large as the model
            system.decode(job.new_tokens)
            peak = peak_memory_bytes()
        before = probe(job, system)
        decoded = system.decode(job.new_tokens)
        bandwidth = (before + probe(job, system)) / 2
        answer(
            {
                "first_token_seconds": first_token_seconds,
                "prefill_tokens_per_second": len(job.prompt) / first_token_seconds,
                "peak_memory_bytes": peak,
            }
            | decode_figures(decoded, system, bandwidth)
        )


def probe(job: Job, system: System) -> float:
    """Bytes a second that this machine reads now, with the job's threads, from as much memory as the weights."""
    _C.set_n_threads(min(job.contender.threads, _C.available_cores()))
    return _C.read_bandwidth(system.weight_bytes, _PROBE_REPEATS)


def decode_figures(decoded: Decoded, system: System, bandwidth: float) -> dict:
    """What a decoding comes to. bandwidth: bytes a second that this machine read directly before and after."""
    step_bytes = system.step_bytes if decoded.step_bytes is None else decoded.step_bytes
    read = decoded.steps * (step_bytes + decoded.cache_bytes)
    return {
        "tokens": decoded.tokens,
        "steps": decoded.steps,
        "tokens_per_second": decoded.tokens / decoded.seconds,
        "gigabytes_per_second": read / decoded.seconds / 1e9,
        "read_bandwidth_gigabytes_per_second": bandwidth / 1e9,
        "roofline_fraction": read / decoded.seconds / bandwidth,
        "acceptance_rate": decoded.acceptance_rate,
    }


def peak_memory_bytes() -> int:
    """The most this process had in memory.

    Not getrusage's ru_maxrss, in which the parent's memory counts that this process began as.
    """
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
