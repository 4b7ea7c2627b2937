"""torch.ops.recycle.prefill and decode_step, against the same steps in plain PyTorch (float64)."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, reference_base, reference_module, write_base, write_module

from recycle_ext.decoder import Decoder
from recycle_ext.packing import pack_model
from recycle_ext.reference_ops import ReferenceDecoder

PROMPT = [5, 17, 3, 99, 42, 7]
STEPS = 24

MODULES = {
    "all norms": {},
    "EAGLE-1: no norms": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "MTP: first embedding zero": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
}


def compare(base, module, mode, drafts, **sampling):
    """Both decoders side by side; returns how many drafts counted."""
    ours = Decoder(
        pack_model(base, module, "f32"),
        mode,
        drafts,
        capacity=200,
        cache_dtype=torch.float32,
        seeds=[sampling.pop("seed", 0)],
        **sampling,
    )
    reference = ReferenceDecoder(
        reference_base(base),
        reference_module(module) if module else None,
        module.draft_vocab() if module else None,
        mode,
        drafts,
        seed=int(ours._sampling[3][0]),
        **sampling,
    )
    assert ours.prefill(PROMPT) == reference.prefill(PROMPT)
    accepted = 0
    for _ in range(STEPS):
        tokens, counts = ours.step()
        expected = reference.step()
        assert tokens[0].tolist() == expected + [-1] * (ours.drafts + 1 - len(expected))
        assert counts.tolist() == [len(expected)]
        assert ours.pending[0].tolist() == reference.pending
        assert ours.lengths.tolist() == [reference.base_cache.length]
        accepted += len(expected) - 1
    return accepted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_standard_mode_of_every_architecture(tmp_path, isa, architecture, tied):
    base = write_base(tmp_path, architecture, tied=tied)
    compare(base, None, "standard", 1)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module(tmp_path, kind, mode, drafts):
    base = write_base(tmp_path / "base", "qwen3")
    module = write_module(tmp_path / "module", base, **MODULES[kind])
    compare(base, module, mode, drafts)


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
def test_sampled_steps_draw_what_the_reference_draws(tmp_path, mode, drafts):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, draft_vocab_size=60)
    accepted = compare(
        base, module, mode, drafts, temperature=1.5, top_k=50, top_p=0.95, seed=2**45 + 11
    )
    assert mode == "standard" or accepted > 0


def test_a_good_module_saves_steps(tmp_path):
    """Not a random one: the base's own last layer on the next token's embedding."""
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True)
    assert compare(base, module, "verify", 1) > 0


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_prompts_longer_than_one_pass(tmp_path, length):
    """A prompt goes through the layers 64 rows at a time; the state is that of one pass."""
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base)
    prompt = torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = Decoder(
        pack_model(base, module, "f32"), "verify", 2, capacity=200, cache_dtype=torch.float32
    )
    reference = ReferenceDecoder(
        reference_base(base), reference_module(module), mode="verify", drafts=2
    )
    assert ours.prefill(prompt) == reference.prefill(prompt)
    assert ours.pending[0].tolist() == reference.pending
    for layer in range(base.config.n_layers):
        for kv, exact in enumerate(reference.base_cache.held(layer)):
            given = ours.base_cache[layer, kv, 0, :, :length]
            torch.testing.assert_close(given.double(), exact[0], rtol=0, atol=2e-5)


def test_an_idle_sequence_is_left_alone(tmp_path):
    base = write_base(tmp_path)
    decoder = Decoder(pack_model(base, None, "f32"), "standard", batch=2, capacity=50)
    decoder.prefill(PROMPT, 1)
    tokens, counts = decoder.step()
    assert counts.tolist() == [0, 1]
    assert tokens[0].tolist() == [-1]
    assert decoder.lengths.tolist() == [0, len(PROMPT) + 1]


def test_numbers_that_are_none_are_reported_and_the_state_stays(tmp_path):
    base = write_base(tmp_path)
    decoder = Decoder(pack_model(base, None, "f32"), "standard", capacity=50)
    decoder.prefill(PROMPT)
    decoder.step()
    before = decoder.pending.clone(), decoder.lengths.clone()
    decoder.base_cache[0, 1, 0, 0, 2] = float("nan")
    with pytest.raises(RuntimeError, match=r"NaN or infinite \(sequence 0, position 7\)"):
        decoder.step()
    assert torch.equal(decoder.pending, before[0])
    assert torch.equal(decoder.lengths, before[1])
