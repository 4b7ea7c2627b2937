"""python -m recycle_ext.info: every section is there, the facts are true, and no extra is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from recycle_ext import _C, info
from recycle_ext.checkpoint.default_model import GGUF_NAME
from recycle_ext.info.__main__ import main

SECTIONS = ["versions", "build", "processor", "memory", "GPU", "default model"]


def test_info_command_prints_every_section(capsys):
    assert main(["--no-bandwidth"]) == 0
    out = capsys.readouterr().out
    headings = [line[:-1] for line in out.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == SECTIONS
    for text in (torch.__version__, _C.build_info()["compiler"], _C.isa()):
        assert text in out
    assert "reading" not in out


def test_info_json_equals_the_report(capsys):
    assert main(["--no-bandwidth", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == SECTIONS
    expected = info.info(bandwidth=False)
    for changing in ("versions", "memory"):  # the date, and the available memory
        assert list(report.pop(changing)) == list(expected.pop(changing))
    assert report == expected


def test_threads_have_a_reason():
    cores, threads = len(os.sched_getaffinity(0)), _C.n_threads()
    lines = info.processor_lines()
    assert lines["cores"].startswith(f"{cores} of {os.cpu_count()}, by the affinity of this process")
    assert lines["threads"].startswith(f"{threads}: ")
    assert "set by a call" not in lines["threads"]
    _C.set_n_threads(threads + 1)
    assert info.processor_lines()["threads"].startswith(f"{threads + 1}: set by a call")


def test_threads_that_torch_limits_are_said_to_be(monkeypatch):
    monkeypatch.setattr(_C, "physical_cores", lambda: 8)
    monkeypatch.setattr(_C, "cpu_quota", lambda: 3.5)
    monkeypatch.setattr(_C, "n_threads", lambda: 1)
    torch.set_num_threads(1)
    assert info.processor_lines()["threads"].startswith("1: torch's number (OMP_NUM_THREADS, torch.set_num_threads)")


def test_threads_that_a_quota_limits_are_said_to_be(monkeypatch):
    monkeypatch.setattr(_C, "physical_cores", lambda: 8)
    monkeypatch.setattr(_C, "cpu_quota", lambda: 3.5)
    monkeypatch.setattr(_C, "n_threads", lambda: 3)
    torch.set_num_threads(8)
    lines = info.processor_lines()
    assert lines["threads"].startswith("3: the CPU time limit, rounded down")
    assert lines["CPU time limit"] == "3.5 cores (container)"


def test_instruction_set_in_use_is_named(isa):
    assert info.processor_lines()["instruction set"].startswith(f"{isa} (of generic")


def test_bandwidth_is_measured_for_a_small_and_a_large_buffer(monkeypatch):
    monkeypatch.setattr(info, "read_bandwidth", lambda device, size, repeats: size * 100.0)
    _C.set_n_threads(2)
    lines = info.memory_lines(bandwidth=True)
    assert lines["reading 32 MiB"] == "3.4 GB/s with 2 threads"
    assert lines["reading 256 MiB"] == "26.8 GB/s with 2 threads"


def test_default_model_place_is_named_without_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("RECYCLE_CACHE", str(tmp_path))
    lines = info.default_model_lines()
    expected = {"folder": str(tmp_path), "RECYCLE_CACHE": str(tmp_path)}
    assert lines == expected | {"file": "not fetched yet"}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / GGUF_NAME).write_bytes(b"")
    assert info.default_model_lines() == expected | {"file": GGUF_NAME}


def test_gpu_lines_without_a_cuda_build_say_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert info.gpu_lines() == {"torch": "built without CUDA"}


def test_gpu_lines_describe_each_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    class Properties:
        name, major, minor, total_memory = "GPU X", 9, 0, 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    lines = info.gpu_lines()
    assert lines["torch"] == "CUDA 13.0"
    assert lines["cuda:0"] == "GPU X, sm_90, 80 GiB"


@pytest.mark.parametrize("missing", [["matplotlib", "scipy", "tabulate", "transformers", "llama_cpp", "pyarrow"]])
def test_info_needs_no_extra(missing):
    block = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); "
    code = block + "from recycle_ext.info.__main__ import main; sys.exit(main(['--no-bandwidth']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("versions:\n")


@pytest.mark.parametrize(("module", "package"), [("psutil", "psutil"), ("cpuinfo", "py-cpuinfo")])
def test_missing_library_of_info_is_one_line(monkeypatch, capsys, module, package):
    info.processor.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["--no-bandwidth"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"needs {package}: `pip install {package}`" in error
