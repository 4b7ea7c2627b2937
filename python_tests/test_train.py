"""python -m recycle_ext.train on a tiny base: from nothing to a module that drafts."""

from __future__ import annotations

import os

import pytest
import torch
from models import write_base

from recycle_ext import train as training
from recycle_ext.config import ModuleConfig
from recycle_ext.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.module_checkpoint import open_module
from recycle_ext.packing import pack_model
from recycle_ext.reference import BaseModel
from recycle_ext.train import DistillLoss, Text, Trainer, TrainOptions

VOCAB = 40


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", vocab_size=VOCAB, n_layers=3)


@pytest.fixture
def text(base):
    """Sequences that the base writes, with its states: hot, so that they differ."""
    model = BaseModel(base.config)
    model.load_state_dict(base.state_dict())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (200, 1), generator=generator)
    with torch.no_grad():
        for _ in range(24):
            probs = model.logits(model(tokens)[:, -1]).softmax(-1)
            tokens = torch.cat((tokens, probs.multinomial(1, generator=generator)), dim=1)
        return Text(tokens, model(tokens).bfloat16(), held_out=24), model


def trainer(base, text, **options) -> Trainer:
    text, model = text
    config = ModuleConfig.like(base.config, 1, fingerprint=base.fingerprint)
    options = TrainOptions(**{"batch_sequences": 16, "warmup_steps": 5, **options})
    return Trainer(training.initial_module(config, model, 0), model, text, None, options)


def test_training_raises_the_held_out_acceptance(base, text, tmp_path):
    run = trainer(base, text, steps=300)
    before = run.acceptance()
    losses = [loss for _, loss, _ in run.run(tmp_path / "state.pt")]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert run.acceptance() > 1.5 * before


def test_the_measured_acceptance_is_the_decoders(base, text, tmp_path):
    """What training reports is what verify mode then does, on the same text."""
    run = trainer(base, text, steps=60)
    for _ in run.run(tmp_path / "state.pt"):
        pass
    training.save_module(tmp_path / "module", run.module.config, dict(run.module.state_dict()))
    module = open_module(tmp_path / "module", base)
    held_out = run.text.tokens[run.text.n_train :]
    accepted = steps = 0
    for row in held_out:
        decoder = Decoder(pack_model(base, module, "bf16"), "verify", 1, capacity=60)
        decoder.prefill(row[:2].tolist())
        while int(decoder.lengths[0]) < len(row) - 2:
            accepted += int(decoder.step()[1][0]) - 1
            steps += 1
    # Steps skip a row after each accepted draft, so the two numbers are close, not equal.
    assert abs(accepted / steps - run.acceptance()) < 0.15


def test_a_resumed_run_ends_with_the_same_weights(base, text, tmp_path):
    whole = trainer(base, text, steps=20)
    for _ in whole.run(tmp_path / "whole.pt"):
        pass
    first = trainer(base, text, steps=20, save_seconds=0.0)
    for step, _, _ in first.run(tmp_path / "cut.pt"):
        if step == 7:
            break
    second = trainer(base, text, steps=20)
    second.load(tmp_path / "cut.pt")
    assert second.step == 7
    for _ in second.run(tmp_path / "cut.pt"):
        pass
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, second.module.state_dict()[name]), name


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(base, text, tmp_path):
    run = trainer(base, text, steps=20, save_seconds=0.0)
    steps = run.run(tmp_path / "state.pt")
    next(steps)
    kept = (tmp_path / "state.pt").read_bytes()
    with torch.no_grad():
        run.module.input_proj.weight[0, 0] = float("nan")
    with pytest.raises(RecycleError, match=r"the loss is nan at step 2; .*state\.pt"):
        list(steps)
    assert (tmp_path / "state.pt").read_bytes() == kept


def test_the_loss_and_its_gradient_are_cross_entropys():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 30, generator=generator).bfloat16().requires_grad_()
    probs = torch.randn(5, 30, generator=generator).softmax(-1).bfloat16()
    loss = DistillLoss.apply(logits, probs)
    exact_logits = logits.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_logits, probs.double())
    assert abs(loss.item() - exact.item()) < 1e-2
    loss.backward()
    exact.backward()
    torch.testing.assert_close(logits.grad.double(), exact_logits.grad, rtol=0.02, atol=1e-3)


def test_the_draft_vocabulary_is_the_most_frequent_tokens():
    tokens = torch.tensor([[3, 3, 3, 9, 9, 1]])
    kept, coverage = training.frequent_tokens(tokens, 2, 10)
    assert kept.tolist() == [3, 9]
    assert coverage == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--lr", "-1"], "--lr is -1.0; it must be positive"),
        (["--held-out", "1"], "--held-out is 1.0"),
        (["--draft-vocab", "1000"], "--draft-vocab is 1000; the base's vocabulary has 40"),
        (["--resume"], "--resume: there is no"),
        (["--base", "nowhere.gguf"], "nowhere.gguf: no such file"),
    ],
)
def test_a_users_mistake_is_one_line(base, tmp_path, capsys, arguments, message):
    output = str(tmp_path / "out")
    status = training.main(["--base", base.path, "--output", output, *arguments])
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not os.path.exists(os.path.join(output, "module.safetensors"))
