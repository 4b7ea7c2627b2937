"""The architectures that are read, one row each. A new one is a row here, plus what no other architecture has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """How an architecture is named, and how its layers and files differ from Llama's."""

    name: str  # ModelConfig.architecture
    hf_classes: tuple[str, ...]  # "architectures" in config.json
    model_types: tuple[str, ...]  # "model_type" in config.json
    gguf_name: str  # general.architecture in a GGUF file
    qkv_bias: bool = False
    qk_norm: bool = False
    # llama.cpp stores the rows of q and k for interleaved RoPE (TensorSource.interleaved_head_dim).
    gguf_interleaves_qk: bool = False
    # What the transformers class assumes where config.json is silent. A key with a None default is not listed, and
    # neither are token ids: those of the class are seldom the model's.
    defaults: Mapping[str, Any] = field(default_factory=dict)


_DEFAULTS = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA = _DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 11008,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = _DEFAULTS | {
    "vocab_size": 32000,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}
_QWEN = _DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QWEN3 = _QWEN | {"head_dim": 128, "attention_bias": False}

ARCHITECTURES = (
    # The first conversions of Llama wrote LLaMA.
    Architecture(
        "llama",
        ("LlamaForCausalLM", "LLaMAForCausalLM"),
        ("llama",),
        "llama",
        gguf_interleaves_qk=True,
        defaults=_LLAMA,
    ),
    Architecture("mistral", ("MistralForCausalLM",), ("mistral",), "llama", defaults=_MISTRAL),
    # MiMo-7B is a Qwen2 with a prediction layer, which recycle_ext.convert reads.
    Architecture(
        "qwen2", ("Qwen2ForCausalLM", "MiMoForCausalLM"), ("qwen2", "mimo"), "qwen2", qkv_bias=True, defaults=_QWEN
    ),
    Architecture("qwen3", ("Qwen3ForCausalLM",), ("qwen3",), "qwen3", qk_norm=True, defaults=_QWEN3),
)

BY_NAME = {row.name: row for row in ARCHITECTURES}
BY_HF_CLASS = {name: row for row in ARCHITECTURES for name in row.hf_classes}
BY_MODEL_TYPE = {name: row for row in ARCHITECTURES for name in row.model_types}
# A GGUF file does not tell Mistral from Llama: the first row of a name counts.
BY_GGUF_NAME = {row.gguf_name: row for row in reversed(ARCHITECTURES)}
