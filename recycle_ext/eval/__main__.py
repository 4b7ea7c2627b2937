"""The command line of python -m recycle_ext.eval."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from recycle_ext import _C
from recycle_ext.checkpoint.base_model import Checkpoint, open_checkpoint
from recycle_ext.checkpoint.module import default_module
from recycle_ext.command_line import exit_status, names, numbers
from recycle_ext.errors import RecycleError
from recycle_ext.eval import cloze, intervals, likelihood
from recycle_ext.eval import prompts as prompt_files
from recycle_ext.eval.decoding import setups
from recycle_ext.eval.measure import add_likelihoods, encode_cloze, encode_prompts, run_cloze, run_prompts
from recycle_ext.eval.plot import plot
from recycle_ext.eval.prompts import Prompt, categories, first_of_each, read_prompts
from recycle_ext.eval.report import heading, summaries, tables
from recycle_ext.files import write_whole
from recycle_ext.generate.model import Model
from recycle_ext.generate.options import add_model_options, model_of
from recycle_ext.measuring.extras import require
from recycle_ext.measuring.machine import machine
from recycle_ext.measuring.plots import check_outputs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.eval",
        description="Measures a module: acceptance, speed and quality of the modes on prompts of several kinds, and "
        "accuracy on a cloze set. Without PROMPT and --prompts: on the prompts of this package.",
    )
    parser.add_argument(
        "prompt", metavar="PROMPT", nargs="*", help="texts to continue; write -- before a text that begins with -"
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='one prompt per line; or .jsonl, lines of {"prompt": text, "category": text, "chat": true}',
    )
    parser.add_argument("--chat", action="store_true", help="your prompts are messages: use the model's chat template")
    parser.add_argument("--only", metavar="LIST", help="categories to run (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts per category (default: all)")
    add_model_options(parser)
    parser.add_argument(
        "--drafts",
        default="1",
        metavar="LIST",
        help="draft tokens per step, 1 to 4; several, as 1,2,3, run one after another (default: 1)",
    )
    _add_measurement_options(parser)
    return parser.parse_args(arguments)


def _add_measurement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score the texts under the base model in plain PyTorch (default: yes)",
    )
    parser.add_argument(
        "--reference-dtype",
        choices=likelihood.DTYPES,
        default="f32",
        help="of that base model; bf16 takes half the memory (default: f32)",
    )
    parser.add_argument(
        "--cloze",
        metavar="FILE",
        type=Path,
        default=cloze.SHIPPED,
        help='lines of {"context": text, "continuation": text} (default: 640 passages of Moby-Dick)',
    )
    parser.add_argument("--no-cloze", action="store_true", help="leave the cloze set out")
    parser.add_argument(
        "--make-cloze",
        metavar=("TEXT", "FILE"),
        nargs=2,
        type=Path,
        help="only write such a file, made of the paragraphs of a text",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures, also those of each prompt")
    parser.add_argument("--plot", metavar="FILE.png", help="draw bar charts (needs matplotlib)")


def chosen_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts that the options select."""
    found = [Prompt(text, chat=options.chat) for text in options.prompt]
    if options.prompts is not None:
        found += read_prompts(options.prompts, options.chat)
    if not found:
        if options.chat:
            raise RecycleError("--chat is for your own prompts; there are none")
        found = read_prompts(prompt_files.SHIPPED)
    if options.only is not None:
        wanted = names("--only", options.only, categories(found))
        if not wanted:
            raise RecycleError("--only is empty")
        found = [prompt for prompt in found if prompt.category in wanted]
    if options.limit is not None:
        found = first_of_each(found, options.limit)
    return found


def check(options: argparse.Namespace) -> None:
    """Raises RecycleError for impossible options, before anything is loaded."""
    for name in ("limit", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise RecycleError(f"{flag} is {value}; it must be at least 1")
    require("tabulate", "python -m recycle_ext.eval")
    require("scipy", "python -m recycle_ext.eval")
    check_outputs(options.json, options.plot, {"machine", "settings", "summaries"})


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status."""
    if options.make_cloze is not None:
        print(f"{cloze.write_cloze(*options.make_cloze)} items")
        return 0
    check(options)
    drafts = numbers("--drafts", options.drafts, _C.MAX_DRAFTS)
    prompts = chosen_prompts(options)
    items = None if options.no_cloze else cloze.read_cloze(options.cloze)
    checkpoint = open_checkpoint(options.model)
    model = model_of(options)
    if model.packed.module_config is None:
        raise RecycleError(
            f"no module is loaded for {checkpoint.config.name}; --module DIR names one, and "
            "`python -m recycle_ext.train` makes one"
        )
    if options.threads is not None:
        torch.set_num_threads(model.packed.threads)  # of the base model in plain PyTorch
    limit, cache_dtype = options.max_new_tokens, options.cache_dtype
    encoded = encode_prompts(model, prompts, limit)
    asked = None if items is None else encode_cloze(model, items)
    requests = sum(prompt.chat for prompt in prompts)
    if requests and model.tokenizer.chat_template is None:
        print(f"this model has no chat template: {requests} requests run as plain text", file=sys.stderr)

    modes = setups(drafts)
    rows = run_prompts(model, prompts, encoded, modes, limit, cache_dtype)
    if options.quality:
        device = model.packed.weights.device
        base = likelihood.load_base(checkpoint, options.reference_dtype, device)
        add_likelihoods(base, rows, encoded, modes)
        del base
    cloze_results = None
    if asked is not None:
        cloze_results = {
            "source": items.source,
            "items": len(asked),
            "items_left_out": len(items.items) - len(asked),
            "by_drafts": run_cloze(model, asked, modes, cache_dtype),
        }
    report = {
        "machine": machine(),
        "settings": settings(options, drafts, checkpoint, model),
        "summaries": summaries(rows, drafts),
        "cloze": cloze_results,
        "prompts": rows,
    }
    show(report, options)
    return report_differences(rows)


def settings(options: argparse.Namespace, drafts: list[int], checkpoint: Checkpoint, model: Model) -> dict:
    """The settings that the figures depend on, besides the machine and the prompts."""
    return {
        "model": Path(checkpoint.path).name,
        "model_name": checkpoint.config.name,
        "module": Path(options.module or default_module(checkpoint)).name,
        "formats": model.packed.formats,
        "dtype": options.dtype,
        "module_dtype": options.module_dtype,
        "cache_dtype": options.cache_dtype,
        "reference_dtype": options.reference_dtype if options.quality else None,
        "device": options.device,
        "threads": model.packed.threads or _C.n_threads(),
        "drafts": drafts,
        "max_new_tokens": options.max_new_tokens,
        "chat_template": model.tokenizer.chat_template is not None,
        "bootstrap_level": intervals.LEVEL,
        "bootstrap_resamples": intervals.RESAMPLES,
        "bootstrap_seed": intervals.SEED,
    }


def show(report: dict, options: argparse.Namespace) -> None:
    """Prints the tables, writes the files."""
    print(f"{heading(report)}\n\n{tables(report)}", flush=True)
    if options.json is not None:
        write_whole(options.json, json.dumps(report, indent=1) + "\n")
    if options.plot is not None:
        plot(report, heading(report), options.plot)


def report_differences(rows: Sequence[dict]) -> int:
    """The exit status: 1, with a message, if a text of verify differs from standard's."""
    wrong = [
        (name, row["prompt"]) for row in rows for name, run in row["runs"].items() if not run.get("identical", True)
    ]
    if wrong:
        name, prompt = wrong[0]
        print(
            f"error: {len(wrong)} texts of verify differ from standard's; the first: {name} on {prompt!r}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return exit_status(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
