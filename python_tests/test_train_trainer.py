"""The training loop: schedule, average of the weights, accumulation, checkpoints and resumed runs."""

from __future__ import annotations

import pytest
import torch
from models import reference_base
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from train_model import finish, frozen_trainer, sampled_states, write_small_base

from recycle_ext.errors import RecycleError
from recycle_ext.train.frozen import Targets, initial_module
from recycle_ext.train.record import read_state
from recycle_ext.train.trainer import TrainOptions, rate_factor


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def states(base):
    return sampled_states(base)


@pytest.fixture
def process_group():
    """A torch.distributed group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_resumed_run_ends_with_same_bits(base, states, tmp_path):
    targets = Targets(num_draft_tokens=2, chain_from=0.5)
    whole = frozen_trainer(base, states, targets, steps=20)
    rates = [step.learning_rate for step in whole.run(tmp_path / "whole.pt")]
    first = frozen_trainer(base, states, targets, steps=20, save_seconds=0.0)
    for step in first.run(tmp_path / "cut.pt"):
        if step.number == 7:
            break
    second = frozen_trainer(base, states, targets, steps=20)
    second.restore(tmp_path / "cut.pt", read_state(tmp_path / "cut.pt"))
    assert second.step == 7
    assert [step.learning_rate for step in second.run(tmp_path / "cut.pt")] == rates[7:]
    for model, other in ((whole.task, second.task), (whole.average, second.average)):
        for name, value in model.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_checkpoint_of_another_shape_is_refused(base, states, tmp_path):
    finish(frozen_trainer(base, states, steps=1), tmp_path / "state.pt")
    state = read_state(tmp_path / "state.pt")
    state["trained"]["module.input_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(RecycleError, match=r"of another shape \(module\.input_proj\.weight\)"):
        frozen_trainer(base, states, steps=1).restore(tmp_path / "state.pt", state)


@pytest.mark.parametrize("part", ["average", "optimizer", "schedule"])
def test_checkpoint_with_a_damaged_part_is_refused(base, states, tmp_path, part):
    finish(frozen_trainer(base, states, steps=1), tmp_path / "state.pt")
    state = read_state(tmp_path / "state.pt") | {part: {"step": [1]}}
    if part == "schedule":
        state[part] = None
    with pytest.raises(RecycleError, match=r"state\.pt is damaged"):
        frozen_trainer(base, states, steps=1).restore(tmp_path / "state.pt", state)


def test_accumulation_changes_memory_not_the_step(base, states, tmp_path):
    weights = [finish(frozen_trainer(base, states, steps=5, accumulate=n), tmp_path / f"{n}.pt") for n in (1, 4)]
    config = frozen_trainer(base, states).task.module.config
    for name, value in initial_module(config, reference_base(base), 0).state_dict().items():
        moved = (weights[0][name] - value).norm()
        # Adam's first steps are signs of gradients: one whose sign rounding decides moves as far as the others.
        assert (weights[0][name] - weights[1][name]).norm() < 0.05 * moved, name


def test_accumulated_gradients_are_reduced_once_a_step(base, states, tmp_path, process_group):
    """DDP reduces after the last micro-batch alone, and the weights are those without DDP."""
    reductions = {}
    weights = {}
    for accumulate in (1, 4):
        trainer = frozen_trainer(base, states, steps=3, accumulate=accumulate)
        trainer.parallel = DistributedDataParallel(trainer.task)
        reduced = reductions[accumulate] = []

        def hook(log, bucket):
            log.append(bucket.buffer().clone())
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        trainer.parallel.register_comm_hook(reduced, hook)
        weights[accumulate] = finish(trainer, tmp_path / f"{accumulate}.pt")
    assert len(reductions[1]) == len(reductions[4]) > 0
    alone = finish(frozen_trainer(base, states, steps=3, accumulate=4), tmp_path / "alone.pt")
    for name, value in alone.items():
        assert torch.equal(value, weights[4][name]), name


@pytest.mark.parametrize("warmup", [1, 5])
def test_learning_rate_equals_torchs_linear_and_cosine(base, states, tmp_path, warmup):
    trainer = frozen_trainer(base, states, steps=12, warmup_steps=warmup, learning_rate=2e-3)
    rates = [step.learning_rate for step in trainer.run(tmp_path / "state.pt")]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    linear = LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)
    cosine = CosineAnnealingLR(optimizer, 12 - warmup, eta_min=1e-4)
    schedule = SequentialLR(optimizer, [linear, cosine], [warmup])
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_learning_rate_without_warmup_begins_at_its_maximum():
    options = TrainOptions(steps=10, warmup_steps=0)
    assert rate_factor(0, options) == 1
    assert rate_factor(10, options) == pytest.approx(0.05)


def test_averaged_weights_are_measured(base, states, tmp_path):
    trainer = frozen_trainer(base, states, steps=30)
    expected = trainer.task.module.input_proj.weight.detach().double()
    for step in trainer.run(tmp_path / "state.pt"):
        decay = min(0.9, (1 + step.number) / (10 + step.number))
        weight = trainer.task.module.input_proj.weight.detach().double()
        expected = decay * expected + (1 - decay) * weight
    last = trainer.task.module.input_proj.weight.detach().clone()
    average = trainer.average.module["module"].input_proj.weight.detach().clone()
    torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(last, average)
    measured = []
    trainer.task.evaluate = lambda: measured.append(trainer.task.module.input_proj.weight.clone())
    trainer.evaluate()
    assert torch.equal(measured[0], average)
    with trainer.averaged():
        assert torch.equal(trainer.task.module.input_proj.weight, average)
    assert torch.equal(trainer.task.module.input_proj.weight, last)


def nan_loss(trainer, monkeypatch):
    with torch.no_grad():
        trainer.task.module.input_proj.weight[0, 0] = float("nan")


def nan_gradient(trainer, monkeypatch):
    weight = trainer.task.module.input_proj.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))


def infinite_step(trainer, monkeypatch):
    step = trainer.optimizer.step

    def too_far():
        step()
        with torch.no_grad():
            trainer.task.module.input_proj.weight[0, 0] = float("inf")

    monkeypatch.setattr(trainer.optimizer, "step", too_far)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (nan_loss, "the loss is nan at step 2"),
        (nan_gradient, "the norm of the gradient is nan at step 2"),
        (infinite_step, "a weight is not finite after step 2"),
    ],
)
def test_nonfinite_step_stops_the_run_and_keeps_the_checkpoint(base, states, tmp_path, monkeypatch, fault, message):
    trainer = frozen_trainer(base, states, steps=20, save_seconds=0.0)
    steps = trainer.run(tmp_path / "state.pt")
    next(steps)
    saved = (tmp_path / "state.pt").read_bytes()
    fault(trainer, monkeypatch)
    with pytest.raises(RecycleError, match=rf"{message}; .*state\.pt has the state after step 1\. A smaller --lr"):
        list(steps)
    assert (tmp_path / "state.pt").read_bytes() == saved


def test_nonfinite_first_step_says_that_nothing_was_saved(base, states, tmp_path, monkeypatch):
    trainer = frozen_trainer(base, states, steps=20)
    nan_gradient(trainer, monkeypatch)
    before = {name: value.clone() for name, value in trainer.task.state_dict().items()}
    with pytest.raises(RecycleError, match="gradient is nan at step 1; no state was saved yet"):
        list(trainer.run(tmp_path / "state.pt"))
    assert all(torch.equal(value, before[name]) for name, value in trainer.task.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_state_is_saved_before_the_first_figures(base, states, tmp_path):
    """The log, whose rows are the figures, is never without its state."""
    trainer = frozen_trainer(base, states, steps=20, evaluate_every=2)
    for step in trainer.run(tmp_path / "state.pt"):
        assert (tmp_path / "state.pt").exists() == (step.number >= 2)
        if step.number == 2:
            break
    assert read_state(tmp_path / "state.pt")["step"] == 2


def test_state_is_saved_when_the_run_is_stopped(base, states, tmp_path):
    trainer = frozen_trainer(base, states, steps=20)
    with pytest.raises(KeyboardInterrupt):
        list(trainer.run(tmp_path / "state.pt", stop=lambda: trainer.step == 2))
    assert read_state(tmp_path / "state.pt")["step"] == 3
