"""A base model in a Hugging Face directory: its config, tensors and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.architectures import BY_HF_CLASS, Architecture
from recycle_ext.checkpoint.config import ModelConfig, RopeScaling, StackConfig
from recycle_ext.checkpoint.json_file import Fields, read_json
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError
from recycle_ext.text import tokenizer
from recycle_ext.text.tokenizer import Tokenizer


def read_config(file: Path, name: str) -> ModelConfig:
    """The model's config. Raises RecycleError, which names the key, for a value that is not supported."""
    fields = Fields(file)
    get, refuse = fields.get, fields.refuse
    given = get("architectures", list, [])
    if given not in [[name] for name in BY_HF_CLASS]:
        refuse("architectures", given, "one of " + ", ".join(BY_HF_CLASS))
    architecture = BY_HF_CLASS[given[0]]
    if fields.values.get("quantization_config") is not None:
        method = get("quantization_config", dict).get("quant_method")
        refuse("quantization_config", method, "a GGUF file, or weights in 16 or 32 bits,")
    if (activation := get("hidden_act", str, "silu")) != "silu":
        refuse("hidden_act", activation, '"silu"')
    for key in ("attention_bias", "mlp_bias"):
        # Qwen2 has a bias on q, k and v even without "attention_bias"; MiMo's config.json has that key.
        if get(key, bool, False) and not (architecture.qkv_bias and key == "attention_bias"):
            refuse(key, True, "a bias on q, k and v of Qwen2, and nowhere else,")
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
        head_dim=get("head_dim", int, architecture.head_dim or hidden_size // n_heads),
        rms_norm_eps=get("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_context(fields, architecture),
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=bos if bos >= 0 else None,
        eos_token_ids=_eos_token_ids(fields),
        name=name,
    )


def weight_files(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model's directory, each with the tensors that the index places in the file."""
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
    if (file := path / "model.safetensors").is_file():
        return {file: []}
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
        # Old versions of transformers saved RoPE's table, and some a second copy of a tied head.
        if not name.endswith(".rotary_emb.inv_freq")
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
        and not name.startswith(tuple(prediction_layers))
    }


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """From tokenizer.json, tokenizer_config.json and chat_template.jinja in directory ``path``.

    Only tokenizer.json must be there. Raises RecycleError for a missing or damaged file.
    """
    config_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
    return tokenizer.from_json(
        path / "tokenizer.json",
        config=read_json(config_file) if config_file.is_file() else {},
        chat_template=template_file.read_text("utf-8") if template_file.is_file() else None,
        vocab_size=config.vocab_size,
        eos_token_ids=config.eos_token_ids,
        bos_token_id=config.bos_token_id,
    )


def read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """RoPE's base and scaling: "rope_parameters" since transformers 5, "rope_theta" and "rope_scaling" before."""
    new = fields.values.get("rope_parameters") is not None
    key = "rope_parameters" if new else "rope_scaling"
    rope = fields.get(key, dict, {})
    theta = rope.get("rope_theta", fields.get("rope_theta", float, 10000.0))
    if not isinstance(theta, (int, float)) or theta <= 0:
        fields.refuse("rope_theta", theta, "a positive number")
    part = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", float, 1.0))
    if part != 1:
        fields.refuse("partial_rotary_factor", part, "1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        fields.refuse(key, kind, '"llama3"')
    return float(theta), RopeScaling.from_json(rope, f'{fields.file}: "{key}"')


def _context(fields: Fields, architecture: Architecture) -> int:
    """Longest context in which every layer sees every position."""
    context = fields.get("max_position_embeddings", int)
    window = fields.values.get("sliding_window", architecture.sliding_window)
    # Mistral has a window unless "sliding_window" is null; the others have one if "use_sliding_window" is true.
    has_window = architecture.sliding_window or fields.get("use_sliding_window", bool, False)
    if not has_window or (architecture.sliding_window and window is None):
        return context
    return min(context, fields.get("sliding_window", int, window))


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """From config.json and generation_config.json; a chat model names the end of a turn in either."""
    ids: list[int] = []
    sources = [(fields.file, fields.values)]
    if (file := fields.file.with_name("generation_config.json")).is_file():
        sources.append((file, read_json(file)))
    for file, values in sources:
        given = values.get("eos_token_id")
        for token_id in given if isinstance(given, list) else [given]:
            if token_id is not None and not isinstance(token_id, int):
                raise RecycleError(f'{file}: "eos_token_id" is {given!r}, not a token id')
            ids += [] if token_id is None else [token_id]
    return tuple(dict.fromkeys(ids))
