"""What the command lines share: the model they ask for, how they end, lists of names and numbers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from recycle_ext.config import DTYPES
from recycle_ext.decoder import AUTO
from recycle_ext.errors import RecycleError
from recycle_ext.generation import Model, load
from recycle_ext.kv_cache import CACHE_DTYPES

INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended


def exit_status(run: Callable[[], int]) -> int:
    """Runs a command; errors of the user's become one line and exit status 2."""
    try:
        return run()
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough; keep Python from complaining once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model and what else ``load`` takes, and --cache-dtype."""
    add = parser.add_argument
    add(
        "--model",
        help=".gguf file, Hugging Face directory or hub id (default: SmolLM2-135M-Instruct)",
    )
    add("--module", help="directory of a module, or none (default: the one shipped for the model)")
    add("--dtype", choices=DTYPES, help="weights in memory (default: a GGUF's own, else bf16)")
    add(
        "--module-dtype",
        choices=DTYPES,
        help="the module's weights (default: f32 for a float32 model, else what it was trained for, or q8)",
    )
    add(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="keys and values (default: f32 for a float32 model, else bf16)",
    )
    add("--threads", type=int, help="default, and at most: the cores this process may use")
    add("--device", default="cpu", help="cpu (default), or an NVIDIA GPU: cuda, cuda:1, ...")


def model_of(options: argparse.Namespace) -> Model:
    """Loads what add_model_options() has asked for."""
    return load(
        options.model,
        options.module,
        options.dtype,
        options.threads,
        options.device,
        options.module_dtype,
    )


def number_of_drafts(text: str) -> int | str:
    """What --drafts may be, for argparse; whether there can be so many is the decoder's to say."""
    try:
        return AUTO if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def names(flag: str, text: str, allowed: Sequence[str]) -> list[str]:
    """A list with commas, each of its names an allowed one, none twice."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in found:
        if name not in allowed:
            raise RecycleError(f"{flag} has {name!r}; it must be of {', '.join(allowed)}")
    return found


def numbers(flag: str, text: str, most: int | None = None) -> list[int]:
    """A list with commas of whole numbers from 1 on, none twice."""
    bounds = "at least 1" if most is None else f"1 to {most}"
    found = []
    for part in text.split(","):
        if not part.strip().isdecimal():
            raise RecycleError(f"{flag} is {text!r}; it must be whole numbers with commas between")
        number = int(part)
        if number < 1 or (most is not None and number > most):
            raise RecycleError(f"{flag} has {number}; it must be {bounds}")
        found.append(number)
    return list(dict.fromkeys(found))
