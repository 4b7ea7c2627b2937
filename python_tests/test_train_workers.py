"""Training by two processes (gloo), started by torchrun: the same run as by one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, config_file, joint, texts  # noqa: F401

from recycle_ext.train import __main__ as command

ARGUMENTS = [*SMALL, "--steps", "6", "--draft-vocab", "0", "--self-generate", "500", "--ema", "0"]
# Rounded weights jump: a sum in another order moves one across a boundary, and the runs part.
ARGUMENTS += ["--module-dtype", "f32"]


def by_two(arguments: list[str]) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*run, "-m", "recycle_ext.train", *arguments], capture_output=True, text=True, timeout=300
    )


def weights(folder: Path) -> torch.Tensor:
    """All of a module's, in a row."""
    tensors = load_file(folder / "module.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_what_one_does(config_file, texts, tmp_path, kind):  # noqa: F811
    assert joint(config_file, texts, tmp_path / "out", "--steps", "20") == 0
    base = ["--base", str(tmp_path / "out" / "base"), *ARGUMENTS]
    shard = []
    if kind == "FSDP2":
        base += ["--text", str(texts), "--online"]
        shard = ["--shard-base"]
    assert command.main([*base, "--output", str(tmp_path / "one")]) == 0
    assert command.main([*base, "--lr", "1e-12", "--output", str(tmp_path / "start")]) == 0
    together = by_two([*base, "--output", str(tmp_path / "two"), *shard])
    assert together.returncode == 0, together.stderr
    start, one, two = (weights(tmp_path / name) for name in ("start", "one", "two"))
    # The sum over processes is in another order, and the module is saved in bfloat16.
    assert (one - two).norm() <= 0.02 * (one - start).norm()
    logs = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-2)
    assert logs[0]["acceptance_1"] == pytest.approx(logs[1]["acceptance_1"], abs=0.02)


def test_joint_training_by_two(config_file, texts, tmp_path):  # noqa: F811
    steps = ["--steps", "6", "--ema", "0"]
    assert joint(config_file, texts, tmp_path / "one", *steps) == 0
    arguments = ["--joint", str(config_file), "--text", str(texts)]
    output = ["--output", str(tmp_path / "two")]
    together = by_two([*arguments, *SMALL, "--lr", "5e-3", *steps, *output])
    assert together.returncode == 0, together.stderr
    logs = [
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1])
        for name in ("one", "two")
    ]
    assert logs[0]["held_out_loss"] == pytest.approx(logs[1]["held_out_loss"], rel=1e-2)


def test_a_mistake_is_told_once_by_each_process(tmp_path):
    failed = by_two(["--output", str(tmp_path / "out"), "--base", "nowhere.gguf"])
    assert failed.returncode != 0
    assert "error: nowhere.gguf: no such file" in failed.stderr
    assert 'File "' not in failed.stderr.split("error: nowhere.gguf")[0]
