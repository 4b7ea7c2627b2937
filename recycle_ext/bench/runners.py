"""The runners: systems, modes, dtypes, thread counts and batch sizes, as jobs for the workers."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recycle_ext import _C
from recycle_ext.bench.requantize import requantized_file
from recycle_ext.bench.story import STORY, part
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.decoding.decoder import AUTO
from recycle_ext.errors import RecycleError
from recycle_ext.measuring.extras import is_installed

OURS = "recycle_ext"
# Other engines: the package to import and what pip calls it.
PEERS = {
    "transformers": ("transformers", "transformers accelerate"),
    "torch.compile": ("transformers", "transformers accelerate"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}
# Engines that run one sequence here: llama.cpp's Python package has no batches.
ONE_SEQUENCE = ("torch.compile", "llama.cpp")
ROW_SYSTEMS = (OURS, "llama.cpp")  # those with steps of several rows


@dataclass(frozen=True)
class Runner:
    """One row of the table.

    dtype: of the weights, "bf16", "q8", ... or "native" (a GGUF file's own formats). drafts: draft tokens per step; 0 in
    standard mode, "auto" only in verify mode.
    """

    system: str
    mode: str
    dtype: str
    threads: int
    batch: int
    drafts: int | str

    @property
    def max_draft_tokens(self) -> int:
        """The largest number of draft tokens of a step."""
        return max_draft_tokens(self.drafts)

    def __str__(self) -> str:
        return f"{self.system} {self.mode} {self.dtype}, threads {self.threads}, batch {self.batch}"


@dataclass(frozen=True)
class Job:
    """A worker's instructions.

    model, module: paths. prompt: token ids whose prefill is timed. sequences: token ids in the caches before decoding is
    timed, one list per sequence. new_tokens: per sequence. cache_values: keys and values of one position in the base
    model's cache. cache_dtype, module_dtype: of recycle_ext; None: the default that goes with the weights.
    """

    runner: Runner
    model: str
    module: str | None
    prompt: list[int]
    sequences: list[list[int]]
    new_tokens: int
    cache_values: int
    cache_dtype: str | None = None
    module_dtype: str | None = None

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Job:
        """The inverse of as_dict."""
        return Job(**(values | {"runner": Runner(**values["runner"])}))


@dataclass(frozen=True)
class Request:
    """The options of the command line, each checked."""

    dtypes: list[str]
    modes: list[str]
    drafts: int | str
    threads: list[int]
    batches: list[int]
    context: int
    new_tokens: int
    prompt_tokens: int
    peers: list[str]
    cache_dtype: str | None = None
    module_dtype: str | None = None
    sequences: int = 1  # at least as many in a job, whatever its batch

    def only_standard(self) -> Request:
        """The same without a module."""
        return dataclasses.replace(self, modes=["standard"])


def cache_values(config: ModelConfig | ModuleConfig) -> int:
    """Keys and values of one position, in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim


def max_draft_tokens(drafts: int | str) -> int:
    """The largest number of draft tokens of a step; "auto" may take as many as a step can have."""
    return _C.MAX_DRAFTS if drafts == AUTO else drafts


def drafts_of(mode: str, requested: int | str) -> int | str:
    """The draft tokens per step of a mode under ``--drafts requested``; alternate mode has no "auto" and takes 1."""
    if mode == "standard":
        return 0
    return 1 if requested == AUTO and mode != "verify" else requested


def growth(new_tokens: int, batch: int, num_draft_tokens: int) -> int:
    """The most tokens that one sequence can get before the batch has ``new_tokens`` per sequence on average.

    The extreme case: all draft tokens of this sequence are accepted and none of the other sequences'.
    """
    return -(-batch * new_tokens // (batch + num_draft_tokens)) * (num_draft_tokens + 1)


def jobs(
    request: Request, checkpoint: Checkpoint, module: Path | None, scratch: Path, note: Callable[[str], None]
) -> list[Job]:
    """A job for each runner that can run here; ``note`` gets a line for each that cannot, with the reason.

    scratch: a directory for requantized GGUF files.
    """
    peers = [peer for peer in request.peers if _can_run(peer, request, checkpoint, note)]
    ids = checkpoint.tokenizer.encode(STORY)
    files: dict[str, str | None] = {}  # llama.cpp's, by dtype

    def file_of(dtype: str) -> str | None:
        if dtype not in files:
            files[dtype] = requantized_file(Path(checkpoint.path), dtype, scratch, note)
        return files[dtype]

    def job(runner: Runner, model: str, module: Path | None = None) -> Job:
        return Job(
            runner=runner,
            model=model,
            module=None if module is None else str(module),
            prompt=part(ids, 0, request.prompt_tokens),
            # Other starts and lengths per sequence: a batch of equal sequences would hide mistakes of indexing.
            sequences=[part(ids, 29 * i, request.context + i) for i in range(max(runner.batch, request.sequences))],
            new_tokens=request.new_tokens,
            cache_values=cache_values(checkpoint.config),
            cache_dtype=request.cache_dtype,
            module_dtype=request.module_dtype,
        )

    found = []
    for batch, threads, dtype in itertools.product(request.batches, request.threads, request.dtypes):
        for mode in request.modes:
            drafts = drafts_of(mode, request.drafts)
            runner = Runner(OURS, mode, dtype, threads, batch, drafts)
            found.append(job(runner, checkpoint.path, module if drafts else None))
        for peer in peers:
            runner = Runner(peer, "standard", dtype, threads, batch, 0)
            if peer in ONE_SEQUENCE and batch > 1:
                continue
            if peer == "llama.cpp":
                if file := file_of(dtype):
                    found.append(job(runner, file))
            elif dtype == "bf16":
                found.append(job(runner, checkpoint.path))
    return found


def check_context(request: Request, config: ModelConfig) -> None:
    """Raises RecycleError if the requested tokens do not fit into the model's context."""
    limit = config.max_position_embeddings
    if request.prompt_tokens >= limit:
        raise RecycleError(
            f"--prompt-tokens is {request.prompt_tokens}; this model's context is {limit}, new tokens included"
        )
    drafts = max(max_draft_tokens(drafts_of(mode, request.drafts)) for mode in request.modes)
    for batch in request.batches:
        needed = request.context + batch - 1 + growth(request.new_tokens, batch, drafts)
        if needed > limit:
            raise RecycleError(
                f"--context {request.context} and --new-tokens {request.new_tokens} need up to {needed} "
                f"positions at batch {batch}; this model's context has {limit}"
            )


def _can_run(peer: str, request: Request, checkpoint: Checkpoint, note: Callable[[str], None]) -> bool:
    """Whether any row of the peer can be measured; ``note`` gets a line for each reason against a row."""
    package, pip_name = PEERS[peer]
    if not is_installed(package):
        note(f"{peer} is left out: it is not installed; `pip install {pip_name}` installs it")
        return False
    if peer != "llama.cpp" and "bf16" not in request.dtypes:
        note(f"{peer} is left out: it runs in bf16, which is not in --dtypes")
        return False
    if peer == "llama.cpp" and Path(checkpoint.path).is_dir():
        note("llama.cpp is left out: it needs a GGUF file, and this model is a directory")
        return False
    if peer in ONE_SEQUENCE and request.batches != [1]:
        note(f"{peer} is left out of batches of more than 1: it runs one sequence here")
        return 1 in request.batches
    return True
