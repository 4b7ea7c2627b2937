"""The library call: continues a prompt with a loaded model.

``recycle_ext.generate`` is the function below; ``python -m recycle_ext.generate`` is the command in ``__main__``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from recycle_ext import arguments
from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.errors import RecycleError
from recycle_ext.generate.generation import Generation
from recycle_ext.generate.model import Model


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    mode: str | None = None,
    drafts: int | str = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    chat: bool = False,
    cache_dtype: str | None = None,
) -> Generation:
    """Continues a prompt; yields pieces of text as soon as they are certain.

    prompt: text, or token ids [n] or [1, n] in a list, tensor or array. mode: "standard" (the base model alone),
    "verify" (a draft token is accepted if the base model would have produced it: the text is the base model's own) or
    "alternate" (all are accepted); None: verify if the model has a module. drafts: draft tokens per step, 1 to 4, or in
    verify mode "auto": 0 to 4, chosen for each step by measured speed. With a temperature, "auto" draws from the base
    model's distribution, but the token that a seed gives depends on timing. temperature 0 takes the most likely token;
    top_k 0 and top_p 1 cut nothing. seed: of the draws; None: a new one, which ``statistics.seed`` tells. chat: the
    prompt is a user's message, put into the model's chat template. cache_dtype: of keys and values, "f32", "bf16" or
    "q8" (half the bytes of bf16, a little less exact); None: f32 for a float32 model, else bf16. Ends at the model's
    end tokens, after ``max_new_tokens``, or where the model's context ends.

    Raises RecycleError for arguments out of range or of another type, and for a prompt longer than the context.
    """
    if not isinstance(model, Model):
        raise RecycleError(f"model is {arguments.shown(model)}; generate needs what recycle_ext.load returns")
    mode = model.default_mode if mode is None else mode
    if cache_dtype is not None:
        cache_dtype = arguments.one_of("cache_dtype", cache_dtype, CACHE_DTYPES)
    max_new_tokens = arguments.integer("max_new_tokens", max_new_tokens, 1)
    prompt = _ids_of(model, prompt, arguments.flag("chat", chat))
    context = model.packed.config.max_position_embeddings
    if len(prompt) >= context:
        raise RecycleError(
            f"the prompt has {len(prompt)} tokens; this model's context is {context}, new tokens included"
        )
    max_new_tokens = min(max_new_tokens, context - len(prompt))
    decoder = Decoder(
        model.packed,
        mode=mode,
        drafts=drafts,
        capacity=len(prompt) + max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=None if seed is None else [arguments.integer("seed", seed)],
        cache_dtype=CACHE_DTYPES[cache_dtype] if cache_dtype else model.cache_dtype,
    )
    return Generation(model, decoder, prompt, max_new_tokens)


def _ids_of(model: Model, prompt: str | Sequence[int], chat: bool) -> list[int]:
    """The token ids of a prompt."""
    if isinstance(prompt, str):
        if chat:
            prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        prompt = model.tokenizer.encode(prompt, add_bos=False if chat else None)
    elif chat:
        raise RecycleError("chat is True, which needs the prompt as text, not as token ids")
    return arguments.token_ids("the prompt", prompt, model.packed.config.vocab_size)


def __getattr__(name: str) -> Any:
    """``main``, the command, which is loaded when first asked for."""
    if name == "main":
        from recycle_ext.generate.__main__ import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
