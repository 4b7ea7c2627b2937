"""Small random models for tests, written to disk in the formats of real checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.module import ModuleCheckpoint, open_module, save_module
from recycle_ext.reference.model import BaseModel, RecyclableModule

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def write_base(
    folder: Path,
    architecture: str = "llama",
    seed: int = 0,
    vocab_size: int = 101,
    hidden_size: int = 64,
    intermediate_size: int = 96,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool = True,
    context: int = 512,
) -> Checkpoint:
    """Writes a random base model as a Hugging Face directory, and opens it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = _shapes(architecture, config)
    save_file(random_tensors(shapes, seed), folder / "model.safetensors")
    return open_checkpoint(folder)


def _shapes(architecture: str, config: dict) -> dict[str, tuple[int, ...]]:
    """Tensor names of Hugging Face, and their shapes."""
    d, inner = config["hidden_size"], config["intermediate_size"]
    size = config["head_dim"]
    q, kv = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "self_attn.q_proj.weight": (q, d),
            "self_attn.k_proj.weight": (kv, d),
            "self_attn.v_proj.weight": (kv, d),
            "self_attn.o_proj.weight": (d, q),
            "mlp.gate_proj.weight": (inner, d),
            "mlp.up_proj.weight": (inner, d),
            "mlp.down_proj.weight": (d, inner),
        }
        if architecture == "qwen2":
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,)}
            layer |= {"self_attn.v_proj.bias": (kv,)}
        if architecture == "qwen3":
            layer |= {"self_attn.q_norm.weight": (size,), "self_attn.k_norm.weight": (size,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    """Random values of a scale that keeps activations near one, and logits further apart than rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        is_norm = name.endswith("norm.weight")
        scale = 0.2 if is_norm or len(shape) == 1 else 1.5 / shape[-1] ** 0.5
        tensors[name] = values * scale + (1.0 if is_norm else 0.0)
    return tensors


def write_module(
    folder: Path,
    base: Checkpoint,
    seed: int = 1,
    n_layers: int = 1,
    norms: bool = True,
    input_bias: bool = False,
    zero_first_embedding: bool = False,
    draft_vocab_size: int = 0,
    like_base: bool = False,
) -> ModuleCheckpoint:
    """Writes a random recyclable module for ``base``, and opens it.

    A random module's draft tokens are hardly ever accepted. like_base (with norms): the module is the base's last
    layer, applied to the next token's embedding; some of its draft tokens are accepted.
    """
    b = base.config
    config = ModuleConfig(
        vocab_size=b.vocab_size,
        hidden_size=b.hidden_size,
        intermediate_size=b.intermediate_size,
        n_layers=n_layers,
        n_heads=b.n_heads,
        n_kv_heads=b.n_kv_heads,
        head_dim=b.head_dim,
        rms_norm_eps=b.rms_norm_eps,
        rope_theta=b.rope_theta,
        rope_scaling=b.rope_scaling,
        qkv_bias=b.qkv_bias,
        qk_norm=b.qk_norm,
        embed_norm=norms,
        hidden_norm=norms,
        output_norm=norms,
        first_input_norm=norms,
        input_bias=input_bias,
        zero_first_embedding=zero_first_embedding,
        draft_vocab_size=draft_vocab_size,
        base_name=b.name,
        base_fingerprint=base.fingerprint,
    )
    shapes = {name: tuple(t.shape) for name, t in RecyclableModule(config).state_dict().items()}
    tensors = random_tensors(shapes, seed)
    if like_base:
        _imitate(tensors, base)
    if draft_vocab_size:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randperm(b.vocab_size, generator=generator)[:draft_vocab_size]
        tensors["draft_vocab"] = ids.sort().values
    save_module(folder, config, tensors)
    return open_module(folder, base)


def _imitate(tensors: dict[str, torch.Tensor], base: Checkpoint) -> None:
    """Replaces the module by the base's last layer, applied to the next token's embedding alone."""
    d = base.config.hidden_size
    last = f"model.layers.{base.config.n_layers - 1}."
    for name, source in base.tensors.items():
        if name.startswith(last):
            tensors["layers.0." + name.removeprefix(last)] = source.to()
    tensors["input_proj.weight"] = torch.cat((torch.eye(d), torch.zeros(d, d)), dim=1)
    tensors["embed_norm.weight"] = torch.ones(d)
    tensors["output_norm.weight"] = base.tensors["model.norm.weight"].to()


def reference_base(base: Checkpoint, dtype: torch.dtype = torch.float64) -> BaseModel:
    """The base model in plain PyTorch."""
    model = BaseModel(base.config)
    model.load_state_dict(base.state_dict())
    return model.to(dtype).eval()


def reference_module(module: ModuleCheckpoint, dtype: torch.dtype = torch.float64) -> RecyclableModule:
    """The module in plain PyTorch."""
    model = RecyclableModule(module.config)
    model.load_state_dict(module.state_dict())
    return model.to(dtype).eval()


def write_byte_tokenizer(folder: Path) -> int:
    """Writes a tokenizer of single bytes for the base in ``folder``; returns the size of its vocabulary, 258."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *sorted(alphabet)])}
    backend = Backend(tokenizer_models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)
