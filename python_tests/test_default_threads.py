"""The default number of threads: physical cores, within the affinity mask, the CPU quota and torch's number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recycle_ext import _C

CPUS = sorted(os.sched_getaffinity(0))

two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="the process may run on one CPU alone, so no limit is below it")


def write(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return str(root)


def test_default_is_at_most_each_limit():
    assert _C.available_cores() == len(CPUS)
    limits = [_C.physical_cores(), max(1, int(_C.cpu_quota() or len(CPUS))), torch.get_num_threads()]
    assert _C.n_threads() == min(limits)


def test_set_n_threads_to_none_is_the_default_again():
    default = _C.n_threads()
    _C.set_n_threads(default + 3)
    assert _C.n_threads() == default + 3
    _C.set_n_threads(None)
    assert _C.n_threads() == default


@two_cpus
def test_torch_set_num_threads_is_obeyed():
    torch.set_num_threads(1)
    assert _C.n_threads() == 1


@two_cpus
def test_affinity_mask_is_obeyed():
    os.sched_setaffinity(0, CPUS[:1])
    try:
        assert _C.available_cores() == _C.physical_cores() == _C.n_threads() == 1
    finally:
        os.sched_setaffinity(0, CPUS)


def test_two_hyperthreads_of_a_core_count_once(tmp_path):
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {siblings.format(cpu): f"{index // 2 * 2}-{index // 2 * 2 + 1}" for index, cpu in enumerate(CPUS)}
    assert _C.physical_cores(write(tmp_path, files)) == (len(CPUS) + 1) // 2


def test_cpus_without_a_topology_are_cores(tmp_path):
    assert _C.physical_cores(str(tmp_path)) == len(CPUS)


GROUPS = "proc/self/cgroup"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({GROUPS: "0::/"}, None),
        ({GROUPS: "0::/", f"{V2}/cpu.max": "max 100000"}, None),
        ({GROUPS: "0::/", f"{V2}/cpu.max": "150000 100000"}, 1.5),
        ({GROUPS: "0::/", f"{V2}/cpu.max": ""}, None),
        # The limit of a group above, and the smallest of several.
        ({GROUPS: "0::/a/b", f"{V2}/a/cpu.max": "200000 100000", f"{V2}/a/b/cpu.max": "max 100000"}, 2),
        ({GROUPS: "0::/a/b", f"{V2}/a/cpu.max": "200000 100000", f"{V2}/a/b/cpu.max": "50000 100000"}, 0.5),
        # A container that sees the host's path: its own group is the top.
        ({GROUPS: "0::/docker/123", f"{V2}/cpu.max": "100000 100000"}, 1),
        # Version 1, with other controllers beside, and together with version 2.
        ({GROUPS: "4:cpu,cpuacct:/a", f"{V1}/a/cpu.cfs_quota_us": "300000", f"{V1}/a/cpu.cfs_period_us": "100000"}, 3),
        ({GROUPS: "4:cpuacct,cpu:/", f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}, None),
        ({GROUPS: "1:cpu:/\n0::/", f"{V1}/cpu.cfs_quota_us": "50000", f"{V1}/cpu.cfs_period_us": "50000"}, 1),
        ({GROUPS: "3:cpuset:/a", f"{V1}/a/cpu.cfs_quota_us": "1", f"{V1}/a/cpu.cfs_period_us": "1"}, None),
        ({GROUPS: "nonsense"}, None),
    ],
)
def test_quota_of_a_control_group_is_in_cpus(tmp_path, files, quota):
    assert _C.cpu_quota(write(tmp_path, files)) == quota


CHILD = """
import os
if {torch_first}: import torch
from recycle_ext import _C
print(_C.available_cores(), _C.n_threads())
_C.set_n_threads(2)
_C.read_bandwidth(1 << 20, 1)
print(max(len(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")))
"""


@two_cpus
@pytest.mark.parametrize("torch_first", [False, True])
def test_thread_that_openmp_has_bound_leaves_the_process_its_cores(torch_first):
    """OpenMP binds the thread that imports torch to a core, and threads inherit that."""
    environment = os.environ | {"OMP_PROC_BIND": "close"}
    command = [sys.executable, "-c", CHILD.format(torch_first=torch_first)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == len(CPUS)
    assert int(out[1]) == _C.n_threads()
    assert int(out[2]) == len(CPUS)


@two_cpus
def test_omp_num_threads_is_obeyed():
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from recycle_ext import _C; print(_C.n_threads())"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "1\n"
