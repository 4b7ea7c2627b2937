"""The measurements: every prompt in every mode, then the texts under the base model, then the cloze set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from tqdm import tqdm

from recycle_ext.decoding.decoder import Decoder
from recycle_ext.decoding.kv_cache import CACHE_DTYPES
from recycle_ext.errors import RecycleError
from recycle_ext.eval import cloze, likelihood
from recycle_ext.eval.decoding import Setup, common_tokens, decode
from recycle_ext.eval.prompts import Prompt
from recycle_ext.eval.report import cloze_figures
from recycle_ext.generate.model import Model
from recycle_ext.measuring.interleave import rounds
from recycle_ext.reference.model import BaseModel

_WARM_UP_TOKENS = 8


def make_decoder(model: Model, setup: Setup, capacity: int, cache_dtype: str | None) -> Decoder:
    """A greedy decoder of one sequence. cache_dtype: of CACHE_DTYPES; None: the model's."""
    try:
        return Decoder(
            model.packed,
            mode=setup.mode,
            drafts=max(1, setup.drafts),
            capacity=capacity,
            cache_dtype=CACHE_DTYPES.get(cache_dtype, model.cache_dtype),
        )
    except RuntimeError as error:  # from torch's allocator
        raise RecycleError(f"no memory for a cache of {capacity} tokens: {error}") from None


def encode_prompts(model: Model, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of the prompts. Raises RecycleError if a prompt leaves no room for the new tokens in the context."""
    context = model.packed.config.max_position_embeddings
    encoded = []
    for prompt in prompts:
        ids = prompt.encode(model.tokenizer)
        if len(ids) + max_new_tokens > context:
            raise RecycleError(
                f"{prompt.where}: the prompt has {len(ids)} tokens, and {max_new_tokens} are to follow; "
                f"this model's context is {context}"
            )
        encoded.append(ids)
    return encoded


def run_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    setups: Sequence[Setup],
    max_new_tokens: int,
    cache_dtype: str | None = None,
) -> list[dict]:
    """Runs every prompt in every mode, interleaved at each prompt so that noise hits all modes alike.

    encoded: the prompts' token ids. setups: standard first. Returns the object of each prompt in --json; the object's
    "runs" hold, by the setup's name, the fields of ``decoding.Run`` and the text.
    """
    ends = model.tokenizer.eos_token_ids
    capacity = max(map(len, encoded)) + max_new_tokens
    decoders = {setup: make_decoder(model, setup, capacity, cache_dtype) for setup in setups}
    for decoder in decoders.values():  # a warm-up: touches the memory and starts the threads
        decode(decoder, encoded[0], min(_WARM_UP_TOKENS, max_new_tokens), ends)
    rows = []
    interleaved = list(zip(prompts, encoded, rounds(setups, len(prompts)), strict=True))
    for prompt, ids, order in tqdm(interleaved, unit=" prompts", leave=False):
        runs = {setup: decode(decoders[setup], ids, max_new_tokens, ends) for setup in order}
        standard = runs[setups[0]].token_ids
        row = {
            "category": prompt.category,
            "prompt": prompt.text,
            "chat": prompt.chat,
            "prompt_tokens": len(ids),
            "runs": {},
        }
        for setup in setups:
            values = dataclasses.asdict(runs[setup])
            values["decode_seconds"] = values.pop("seconds")
            values["text"] = model.tokenizer.decode(values["token_ids"])
            if setup.mode == "verify":
                values["identical"] = values["token_ids"] == standard
            if setup.mode == "alternate":
                values["common_tokens"] = common_tokens(values["token_ids"], standard)
            row["runs"][setup.name] = values
        rows.append(row)
    return rows


def add_likelihoods(
    base: BaseModel, rows: Sequence[dict], encoded: Sequence[list[int]], setups: Sequence[Setup]
) -> None:
    """Adds to the runs of standard and alternate mode in ``rows`` the scores of their texts under the base model.

    log_likelihood_nats_per_token: the text's mean; None for an empty text. In alternate mode also draft_tokens, and
    draft_tokens_agreeing, the number of them that are the base model's argmax there; base_tokens alike.
    """
    scored = [
        (setup, ids, row["runs"][setup.name])
        for row, ids in zip(rows, encoded, strict=True)
        for setup in setups
        if setup.mode != "verify"  # verify's text is standard's
    ]
    texts = [(ids, run["token_ids"]) for _, ids, run in scored]
    read = tqdm(likelihood.read(base, texts), total=len(texts), unit=" texts", leave=False)
    for (setup, _, run), (log_likelihoods, argmax) in zip(scored, read, strict=True):
        tokens = torch.tensor(run["token_ids"], dtype=torch.int64, device="cpu")
        mean = float(log_likelihoods.mean()) if len(tokens) else None
        run["log_likelihood_nats_per_token"] = mean
        if setup.mode == "alternate":
            # The prefill gives a token of the base model; each step gives the draft tokens, then one more of the base model.
            is_base = torch.arange(len(tokens), device="cpu") % (setup.drafts + 1) == 0
            for name, chosen in (("base", is_base), ("draft", ~is_base)):
                run[f"{name}_tokens"] = int(chosen.sum())
                run[f"{name}_tokens_agreeing"] = int((tokens == argmax)[chosen].sum())


def encode_cloze(model: Model, items: cloze.Cloze) -> list[tuple[list[int], list[int]]]:
    """Token ids of the contexts and continuations that suit this model. Raises RecycleError if none does."""
    asked = cloze.encode(items, model.tokenizer)
    if not asked:
        raise RecycleError(f"{items.source}: this tokenizer makes two tokens of no continuation")
    longest = max(len(context) + len(following) for context, following in asked)
    if longest > (limit := model.packed.config.max_position_embeddings):
        raise RecycleError(f"{items.source}: an item has {longest} tokens; this model's context is {limit}")
    return asked


def run_cloze(
    model: Model, asked: Sequence[tuple[list[int], list[int]]], setups: Sequence[Setup], cache_dtype: str | None = None
) -> dict[str, list[dict]]:
    """The accuracies of standard and alternate mode, by alternate's number of draft tokens."""
    capacity = max(len(context) + len(following) for context, following in asked)
    right = {}
    for setup in setups:
        if setup.mode != "verify":
            decoder = make_decoder(model, setup, capacity, cache_dtype)
            answers = cloze.right_tokens(decoder, asked)
            right[setup.name] = list(tqdm(answers, total=len(asked), unit=" items", leave=False))
    return {
        str(setup.drafts): cloze_figures(right["standard"], right[setup.name])
        for setup in setups
        if setup.mode == "alternate"
    }
