"""One runner in its own process: memory, thread pools and crashes of one runner do not touch another.

Both ends exchange lines of JSON. The parent sends the job, then any number of "measure", "phases" and {"rows": n} requests.
The worker answers each of them; it answers the job, once the model is loaded, with facts of the model.
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
from recycle_ext.bench.peers import open_system
from recycle_ext.bench.runners import Job
from recycle_ext.bench.systems import Decoded, System
from recycle_ext.errors import RecycleError
from recycle_ext.measuring.machine import peak_memory_bytes

COMMAND = [sys.executable, "-m", "recycle_ext.bench.worker"]
_PROBE_REPEATS = 11


class WorkerDied(Exception):  # noqa: N818  (an event, not an error of this program)
    """The process ended; the message is the final message of the process."""


class Worker:
    """The parent's end: starts the process, which loads the job's model in the background."""

    def __init__(self, job: Job, command: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (close() closes the file)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Ctrl-C then reaches the parent alone, and the parent ends the workers.
            start_new_session=True,
        )
        self._send(job.as_dict())

    def ask(self, request: str | dict) -> dict:
        """Sends "measure", "phases" or {"rows": n} and waits. Raises WorkerDied."""
        self._send(request)
        return self.answer()

    def answer(self) -> dict:
        """The next answer. Raises WorkerDied."""
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise WorkerDied(self._final_message())
        return json.loads(line)

    def close(self) -> None:
        """Ends the process at once."""
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        with suppress(BrokenPipeError):  # the process died before it read a request
            self._process.stdin.close()

    def _send(self, message: dict | str) -> None:
        with suppress(BrokenPipeError):  # the process died; answer() says so
            print(json.dumps(message), file=self._process.stdin, flush=True)

    def _final_message(self) -> str:
        """The last line of standard error, and the signal if one ended the process."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "no reason given")
        said = said.removeprefix("error: ")
        return said if status >= 0 else f"ended by signal {-status}: {said}"


def main() -> int:
    """The worker process: answers until standard input ends."""
    # Libraries that print to standard output must not print between the answers.
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
    # A warm-up: touches the memory and starts the threads.
    system.prefill(job.prompt[:16])
    system.decode(min(4, job.new_tokens))
    names = ("weight_bytes", "step_bytes", "standard_step_bytes", "formats")
    answer({name: getattr(system, name) for name in names})

    peak = 0
    for line in requests:
        request = json.loads(line)
        if request == "phases":
            answer({"phases": system.phases()})
            continue
        if request != "measure":
            answer({"seconds": system.step_seconds(request["rows"], job.new_tokens)})
            continue
        first_token_seconds = system.prefill(job.prompt)
        if not peak:  # the first probe allocates a buffer as large as the model
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
    """Bytes per second that the job's threads read now from a buffer as large as the weights."""
    _C.set_n_threads(min(job.runner.threads, _C.available_cores()))
    return _C.read_bandwidth(system.weight_bytes, _PROBE_REPEATS)


def decode_figures(decoded: Decoded, system: System, bandwidth: float) -> dict:
    """The figures of a decoding. bandwidth: bytes per second, the mean of the probes directly before and after."""
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


if __name__ == "__main__":
    sys.exit(main())
