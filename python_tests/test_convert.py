"""python -m recycle_ext.convert: every format written out plainly, and the module that is made of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import random_tensors, reference_base, reference_module, write_base, write_module
from safetensors.torch import load_file, save_file

from recycle_ext import convert
from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.config import ModuleConfig, RopeScaling
from recycle_ext.checkpoint.module import open_module
from recycle_ext.checkpoint.shapes import layer_shapes
from recycle_ext.convert import __main__ as command
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError
from recycle_ext.reference.model import RecyclableModule

WEIGHTS = "model.safetensors"
EPS = 1e-5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Layout:
    """One format: its names, and its formula as its authors have it."""

    def __init__(
        self, layer, proj, norms, config, hidden_first=False, zero_first=False, centre=0.0
    ):
        self.layer = layer  # prefix of the layer's tensors
        self.proj = proj
        self.norms = norms  # of the embedding, of the state, of the output
        self.config = config
        self.hidden_first = hidden_first
        self.zero_first = zero_first
        self.centre = centre  # norms multiply by this and the weight

    def norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (self.centre + weight)

    def attention(self, t, x, sizes):
        """Head by head."""
        size, group = sizes.head_dim, sizes.n_heads // sizes.n_kv_heads
        part = f"{self.layer}self_attn."
        q, k, v = (
            F.linear(x, t[f"{part}{n}_proj.weight"], t.get(f"{part}{n}_proj.bias")) for n in "qkv"
        )
        inv_freq = (1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)).double()
        angles = torch.arange(len(x)).double()[:, None] * inv_freq
        causal = torch.ones(len(x), len(x)).tril().log()

        def rotated(heads, i, norm):
            one = heads[:, i * size : (i + 1) * size]
            if f"{part}{norm}.weight" in t:
                one = self.norm(one, t[f"{part}{norm}.weight"])
            a, b = one[:, : size // 2], one[:, size // 2 :]
            return torch.cat(
                (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1
            )

        out = []
        for i in range(sizes.n_heads):
            scores = rotated(q, i, "q_norm") @ rotated(k, i // group, "k_norm").T / size**0.5
            values = v[:, i // group * size : (i // group + 1) * size]
            out.append((scores + causal).softmax(-1) @ values)
        return F.linear(torch.cat(out, dim=1), t[f"{part}o_proj.weight"])

    def rows(self, t, embedding, hidden, sizes):
        """e(x_{i+1}) and the state it is given, [T, d] float64 each -> g and what goes into lm_head."""
        if self.zero_first:
            embedding = torch.cat((torch.zeros_like(embedding[:1]), embedding[1:]))
        if self.norms:
            embedding = self.norm(embedding, t[self.norms[0]])
            hidden = self.norm(hidden, t[self.norms[1]])
        pair = (hidden, embedding) if self.hidden_first else (embedding, hidden)
        x = F.linear(
            torch.cat(pair, dim=1), t[self.proj], t.get(self.proj.replace(".weight", ".bias"))
        )
        name = f"{self.layer}input_layernorm.weight"
        x = x + self.attention(t, self.norm(x, t[name]) if name in t else x, sizes)
        y = self.norm(x, t[f"{self.layer}post_attention_layernorm.weight"])
        gate, up = (F.linear(y, t[f"{self.layer}mlp.{n}_proj.weight"]) for n in ("gate", "up"))
        g = x + F.linear(F.silu(gate) * up, t[f"{self.layer}mlp.down_proj.weight"])
        return g, self.norm(g, t[self.norms[2]]) if self.norms else g


EAGLE = Layout("layers.0.", "fc.weight", None, {"architectures": ["LlamaForCausalLM"]})
MIMO_LAYER, DEEPSEEK_LAYER = "model.mtp_layers.0.", "model.layers.2."
MIMO = Layout(
    MIMO_LAYER,
    f"{MIMO_LAYER}input_proj.weight",
    [f"{MIMO_LAYER}{n}_layernorm.weight" for n in ("token", "hidden", "final")],
    {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True},
    hidden_first=True,
    zero_first=True,
)
DEEPSEEK = Layout(
    DEEPSEEK_LAYER,
    f"{DEEPSEEK_LAYER}eh_proj.weight",
    [f"{DEEPSEEK_LAYER}{n}.weight" for n in ("enorm", "hnorm", "shared_head.norm")],
    {"num_nextn_predict_layers": 1},
    zero_first=True,
)
QWEN_NORMS = [f"mtp.{n}.weight" for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")]
QWEN = Layout("mtp.layers.0.", "mtp.fc.weight", QWEN_NORMS, {"model_type": "qwen3"})
QWEN_NEXT = Layout(
    "mtp.layers.0.", "mtp.fc.weight", QWEN_NORMS, {"model_type": "qwen3_next"}, centre=1.0
)
MTP = {"mimo": MIMO, "deepseek": DEEPSEEK, "qwen": QWEN, "qwen_next": QWEN_NEXT}
# Each with the kind of base it is met on.
CASES = [
    pytest.param(EAGLE, "llama", id="eagle"),
    pytest.param(EAGLE, "qwen2", id="eagle-qwen2"),
    pytest.param(MIMO, "qwen2", id="mimo"),
    pytest.param(DEEPSEEK, "llama", id="deepseek"),
    pytest.param(QWEN, "qwen3", id="qwen"),
    pytest.param(QWEN_NEXT, "qwen3", id="qwen-next"),
]


def write_head(folder, layout, base, **config):
    """A random head for ``base``, alone in a directory; bf16, so that a module keeps every bit."""
    folder.mkdir()
    b = base.config
    sizes = ModuleConfig.like(b, 1)
    shapes = layer_shapes(sizes, layout.layer, input_norm=layout.norms is not None)
    shapes |= {layout.proj: (b.hidden_size, 2 * b.hidden_size)}
    shapes |= dict.fromkeys(layout.norms or [], (b.hidden_size,))
    if layout.norms is None:
        shapes[layout.proj.replace(".weight", ".bias")] = (b.hidden_size,)
    tensors = random_tensors(shapes, seed=3)
    if layout.centre:
        # In steps of which bfloat16 can hold both w and 1 + w.
        norms = [n for n in tensors if n.endswith("norm.weight") or n in layout.norms]
        tensors |= {name: ((tensors[name] % 1) * 64).round() / 64 for name in norms}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    fields = json.loads(Path(base.path, "config.json").read_text())
    fields |= {"num_hidden_layers": 1 if layout is EAGLE else b.n_layers} | layout.config | config
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors


def run(*arguments):
    return command.main([str(argument) for argument in arguments])


def inputs(base, rows=7):
    """Embeddings e(x_{i+1}), and the states before and after the base's final norm, float64 [T, d]."""
    model = reference_base(base)
    tokens = torch.randint(0, base.config.vocab_size, (1, rows + 1))
    before = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, x: before.append(x[0][0]))
    with torch.no_grad():
        after = model(tokens)[0]
        hook.remove()
        return model.model.embed_tokens(tokens[0, 1:]), before[0][:-1], after[:-1]


def doubled(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@torch.no_grad()
def module_rows(module, embedding, hidden):
    g, out = module(embedding[None], hidden[None])
    return g[0], out[0]


def assert_equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(("layout", "architecture"), CASES)
def test_a_module_computes_what_the_head_does(tmp_path, layout, architecture, capsys):
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
def test_every_tensor_arrives(tmp_path, layout, architecture):
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
        assert torch.equal(ours.pop(name), tensor + layout.centre if is_norm else tensor), name
    assert not ours


@pytest.mark.parametrize("name", MTP)
def test_a_head_of_the_state_before_the_norm_is_folded(tmp_path, name, capsys):
    """W diag(v / w) h, to the precision of float64."""
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
    # Norming the normed state again, which is what a module without the fold would do, is something else.
    wrong = layout.rows(tensors, embedding, after, head.config)[1]
    assert (ours[1] - wrong).abs().max() > 1e-3

    command_line = [tmp_path / "head", "--base", base.path, "--hidden-state", "before-norm"]
    assert run(*command_line, "--output", tmp_path / "module") == 0
    assert "folded into input_proj" in capsys.readouterr().out
    saved = open_module(tmp_path / "module", base).state_dict()["input_proj.weight"]
    assert torch.equal(saved, head.tensors["input_proj.weight"].bfloat16().float())


def guesses(rows, lm_head, table, embedding, hidden, n, feed):
    """Tokens guessed after the last row, each from the one before it; ``feed``: 0 takes g back, 1 n(g)."""
    tokens = []
    for _ in range(n):
        states = rows(embedding, hidden)
        tokens.append(int((states[1][-1] @ lm_head.T).argmax()))
        embedding = torch.cat((embedding, table[tokens[-1:]]))
        hidden = torch.cat((hidden, states[feed][-1:]))
    return tokens, hidden


@pytest.mark.parametrize(("layout", "same"), [(EAGLE, True), (DEEPSEEK, False)])
def test_what_is_said_of_further_guesses_holds(tmp_path, layout, same, capsys):
    """EAGLE-1 takes its g back as a module does; MTP layers take it normed, and the note says so."""
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
    ours = guesses(lambda e, h: module_rows(reference, e, h), *arguments, feed=0)
    expected = guesses(theirs, *arguments, feed=0 if layout is EAGLE else 1)
    assert ours[0][0] == expected[0][0]
    assert torch.allclose(ours[1], expected[1]) == same
    assert ("further ones (--drafts 2 to 4) are not" in capsys.readouterr().out) == (not same)


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("input_bias", [False, True])
def test_an_eagle_head_computes_what_the_module_does(tmp_path, input_bias, n_layers):
    base = write_base(tmp_path / "base", tied=False)
    module = write_module(
        tmp_path / "module", base, norms=False, input_bias=input_bias, n_layers=n_layers
    )
    assert run(module.path, "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 0
    theirs = load_file(tmp_path / "h" / WEIGHTS)
    bias = theirs["fc.bias"]
    assert bool(bias.any()) == input_bias

    ours = {name: source.raw_rows(0, source.shape[0]) for name, source in module.tensors.items()}
    renamed = {name.replace("fc.", "input_proj."): tensor for name, tensor in theirs.items()}
    if not input_bias:
        del renamed["input_proj.bias"]
    assert renamed.keys() == ours.keys()
    assert all(torch.equal(renamed[name], tensor) for name, tensor in ours.items())

    if n_layers == 1:
        embedding, _, hidden = inputs(base)
        g, _ = EAGLE.rows(doubled(theirs), embedding, hidden, module.config)
        assert_equal(module_rows(reference_module(module), embedding, hidden)[0], g)

    assert run(tmp_path / "h", "--base", base.path, "--output", tmp_path / "again") == 0
    again = open_module(tmp_path / "again", base)
    assert all(torch.equal(again.tensors[name].to(), ours[name].float()) for name in ours)


def test_config_json_of_an_eagle_head_is_a_llamas(tmp_path):
    """What vLLM and SGLang make a draft model of: transformers reads the same sizes."""
    transformers = pytest.importorskip("transformers", reason="the extra `test` brings it")
    base = write_base(tmp_path / "base", context=300)
    folder = tmp_path / "module"
    write_module(folder, base, norms=False)
    fields = json.loads((folder / "config.json").read_text())
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    (folder / "config.json").write_text(json.dumps(fields | {"rope_scaling": scaling}))
    run(folder, "--base", base.path, "--output", tmp_path / "head", "--to", "eagle")

    read = transformers.LlamaConfig.from_pretrained(tmp_path / "head")
    assert read.architectures == ["LlamaForCausalLMEagle", "LlamaForCausalLM"]
    assert (read.hidden_size, read.num_key_value_heads, read.head_dim) == (64, 2, 16)
    assert (read.num_hidden_layers, read.max_position_embeddings) == (1, 300)
    assert read.rope_parameters["factor"] == 8.0 and read.rope_parameters["rope_type"] == "llama3"
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "again") == 0
    assert open_module(tmp_path / "again", base).config.rope_scaling == RopeScaling(**scaling)


def test_a_draft_vocabulary_and_a_bias_are_told_of(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "m", base, norms=False, input_bias=True, draft_vocab_size=20)
    assert (
        run(tmp_path / "m", "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 0
    )
    said = capsys.readouterr().out
    assert "guesses among 20 tokens" in said and "vLLM 0.32 does not" in said
    assert "draft_vocab" not in load_file(tmp_path / "h" / WEIGHTS)


@pytest.mark.parametrize(("layout", "architecture"), [(MIMO, "qwen2"), (DEEPSEEK, "llama")])
def test_a_directory_with_model_and_head_is_base_and_source(tmp_path, layout, architecture):
    """As MiMo-7B is published: the head's tensors are none of the base's."""
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


def edit_tensors(edit, *names):
    """Puts what ``edit`` makes of the tensors in their place; None removes one."""

    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        for name in names:
            tensors[name] = edit(tensors.get(name))
        kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
        save_file(kept, folder / WEIGHTS)

    return change


def edit_config(**changes):
    def change(folder):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    return change


def put(*names, shape=(4, 4)):
    return edit_tensors(lambda _: torch.ones(shape), *names)


Q_PROJ = "mtp.layers.0.self_attn.q_proj.weight"
EXPERTS = f"{DEEPSEEK_LAYER}mlp.experts.0.up_proj.weight"
MLA = f"{DEEPSEEK_LAYER}self_attn.kv_a_proj_with_mqa.weight"
REFUSED = [
    (EAGLE, put("midlayer.mlp.up_proj.weight"), "an EAGLE-3 head"),
    (EAGLE, put("d2t"), "an EAGLE-3 head"),
    (EAGLE, edit_tensors(lambda _: None, "fc.weight"), "no head of a known format"),
    (EAGLE, edit_tensors(lambda t: t[:, :64], "fc.weight"), "fc.weight has shape [64, 64]"),
    (EAGLE, put("embed_tokens.weight"), "embed_tokens.weight has shape [4, 4]"),
    (EAGLE, put("lm_head.weight", shape=(101, 64)), "lm_head.weight is the head's own: it differs"),
    (EAGLE, put("layers.0.input_layernorm.weight", shape=64), "has no place in a module"),
    (EAGLE, put("layers.0.self_attn.o_proj.bias", shape=64), "has no place in a module"),
    (EAGLE, edit_config(num_hidden_layers=2), "tensor layers.1.input_layernorm.weight is missing"),
    (EAGLE, edit_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (EAGLE, edit_config(hidden_act="gelu"), "\"hidden_act\" is 'gelu'"),
    (EAGLE, edit_config(vocab_size=100), "vocab_size is 100; base has 101"),
    (EAGLE, edit_config(num_key_value_heads=3), "4 heads cannot share 3"),
    (EAGLE, edit_config(rope_scaling={"type": "linear"}), "\"rope_scaling\" is 'linear'"),
    (EAGLE, lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "weights_only=True"),
    (EAGLE, lambda f: (f / WEIGHTS).write_bytes(b"PK\3\4"), "not a whole safetensors file"),
    (EAGLE, lambda f: (f / "config.json").unlink(), "No such file"),
    (EAGLE, shutil.rmtree, "no such file or directory"),
    (MIMO, put("model.mtp_layers.1.input_proj.weight"), "several prediction layers"),
    (MIMO, put("model.mtp_layers.0.self_attn.sinks"), "attention sinks"),
    (DEEPSEEK, put(EXPERTS), "a mixture of experts"),
    (DEEPSEEK, put(MLA), "multi-head latent attention"),
    (DEEPSEEK, put("model.layers.3.eh_proj.weight"), "2 prediction layers"),
    (
        DEEPSEEK,
        put(f"{DEEPSEEK_LAYER}embed_tokens.weight", shape=(101, 64)),
        "embed_tokens.weight is the head's own",
    ),
    (DEEPSEEK, edit_config(partial_rotary_factor=0.5), '"partial_rotary_factor" is 0.5'),
    (QWEN, edit_tensors(lambda t: torch.cat((t, t)), Q_PROJ), "the head's attention gates"),
    (QWEN, put("mtp.layers.1.mlp.up_proj.weight"), "several prediction layers"),
]


@pytest.mark.parametrize(("layout", "change", "reason"), REFUSED)
def test_what_cannot_be_mapped_is_refused(tmp_path, layout, change, reason, capsys):
    base = write_base(tmp_path / "base", "qwen3" if layout is QWEN else "llama")
    write_head(tmp_path / "head", layout, base)
    change(tmp_path / "head")
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert str(tmp_path / "head") in error and reason in error
    assert not (tmp_path / "module").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_copy_of_the_bases_embedding_is_fine_in_any_precision(tmp_path, dtype, capsys):
    base = write_base(tmp_path / "base")
    write_head(tmp_path / "head", EAGLE, base)
    copy = base.tensors["model.embed_tokens.weight"].to(dtype)
    edit_tensors(lambda _: copy.clone(), "embed_tokens.weight", "lm_head.weight")(tmp_path / "head")
    arguments = tmp_path / "head", "--base", base.path, "--output"
    assert run(*arguments, tmp_path / "module") == 0
    # One number that is another's is found, and the difference told.
    edit_tensors(lambda t: t + 0.25 * torch.eye(*t.shape), "embed_tokens.weight")(tmp_path / "head")
    assert run(*arguments, tmp_path / "second") == 2
    assert "by up to 0.25" in capsys.readouterr().err


def test_a_head_that_is_not_bf16_is_rounded_and_that_is_said(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_head(tmp_path / "head", EAGLE, base)
    edit_tensors(lambda t: t.float() * 1.001, "fc.weight")(tmp_path / "head")
    assert run(tmp_path / "head", "--base", base.path, "--output", tmp_path / "module") == 0
    assert "rounded to bfloat16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            edit_tensors(lambda t: t * (torch.arange(64) != 17), "model.norm.weight"),
            "in dimension 17",
        ),
        (edit_config(rms_norm_eps=1e-6), "rms_norm_eps is 1e-05, the base's 1e-06"),
    ],
)
def test_a_final_norm_that_cannot_be_undone_is_refused(tmp_path, change, reason):
    write_head(tmp_path / "head", DEEPSEEK, write_base(tmp_path / "base"))
    change(tmp_path / "base")
    base = open_checkpoint(tmp_path / "base")
    with pytest.raises(RecycleError, match=reason):
        convert.to_module(Source(tmp_path / "head"), base, before_norm=True)


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("embed_norm", "a norm on the embedding (embed_norm)"),
        ("hidden_norm", "a norm on the hidden state (hidden_norm)"),
        ("output_norm", "a norm before the output head (output_norm)"),
        ("first_input_norm", "a norm before the first layer's attention (first_input_norm)"),
        ("zero_first_embedding", "(zero_first_embedding)"),
    ],
)
def test_a_module_that_eagle_cannot_hold_is_refused_by_name(tmp_path, flag, reason, capsys):
    base = write_base(tmp_path / "base")
    folder = tmp_path / "module"
    write_module(folder, base, norms=False)
    edit_config(**{flag: True})(folder)
    name = {"first_input_norm": "layers.0.input_layernorm"}.get(flag, flag)
    if flag != "zero_first_embedding":
        tensors = load_file(folder / "module.safetensors")
        tensors[f"{name}.weight"] = torch.ones(64)
        save_file(tensors, folder / "module.safetensors")
    assert run(folder, "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 2
    error = capsys.readouterr().err
    assert reason in error and "--shape eagle" in error
    assert not (tmp_path / "h").exists()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_attention_that_the_llama_head_lacks_is_refused(tmp_path, architecture, capsys):
    base = write_base(tmp_path / "base", architecture)
    write_module(tmp_path / "m", base, norms=False)
    assert (
        run(tmp_path / "m", "--base", base.path, "--output", tmp_path / "h", "--to", "eagle") == 2
    )
    flag = {"qwen2": "qkv_bias", "qwen3": "qk_norm"}[architecture]
    assert f"({flag})" in capsys.readouterr().err


def test_arguments_that_do_not_fit_are_refused(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    write_module(tmp_path / "module", base, norms=False)
    write_head(tmp_path / "head", EAGLE, base)
    (tmp_path / "file").touch()

    def error(source, *more):
        assert run(tmp_path / source, "--base", base.path, *more) == 2
        return capsys.readouterr().err

    new = tmp_path / "new"
    assert "is a module already" in error("module", "--output", new)
    assert "starts from a module" in error("head", "--output", new, "--to", "eagle")
    assert "is there and not empty" in error("head", "--output", tmp_path / "module")
    assert "is there and not empty" in error("head", "--output", tmp_path / "file")
    before = ["--hidden-state", "before-norm"]
    assert "for heads that norm the state" in error("head", "--output", new, *before)
    assert not new.exists()
    new.mkdir()
    assert run(tmp_path / "head", "--base", base.path, "--output", new) == 0
