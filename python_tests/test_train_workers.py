"""Training by two processes (gloo), which torchrun starts: the same run as by one.

One start of torchrun makes all runs, because starting its three processes takes longer than the runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_model import SMALL, log_rows, train_joint, write_joint_config, write_text

from recycle_ext.train import __main__ as command
from recycle_ext.train.record import read_state

ARGUMENTS = [*SMALL, "--steps", "6", "--draft-vocab", "0", "--ema", "0"]
# Rounding is not continuous: a sum in another order can move a weight across a boundary, and the runs then differ.
ARGUMENTS += ["--module-dtype", "f32"]
KINDS = ["DDP", "FSDP2"]

# argv: the runs' arguments as JSON, a file for their statuses. The second process gets Ctrl-C in the run "stopped".
# torchrun's store connects one group; the groups after the first meet in a file.
_CHILD = """
import functools, json, os, signal, sys
from pathlib import Path
from torch import distributed
from recycle_ext.train.__main__ import main
from recycle_ext.train.trainer import Trainer
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background job ignores it.
train_step, init, rank = Trainer.train_step, distributed.init_process_group, int(os.environ["RANK"])
def interrupted(trainer, *stop):
    if trainer.step == 2 and rank == 1:
        signal.raise_signal(signal.SIGINT)
    return train_step(trainer, *stop)
statuses = {}
for name, arguments in json.loads(sys.argv[1]).items():
    Trainer.train_step = interrupted if name == "stopped" else train_step
    statuses[name] = main(arguments)
    store = f"file://{sys.argv[2]}-after-{name}"
    distributed.init_process_group = functools.partial(init, init_method=store, rank=rank, world_size=2)
Path(f"{sys.argv[2]}{rank}").write_text(json.dumps(statuses))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the text, and in base/ the base of a joint run by one process."""
    folder = tmp_path_factory.mktemp("workers")
    steps = ["--steps", "6", "--ema", "0"]
    assert train_joint(folder, folder / "joint-one", *steps) == 0
    (folder / "joint-one" / "base").rename(folder / "base")
    return folder


def run_arguments(folder: Path, kind: str) -> list[str]:
    """Arguments of a run for the base, for one process and for two."""
    if kind == "FSDP2":
        return ["--base", str(folder / "base"), *ARGUMENTS, "--text", str(folder / "text.txt"), "--online"]
    return ["--base", str(folder / "base"), *ARGUMENTS, "--self-generate", "500"]


@pytest.fixture(scope="module")
def two(folder):
    """The runs by two processes: exit statuses of both processes, standard error."""
    joint = ["--joint", str(write_joint_config(folder)), "--text", str(write_text(folder)), *SMALL, "--lr", "5e-3"]
    runs = {
        # DDP with two micro-batches, the first of which reduces no gradients.
        "DDP": [*run_arguments(folder, "DDP"), "--accumulate", "2"],
        "FSDP2": [*run_arguments(folder, "FSDP2"), "--shard-base"],
        "joint": [*joint, "--steps", "6", "--ema", "0"],
        "stopped": run_arguments(folder, "FSDP2"),
        "wrong": ["--base", "nowhere.gguf"],
    }
    given = {name: [*arguments, "--output", str(folder / f"{name}-two")] for name, arguments in runs.items()}
    script, statuses = folder / "child.py", folder / "statuses"
    script.write_text(_CHILD)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*start, json.dumps(given), str(statuses)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{statuses}{rank}").read_text()) for rank in (0, 1)], done.stderr


def module_weights(folder: Path) -> torch.Tensor:
    """All weights of a module in one vector."""
    tensors = load_file(folder / "module.safetensors")
    return torch.cat([tensors[name].float().flatten() for name in sorted(tensors)])


def test_exit_statuses_of_two_processes_are_those_of_one(two):
    statuses, _ = two
    expected = {"DDP": 0, "FSDP2": 0, "joint": 0, "stopped": 130, "wrong": 2}
    assert statuses == [expected, expected]


@pytest.mark.parametrize("kind", KINDS)
def test_module_of_two_processes_equals_that_of_one(folder, two, kind):
    arguments = run_arguments(folder, kind)
    outputs = [folder / f"{kind}-{name}" for name in ("one", "start", "two")]
    assert command.main([*arguments, "--output", str(outputs[0])]) == 0
    assert command.main([*arguments, "--lr", "1e-12", "--output", str(outputs[1])]) == 0
    one, start, by_two = (module_weights(output) for output in outputs)
    # The sum over processes is in another order, and the module is saved in bfloat16.
    assert (one - by_two).norm() <= 0.02 * (one - start).norm()
    last_one, last_two = (log_rows(output)[-1] for output in (outputs[0], outputs[2]))
    assert last_one["loss"] == pytest.approx(last_two["loss"], rel=1e-2)
    assert last_one["acceptance_1"] == pytest.approx(last_two["acceptance_1"], abs=0.02)


def test_joint_loss_of_two_processes_equals_that_of_one(folder, two):
    last_one, last_two = (log_rows(folder / f"joint-{name}")[-1] for name in ("one", "two"))
    assert last_one["held_out_loss"] == pytest.approx(last_two["held_out_loss"], rel=1e-2)


def test_interrupt_of_one_process_stops_both_after_one_step(folder, two):
    """The other process sees it with the step's loss, so that neither waits for the other."""
    assert read_state(folder / "stopped-two" / "training.pt")["step"] == 3
    assert f"stopped; go on with --resume --output {folder / 'stopped-two'}" in two[1]


def test_error_of_two_processes_has_no_traceback(two):
    assert two[1].count("error: nowhere.gguf: no such file") == 2
    assert "Traceback" not in two[1]
