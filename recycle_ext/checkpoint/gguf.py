"""A base model in a GGUF file: its config, and its tensors under Hugging Face's names."""

from __future__ import annotations

import math
import re
from pathlib import Path

from recycle_ext.checkpoint.architectures import BY_GGUF_NAME, BY_NAME
from recycle_ext.checkpoint.config import ModelConfig
from recycle_ext.checkpoint.gguf_header import GgufHeader, StoredTensor
from recycle_ext.checkpoint.tensor_source import BLOCKS, FLOAT_DTYPES, TensorSource, ggml_type_name
from recycle_ext.errors import RecycleError
from recycle_ext.text.end_tokens import end_tokens

# Types that keep their format; all others are dequantized on reading.
_KEPT_TYPES = {0: "f32", 1: "f16", 30: "bf16"} | {number: name for name, (number, *_) in BLOCKS.items()}

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tokens that end a text, by their names in metadata; "fim" tokens end a completion of code.
_END_NAMES = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


def read_config(header: GgufHeader) -> ModelConfig:
    """The model's config. Raises RecycleError, which names the key, for a value that is not supported."""
    file, get = header.file, header.get
    _check_kind(header)
    arch = get("general.architecture", str)
    if arch not in BY_GGUF_NAME:
        raise RecycleError(
            f"{file}: architecture {arch!r} is not supported; "
            f"{', '.join(sorted(BY_GGUF_NAME))} are (a Mistral file says llama)"
        )
    architecture = BY_GGUF_NAME[arch]
    if get(f"{arch}.expert_count", int, 0):
        raise RecycleError(f"{file}: mixture-of-experts models are not supported")
    hidden_size = get(f"{arch}.embedding_length", int)
    n_heads = get(f"{arch}.attention.head_count", int)
    if hidden_size < 1 or n_heads < 1:
        raise RecycleError(f"{file}: hidden size {hidden_size} with {n_heads} heads")
    head_dim = get(f"{arch}.attention.key_length", int, hidden_size // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := get(f"{arch}.{key}", int, head_dim)) != head_dim:
            raise RecycleError(f"{file}: {arch}.{key} is {size}; only {head_dim}, the head size, is")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise RecycleError(f"{file}: tensor token_embd.weight is missing")
    context = get(f"{arch}.context_length", int)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=get(f"{arch}.feed_forward_length", int),
        n_layers=get(f"{arch}.block_count", int),
        n_heads=n_heads,
        n_kv_heads=get(f"{arch}.attention.head_count_kv", int, n_heads),
        head_dim=head_dim,
        rms_norm_eps=get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_theta=get(f"{arch}.rope.freq_base", float, 10000.0),
        rope_scaling=None,
        rope_freq_factors=_rope_freq_factors(header, arch, head_dim),
        max_position_embeddings=min(context, get(f"{arch}.attention.sliding_window", int, 0) or context),
        tie_word_embeddings="output.weight" not in header.tensors,
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=header.token_id("bos"),
        eos_token_ids=_eos_token_ids(header),
        # general.name is often the training run's, not the model's.
        name=file.stem,
    )


def _check_kind(header: GgufHeader) -> None:
    """Raises RecycleError, with the remedy, for a GGUF file that is no whole language model."""
    get = header.get
    kind, arch = get("general.type", str, "model"), get("general.architecture", str, "")
    if get("split.count", int, 1) > 1:
        reason = (
            f"part {get('split.no', int, 0) + 1} of {get('split.count', int)} of a split model; "
            "join the parts first (llama-gguf-split --merge PART1 FILE, which llama.cpp brings)"
        )
    elif kind == "adapter" or "adapter.type" in header.metadata:
        reason = (
            "a LoRA adapter, not a model; merge it into its base first "
            "(llama-export-lora -m BASE --lora ADAPTER -o FILE, which llama.cpp brings)"
        )
    elif kind == "mmproj" or arch == "clip":
        reason = "the image and sound part of a model (mmproj); give the file of its language model"
    elif kind == "imatrix" or arch == "controlvector":
        reason = f"{'an importance matrix' if kind == 'imatrix' else 'a control vector'}, not a model; give the model"
    elif not header.tensors:
        reason = "a vocabulary without a model; give the file that has the tensors too"
    else:
        return
    raise RecycleError(f"{header.file}: {reason}")


def read_tensors(header: GgufHeader, config: ModelConfig) -> dict[str, TensorSource]:
    """Every weight under Hugging Face's name. Raises RecycleError for a tensor with no place in the model."""
    sources: dict[str, TensorSource] = {}
    for name, stored in header.tensors.items():
        if name == "rope_freqs.weight":
            continue
        new_name = _NAMES.get(name)
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part in _LAYER_NAMES:
                new_name = f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
        if new_name is None:
            raise RecycleError(f"{header.file}: tensor {name} has no place in a {config.architecture} model")
        is_qk = re.search(r"attn_[qk]\.weight$", name)
        interleaved = is_qk and BY_NAME[config.architecture].gguf_interleaves_qk
        head_dim = config.head_dim if interleaved else 0
        sources[new_name] = _tensor(header.file, name, new_name, stored, head_dim)
    return sources


def _rope_freq_factors(header: GgufHeader, arch: str, head_dim: int) -> tuple[float, ...] | None:
    """Divisors of the frequencies of RoPE: the tensor's, times the factor of linear scaling. None: all are 1."""
    factor = _linear_rope_factor(header, arch)
    name = "rope_freqs.weight"
    stored = header.tensors.get(name)
    if stored is None:
        return None if factor == 1 else (factor,) * (head_dim // 2)
    source = _tensor(header.file, name, name, stored)
    if source.shape != (head_dim // 2,) or source.format != "f32":
        raise RecycleError(
            f"{header.file}: tensor {name} is {source.format} {list(source.shape)}; it must be f32 {[head_dim // 2]}"
        )
    return tuple((source.to() * factor).tolist())


def _linear_rope_factor(header: GgufHeader, arch: str) -> float:
    """How much RoPE's positions are stretched. As in llama.cpp, a factor without a type is linear scaling's.

    Raises RecycleError for other kinds of scaling, and for scaling of the attention.
    """
    get, keys = header.get, f"{arch}.rope.scaling"
    kind = get(f"{keys}.type", str, "linear")
    if kind not in ("none", "linear"):
        raise RecycleError(f"{header.file}: RoPE scaling {kind!r} is not supported; Llama 3's and linear scaling are")
    if (attention := get(f"{keys}.attn_factor", float, 1.0)) != 1:
        raise RecycleError(f"{header.file}: {keys}.attn_factor is {attention}; only 1 is supported")
    factor = get(f"{keys}.factor", float, get(f"{arch}.rope.scale_linear", float, 0.0)) or 1.0
    if not 0 < factor < math.inf:
        raise RecycleError(f"{header.file}: {keys}.factor is {factor}; it must be positive")
    return 1.0 if kind == "none" else factor


def _eos_token_ids(header: GgufHeader) -> tuple[int, ...]:
    key = "tokenizer.ggml.tokens"
    tokens = header.strings(key) if key in header.metadata else []
    ids = {text: index for index, text in enumerate(tokens)}
    return end_tokens(map(header.token_id, _END_NAMES), ids.get, len(tokens))


def _tensor(
    file: Path, stored_name: str, name: str, stored: StoredTensor, interleaved_head_dim: int = 0
) -> TensorSource:
    """The tensor ``stored_name`` of ``file`` under another name.

    Raises RecycleError for a type that is not supported, an impossible shape and a truncated file.
    """
    format = _KEPT_TYPES.get(stored.ggml_type)
    if format in FLOAT_DTYPES:
        block, block_bytes = 1, FLOAT_DTYPES[format].itemsize
    elif format in BLOCKS:
        _, block, block_bytes = BLOCKS[format]
    else:
        block, block_bytes = _block(file, stored_name, stored.ggml_type)
    row = stored.shape[1] if len(stored.shape) == 2 else 1
    if len(stored.shape) not in (1, 2) or 0 in stored.shape:
        raise RecycleError(f"{file}: tensor {stored_name} has shape {list(stored.shape)}")
    if row % block:
        raise RecycleError(
            f"{file}: tensor {stored_name} has rows of {row}; {ggml_type_name(stored.ggml_type)} has blocks of {block}"
        )
    row_bytes = row // block * block_bytes
    missing = stored.offset + stored.shape[0] * row_bytes - file.stat().st_size
    if missing > 0:
        raise RecycleError(
            f"{file}: the file is truncated: tensor {stored_name} {list(stored.shape)} ends "
            f"{missing} bytes after the end of the file"
        )
    return TensorSource(
        name=name,
        shape=stored.shape,
        format=format or "f32",
        file=file,
        offset=stored.offset,
        row_bytes=row_bytes,
        ggml_type=None if format else stored.ggml_type,
        interleaved_head_dim=interleaved_head_dim,
    )


def _block(file: Path, stored_name: str, ggml_type: int) -> tuple[int, int]:
    """Values and bytes of a block of a GGUF type that is dequantized on reading."""
    # Imported here: the import takes 0.2 s, and most models never need it.
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import _type_traits

    known = {int(kind): GGML_QUANT_SIZES[kind] for kind in _type_traits}
    if ggml_type not in known:
        raise RecycleError(
            f"{file}: tensor {stored_name} has type {ggml_type_name(ggml_type)}, which is not supported; convert the file "
            "to another type (llama-quantize --allow-requantize FILE NEW Q4_K_M, which llama.cpp brings)"
        )
    return known[ggml_type]
