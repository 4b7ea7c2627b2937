"""Races, bounds, uninitialised shared memory and shuffles of the CUDA kernels, found without a GPU.

cuda_emulation/race.py --all runs all modes, formats, rows and lengths; here a few cases run, and faults are planted in
copies of the sources, each to be found by its tool.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_emulation.builds import BOUNDS, CHECKS, COMPILER, RACES, SANITIZED, link, objects
from cuda_emulation.cases import sampled_cases, smoke_cases
from cuda_emulation.faults import FAULTS, Fault, plant
from cuda_emulation.race import replay


def _is_gcc() -> bool:
    if COMPILER is None:
        return False
    version = subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout
    return "Free Software Foundation" in version


pytestmark = pytest.mark.skipif(not _is_gcc(), reason="needs GCC and its sanitizers (other compilers lack its options)")


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Path]]:
    return objects(SANITIZED, "replay.cpp")


@pytest.fixture(scope="module")
def planted(parts, tmp_path_factory) -> Iterator[dict[str, Future[Path]]]:
    """The programs with a fault, which are compiled on all cores."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {
            fault.name: pool.submit(plant, fault, parts[fault.tool.name], tmp_path_factory.mktemp("fault"))
            for fault in FAULTS
        }


@pytest.mark.parametrize("variant", SANITIZED, ids=lambda variant: variant.name)
def test_kernels_without_a_fault_pass(variant, parts, tmp_path):
    program = link(variant, parts[variant.name], tmp_path / "replay")
    cases = smoke_cases() + sampled_cases()
    outcome = replay(program, cases, range(1, 2))
    assert outcome.report == ""
    assert len(outcome.results) == len(cases)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_reported_by_its_tool(fault: Fault, planted):
    report = replay(planted[fault.name].result(), [fault.case], range(1, 5)).report
    for part in fault.report:
        assert part in report


@pytest.mark.parametrize("variant", [RACES, BOUNDS, CHECKS], ids=lambda variant: variant.name)
def test_each_tool_has_a_fault(variant):
    assert any(fault.tool == variant for fault in FAULTS)
