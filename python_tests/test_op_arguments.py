"""A wrong argument is a ValueError that names the argument, what was given and what is needed."""

from __future__ import annotations

import pytest
import torch
from models import write_base, write_module

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.weights.layout import pack_matrix
from recycle_ext.weights.pack import pack_model

STEP = [
    "weights",
    "plan",
    "base_cache",
    "module_cache",
    "pending",
    "lengths",
    "draft_probs",
    "scratch",
    "decode_mode",
    "temperature",
    "top_k",
    "top_p",
    "seeds",
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    base = write_base(folder / "base")
    return pack_model(base, write_module(folder / "module", base), "f32")


def misaligned(buffer):
    """The same bytes at an address that is no multiple of 64."""
    return torch.cat((buffer, buffer[:64]))[1:]


ADDRESS = "must begin at an address that is a multiple of 64"


@pytest.fixture
def step(packed):
    """Good arguments of decode_step by name; two sequences have read a prompt."""
    decoder = Decoder(packed, "verify", 2, batch=2, capacity=30)
    decoder.prefill([1, 2, 3], 0)
    decoder.prefill([4, 5], 1)
    return dict(zip(STEP, decoder.arguments(), strict=True))


def test_decode_step_with_good_arguments_is_accepted(step):
    torch.ops.recycle.decode_step(**step)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights", lambda t: t[:-64], "plan points outside the weights"),
        ("weights", misaligned, f"weights {ADDRESS}"),
        ("weights", lambda t: t.float(), "weights is float32; it must be uint8"),
        ("plan", lambda t: t[:-1], "plan is cut off"),
        ("plan", lambda t: t * 0, "not a plan"),
        ("plan", lambda t: t.int(), "plan is int32; it must be int64"),
        ("base_cache", lambda t: t[:1], r"base_cache has shape \[1, 2, 2, 2, 34, 16\]; it must be"),
        ("base_cache", lambda t: t.double(), "base_cache is float64; it must be float32, bfloat16 or int8"),
        ("base_cache", lambda t: t.transpose(3, 4), "base_cache has shape"),
        ("base_cache", lambda t: t[:, :, :, :, ::2], "base_cache must be contiguous"),
        ("module_cache", lambda t: t[:, :, :1], "module_cache has shape"),
        ("pending", lambda t: t[:, :1].contiguous(), r"\[2, 1\]; it must be .* with 1 to 4 drafts"),
        ("pending", lambda t: t.repeat(1, 2), r"pending has shape \[2, 6\]"),
        ("pending", lambda t: t + 100, r"pending\[0\]\[\d\] is \d+; token ids are 0 to 100"),
        ("lengths", lambda t: t[0], r"lengths has shape \[2\]; it must be \[2, 2\]"),
        ("lengths", lambda t: t - 5, r"lengths\[0\]\[0\] is -2; it must be 0 or more"),
        ("lengths", lambda t: t + torch.tensor([[0], [1]]), r"lengths\[1\]\[0\] is 4; .* 0 to 3"),
        ("lengths", lambda t: t * torch.tensor([[1], [-1]]), r"lengths\[1\]\[0\] is -3; .* 0 to 3"),
        ("scratch", lambda t: t.flatten(), r"scratch has shape \[\d+\]; it must be \[threads, bytes\]"),
        ("scratch", lambda t: t[:0], r"scratch has shape \[0, \d+\]; it must be .* with 1 to 256 threads"),
        ("scratch", lambda t: t.flatten()[:257].view(257, 1), "it must be .* with 1 to 256 threads"),
        ("scratch", lambda t: t[:1, :100], r"scratch has shape \[1, 100\], 100 bytes; 1 threads need \d+"),
        ("scratch", lambda t: t[:, 64:].contiguous(), r"threads need \d+"),
        ("scratch", lambda t: misaligned(t.flatten())[: t.numel()].view(t.shape), f"scratch {ADDRESS}"),
        ("decode_mode", lambda _: 3, "decode_mode is 3; it must be 0 .* 1 .* or 2"),
        ("decode_mode", lambda _: 0, "without drafts in standard mode"),
        ("temperature", lambda _: -1.0, "temperature is -1"),
        ("temperature", lambda _: float("nan"), "temperature is nan"),
        ("temperature", lambda _: 1.0, "draft_probs has shape"),
        ("top_k", lambda _: -1, "top_k is -1"),
        ("top_p", lambda _: 0.0, "top_p is 0"),
        ("seeds", lambda t: t[:1], r"seeds has shape \[1\]; it must be \[2\]"),
    ],
)
def test_decode_step_with_a_wrong_argument_names_it(step, name, change, message):
    before = step["pending"].clone(), step["lengths"].clone(), step["base_cache"].clone()
    wrong = step | {name: change(step[name])}
    with pytest.raises(ValueError, match=message):
        torch.ops.recycle.decode_step(**wrong)
    for old, key in zip(before, ("pending", "lengths", "base_cache"), strict=True):
        assert torch.equal(step[key], old)


def test_decode_step_with_a_damaged_plan_is_refused(step):
    """Each entry in turn is replaced by numbers that a damaged file could hold.

    test_guard_pages.py shows that plans that are accepted all the same read nothing outside the weights.
    """
    plan = step["plan"]
    refused = 0
    for index in range(len(plan)):
        for number in (-(2**62), -7, 2**40, 2**62):
            damaged = plan.clone()
            damaged[index] = number
            fresh = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in step.items()}
            try:
                torch.ops.recycle.decode_step(**fresh | {"plan": damaged})
            except (ValueError, RuntimeError):
                refused += 1
    # Flags may have any value, and eps any bits.
    assert refused > 3 * len(plan)


@pytest.mark.parametrize(
    ("prompt", "sequence", "message"),
    [
        ([], 0, "prompt is empty"),
        ([1, 101], 0, r"prompt\[1\] is 101; token ids are 0 to 100"),
        ([1] * 40, 0, "prompt has 40 tokens, but the caches have room for 34"),
        ([1], 2, "sequence is 2; it must be 0 to 1"),
    ],
)
def test_prefill_with_a_wrong_argument_names_it(step, prompt, sequence, message):
    before = step["pending"].clone(), step["lengths"].clone(), step["base_cache"].clone()
    with pytest.raises(ValueError, match=message):
        torch.ops.recycle.prefill(**step, sequence=sequence, prompt=torch.tensor(prompt, dtype=torch.int64))
    for old, key in zip(before, ("pending", "lengths", "base_cache"), strict=True):
        assert torch.equal(step[key], old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 1, 4)}, "q has shape"),
        ({"q": torch.zeros(2, 1, 3, 32)}, "q has 3 heads, k 2"),
        ({"k": torch.zeros(2, 2, 2, 32)}, "k has shape"),
        ({"v": torch.zeros(2, 1, 2, 32).double()}, "v is float64"),
        ({"cache": torch.zeros(2, 2, 2, 0, 32)}, "cache has room for 0 positions"),
        ({"lengths": torch.tensor([0, 8])}, r"lengths\[1\] is 8 and 1 rows"),
        ({"inv_freq": torch.zeros(7)}, "inv_freq has shape"),
        ({"q_norm": torch.zeros(7)}, "q_norm has shape"),
    ],
)
def test_attention_decode_with_a_wrong_argument_names_it(change, message):
    good = {
        "q": torch.zeros(2, 1, 4, 32),
        "k": torch.zeros(2, 1, 2, 32),
        "v": torch.zeros(2, 1, 2, 32),
        "cache": torch.zeros(2, 2, 2, 8, 32),
        "lengths": torch.tensor([0, 3]),
        "inv_freq": torch.ones(16),
    }
    torch.ops.recycle.attention_decode(**good)
    with pytest.raises(ValueError, match=message):
        torch.ops.recycle.attention_decode(**good | change)


def test_attention_decode_with_head_dim_24_is_refused():
    with pytest.raises(ValueError, match="head_dim 24; it must be a multiple of 16"):
        torch.ops.recycle.attention_decode(
            torch.zeros(1, 1, 1, 24),
            torch.zeros(1, 1, 1, 24),
            torch.zeros(1, 1, 1, 24),
            torch.zeros(2, 1, 1, 4, 24),
            torch.tensor([0]),
            torch.ones(12),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(1, 33)}, "hidden has 33 columns"),
        ({"hidden": torch.zeros(65, 32)}, "hidden has 65 rows"),
        ({"head": torch.zeros(10, dtype=torch.uint8)}, "head has 10 bytes; it needs"),
        ({"format": 99}, "format is 99"),
        ({"n_vocab": 0}, "n_vocab is 0"),
        ({"n_vocab": 500}, "head has"),
        ({"norm": torch.zeros(3)}, "norm has shape"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions has shape"),
    ],
)
def test_recycle_head_with_a_wrong_argument_names_it(change, message):
    good = {
        "hidden": torch.zeros(1, 32),
        "norm": None,
        "eps": 1e-5,
        "head": pack_matrix(torch.zeros(50, 32), "f32"),
        "format": 0,
        "n_vocab": 50,
        "positions": torch.tensor([0]),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seeds": torch.tensor([0]),
    }
    torch.ops.recycle.recycle_head(**good)
    with pytest.raises(ValueError, match=message):
        torch.ops.recycle.recycle_head(**good | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast'; it must be one of standard, verify, alternate"),
        ({"drafts": 5}, "drafts is 5; it must be 1 to 4, or auto"),
        ({"drafts": "many"}, "drafts is 'many'; it must be 1 to 4, or auto"),
        ({"drafts": "auto", "mode": "alternate"}, "'auto', which mode 'alternate' can't have: there every"),
        ({"capacity": 10**6}, "capacity is 1000000; it must be in this model's context, 1 to 512"),
        ({"mode": "standard", "batch": 2, "seeds": [1]}, "batch is 2 and there are 1 seeds"),
    ],
)
def test_decoder_with_a_wrong_argument_names_it(packed, arguments, message):
    with pytest.raises(RecycleError, match=message):
        Decoder(packed, **arguments)


def test_set_num_draft_tokens_out_of_range_is_refused(packed):
    with pytest.raises(RecycleError, match="count is 3; it must be 0 to 2"):
        Decoder(packed, "verify", 2).set_num_draft_tokens(3)
    with pytest.raises(RecycleError, match="mode is 'alternate'; drafts can be changed in verify"):
        Decoder(packed, "alternate", 2).set_num_draft_tokens(1)


def test_verify_without_a_module_is_refused(tmp_path):
    packed = pack_model(write_base(tmp_path), None, "f32")
    with pytest.raises(RecycleError, match="needs a module, and none is loaded"):
        Decoder(packed, "verify")


@pytest.mark.parametrize(
    ("sizes", "message"), [({"hidden_size": 40}, "hidden_size is 40"), ({"head_dim": 24}, "head_dim is 24")]
)
def test_pack_model_with_unsupported_sizes_is_refused(tmp_path, sizes, message):
    with pytest.raises(RecycleError, match=message + "; the kernels need a multiple of 16"):
        pack_model(write_base(tmp_path, **sizes), None, "f32")
