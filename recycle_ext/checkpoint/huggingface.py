"""A base model in a Hugging Face directory: config.json and safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recycle_ext.checkpoint import safetensors as safetensors_file
from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig, RopeScaling
from recycle_ext.checkpoint.json_file import read_json
from recycle_ext.checkpoint.tensor_source import TensorSource
from recycle_ext.errors import RecycleError

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MiMoForCausalLM": "qwen2",  # MiMo-7B; its prediction layer is for recycle_ext.convert
}
# What the transformers classes assume where config.json is silent.
_MISTRAL_SLIDING_WINDOW = 4096
_QWEN3_HEAD_DIM = 128


class Fields:
    """config.json with types checked."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values = read_json(file)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """Value of a key; null and absent are the same."""
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise RecycleError(f'{self.file}: "{key}" is missing')
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise RecycleError(f'{self.file}: "{key}" is {value!r}, not {kind.__name__}')
        return value

    def refuse(self, key: str, value: Any, needed: str) -> None:
        """Raises the RecycleError that says what a key is and what it would have to be."""
        raise RecycleError(
            f'{self.file}: "{key}" is {value!r}, which is not supported; {needed} is'
        )


def read_config(file: Path, name: str) -> ModelConfig:
    """Sizes of the model that a config.json describes, or a RecycleError naming what is not supported."""
    fields = Fields(file)
    get, refuse = fields.get, fields.refuse
    given = get("architectures", list, [])
    if given not in [[name] for name in _ARCHITECTURES]:
        refuse("architectures", given, "one of " + ", ".join(_ARCHITECTURES))
    architecture = _ARCHITECTURES[given[0]]
    if fields.values.get("quantization_config") is not None:
        method = get("quantization_config", dict).get("quant_method")
        refuse("quantization_config", method, "a GGUF file, or weights in 16 or 32 bits,")
    if (activation := get("hidden_act", str, "silu")) != "silu":
        refuse("hidden_act", activation, '"silu"')
    for key in ("attention_bias", "mlp_bias"):
        # Qwen2's bias on q, k and v is there whatever "attention_bias" says, and MiMo says it.
        if get(key, bool, False) and (architecture, key) != ("qwen2", "attention_bias"):
            refuse(key, True, "a bias on q, k and v of Qwen2, and nowhere else,")
    hidden_size, n_heads = get("hidden_size", int), get("num_attention_heads", int)
    if hidden_size < 1 or n_heads < 1:
        raise RecycleError(f"{fields.file}: hidden_size {hidden_size} with {n_heads} heads")
    default_head_dim = _QWEN3_HEAD_DIM if architecture == "qwen3" else hidden_size // n_heads
    theta, scaling = read_rope(fields)
    bos = get("bos_token_id", int, -1)
    return ModelConfig(
        architecture=architecture,
        vocab_size=get("vocab_size", int),
        hidden_size=hidden_size,
        intermediate_size=get("intermediate_size", int),
        n_layers=get("num_hidden_layers", int),
        n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", int, n_heads),
        head_dim=get("head_dim", int, default_head_dim),
        rms_norm_eps=get("rms_norm_eps", float),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_context(fields, architecture),
        tie_word_embeddings=get("tie_word_embeddings", bool, False),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        bos_token_id=bos if bos >= 0 else None,
        eos_token_ids=_eos_token_ids(fields),
        name=name,
    )


def weight_files(path: Path) -> dict[Path, list[str]]:
    """The safetensors files of a model's directory, each with the tensors that an index promises in it."""
    index_file = path / "model.safetensors.index.json"
    if index_file.is_file():
        placed = read_json(index_file).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise RecycleError(f'{index_file}: "weight_map" must name the file of each tensor')
        files: dict[Path, list[str]] = {}
        for name, file_name in sorted(placed.items(), key=lambda item: (item[1], item[0])):
            # Only the name counts: a file outside this directory is none of the model's.
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


def llama_json(config: ModelConfig | ModuleConfig) -> dict[str, Any]:
    """What a Llama of these sizes says in config.json, but for its architecture, context and tokens."""
    scaling = config.rope_scaling
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **vars(scaling)},
        "torch_dtype": "bfloat16",
    }


def read_tensors(path: Path, config: ModelConfig) -> dict[str, TensorSource]:
    """Every weight of the base model in directory ``path``."""
    tensors: dict[str, TensorSource] = {}
    for file, promised in weight_files(path).items():
        tensors |= safetensors_file.read_tensors(file)
        if missing := [name for name in promised if name not in tensors]:
            index_file = path / "model.safetensors.index.json"
            raise RecycleError(
                f"{file}: tensor {missing[0]} is missing, which {index_file} promises"
            )
    # Prediction layers, which recycle_ext.convert makes a module of: MiMo's and Qwen's by their names,
    # DeepSeek's as one layer more than the model has.
    not_the_base = ["model.mtp_layers.", "mtp."]
    next_layer = f"model.layers.{config.n_layers}."
    if f"{next_layer}eh_proj.weight" in tensors:
        not_the_base.append(next_layer)
    return {
        name: source
        for name, source in tensors.items()
        # Tables that old versions of transformers saved, and a second copy of a tied head.
        if not name.endswith(".rotary_emb.inv_freq")
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
        and not name.startswith(tuple(not_the_base))
    }


def read_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base of RoPE and scaling: "rope_parameters" since transformers 5, two keys before."""
    new = fields.values.get("rope_parameters") is not None
    key = "rope_parameters" if new else "rope_scaling"
    rope = fields.get(key, dict, {})
    theta = rope.get("rope_theta", fields.get("rope_theta", float, 10000.0))
    if not isinstance(theta, (int, float)) or theta <= 0:
        fields.refuse("rope_theta", theta, "a positive number")
    if (
        part := rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", float, 1.0))
    ) != 1:
        fields.refuse("partial_rotary_factor", part, "1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        fields.refuse(key, kind, '"llama3"')
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in names:
        if not isinstance(rope.get(name), (int, float)) or rope[name] <= 0:
            raise RecycleError(
                f'{fields.file}: "{key}": {name} is {rope.get(name)!r}, not a number'
            )
    return float(theta), RopeScaling(
        *(float(rope[name]) for name in names[:3]), int(rope[names[3]])
    )


def _context(fields: Fields, architecture: str) -> int:
    """Longest context in which every layer sees every position."""
    context = fields.get("max_position_embeddings", int)
    window = fields.values.get("sliding_window")
    if architecture == "mistral":
        if "sliding_window" not in fields.values:
            window = _MISTRAL_SLIDING_WINDOW
        used = window is not None
    else:
        used = fields.get("use_sliding_window", bool, False)
    return min(context, fields.get("sliding_window", int, window)) if used else context


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    """From config.json and generation_config.json, where chat models name the end of a turn."""
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
