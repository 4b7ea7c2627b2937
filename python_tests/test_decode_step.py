"""torch.ops.recycle.prefill and decode_step against the reference decoder, plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from models import ARCHITECTURES, reference_base, reference_module, write_base, write_module

from recycle_ext.checkpoint.config import MODULE_DTYPES
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.reference.model import KvCache
from recycle_ext.reference.ops import ReferenceDecoder
from recycle_ext.train.rounding import rounded
from recycle_ext.weights.pack import pack_model

PROMPT = [5, 17, 3, 99, 42, 7]
STEPS = 24

MODULES = {
    "all norms": {},
    "EAGLE-1: no norms": {"norms": False},
    "input bias, two layers": {"input_bias": True, "n_layers": 2},
    "MTP: first embedding zero": {"zero_first_embedding": True},
    "draft vocabulary": {"draft_vocab_size": 37},
}


def lengths_of(reference) -> list[int]:
    """Positions in the base's cache and in the module's."""
    return [reference.base_cache.length, reference.module_cache.length]


def compare(base, module, mode, drafts, changes=(), module_dtype="f32", **sampling):
    """Runs both decoders and asserts equal tokens and state after each step; returns the accepted draft tokens.

    drafts: the decoders' draft tokens per step. changes: numbers of draft tokens that the steps are set to, in turn.
    """
    module_format, _ = MODULE_DTYPES[module_dtype]
    reference = reference_module(module) if module else None
    for weight in reference.parameters() if module else ():
        if weight.dim() == 2:
            weight.data = rounded(weight.data.float(), module_format).double()
    ours = Decoder(
        pack_model(base, module, "f32", module_dtype),
        mode,
        drafts,
        capacity=200,
        cache_dtype=torch.float32,
        seeds=[sampling.pop("seed", 0)],
        **sampling,
    )
    reference = ReferenceDecoder(
        reference_base(base),
        reference,
        module.draft_vocab() if module else None,
        mode,
        drafts,
        seed=int(ours._sampling[3][0]),
        **sampling,
    )
    assert ours.prefill(PROMPT) == reference.prefill(PROMPT)
    accepted = 0
    for step in range(STEPS):
        if changes:
            ours.set_num_draft_tokens(changes[step % len(changes)])
            reference.set_num_draft_tokens(changes[step % len(changes)])
        tokens, counts, *_ = ours.step()
        expected = reference.step()
        assert tokens[0].tolist() == expected + [-1] * (ours.num_draft_tokens + 1 - len(expected))
        assert counts.tolist() == [len(expected)]
        assert ours.pending[0].tolist() == reference.pending
        assert ours.lengths[:, 0].tolist() == lengths_of(reference)
        accepted += len(expected) - 1
    return accepted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_standard_step_of_every_architecture_equals_reference(tmp_path, isa, architecture, tied):
    base = write_base(tmp_path, architecture, tied=tied)
    compare(base, None, "standard", 1)


@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["verify", "alternate"])
@pytest.mark.parametrize("kind", MODULES)
def test_step_with_every_kind_of_module_equals_reference(tmp_path, kind, mode, drafts):
    base = write_base(tmp_path / "base", "qwen3")
    module = write_module(tmp_path / "module", base, **MODULES[kind])
    compare(base, module, mode, drafts)


@pytest.mark.parametrize("module_dtype", MODULE_DTYPES)
def test_step_with_module_of_another_dtype_equals_reference(tmp_path, isa, module_dtype):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, n_layers=2)
    compare(base, module, "alternate", 2, module_dtype=module_dtype)


# Numbers of draft tokens: up and down, from and to none, by one and by more.
CHANGES = [3, 1, 0, 0, 4, 4, 2, 0, 1, 1, 3]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_steps_with_changing_num_draft_tokens_equal_reference(tmp_path, isa, kind, temperature):
    base = write_base(tmp_path / "base", n_layers=1)
    good = MODULES[kind].get("norms", True)
    module = write_module(tmp_path / "module", base, like_base=good, **MODULES[kind])
    accepted = compare(base, module, "verify", 4, CHANGES, temperature=temperature, seed=7)
    assert accepted > 0 or not good


@pytest.mark.parametrize("zero_first_embedding", [False, True])
def test_module_after_standard_steps_reads_on_as_if_they_were_not_there(tmp_path, isa, zero_first_embedding):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, zero_first_embedding=zero_first_embedding)
    packed = pack_model(base, module, "f32")
    decoder = Decoder(packed, "verify", 3, capacity=100, cache_dtype=torch.float32)
    text, read = [*PROMPT, decoder.prefill(PROMPT)], list(range(len(PROMPT)))
    for num_draft_tokens in (3, 0, 0, 0, 1, 2, 0, 0, 3):
        decoder.set_num_draft_tokens(num_draft_tokens)
        tokens, counts, *_ = decoder.step()
        if num_draft_tokens:
            read += range(len(text) - 1, len(text) - 1 + int(counts[0]))
        text += tokens[0, : counts[0]].tolist()
    assert decoder.lengths[:, 0].tolist() == [len(text) - 1, len(read)]

    reference, cache = reference_base(base), KvCache()
    with torch.no_grad():
        hidden = reference(torch.tensor([text]))[:, read]
        following = reference.model.embed_tokens(torch.tensor([text])[:, [i + 1 for i in read]])
        reference_module(module)(following, hidden, cache)
    for kv, exact in enumerate(cache.held(0)):
        given = decoder.module_cache[0, kv, 0, :, : len(read)]
        torch.testing.assert_close(given.double(), exact[0], rtol=0, atol=2e-5)


def test_module_without_a_prompt_still_drafts(tmp_path):
    """The prompt is read in standard mode, through the op: the module's first rows are those after the prompt."""
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base)
    packed = pack_model(base, module, "f32")
    standard = Decoder(packed, "standard", capacity=100)
    verify = Decoder(packed, "verify", 2, capacity=100)
    standard.prefill(PROMPT)
    verify.prefill([9, 9, 9])
    verify.set_num_draft_tokens(0)
    torch.ops.recycle.prefill(*verify.arguments(), 0, torch.tensor(PROMPT))
    assert verify.lengths.tolist() == [[len(PROMPT)], [0]]
    verify.set_num_draft_tokens(2)
    expected = [int(standard.step()[0]) for _ in range(12)]
    given = []
    while len(given) < 12:
        tokens, counts, *_ = verify.step()
        given += tokens[0, : counts[0]].tolist()
    assert given[:12] == expected
    assert verify.lengths[:, 0].tolist() == [len(PROMPT) + len(given), len(given)]


def test_sampled_steps_with_drafts_from_anywhere_equal_reference(tmp_path):
    """Pending draft tokens of any token id, most of them outside of the draft vocabulary, where their q is 0."""
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, draft_vocab_size=37)
    sampling = {"temperature": 1.5, "top_k": 60}
    ours = Decoder(
        pack_model(base, module, "f32"), "verify", 2, capacity=400, cache_dtype=torch.float32, seeds=[7], **sampling
    )
    reference = ReferenceDecoder(
        reference_base(base), reference_module(module), module.draft_vocab(), "verify", 2, seed=7, **sampling
    )
    assert ours.prefill(PROMPT) == reference.prefill(PROMPT)
    accepted = 0
    for token in range(0, base.config.vocab_size, 4):
        ours.pending[0, 1:] = torch.tensor([token, 100 - token])
        reference.pending[1:] = [token, 100 - token]
        expected = reference.step()
        assert ours.step().sequence().tokens == expected
        assert ours.pending[0].tolist() == reference.pending
        accepted += len(expected) - 1
    assert accepted > 12


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("mode", ["standard", "verify", "alternate"])
def test_sampled_steps_equal_reference(tmp_path, mode, drafts):
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base, draft_vocab_size=60)
    accepted = compare(base, module, mode, drafts, temperature=1.5, top_k=50, top_p=0.95, seed=2**45 + 11)
    assert mode == "standard" or accepted > 0


def test_good_module_has_accepted_drafts(tmp_path):
    """The module is no random one but the base's last layer (``like_base``)."""
    base = write_base(tmp_path / "base", n_layers=1)
    module = write_module(tmp_path / "module", base, like_base=True)
    assert compare(base, module, "verify", 1) > 0


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_prefill_of_a_long_prompt_equals_one_pass(tmp_path, length):
    """A prompt passes through the layers 64 rows at a time; the state is that of a single pass."""
    base = write_base(tmp_path / "base")
    module = write_module(tmp_path / "module", base)
    prompt = torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = Decoder(pack_model(base, module, "f32"), "verify", 2, capacity=200, cache_dtype=torch.float32)
    reference = ReferenceDecoder(reference_base(base), reference_module(module), mode="verify", drafts=2)
    assert ours.prefill(prompt) == reference.prefill(prompt)
    assert ours.pending[0].tolist() == reference.pending
    for layer in range(base.config.n_layers):
        for kv, exact in enumerate(reference.base_cache.held(layer)):
            given = ours.base_cache[layer, kv, 0, :, :length]
            torch.testing.assert_close(given.double(), exact[0], rtol=0, atol=2e-5)


def test_idle_sequence_is_left_alone(tmp_path):
    base = write_base(tmp_path)
    decoder = Decoder(pack_model(base, None, "f32"), "standard", batch=2, capacity=50)
    decoder.prefill(PROMPT, 1)
    tokens, counts, *_ = decoder.step()
    assert counts.tolist() == [0, 1]
    assert tokens[0].tolist() == [-1]
    assert decoder.lengths.tolist() == [[0, len(PROMPT) + 1], [0, 0]]
    assert decoder.pending[0].tolist() == [-1]
    assert not decoder.base_cache[:, :, 0].any()
    assert decoder.base_cache[:, :, 1].any()
