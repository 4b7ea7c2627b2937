"""The library call: load a model once, then generate text from prompts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recycle_ext import _C
from recycle_ext.checkpoint import Checkpoint, open_checkpoint
from recycle_ext.decoder import AUTO, Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.kv_cache import CACHE_DTYPES
from recycle_ext.module_checkpoint import default_module, open_module
from recycle_ext.ops import check_device
from recycle_ext.packing import PackedModel, pack_model
from recycle_ext.tokenizer import Tokenizer


@dataclass(frozen=True)
class Model:
    """A base model in memory, with its module if it has one."""

    packed: PackedModel
    tokenizer: Tokenizer
    # Of keys and values: float32 for a float32 model, bfloat16 for all others.
    cache_dtype: torch.dtype

    @property
    def default_mode(self) -> str:
        """verify where there is a module, else standard."""
        return "standard" if self.packed.module_config is None else "verify"


def load(
    model: str | Path | None = None,
    module: str | Path | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    module_dtype: str | None = None,
) -> Model:
    """Loads a model into memory.

    model: a .gguf file, a Hugging Face directory or a hub id; None: SmolLM2-135M-Instruct, which is fetched
    (93 MB) the first time. module: the directory of a recyclable module; None: the one shipped for this
    model, if there is one; "none": no module. dtype: "f32", "bf16", "q8" or "q4"; None: a GGUF file's own
    formats, bf16 for a Hugging Face directory. threads: for the kernels, in the whole process; None, or more
    than this process has cores: one a core, because more would only wait for each other. device: "cpu", or an
    NVIDIA GPU, "cuda" or "cuda:1", to which the packed weights are copied. module_dtype: of the module's weights;
    None: f32 for a float32 model, else what it was trained for, or q8.

    Raises RecycleError for files that are missing, damaged, foreign or don't fit together.
    """
    if threads is not None:
        if not 1 <= threads <= 256:
            raise RecycleError(f"threads is {threads}; it must be 1 to 256")
        _C.set_n_threads(min(threads, _C.available_cores()))
    device = check_device(device)
    base = open_checkpoint(model)
    if module is None:
        module = default_module(base)
    opened = None if module is None or str(module) == "none" else open_module(module, base)
    # First: what building it takes for a moment is free again when the weights come.
    tokenizer = base.tokenizer
    return Model(
        packed=pack_model(base, opened, dtype, module_dtype).to(device),
        tokenizer=tokenizer,
        cache_dtype=torch.float32 if _is_float32(base, dtype) else torch.bfloat16,
    )


def _is_float32(base: Checkpoint, dtype: str | None) -> bool:
    if dtype is not None:
        return dtype == "f32"
    source = base.tensors["model.layers.0.mlp.down_proj.weight"]
    return base.path.endswith(".gguf") and source.format == "f32" and source.ggml_type is None


@dataclass
class Statistics:
    """What a generation took. Times in seconds, by the wall clock."""

    mode: str
    drafts: int | str  # a step, or "auto"
    prompt_tokens: int
    new_tokens: int = 0
    steps: int = 0
    offered_drafts: int = 0  # to the base model, in all steps
    accepted_drafts: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    weight_bytes: int = 0  # in memory
    read_bytes: int = 0  # of weights, by all decode steps

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts that counted; None without drafts."""
        return self.accepted_drafts / self.offered_drafts if self.offered_drafts else None

    @property
    def decoded_tokens(self) -> int:
        """Tokens that the decode steps gave: all but the first, which the prefill gives."""
        return self.steps + self.accepted_drafts

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the prefill."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def gigabytes_per_second(self) -> float:
        """Weights read by the decode steps per second, in 10^9 bytes."""
        if not self.decode_seconds:
            return 0.0
        return self.read_bytes / self.decode_seconds / 1e9

    def as_dict(self) -> dict:
        """All of the above."""
        names = ("acceptance_rate", "tokens_per_second", "gigabytes_per_second")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


class Generation(Iterator[str]):
    """Text as it comes: iterate over it. ``text``, ``token_ids`` and ``statistics`` hold what there is so
    far; ``token_ids`` are the new tokens, an end token not among them.
    """

    def __init__(
        self, model: Model, decoder: Decoder, prompt: Sequence[int], max_new_tokens: int
    ) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.statistics = Statistics(
            mode=decoder.mode,
            drafts=decoder.drafts if decoder.policy is None else AUTO,
            prompt_tokens=len(prompt),
            weight_bytes=model.packed.weights.numel(),
        )
        self._model = model
        self._decoder = decoder
        self._prompt = list(prompt)
        self._max_new_tokens = max_new_tokens
        self._stream = model.tokenizer.stream(after=self._prompt)
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        for ids in self._token_groups():
            piece = ""
            ended = False
            for token in ids:
                ended = token in self._model.tokenizer.eos_token_ids
                if ended or len(self.token_ids) == self._max_new_tokens:
                    break
                self.token_ids.append(token)
                piece += self._stream.push(token)
            ended = ended or len(self.token_ids) == self._max_new_tokens
            if ended:
                piece += self._stream.flush()
            self.statistics.new_tokens = len(self.token_ids)
            if piece:
                self.text += piece
                yield piece
            if ended:
                return

    def _token_groups(self) -> Iterator[list[int]]:
        """The first token, then what each step gives."""
        statistics = self.statistics
        try:
            start = time.perf_counter()
            first = self._decoder.prefill(self._prompt)
            if self._model.packed.weights.is_cuda:
                self._decoder.capture()
            statistics.prefill_seconds = time.perf_counter() - start
            yield [first]
            steps = self._decoder.run()
            while True:
                start = time.perf_counter()
                tokens, counts = next(steps)
                statistics.decode_seconds += time.perf_counter() - start
                count, drafts = int(counts[0]), tokens.shape[1] - 1
                statistics.steps += 1
                statistics.offered_drafts += drafts
                statistics.read_bytes += self._model.packed.step_bytes(drafts)
                statistics.accepted_drafts += count - 1
                yield tokens[0, :count].tolist()
        except RuntimeError as error:
            raise RecycleError(f"step {statistics.steps}: {error}") from None


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
    seed: int = 0,
    chat: bool = False,
    cache_dtype: str | None = None,
) -> Generation:
    """Continues a prompt; yields pieces of text as they are certain.

    prompt: text, or token ids. mode: "standard" (the base model alone), "verify" (two tokens a step where
    the module guessed right; the text is the base model's own) or "alternate" (the module's tokens
    always count); None: verify if the model has a module. drafts: tokens the module guesses a step, 1 to 4, or
    in verify mode "auto": 0 to 4, chosen for each step by what counts and what steps cost; what one generation
    measures the next one knows. With a temperature above 0 "auto" still draws from the base model's distribution,
    but what a seed gives then depends on timing.
    temperature 0 takes the most likely token; top_k 0 and top_p 1 cut nothing. chat: the prompt is a
    user's message, put in the model's chat template. cache_dtype: of keys and values, "f32", "bf16" or "q8"
    (half the bytes of bf16, a little less exact); None: f32 for a float32 model, else bf16. Ends at the model's end tokens, after
    ``max_new_tokens``, or where the model's context ends.

    Raises RecycleError for arguments out of range and for a prompt longer than the context.
    """
    mode = mode or model.default_mode
    if cache_dtype is not None and cache_dtype not in CACHE_DTYPES:
        names = ", ".join(CACHE_DTYPES)
        raise RecycleError(f"cache_dtype is {cache_dtype!r}; it must be one of {names}")
    if max_new_tokens < 1:
        raise RecycleError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if isinstance(prompt, str):
        if chat:
            prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        prompt = model.tokenizer.encode(prompt, add_bos=False if chat else None)
    if not len(prompt):
        raise RecycleError("the prompt is empty; it needs at least one token")
    vocab_size = model.packed.config.vocab_size
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise RecycleError(f"the prompt has token ids outside of 0 to {vocab_size - 1}")
    context = model.packed.config.max_position_embeddings
    if len(prompt) >= context:
        raise RecycleError(
            f"the prompt has {len(prompt)} tokens; this model's context is {context}, "
            "new tokens included"
        )
    max_new_tokens = min(max_new_tokens, context - len(prompt))
    try:
        decoder = Decoder(
            model.packed,
            mode=mode,
            drafts=drafts,
            capacity=len(prompt) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seeds=[seed],
            cache_dtype=CACHE_DTYPES[cache_dtype] if cache_dtype else model.cache_dtype,
        )
    except RuntimeError as error:  # torch's allocator
        raise RecycleError(
            f"no memory for a cache of {len(prompt) + max_new_tokens} tokens: {error}"
        ) from None
    return Generation(model, decoder, prompt, max_new_tokens)
