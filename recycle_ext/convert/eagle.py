"""EAGLE-1 heads for Llama bases (Li et al. 2024, arXiv 2401.15077), both ways.

    u_i = fc [e(x_{i+1}) ; h_i] (+ bias),  g = layers(u),  q_i = softmax(lm_head(g_i))

h is the base's state after its final norm, and for a further draft token g takes the place of h, as in a module. There
is no norm on e, on h, before the first layer's attention or before lm_head (EAGLE's cnets1.py and ea_model.py; vLLM's
and SGLang's llama_eagle.py). So a module without the four norms is an EAGLE-1 head under other names, for any number
of draft tokens.

An exported directory has the files that vLLM 0.32 (``speculative_config`` method "eagle") and SGLang
(``--speculative-algorithm EAGLE``) read: config.json and model.safetensors. Both take the embedding and lm_head from
the base. vLLM looks for the architecture LlamaForCausalLM, SGLang for LlamaForCausalLMEagle: the export lists both.
SGLang's fc always has a bias, which stays random if the file has none, so the export has a bias of zeros; vLLM's fc
has no bias, and vLLM ignores the tensor.
"""

from __future__ import annotations

from typing import Any

import torch

from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModuleConfig
from recycle_ext.checkpoint.huggingface import llama_json
from recycle_ext.checkpoint.module import ModuleCheckpoint
from recycle_ext.checkpoint.shapes import module_shapes
from recycle_ext.convert.head import Head, layer_flags, refuse_other_layers
from recycle_ext.convert.source import Source
from recycle_ext.errors import RecycleError

_EAGLE3 = ("midlayer.", "d2t", "t2d")
_HOW = "`python -m recycle_ext.train --shape eagle --module-dtype bf16` trains one that EAGLE-1 can hold"


def found_in(source: Source) -> bool:
    """Whether the tensors have EAGLE's names, of EAGLE-1 or of EAGLE-3, which ``to_module`` refuses with a reason."""
    return any(name.removeprefix("model.") == "fc.weight" for name in source.names)


def to_module(source: Source, base: Checkpoint, before_norm: bool) -> Head:
    """As ``recycle_ext.convert.to_module``."""
    # Some conversions keep the prefix of the class around the head.
    prefix = "model." if "model.fc.weight" in source.names else ""
    names = {name.removeprefix(prefix): name for name in source.names}
    if eagle3 := [names[name] for name in names if name.startswith(_EAGLE3)]:
        raise RecycleError(
            f"{source.path}: an EAGLE-3 head (tensor {eagle3[0]}): it takes the states of three of the "
            "base's layers, and a module takes the last layer's"
        )
    if before_norm:
        raise RecycleError(
            f"{source.path}: --hidden-state before-norm is for heads that norm the state themselves, as "
            "MTP layers do; an EAGLE-1 head takes the state as it is, whose size cannot be computed from the "
            "state after the base's final norm"
        )
    refuse_other_layers(source, list(names))
    source.require_same(names.get("embed_tokens.weight", ""), base, "model.embed_tokens.weight")
    source.require_same(names.get("lm_head.weight", ""), base, "lm_head.weight")
    ours = {
        name.replace("fc.", "input_proj.", 1) if name.startswith("fc.") else name: theirs
        for name, theirs in names.items()
        if name not in ("embed_tokens.weight", "lm_head.weight") and not name.endswith("rotary_emb.inv_freq")
    }
    n_layers = source.fields.get("num_hidden_layers", int)
    if not 1 <= n_layers <= len(ours):
        raise RecycleError(f"{source.fields.file}: num_hidden_layers is {n_layers}, for {len(ours)} tensors")
    config = ModuleConfig(
        **source.sizes(base),
        **layer_flags(ours),
        n_layers=n_layers,
        embed_norm=False,
        hidden_norm=False,
        output_norm=False,
        first_input_norm=False,
        input_bias="input_proj.bias" in ours,
        zero_first_embedding=False,
    )
    return Head(config, source.read(ours, module_shapes(config)), "EAGLE-1")


def from_module(
    module: ModuleCheckpoint, base: Checkpoint
) -> tuple[dict[str, Any], dict[str, torch.Tensor], list[str]]:
    """config.json, tensors (bf16) and notes of the EAGLE-1 head that computes what ``module`` computes.

    Raises RecycleError for a module that EAGLE-1 cannot hold.
    """
    config = module.config
    for flag, where in (
        ("embed_norm", "on the embedding"),
        ("hidden_norm", "on the hidden state"),
        ("output_norm", "before the output head"),
        ("first_input_norm", "before the first layer's attention"),
    ):
        if getattr(config, flag):
            raise RecycleError(
                f"{module.path}: this module has a norm {where} ({flag}), EAGLE-1 has none there, and a "
                f"norm cannot be folded into a matrix; {_HOW}"
            )
    if config.zero_first_embedding:
        raise RecycleError(
            f"{module.path}: this module's row 0 sees a zero embedding (zero_first_embedding), "
            f"EAGLE-1's does not; {_HOW}"
        )
    for flag, what in (("qk_norm", "norms its queries and keys"), ("qkv_bias", "has a bias on q, k and v")):
        if getattr(config, flag):
            raise RecycleError(
                f"{module.path}: this module's attention {what} ({flag}), which the EAGLE-1 head for Llama "
                "in vLLM does not; a module for a Llama base can be converted"
            )
    tensors = {
        name.replace("input_proj.", "fc.", 1): source.to(torch.bfloat16)
        for name, source in module.tensors.items()
        if name != "draft_vocab"
    }
    notes = []
    bias = tensors.setdefault("fc.bias", torch.zeros(config.hidden_size, dtype=torch.bfloat16, device="cpu"))
    if max_bias := bias.abs().max().item():
        notes.append(
            f"this module's input_proj has a bias (up to {max_bias:.3g}); SGLang reads it, vLLM 0.32 does "
            "not and drafts without it"
        )
    if config.draft_vocab_size:
        notes.append(
            f"this module drafts from {config.draft_vocab_size} tokens; EAGLE-1 has no draft vocabulary: the "
            f"head drafts from all {config.vocab_size} and reads all of lm_head"
        )
    return _eagle_config(config, base), tensors, notes


def _eagle_config(config: ModuleConfig, base: Checkpoint) -> dict[str, Any]:
    """The config.json of an EAGLE-1 head: a small Llama's."""
    return llama_json(config) | {
        "architectures": ["LlamaForCausalLMEagle", "LlamaForCausalLM"],
        "max_position_embeddings": base.config.max_position_embeddings,
        "tie_word_embeddings": base.config.tie_word_embeddings,
        "bos_token_id": base.config.bos_token_id,
        "eos_token_id": base.config.eos_token_ids[0] if base.config.eos_token_ids else None,
    }
