"""A base model in a Hugging Face directory: its config, tensors and tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.architectures import BY_HF_CLASS, BY_MODEL_TYPE, Architecture
from recycle_ext.checkpoint.config import ModelConfig, RopeScaling, StackConfig
from recycle_ext.checkpoint.json_file import Fields, as_float, read_json, read_text
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError
from recycle_ext.text import tokenizer
from recycle_ext.text.tokenizer import Tokenizer

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 4096  # of an embedding
_SLIDING = "sliding_attention"  # of "layer_types"
# Keys that make transformers build other layers, or read other files. A model that has one is not read as if it had none.
_UNREAD_KEYS = ("configuration_files", "per_layer_config", "transformers_weights")


def read_config(file: Path, name: str) -> ModelConfig:
    """The model's config, as transformers reads it: keys that are absent have the defaults of the model's class.

    Raises RecycleError, which names the key, for a value that is not supported.
    """
    fields = Fields(file)
    get = fields.get
    architecture = _architecture(fields)
    fields.values = architecture.defaults | fields.values
    if fields.values.get("quantization_config") is not None:
        method = get("quantization_config", dict).get("quant_method")
        fields.refuse("quantization_config", method, "a GGUF file, or weights in 16 or 32 bits,")
    for key in _UNREAD_KEYS:
        if fields.values.get(key):
            fields.refuse(key, fields.values[key], "a config.json without this key")
    check_activation(fields)
    for key in ("attention_bias", "mlp_bias"):
        # Qwen2 has its bias on q, k and v whatever the key says; so has MiMo, whose config.json has the key.
        if key in architecture.defaults and get(key, bool):
            fields.refuse(key, True, "a bias on q, k and v of Qwen2, and nowhere else,")
    hidden_size, n_heads = get("hidden_size", int), get("num_attention_heads", int)
    if hidden_size < 1 or n_heads < 1:
        raise RecycleError(f"{fields.file}: hidden_size {hidden_size} with {n_heads} heads")
    theta, scaling = read_rope(fields)
    bos = get("bos_token_id", int, -1)
    return ModelConfig(
        architecture=architecture.name,
        vocab_size=get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size", int),
        n_layers=get("num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", int, n_heads),
        head_dim=get("head_dim", int, hidden_size // n_heads),
        rms_norm_eps=get("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_context(fields, architecture),
        tie_word_embeddings=get("tie_word_embeddings", bool),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=bos if bos >= 0 else None,
        eos_token_ids=_eos_token_ids(fields),
        name=name,
    )


def _architecture(fields: Fields) -> Architecture:
    """By "architectures" and "model_type". One of them may be absent; both must mean the same."""
    classes, model_type = fields.get("architectures", list, []), fields.get("model_type", str, "")
    if classes and classes not in [[name] for name in BY_HF_CLASS]:
        fields.refuse("architectures", classes, "one of " + ", ".join(BY_HF_CLASS))
    # transformers goes by the model type alone.
    known = BY_HF_CLASS[classes[0]].model_types if classes else BY_MODEL_TYPE
    if model_type not in known and (model_type or not classes):
        beside = f' beside "architectures" {classes}' if classes else ""
        fields.refuse("model_type", fields.values.get("model_type"), f"one of {', '.join(known)}{beside}")
    return BY_MODEL_TYPE[model_type] if model_type else BY_HF_CLASS[classes[0]]


def check_activation(fields: Fields) -> None:
    """Raises RecycleError for another activation than SiLU, which is also called swish."""
    if (activation := fields.get("hidden_act", str, "silu")) not in ("silu", "swish"):
        fields.refuse("hidden_act", activation, '"silu"')


def weight_files(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model's directory, each with the tensors that the index places in the file.

    A whole model.safetensors counts before an index, as in transformers: the index may be left from other weights.
    """
    if (file := path / "model.safetensors").is_file():
        return {file: []}
    index_file = path / "model.safetensors.index.json"
    if index_file.is_file():
        placed = read_json(index_file).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise RecycleError(f'{index_file}: "weight_map" must name the file of each tensor')
        files: dict[Path, list[str]] = {}
        for name, file_name in sorted(placed.items(), key=lambda item: (item[1], item[0])):
            # Only the file's name counts: a file outside this directory is not the model's.
            files.setdefault(path / Path(file_name).name, []).append(name)
        return files
    if any(path.glob("*.bin")):
        raise RecycleError(
            f"{path}: the weights are in .bin files, which can run code when they are opened and are "
            "not read; convert them to model.safetensors"
        )
    raise RecycleError(f"{path}: there is no model.safetensors and no index of its parts")


def llama_json(config: StackConfig) -> dict[str, Any]:
    """The config.json of a Llama of these sizes, without architecture, context length and token ids."""
    names = ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "rope_theta"]
    scaling = config.rope_scaling
    return {
        "model_type": "llama",
        **{name: getattr(config, name) for name in names},
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "hidden_act": "silu",
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
        "torch_dtype": "bfloat16",
    }


def read_tensors(path: Path, config: ModelConfig) -> dict[str, TensorSource]:
    """Every weight of the base model in directory ``path``. Raises RecycleError for a missing tensor or file."""
    tensors: dict[str, TensorSource] = {}
    for file, promised in weight_files(path).items():
        tensors |= safetensors_file.read_tensors(file)
        if missing := [name for name in promised if name not in tensors]:
            index_file = path / "model.safetensors.index.json"
            raise RecycleError(f"{file}: tensor {missing[0]} is missing, which {index_file} promises")
    # Prediction layers are not the base model's (recycle_ext.convert reads them): MiMo's and Qwen's have names of
    # their own, DeepSeek's is one layer more than the config says.
    prediction_layers = ["model.mtp_layers.", "mtp."]
    next_layer = f"model.layers.{config.n_layers}."
    if f"{next_layer}eh_proj.weight" in tensors:
        prediction_layers.append(next_layer)
    return {
        name: source
        for name, source in tensors.items()
        # Old versions of transformers saved RoPE's table.
        if not name.endswith(".rotary_emb.inv_freq") and not name.startswith(tuple(prediction_layers))
    }


def resolve_tied_head(
    config: ModelConfig, tensors: dict[str, TensorSource]
) -> tuple[ModelConfig, dict[str, TensorSource]]:
    """The config and the tensors of a model whose config.json ties the head to the embedding, as transformers ties them.

    A head that equals the embedding is left out. A head that differs is the model's own, whatever the config says. A
    head without an embedding is both.
    """
    embedding, head = tensors.get(_EMBEDDING), tensors.get(_HEAD)
    if not config.tie_word_embeddings or head is None:
        return config, tensors
    if embedding is not None and not _equal(embedding, head):
        return dataclasses.replace(config, tie_word_embeddings=False), tensors
    rest = {name: source for name, source in tensors.items() if name not in (_EMBEDDING, _HEAD)}
    return config, rest | {_EMBEDDING: embedding or dataclasses.replace(head, name=_EMBEDDING)}


def _equal(a: TensorSource, b: TensorSource) -> bool:
    """Whether all values are the same. Some rows at a time: an embedding can have gigabytes."""
    starts = range(0, a.shape[0], _ROWS_AT_ONCE)
    return a.shape == b.shape and all(
        torch.equal(*(each.float_rows(start, min(start + _ROWS_AT_ONCE, a.shape[0])) for each in (a, b)))
        for start in starts
    )


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja in directory ``path``.

    Only tokenizer.json must be there. Raises RecycleError for a missing or damaged file.
    """
    settings, named = (
        read_json(file) if (file := path / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    template_file = path / "chat_template.jinja"
    return tokenizer.from_json(
        path / "tokenizer.json",
        config=settings,
        special_tokens_map=named,
        chat_template=read_text(template_file) if template_file.is_file() else None,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
    )


def read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: "rope_parameters" since transformers 5, "rope_theta" and "rope_scaling" before.

    Where a config.json has both, "rope_scaling" counts, as in transformers.
    """
    key = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    rope = fields.get(key, dict, {})
    if any(isinstance(value, dict) for value in rope.values()):
        fields.refuse(key, rope, "one set of values, the same for all kinds of layers,")
    theta = rope.get("rope_theta", fields.values.get("rope_theta", 10000.0))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        fields.refuse("rope_theta", theta, "a positive number")
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", float, 1.0))
    if part != 1:
        fields.refuse("partial_rotary_factor", part, "1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return as_float(theta), None
    if kind != "llama3":
        fields.refuse(key, kind, '"llama3"')
    # As in transformers: the length beside "rope_scaling" counts before the one inside, and the default is the context.
    name = "original_max_position_embeddings"
    length = fields.values.get(name, rope.get(name, fields.values.get("max_position_embeddings")))
    return as_float(theta), RopeScaling.from_json(rope | {name: length}, f'{fields.file}: "{key}"')


def _context(fields: Fields, architecture: Architecture) -> int:
    """Longest context in which every layer sees every position: at most the window, where a layer has one."""
    context, n_layers = fields.get("max_position_embeddings", int), fields.get("num_hidden_layers", int)
    kinds = fields.get("layer_types", list, [])
    if "layer_types" in fields.values and architecture.name == "mistral":
        # transformers reads such a model as another architecture.
        fields.refuse("layer_types", kinds, "a Mistral without this key")
    if kinds and (len(kinds) != n_layers or any(kind not in ("full_attention", _SLIDING) for kind in kinds)):
        fields.refuse("layer_types", kinds, f"full_attention or {_SLIDING} for each of {n_layers} layers")
    # Llama has no window, every layer of Mistral has one, and Qwen's config says which layers have one, if any.
    defaults = architecture.defaults
    has_window = "sliding_window" in defaults
    if "use_sliding_window" in defaults:
        has_window = fields.get("use_sliding_window", bool)
    has_window = has_window and fields.values["sliding_window"] is not None
    first = fields.get("max_window_layers", int) if "max_window_layers" in defaults else 0
    if _SLIDING in kinds and not has_window:
        fields.refuse("layer_types", kinds, f"{_SLIDING} with a window (sliding_window, use_sliding_window)")
    if not has_window or (_SLIDING not in kinds if kinds else n_layers <= first):
        return context
    if (window := fields.get("sliding_window", int)) < 1:
        fields.refuse("sliding_window", window, "a positive number, or null,")
    return min(context, window)


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """From config.json and generation_config.json; the tokenizer adds the ends that it knows (text.end_tokens)."""
    ids: list[int] = []
    sources = [(fields.file, fields.values)]
    if (file := fields.file.with_name("generation_config.json")).is_file():
        sources.append((file, read_json(file)))
    for file, values in sources:
        given = values.get("eos_token_id")
        for token_id in given if isinstance(given, list) else [given]:
            if token_id is not None and type(token_id) is not int:
                raise RecycleError(f'{file}: "eos_token_id" is {given!r}, not a token id')
            ids += [] if token_id is None else [token_id]
    return tuple(dict.fromkeys(ids))
