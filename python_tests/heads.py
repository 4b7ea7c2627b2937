"""Heads of other projects for tests: each format written out plainly, and random heads on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from model_files import WEIGHTS
from models import random_tensors, reference_base
from safetensors.torch import save_file

from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.shapes import layer_shapes
from recycle_ext.convert import __main__ as command

EPS = 1e-5


class Layout:
    """A head format: its tensor names, and its formula as the authors write it."""

    def __init__(self, layer, proj, norms, config, hidden_first=False, zero_first=False, norm_offset=0.0):
        self.layer = layer  # prefix of the layer's tensors
        self.proj = proj
        self.norms = norms  # of the embedding, of the state, of the output
        self.config = config
        self.hidden_first = hidden_first
        self.zero_first = zero_first
        self.norm_offset = norm_offset  # norms multiply by norm_offset + weight

    def norm(self, x, weight):
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (self.norm_offset + weight)

    def attention(self, t, x, sizes):
        """Causal attention with RoPE, one head at a time, [T, d] -> [T, d]."""
        size, group = sizes.head_dim, sizes.n_heads // sizes.n_kv_heads
        part = f"{self.layer}self_attn."
        q, k, v = (F.linear(x, t[f"{part}{n}_proj.weight"], t.get(f"{part}{n}_proj.bias")) for n in "qkv")
        inv_freq = (1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)).double()
        angles = torch.arange(len(x)).double()[:, None] * inv_freq
        causal = torch.ones(len(x), len(x)).tril().log()

        def rotated(heads, i, norm):
            one = heads[:, i * size : (i + 1) * size]
            if f"{part}{norm}.weight" in t:
                one = self.norm(one, t[f"{part}{norm}.weight"])
            a, b = one[:, : size // 2], one[:, size // 2 :]
            return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=1)

        out = []
        for i in range(sizes.n_heads):
            scores = rotated(q, i, "q_norm") @ rotated(k, i // group, "k_norm").T / size**0.5
            values = v[:, i // group * size : (i // group + 1) * size]
            out.append((scores + causal).softmax(-1) @ values)
        return F.linear(torch.cat(out, dim=1), t[f"{part}o_proj.weight"])

    def rows(self, t, embedding, hidden, sizes):
        """embedding e(x_{i+1}) and hidden h_i, [T, d] float64 each -> g and lm_head's input, [T, d] each."""
        if self.zero_first:
            embedding = torch.cat((torch.zeros_like(embedding[:1]), embedding[1:]))
        if self.norms:
            embedding = self.norm(embedding, t[self.norms[0]])
            hidden = self.norm(hidden, t[self.norms[1]])
        pair = (hidden, embedding) if self.hidden_first else (embedding, hidden)
        x = F.linear(torch.cat(pair, dim=1), t[self.proj], t.get(self.proj.replace(".weight", ".bias")))
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
QWEN_NEXT = Layout("mtp.layers.0.", "mtp.fc.weight", QWEN_NORMS, {"model_type": "qwen3_next"}, norm_offset=1.0)


def write_head(folder, layout, base, **config):
    """A random head for ``base``, alone in a directory; in bf16, which a module keeps bit by bit."""
    folder.mkdir()
    b = base.config
    sizes = ModuleConfig.like(b, 1)
    shapes = layer_shapes(sizes, layout.layer, input_norm=layout.norms is not None)
    shapes |= {layout.proj: (b.hidden_size, 2 * b.hidden_size)}
    shapes |= dict.fromkeys(layout.norms or [], (b.hidden_size,))
    if layout.norms is None:
        shapes[layout.proj.replace(".weight", ".bias")] = (b.hidden_size,)
    tensors = random_tensors(shapes, seed=3)
    if layout.norm_offset:
        # Multiples of 1/64: bfloat16 represents both w and 1 + w.
        norms = [n for n in tensors if n.endswith("norm.weight") or n in layout.norms]
        tensors |= {name: ((tensors[name] % 1) * 64).round() / 64 for name in norms}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS)
    fields = json.loads(Path(base.path, "config.json").read_text())
    fields |= {"num_hidden_layers": 1 if layout is EAGLE else b.n_layers} | layout.config | config
    (folder / "config.json").write_text(json.dumps(fields))
    return tensors


def run(*arguments):
    """Exit status of python -m recycle_ext.convert."""
    return command.main([str(argument) for argument in arguments])


def inputs(base, rows=7):
    """Embeddings e(x_{i+1}), and the states before and after the base's final norm, float64 [T, d] each."""
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
