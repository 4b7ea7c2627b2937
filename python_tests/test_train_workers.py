"""Training by two processes (gloo), which torchrun starts: the same run as by one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_model import SMALL, log_rows, train_joint, write_joint_config, write_text

from recycle_ext.train import __main__ as command

ARGUMENTS = [*SMALL, "--steps", "6", "--draft-vocab", "0", "--self-generate", "500", "--ema", "0"]
# Rounding is not continuous: a sum in another order can move a weight across a boundary, and the runs then differ.
ARGUMENTS += ["--module-dtype", "f32"]


def run_two_processes(arguments: list[str]) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*run, "-m", "recycle_ext.train", *arguments], capture_output=True, text=True, timeout=300)


def module_weights(folder: Path) -> torch.Tensor:
    """All weights of a module in one vector."""
    tensors = load_file(folder / "module.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_module_of_two_processes_equals_that_of_one(tmp_path, kind):
    assert train_joint(tmp_path, tmp_path / "out", "--steps", "20") == 0
    base = ["--base", str(tmp_path / "out" / "base"), *ARGUMENTS]
    # DDP with two micro-batches, the first of which reduces no gradients.
    only_two = ["--accumulate", "2"]
    if kind == "FSDP2":
        base += ["--text", str(write_text(tmp_path)), "--online"]
        only_two = ["--shard-base"]
    assert command.main([*base, "--output", str(tmp_path / "one")]) == 0
    assert command.main([*base, "--lr", "1e-12", "--output", str(tmp_path / "start")]) == 0
    together = run_two_processes([*base, "--output", str(tmp_path / "two"), *only_two])
    assert together.returncode == 0, together.stderr
    start, one, two = (module_weights(tmp_path / name) for name in ("start", "one", "two"))
    # The sum over processes is in another order, and the module is saved in bfloat16.
    assert (one - two).norm() <= 0.02 * (one - start).norm()
    last_one, last_two = (log_rows(tmp_path / name)[-1] for name in ("one", "two"))
    assert last_one["loss"] == pytest.approx(last_two["loss"], rel=1e-2)
    assert last_one["acceptance_1"] == pytest.approx(last_two["acceptance_1"], abs=0.02)


def test_joint_loss_of_two_processes_equals_that_of_one(tmp_path):
    steps = ["--steps", "6", "--ema", "0"]
    assert train_joint(tmp_path, tmp_path / "one", *steps) == 0
    arguments = ["--joint", str(write_joint_config(tmp_path)), "--text", str(write_text(tmp_path))]
    output = ["--output", str(tmp_path / "two")]
    together = run_two_processes([*arguments, *SMALL, "--lr", "5e-3", *steps, *output])
    assert together.returncode == 0, together.stderr
    last_one, last_two = (log_rows(tmp_path / name)[-1] for name in ("one", "two"))
    assert last_one["held_out_loss"] == pytest.approx(last_two["held_out_loss"], rel=1e-2)


def test_error_of_two_processes_has_no_traceback(tmp_path):
    failed = run_two_processes(["--output", str(tmp_path / "out"), "--base", "nowhere.gguf"])
    assert failed.returncode != 0
    assert "error: nowhere.gguf: no such file" in failed.stderr
    assert 'File "' not in failed.stderr.split("error: nowhere.gguf")[0]
