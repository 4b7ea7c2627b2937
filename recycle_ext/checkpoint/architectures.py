"""The architectures that are read, one row each. A new one is a row here, plus what no other architecture has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """How an architecture is named, and how its layers and files differ from Llama's."""

    name: str  # ModelConfig.architecture
    hf_classes: tuple[str, ...]  # "architectures" in config.json
    gguf_name: str  # general.architecture in a GGUF file
    qkv_bias: bool = False
    qk_norm: bool = False
    # llama.cpp stores the rows of q and k for interleaved RoPE (TensorSource.interleaved_head_dim).
    gguf_interleaves_qk: bool = False
    # The defaults of the transformers classes where config.json is silent; None: hidden_size / heads, no window.
    head_dim: int | None = None
    sliding_window: int | None = None


ARCHITECTURES = (
    Architecture("llama", ("LlamaForCausalLM",), "llama", gguf_interleaves_qk=True),
    Architecture("mistral", ("MistralForCausalLM",), "llama", sliding_window=4096),
    # MiMo-7B is a Qwen2 with a prediction layer, which recycle_ext.convert reads.
    Architecture("qwen2", ("Qwen2ForCausalLM", "MiMoForCausalLM"), "qwen2", qkv_bias=True),
    Architecture("qwen3", ("Qwen3ForCausalLM",), "qwen3", qk_norm=True, head_dim=128),
)

BY_NAME = {row.name: row for row in ARCHITECTURES}
BY_HF_CLASS = {name: row for row in ARCHITECTURES for name in row.hf_classes}
# A GGUF file does not tell Mistral from Llama: the first row of a name counts.
BY_GGUF_NAME = {row.gguf_name: row for row in reversed(ARCHITECTURES)}
