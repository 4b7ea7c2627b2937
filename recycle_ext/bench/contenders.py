"""What is measured: systems, modes, widths, thread counts and batch sizes, as jobs for the workers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from recycle_ext import _C
from recycle_ext.bench.same_width import write_same_width
from recycle_ext.bench.story import STORY, part
from recycle_ext.checkpoint.base_model import Checkpoint
from recycle_ext.checkpoint.config import ModelConfig, ModuleConfig
from recycle_ext.decoding.decoder import AUTO
from recycle_ext.errors import RecycleError

OURS = "recycle_ext"
# Other engines: the package to import and what pip calls it.
PEERS = {
    "transformers": ("transformers", "transformers accelerate"),
    "torch.compile": ("transformers", "transformers accelerate"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
}
# What of them we drive without batches: llama.cpp's Python package has none.
ONE_SEQUENCE = ("torch.compile", "llama.cpp")


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    system: str
    mode: str
    width: str  # "bf16", "q8", ... or "native"
    threads: int
    batch: int
    drafts: int | str  # 0 in standard mode; "auto" in verify mode alone

    @property
    def most_drafts(self) -> int:
        """That a step may have."""
        return most_drafts(self.drafts)

    def __str__(self) -> str:
        return f"{self.system} {self.mode} {self.width}, threads {self.threads}, batch {self.batch}"


@dataclass(frozen=True)
class Job:
    """What a worker is told."""

    contender: Contender
    model: str  # path of what the contender loads
    module: str | None  # path
    prompt: list[int]  # whose prefill is timed
    sequences: list[list[int]]  # what is in the caches before decoding is timed, one a sequence
    new_tokens: int  # a sequence
    cache_values: int  # values a position has in the base's cache
    cache_dtype: str | None = None  # of ours; None: the one that goes with the weights
    module_dtype: str | None = None  # the same

    def as_dict(self) -> dict:
        """For JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict) -> Job:
        """The inverse of as_dict."""
        return Job(**(values | {"contender": Contender(**values["contender"])}))


@dataclass(frozen=True)
class Request:
    """What the command line asks for, checked one by one."""

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

    def only_standard(self) -> Request:
        """The same without a module."""
        return dataclasses.replace(self, modes=["standard"])


def cache_values(config: ModelConfig | ModuleConfig) -> int:
    """Keys and values of one position, in all layers."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim


def most_drafts(drafts: int | str) -> int:
    """That a step may have."""
    return _C.MAX_DRAFTS if drafts == AUTO else drafts


def drafts_of(mode: str, asked: int | str) -> int | str:
    """Of a mode, where --drafts is ``asked``; where "auto" can't be, the usual one draft."""
    if mode == "standard":
        return 0
    return 1 if asked == AUTO and mode != "verify" else asked


def growth(new_tokens: int, batch: int, drafts: int) -> int:
    """Tokens that one sequence may get at most until the batch has ``new_tokens`` for each.

    That is when all of its drafts are accepted and no other sequence's.
    """
    return -(-batch * new_tokens // (batch + drafts)) * (drafts + 1)


def jobs(
    request: Request,
    checkpoint: Checkpoint,
    module: Path | None,
    scratch: Path,
    note: Callable[[str], None],
) -> list[Job]:
    """A job for each contender that can run here; ``note`` is told which ones cannot, and why.

    scratch: a directory for GGUF files of other widths.
    """
    peers = [peer for peer in request.peers if _can_run(peer, request, checkpoint, note)]
    ids = checkpoint.tokenizer.encode(STORY)
    files: dict[str, str | None] = {}  # of llama.cpp, by width

    def file_of(width: str) -> str | None:
        if width not in files:
            files[width] = write_same_width(Path(checkpoint.path), width, scratch, note)
        return files[width]

    def job(contender: Contender, model: str, module: Path | None = None) -> Job:
        return Job(
            contender=contender,
            model=model,
            module=None if module is None else str(module),
            prompt=part(ids, 0, request.prompt_tokens),
            # Each starts elsewhere in the story and has one token more than the one before.
            sequences=[part(ids, 29 * i, request.context + i) for i in range(contender.batch)],
            new_tokens=request.new_tokens,
            cache_values=cache_values(checkpoint.config),
            cache_dtype=request.cache_dtype,
            module_dtype=request.module_dtype,
        )

    found = []
    for batch in request.batches:
        for threads in request.threads:
            for width in request.dtypes:
                for mode in request.modes:
                    drafts = drafts_of(mode, request.drafts)
                    contender = Contender(OURS, mode, width, threads, batch, drafts)
                    found.append(job(contender, checkpoint.path, module if drafts else None))
                for peer in peers:
                    contender = Contender(peer, "standard", width, threads, batch, 0)
                    if peer in ONE_SEQUENCE and batch > 1:
                        continue
                    if peer == "llama.cpp":
                        if file := file_of(width):
                            found.append(job(contender, file))
                    elif width == "bf16":
                        found.append(job(contender, checkpoint.path))
    return found


def check_context(request: Request, config: ModelConfig) -> None:
    """Raises RecycleError where the tokens asked for are more than the model's context has."""
    limit = config.max_position_embeddings
    if request.prompt_tokens >= limit:
        raise RecycleError(
            f"--prompt-tokens is {request.prompt_tokens}; this model's context is {limit}, "
            "new tokens included"
        )
    drafts = max(most_drafts(drafts_of(mode, request.drafts)) for mode in request.modes)
    for batch in request.batches:
        needed = request.context + batch - 1 + growth(request.new_tokens, batch, drafts)
        if needed > limit:
            raise RecycleError(
                f"--context {request.context} and --new-tokens {request.new_tokens} need up to {needed} "
                f"positions at batch {batch}; this model's context has {limit}"
            )


def _can_run(
    peer: str, request: Request, checkpoint: Checkpoint, note: Callable[[str], None]
) -> bool:
    """Whether any line of the peer can be measured; notes also the lines that cannot."""
    package, pip_name = PEERS[peer]
    if importlib.util.find_spec(package) is None:
        note(f"{peer} is left out: it is not installed; `pip install {pip_name}` installs it")
        return False
    if peer != "llama.cpp" and "bf16" not in request.dtypes:
        note(f"{peer} is left out: it runs in bf16, which --dtypes does not have")
        return False
    if peer == "llama.cpp" and Path(checkpoint.path).is_dir():
        note("llama.cpp is left out: it needs a GGUF file, and this model is a directory")
        return False
    if peer in ONE_SEQUENCE and request.batches != [1]:
        note(f"{peer} is left out of batches of more than 1: it runs one sequence here")
        return 1 in request.batches
    return True
