"""Sizes and options of a base model and of a recyclable module (the small stack of layers that drafts)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from recycle_ext.checkpoint.json_file import as_float
from recycle_ext.errors import RecycleError

_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's rule for stretching RoPE to longer contexts (Llama 3.1 model card, section "RoPE")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> RopeScaling:
        """From the parsed keys of a config.json. ``where``: how an error names them."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in names:
            if not isinstance(value := values.get(name), (int, float)) or not 0 < value <= _MAX_FLOAT32:
                raise RecycleError(f"{where}: {name} is {value!r}; it must be a positive number, which float32 holds")
        *factors, length = (values[name] for name in names)
        return cls(*map(float, factors), int(length))

    def __call__(self, inv_freq: torch.Tensor) -> torch.Tensor:
        """inv_freq [head_dim / 2] float32 -> the same, low frequencies divided by ``factor``."""
        old_length = self.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        span = self.high_freq_factor - self.low_freq_factor
        smooth = (old_length / wavelength - self.low_freq_factor) / span
        blended = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        is_low = wavelength > old_length / self.low_freq_factor
        is_high = wavelength < old_length / self.high_freq_factor
        stretched = torch.where(is_low, inv_freq / self.factor, blended)
        return torch.where(is_high, inv_freq, stretched)


def rope_inv_freq(head_dim: int, rope_theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Angles per position of each pair of dimensions, [head_dim / 2] float32 (RoFormer, eq. 15)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    inv_freq = 1.0 / (rope_theta**exponents)
    return inv_freq if scaling is None else scaling(inv_freq)


@dataclass(frozen=True)
class StackConfig:
    """A stack of Llama layers: a base model's or a module's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # Qwen3

    def inv_freq(self) -> torch.Tensor:
        """Angles per position, [head_dim / 2] float32, scaling included."""
        return rope_inv_freq(self.head_dim, self.rope_theta, self.rope_scaling)


def check_numbers(config: StackConfig, file: str) -> None:
    """Raises RecycleError for a base of RoPE or an eps that float32 cannot hold."""
    if not 0 < config.rope_theta <= _MAX_FLOAT32:
        raise RecycleError(f"{file}: rope_theta is {config.rope_theta}; it must be positive, and float32 must hold it")
    if not 0 <= config.rms_norm_eps <= _MAX_FLOAT32:
        raise RecycleError(
            f"{file}: rms_norm_eps is {config.rms_norm_eps}; it must be 0 or more, and float32 must hold it"
        )


@dataclass(frozen=True)
class ModelConfig(StackConfig):
    """A Llama-family base model."""

    architecture: str  # a name in architectures.ARCHITECTURES
    max_position_embeddings: int  # at most the sliding window, where the model has one
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]  # of a directory, without those of the tokenizer: Tokenizer.eos_token_ids has all
    name: str
    # Divisors of inv_freq that a GGUF file brings in place of the rule (rope_freqs.weight).
    rope_freq_factors: tuple[float, ...] | None = None

    def inv_freq(self) -> torch.Tensor:
        """Angles per position, [head_dim / 2] float32, scaling included."""
        inv_freq = super().inv_freq()
        if self.rope_freq_factors is not None:
            inv_freq = inv_freq / torch.tensor(self.rope_freq_factors, dtype=torch.float32, device="cpu")
        return inv_freq


# The values of --dtype: the format (weights.layout.FORMATS) of the layers' matrices, and of the embedding and the head.
DTYPES = {"f32": ("f32", "f32"), "bf16": ("bf16", "bf16"), "q8": ("q8_0", "q8_0"), "q4": ("q4_0", "q8_0")}
# The same for a module; its head may be some rows of the base's.
MODULE_DTYPES = DTYPES | {"q4": ("q4_1", "q8_0")}

# Hugging Face's names, which a module's config.json uses, and the names here.
_JSON_NAMES = {
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "attention_bias": "qkv_bias",
}
# Keys that older versions wrote.
_FORMER_NAMES = {"runs_in": "module_dtype"}


@dataclass(frozen=True)
class ModuleConfig(StackConfig):
    """A recyclable module: a short stack of layers of the base's hidden size, and how its input is computed.

    u_i = W_in [a(e(x_{i+1})) ; b(h_i)], g = layers(u), q_i = softmax(head(n(g_i))) (docs/design.md, The models).
    Each of a, b, n and the first layer's input norm is an RMSNorm or the identity, as the flags say.
    """

    embed_norm: bool  # a
    hidden_norm: bool  # b
    output_norm: bool  # n
    first_input_norm: bool
    input_bias: bool
    zero_first_embedding: bool  # row 0 sees a zero embedding, as MTP implementations do it
    draft_vocab_size: int  # 0: the module's head is the whole base head
    base_name: str
    base_fingerprint: str
    # The key of MODULE_DTYPES that the module was trained for; None: unknown.
    module_dtype: str | None = None

    @classmethod
    def like(
        cls,
        base: ModelConfig,
        n_layers: int,
        draft_vocab_size: int = 0,
        fingerprint: str = "",
        shape: str = "recycle",
        module_dtype: str | None = None,
    ) -> ModuleConfig:
        """The config of a module of the base's kind of layers.

        shape: "recycle", with all four norms, or "eagle", with none of them, as vLLM reads an EAGLE-1 head.
        """
        sizes = {field.name: getattr(base, field.name) for field in dataclasses.fields(StackConfig)}
        norms = ["embed_norm", "hidden_norm", "output_norm", "first_input_norm"]
        return cls(
            **sizes | {"n_layers": n_layers} | dict.fromkeys(norms, shape == "recycle"),
            input_bias=False,
            zero_first_embedding=False,
            draft_vocab_size=draft_vocab_size,
            base_name=base.name,
            base_fingerprint=fingerprint,
            module_dtype=module_dtype,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of config.json."""
        fields = dataclasses.asdict(self)
        for json_name, name in _JSON_NAMES.items():
            fields[json_name] = fields.pop(name)
        return {"model_type": "recycle_module", **fields}

    @classmethod
    def from_json(cls, fields: dict[str, Any], file: str) -> ModuleConfig:
        """From the parsed config.json at ``file``. Raises RecycleError for an unknown, missing or wrong key."""
        if (given := fields.get("model_type")) != "recycle_module":
            raise RecycleError(f'{file}: "model_type" is {given!r}; a module says "recycle_module"')
        names = _JSON_NAMES | _FORMER_NAMES
        values = {names.get(key, key): value for key, value in fields.items()}
        del values["model_type"]
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - types.keys()):
            raise RecycleError(f"{file}: unknown key {unknown[0]!r}")
        values = {"module_dtype": None} | values
        if missing := sorted(types.keys() - values.keys()):
            raise RecycleError(f"{file}: key {missing[0]!r} is missing")
        if values["module_dtype"] not in (None, *MODULE_DTYPES):
            raise RecycleError(
                f"{file}: module_dtype is {values['module_dtype']!r}; it must be one of {', '.join(MODULE_DTYPES)}"
            )
        for name, kind in types.items():
            allowed = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}.get(kind)
            if allowed and type(values[name]) not in allowed:
                raise RecycleError(f"{file}: {name} is {values[name]!r}; it must be {kind}")
            if kind == "float":
                values[name] = as_float(values[name])
        if (scaling := values["rope_scaling"]) is not None:
            if not isinstance(scaling, dict):
                raise RecycleError(f"{file}: rope_scaling is {scaling!r}; it must be an object")
            values["rope_scaling"] = RopeScaling.from_json(scaling, f"{file}: rope_scaling")
        return cls(**values)
