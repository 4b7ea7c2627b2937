"""python -m recycle_ext.convert: the module computes what each format's formula computes."""

from __future__ import annotations

import shutil

import pytest
import torch
from heads import DEEPSEEK, EAGLE, MIMO, QWEN, QWEN_NEXT, assert_equal, doubled, inputs, module_rows, run, write_head
from model_files import WEIGHTS, edit_tensor
from models import reference_module, write_base
from safetensors.torch import load_file, save_file

from recycle_ext import convert
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.module import open_module
from recycle_ext.convert.source import Source
from recycle_ext.reference.model import RecyclableModule

MTP = {"mimo": MIMO, "deepseek": DEEPSEEK, "qwen": QWEN, "qwen_next": QWEN_NEXT}
# Each format with an architecture of its published bases.
CASES = [
    pytest.param(EAGLE, "llama", id="eagle"),
    pytest.param(EAGLE, "qwen2", id="eagle-qwen2"),
    pytest.param(MIMO, "qwen2", id="mimo"),
    pytest.param(DEEPSEEK, "llama", id="deepseek"),
    pytest.param(QWEN, "qwen3", id="qwen"),
    pytest.param(QWEN_NEXT, "qwen3", id="qwen-next"),
]


@pytest.mark.parametrize(("layout", "architecture"), CASES)
def test_converted_module_computes_the_head(tmp_path, layout, architecture, capsys):
    base = write_base(tmp_path / "base", architecture, tied=False)
    tensors = write_head(tmp_path / "head", layout, base)
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 0
    module = open_module(tmp_path / "module", base)
    assert "rounded" not in capsys.readouterr().out

    embedding, _, hidden = inputs(base)
    g, out = layout.rows(doubled(tensors), embedding, hidden, module.config)
    ours = module_rows(reference_module(module), embedding, hidden)
    assert_equal(ours[0], g)
    assert_equal(ours[1], out)
    assert module.config.base_fingerprint == base.fingerprint


@pytest.mark.parametrize(("layout", "architecture"), CASES)
def test_converted_module_has_every_tensor(tmp_path, layout, architecture):
    base = write_base(tmp_path / "base", architecture)
    theirs = write_head(tmp_path / "head", layout, base)
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 0
    ours = load_file(tmp_path / "module" / "module.safetensors")

    d = base.config.hidden_size
    projection = theirs.pop(layout.proj)
    if layout.hidden_first:
        projection = torch.cat((projection[:, d:], projection[:, :d]), dim=1)
    assert torch.equal(ours.pop("input_proj.weight"), projection)
    for name, tensor in theirs.items():
        name = name.replace(layout.layer, "layers.0.") if name.startswith(layout.layer) else name
        name = {"fc.bias": "input_proj.bias"}.get(name, name)
        for part, norm in zip(("embed", "hidden", "output"), layout.norms or [], strict=False):
            if name == norm.replace(layout.layer, "layers.0."):
                name = f"{part}_norm.weight"
        is_norm = name.endswith("norm.weight")
        assert torch.equal(ours.pop(name), tensor + layout.norm_offset if is_norm else tensor), name
    assert not ours


@pytest.mark.parametrize("name", MTP)
def test_head_of_the_state_before_the_norm_is_folded(tmp_path, name, capsys):
    """The folded matrix W diag(v / w) times h equals the head, to the precision of float64."""
    layout, architecture = MTP[name], {"mimo": "qwen2", "deepseek": "llama"}.get(name, "qwen3")
    base = write_base(tmp_path / "base", architecture)
    tensors = doubled(write_head(tmp_path / "head", layout, base))
    head = convert.to_module(Source(tmp_path / "head"), base, before_norm=True)
    assert not head.config.hidden_norm and "hidden_norm.weight" not in head.tensors
    module = RecyclableModule(head.config).double()
    module.load_state_dict(head.tensors)

    embedding, before, after = inputs(base)
    ours = module_rows(module, embedding, after)
    assert_equal(ours[1], layout.rows(tensors, embedding, before, head.config)[1])
    # A second norm of the normed state, which a module without the fold would compute, differs.
    wrong = layout.rows(tensors, embedding, after, head.config)[1]
    assert (ours[1] - wrong).abs().max() > 1e-3

    command_line = [tmp_path / "head", "--base", base.path, "--hidden-state", "before-norm"]
    assert run(*command_line, "--output", tmp_path / "module") == 0
    assert "folded into input_proj" in capsys.readouterr().out
    saved = open_module(tmp_path / "module", base).state_dict()["input_proj.weight"]
    assert torch.equal(saved, head.tensors["input_proj.weight"].bfloat16().float())


def draft(rows, lm_head, table, embedding, hidden, n, feed):
    """n draft tokens after the last row, and the hidden states; ``feed``: 0 feeds g back, 1 feeds n(g) back."""
    tokens = []
    for _ in range(n):
        states = rows(embedding, hidden)
        tokens.append(int((states[1][-1] @ lm_head.T).argmax()))
        embedding = torch.cat((embedding, table[tokens[-1:]]))
        hidden = torch.cat((hidden, states[feed][-1:]))
    return tokens, hidden


@pytest.mark.parametrize(("layout", "same"), [(EAGLE, True), (DEEPSEEK, False)])
def test_further_draft_tokens_differ_where_the_note_says(tmp_path, layout, same, capsys):
    """EAGLE-1 feeds g back, as a module does; MTP layers feed back the normed g, and the note says so."""
    base = write_base(tmp_path / "base", tied=False)
    tensors = doubled(write_head(tmp_path / "head", layout, base))
    run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module")
    module = open_module(tmp_path / "module", base)
    embedding, _, hidden = inputs(base)
    table = base.tensors["model.embed_tokens.weight"].to(torch.float64)
    arguments = base.tensors["lm_head.weight"].to(torch.float64), table, embedding, hidden, 3

    def theirs(e, h):
        return layout.rows(tensors, e, h, module.config)

    reference = reference_module(module)
    ours = draft(lambda e, h: module_rows(reference, e, h), *arguments, feed=0)
    expected = draft(theirs, *arguments, feed=0 if layout is EAGLE else 1)
    assert ours[0][0] == expected[0][0]
    assert torch.allclose(ours[1], expected[1]) == same
    assert ("further ones (--drafts 2 to 4) are not" in capsys.readouterr().out) == (not same)


@pytest.mark.parametrize(("layout", "architecture"), [(MIMO, "qwen2"), (DEEPSEEK, "llama")])
def test_directory_with_model_and_head_is_base_and_source(tmp_path, layout, architecture):
    """The form in which MiMo-7B is published: the head's tensors are not the base's."""
    alone = write_base(tmp_path / "base", architecture, tied=False)
    head = write_head(tmp_path / "head", layout, alone)
    both = tmp_path / "both"
    shutil.copytree(tmp_path / "base", both)
    shutil.copy(tmp_path / "head" / "config.json", both)
    save_file(load_file(both / WEIGHTS) | head, both / WEIGHTS)
    base = open_checkpoint(both)
    assert base.fingerprint == alone.fingerprint
    assert run(both, "--base", both, "--output", tmp_path / "module") == 0
    open_module(tmp_path / "module", alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_copy_of_the_embedding_in_any_precision_is_accepted(tmp_path, dtype, capsys):
    base = write_base(tmp_path / "base")
    write_head(tmp_path / "head", EAGLE, base)
    copy = base.tensors["model.embed_tokens.weight"].to(dtype)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        edit_tensor(name, lambda _: copy.clone())(tmp_path / "head")
    arguments = tmp_path / "head", "--base", base.path, "--output"
    assert run(*arguments, tmp_path / "module") == 0
    # A different number is found, and the message has the difference.
    edit_tensor("embed_tokens.weight", lambda t: t + 0.25 * torch.eye(*t.shape))(tmp_path / "head")
    assert run(*arguments, tmp_path / "second") == 2
    assert "by up to 0.25" in capsys.readouterr().err


def test_head_beyond_bf16_is_rounded_with_a_note(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_head(tmp_path / "head", EAGLE, base)
    edit_tensor("fc.weight", lambda t: t.float() * 1.001)(tmp_path / "head")
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 0
    assert "rounded to bfloat16" in capsys.readouterr().out
