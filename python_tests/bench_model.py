"""A tiny model with a module, and requests and jobs for the tests of python -m recycle_ext.bench."""

from __future__ import annotations

from pathlib import Path

from models import write_base, write_byte_tokenizer, write_module

from recycle_ext.bench.runners import Job, Request, jobs
from recycle_ext.checkpoint.base_model import open_checkpoint

SMALL = ["--new-tokens", "6", "--prompt-tokens", "20", "--context", "5", "--repeats", "2"]


def write_model(folder: Path) -> Path:
    """A tiny base model with a tokenizer of single bytes; its module is in ``module`` beside it."""
    base = write_base(folder, vocab_size=write_byte_tokenizer(folder))
    write_module(folder.parent / "module", base, like_base=True)
    return folder


def request(**changes) -> Request:
    values = {
        "dtypes": ["bf16"],
        "modes": ["standard", "verify", "alternate"],
        "drafts": 1,
        "threads": [1],
        "batches": [1],
        "context": 5,
        "new_tokens": 6,
        "prompt_tokens": 20,
        "peers": [],
    }
    return Request(**(values | changes))


def jobs_of(model: Path, notes: list[str] | None = None, **changes) -> list[Job]:
    checkpoint = open_checkpoint(model)
    note = [].append if notes is None else notes.append
    return jobs(request(**changes), checkpoint, model.parent / "module", model.parent, note)
