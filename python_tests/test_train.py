"""A module trained on a frozen base's states: training raises its acceptance, and what is measured is what decoding does."""

from __future__ import annotations

import pytest
import torch
from models import reference_base
from train_model import ONE_PROCESS, VOCAB, finish, frozen_trainer, sampled_states, write_small_base

from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.module import open_module
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.train.frozen import Targets, initial_module
from recycle_ext.train.joint import Joint
from recycle_ext.weights.pack import pack_model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def states(base):
    return sampled_states(base)


def test_training_raises_held_out_acceptance(base, states, tmp_path):
    trainer = frozen_trainer(base, states, steps=40)
    before = trainer.evaluate()
    losses = [step.loss for step in trainer.run(tmp_path / "state.pt")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert trainer.evaluate()["acceptance_1"] > 1.3 * before["acceptance_1"]


def test_training_with_chains_lowers_chain_loss(base, states, tmp_path):
    """The held-out loss of draft tokens 1 to 3, after the same steps with and without chains."""
    losses = {}
    for num_draft_tokens in (1, 3):
        targets = Targets(num_draft_tokens=num_draft_tokens)
        trainer = frozen_trainer(base, states, targets, steps=20)
        finish(trainer, tmp_path / f"{num_draft_tokens}.pt")
        measured = frozen_trainer(base, states, Targets(num_draft_tokens=3)).task
        measured.module.load_state_dict(trainer.task.module.state_dict())
        measured.begin_step(1.0)
        with torch.no_grad():
            loss = measured(list(range(measured.n_train, len(states))))
        losses[num_draft_tokens] = float(loss)
    assert losses[3] < losses[1]


@pytest.mark.parametrize(
    "targets",
    [Targets(soft=0, hard=1), Targets(soft=0.5, hard=0.5), Targets(regression=1.0)],
    ids=["hard", "both", "regression"],
)
def test_training_on_each_target_raises_acceptance(base, states, tmp_path, targets):
    trainer = frozen_trainer(base, states, targets, steps=40)
    before = trainer.evaluate()["acceptance_1"]
    finish(trainer, tmp_path / "state.pt")
    assert trainer.evaluate()["acceptance_1"] > 1.1 * before


def test_measured_acceptance_equals_decoders(base, states, tmp_path):
    """evaluate()'s acceptance is that of verify mode on the same text."""
    trainer = frozen_trainer(base, states, steps=30)
    finish(trainer, tmp_path / "state.pt")
    with trainer.averaged():
        trainer.task.save(tmp_path / "module")
    module = open_module(tmp_path / "module", base)
    accepted = drafted = 0
    for row in states.tokens(range(trainer.task.n_train, len(states))):
        decoder = Decoder(pack_model(base, module, "bf16"), "verify", 1, capacity=60)
        prefill, *steps = decoder.decode(row[:2].tolist(), len(row) - 2)
        assert len(prefill.tokens) == 1
        accepted += sum(step.accepted for step in steps)
        drafted += sum(step.drafted for step in steps)
    # Steps skip a row after each accepted draft token, so the two shares are close, not equal.
    assert abs(accepted / drafted - trainer.evaluate()["acceptance_1"]) < 0.15


def test_loss_under_autocast_is_float32(base, states):
    """The logged loss has more digits than bfloat16."""
    trainer = frozen_trainer(base, states)
    loss = trainer.task(list(range(16))).detach()
    assert loss.dtype == torch.float32
    assert float(loss) != float(loss.bfloat16())
    with torch.no_grad():
        _, embedding, hidden, target_hidden = trainer.task.rows(list(range(16)))
        with torch.autocast("cpu", torch.bfloat16):
            states = trainer.task.module(embedding, hidden)[1].bfloat16()
        head = trainer.task.head.float()
        target = (target_hidden.float() @ head.T).softmax(-1)
        expected = -((states.float() @ head.T).log_softmax(-1) * target).sum(-1).mean()
    # The logits are rounded to bfloat16, the sums are not.
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_joint_figures_are_of_the_held_out_sequences(tmp_path):
    base = write_small_base(tmp_path / "base")
    module = initial_module(ModuleConfig.like(base.config, 1), reference_base(base, torch.float32), 0)
    tokens = torch.randint(0, VOCAB, (12, 16), generator=torch.Generator().manual_seed(0))

    def figures(tokens: torch.Tensor) -> dict[str, float]:
        return Joint(reference_base(base, torch.float32), module, None, tokens, 4, 1.0, ONE_PROCESS).evaluate()

    expected = figures(tokens)
    assert figures(torch.cat((torch.zeros_like(tokens[:8]), tokens[8:]))) == expected
    assert figures(torch.cat((tokens[:11], torch.zeros_like(tokens[:1])))) != expected
