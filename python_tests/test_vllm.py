"""An exported module in a real vLLM: the text of vLLM without the module, and the acceptance of recycle_ext.

Opt-in: `pytest -m vllm`, with vLLM in an environment of its own (CONTRIBUTING.md). RECYCLE_VLLM_PYTHON is that
environment's Python. RECYCLE_EAGLE_MODULE is the module to export; without it, the test fits a module in closed form.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from recycle_ext.checkpoint.base_model import open_checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.module import open_module, save_module
from recycle_ext.convert import __main__ as convert
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.reference.model import BaseModel, RecyclableModule
from recycle_ext.weights.pack import pack_model

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
PROMPTS = [
    "Once upon a time, in a small village by the sea,",
    "The capital of France is",
    "Q: What is the boiling point of water?\nA:",
    "Ingredients: flour, sugar, two eggs",
]
NEW_TOKENS = 64
TEXT = ["README", "CONTRIBUTING", "CHANGELOG"]  # W_in is fitted on these pages


def vllm(model, drafter, prompts):
    """vLLM's continuations (token ids), and its counts of draft tokens and of accepted ones."""
    done = subprocess.run(
        [os.environ.get("RECYCLE_VLLM_PYTHON", sys.executable), HERE / "vllm_run.py", model, drafter],
        input=json.dumps({"prompts": prompts, "new_tokens": NEW_TOKENS}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def base(default_model, tmp_path_factory):
    """SmolLM2 as a Hugging Face directory in bf16, which vLLM and recycle_ext read alike."""
    gguf = open_checkpoint(default_model)
    config, folder = gguf.config, tmp_path_factory.mktemp("smollm2")
    names = ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps"]
    names += ["rope_theta", "max_position_embeddings", "tie_word_embeddings"]
    fields = {name: getattr(config, name) for name in names} | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    # Norms stay float32, so that the directory has the fingerprint of the file it came from.
    tensors = {
        name: source.to(torch.float32 if name.endswith("norm.weight") else torch.bfloat16)
        for name, source in gguf.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def tokenizer(default_model):
    """The default model's; the directory ``base`` has no tokenizer."""
    return open_checkpoint(default_model).tokenizer


@pytest.fixture(scope="module")
def module(base, tokenizer, tmp_path_factory):
    """RECYCLE_EAGLE_MODULE, or W_in by least squares, h_{i+1} from [e(x_{i+1}) ; h_i], before a layer with small outputs."""
    if given := os.environ.get("RECYCLE_EAGLE_MODULE"):
        return Path(given)
    reference = BaseModel(base.config)
    reference.load_state_dict(base.state_dict())
    text = "".join((HERE.parent / f"{name}.md").read_text("utf-8") for name in TEXT)
    tokens = torch.tensor(tokenizer.encode(text)[:4096])
    pairs, targets = [], []
    with torch.no_grad():
        for part in tokens.split(256):
            hidden = reference(part[None])[0]
            pairs.append(torch.cat((reference.model.embed_tokens(part[1:]), hidden[:-1]), dim=1))
            targets.append(hidden[1:])
    x, y = torch.cat(pairs).double(), torch.cat(targets).double()
    ridge = 0.01 * x.square().mean() * len(x) * torch.eye(x.shape[1])
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ y).T

    config = ModuleConfig.like(base.config, 1, fingerprint=base.fingerprint)
    no_norms = ["embed_norm", "hidden_norm", "output_norm", "first_input_norm"]
    config = dataclasses.replace(config, **dict.fromkeys(no_norms, False), input_bias=False)
    torch.manual_seed(0)
    tensors = {name: t.detach() for name, t in RecyclableModule(config).state_dict().items()}
    tensors["input_proj.weight"] = weight
    for name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
        tensors[f"layers.0.{name}"] *= 0.3
    folder = tmp_path_factory.mktemp("module")
    save_module(folder, config, tensors)
    return folder


def here(base, module, prompts):
    """The continuations of recycle_ext, and its counts: ids, drafted, accepted."""
    packed = pack_model(base, open_module(module, base), "f32")
    ids, drafted, accepted = [], 0, 0
    for prompt in prompts:
        decoder = Decoder(packed, "verify", 1, capacity=512, cache_dtype=torch.float32)
        steps = list(decoder.decode(prompt, NEW_TOKENS))
        ids.append([token for step in steps for token in step.tokens])
        drafted += sum(step.drafted for step in steps)
        accepted += sum(step.accepted for step in steps)
    return ids, drafted, accepted


def test_vllm_with_exported_module_equals_vllm_alone(base, tokenizer, module, tmp_path, capsys):
    head = tmp_path / "head"
    assert convert.main([str(module), "--base", base.path, "--output", str(head), "--to", "eagle"]) == 0
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = vllm(base.path, "none", prompts)
    together = vllm(base.path, head, prompts)
    ids, drafted, accepted = here(base, module, prompts)
    theirs = together["accepted"] / together["drafted"]
    with capsys.disabled():
        print(
            f"\nvLLM: {theirs:.1%} of {together['drafted']} draft tokens accepted; "
            f"recycle_ext: {accepted / drafted:.1%} of {drafted}"
        )
    assert together["ids"] == alone["ids"] == ids
    assert accepted > 0
    # vLLM's last step can pass the last token, so its counts can end later.
    assert abs(theirs - accepted / drafted) < 0.03
