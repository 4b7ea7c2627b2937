"""The fuzzer of python_tests/fuzz, for some seconds; `python python_tests/fuzz/run.py --seconds N --seed S` goes on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parent / "fuzz"


def run(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, FUZZ / "run.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_damaged_inputs_are_right_or_refused_by_name():
    done = run("--seconds", 600, "--inputs", 150, "--seed", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = [list(map(int, re.findall(r" (\d+) ", line))) for line in done.stdout.splitlines()]
    assert len(counts) == 8
    assert all(accepted > 2 and refused > 15 and accepted + refused == 150 for accepted, refused, findings in counts)


def test_faults_that_are_planted_are_found(tmp_path):
    """An exception of another type, an unnamed error, a hang and a crash; the inputs after them are run."""
    program = f"""
import os, sys, time
sys.path.insert(0, {str(FUZZ)!r})
import run, targets
from recycle_ext.errors import RecycleError

def planted(folder):
    numbers = iter(range(100))
    def one(random):
        number = next(numbers) + len(list(folder.parent.glob("crashed*")))
        return faults[number % len(faults)](folder)
    return one

def crash(folder):
    os.kill(os.getpid(), 11)

faults = [
    lambda folder: True,
    lambda folder: {{}}["missing"],
    lambda folder: targets.refused(RecycleError("something is wrong"), folder),
    lambda folder: targets.refused(RecycleError(f"{{folder}}: wrong"), folder),
    lambda folder: time.sleep(60),
    crash,
]
run.MAX_SECONDS = 1
run.TARGETS["planted"] = planted
accepted, refused, found = run.fuzz("planted", 0, 60, inputs=7)
print(accepted, refused, [each["error"].split(":")[0] for each in found])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    errors = ["KeyError", "UnnamedError", "TooSlowError", "the process ended with -11"]
    assert done.stdout == f"2 1 {errors}\n", done.stderr
