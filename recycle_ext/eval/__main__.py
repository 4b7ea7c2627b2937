"""The command line of python -m recycle_ext.eval."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from recycle_ext import _C
from recycle_ext.bench.__main__ import names, numbers
from recycle_ext.bench.plot import check_plot
from recycle_ext.bench.race import rounds
from recycle_ext.bench.report import machine
from recycle_ext.checkpoint import Checkpoint, open_checkpoint
from recycle_ext.decoder import Decoder
from recycle_ext.errors import RecycleError
from recycle_ext.eval import bootstrap, cloze, likelihood
from recycle_ext.eval import prompts as prompt_files
from recycle_ext.eval.decoding import Setup, common_tokens, decode, setups
from recycle_ext.eval.plot import plot
from recycle_ext.eval.prompts import Prompt, categories, first_of_each, read_prompts
from recycle_ext.eval.report import cloze_figures, heading, summaries, tables
from recycle_ext.generate import INTERRUPTED
from recycle_ext.generation import Model, load
from recycle_ext.kv_cache import CACHE_DTYPES
from recycle_ext.module_checkpoint import default_module
from recycle_ext.packing import DTYPES

_WARM_UP_TOKENS = 8


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.eval",
        description="Measures what a module is worth: acceptance, speed and quality of the modes on prompts of "
        "several kinds, and accuracy on a cloze set. Without PROMPT or --prompts: on the prompts of this package.",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="*", help="texts to continue")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help='a prompt a line; or .jsonl, lines of {"prompt": text, "category": text, "chat": true}',
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="your prompts are messages: use the model's chat template",
    )
    parser.add_argument("--only", metavar="LIST", help="these categories (default: all)")
    parser.add_argument("--limit", type=int, metavar="N", help="prompts a category (default: all)")
    parser.add_argument(
        "--model",
        help=".gguf file, Hugging Face directory or hub id (default: SmolLM2-135M-Instruct)",
    )
    parser.add_argument(
        "--module", help="directory of a module (default: the one shipped for the model)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="weights in memory (default: a GGUF's own, else bf16)"
    )
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="keys and values (default: f32 for a float32 model, else bf16)",
    )
    parser.add_argument(
        "--threads", type=int, help="default, and at most: the cores this process may use"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu (default), or an NVIDIA GPU: cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--drafts",
        default="1",
        metavar="LIST",
        help="tokens the module guesses a step, 1 to 4; several, as 1,2,3, are run one by one (default: 1)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument(
        "--quality",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the texts under the base in plain PyTorch (default: yes)",
    )
    parser.add_argument(
        "--reference-dtype",
        choices=likelihood.DTYPES,
        default="f32",
        help="of that base; bf16 takes half the memory (default: f32)",
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
        help="only make such a file of the paragraphs of a text",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything, prompt by prompt too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw bar charts (needs matplotlib)")
    return parser.parse_args(arguments)


def chosen_prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts that the options ask for."""
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
    """Refuses what cannot be before anything is loaded."""
    for name in ("limit", "max_new_tokens"):
        if (value := getattr(options, name)) is not None and value < 1:
            flag = "--" + name.replace("_", "-")
            raise RecycleError(f"{flag} is {value}; it must be at least 1")
    for flag, file in (("--json", options.json), ("--plot", options.plot)):
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise RecycleError(f"{flag} {file}: there is no directory {Path(file).parent}")
    if options.plot is not None:
        check_plot(options.plot)


def make_decoder(model: Model, setup: Setup, capacity: int, cache_dtype: str | None) -> Decoder:
    """A greedy decoder of one sequence."""
    try:
        return Decoder(
            model.packed,
            mode=setup.mode,
            drafts=max(1, setup.drafts),
            capacity=capacity,
            cache_dtype=CACHE_DTYPES.get(cache_dtype, model.cache_dtype),
        )
    except RuntimeError as error:  # torch's allocator
        raise RecycleError(f"no memory for a cache of {capacity} tokens: {error}") from None


def encode_prompts(model: Model, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of the prompts, which must leave room for the new tokens in the model's context."""
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
    modes: Sequence[Setup],
    options: argparse.Namespace,
) -> list[dict]:
    """Every prompt in every mode; the modes take turns at each prompt, so that the machine's moods hit all alike."""
    limit, ends = options.max_new_tokens, model.tokenizer.eos_token_ids
    capacity = max(map(len, encoded)) + limit
    decoders = {mode: make_decoder(model, mode, capacity, options.cache_dtype) for mode in modes}
    for decoder in decoders.values():  # memory touched, threads there
        decode(decoder, encoded[0], min(_WARM_UP_TOKENS, limit), ends)
    rows = []
    turns = list(zip(prompts, encoded, rounds(modes, len(prompts)), strict=True))
    for prompt, ids, order in tqdm(turns, unit=" prompts", leave=False):
        runs = {mode: decode(decoders[mode], ids, limit, ends) for mode in order}
        standard = runs[modes[0]].token_ids
        row = {
            "category": prompt.category,
            "prompt": prompt.text,
            "chat": prompt.chat,
            "prompt_tokens": len(ids),
            "runs": {},
        }
        for mode in modes:
            values = dataclasses.asdict(runs[mode])
            values["decode_seconds"] = values.pop("seconds")
            values["text"] = model.tokenizer.decode(values["token_ids"])
            if mode.mode == "verify":
                values["identical"] = values["token_ids"] == standard
            if mode.mode == "alternate":
                values["common_tokens"] = common_tokens(values["token_ids"], standard)
            row["runs"][mode.name] = values
        rows.append(row)
    return rows


def add_likelihoods(
    checkpoint: Checkpoint,
    rows: Sequence[dict],
    encoded: Sequence[list[int]],
    modes: Sequence[Setup],
    options: argparse.Namespace,
) -> None:
    """Adds to the runs in ``rows`` what the base says of the texts of standard and alternate mode."""
    base = likelihood.load_base(checkpoint, options.reference_dtype, torch.device(options.device))
    judged = [
        (mode, ids, row["runs"][mode.name])
        for row, ids in zip(rows, encoded, strict=True)
        for mode in modes
        if mode.mode != "verify"  # standard's text once more
    ]
    texts = [(ids, run["token_ids"]) for _, ids, run in judged]
    read = tqdm(likelihood.read(base, texts), total=len(texts), unit=" texts", leave=False)
    for (mode, _, run), (log_likelihoods, picks) in zip(judged, read, strict=True):
        tokens = torch.tensor(run["token_ids"], dtype=torch.int64)
        mean = float(log_likelihoods.mean()) if len(tokens) else None
        run["log_likelihood_nats_per_token"] = mean
        if mode.mode == "alternate":
            # The first token is the base's; then come the drafts and one more of the base's, step after step.
            is_base = torch.arange(len(tokens)) % (mode.drafts + 1) == 0
            for name, chosen in (("base", is_base), ("draft", ~is_base)):
                run[f"{name}_tokens"] = int(chosen.sum())
                run[f"{name}_tokens_agreeing"] = int((tokens == picks)[chosen].sum())


def run_cloze(
    model: Model, items: cloze.Cloze, modes: Sequence[Setup], options: argparse.Namespace
) -> dict:
    """The accuracies of standard and alternate mode."""
    asked = cloze.encode(items, model.tokenizer)
    if not asked:
        raise RecycleError(
            f"--cloze {options.cloze}: this tokenizer makes two tokens of no continuation"
        )
    capacity = max(len(context) + len(following) for context, following in asked)
    if capacity > (context := model.packed.config.max_position_embeddings):
        raise RecycleError(
            f"--cloze {options.cloze}: an item has {capacity} tokens; this model's context is {context}"
        )
    right = {}
    for mode in modes:
        if mode.mode != "verify":
            decoder = make_decoder(model, mode, capacity, options.cache_dtype)
            answers = cloze.right_tokens(decoder, asked)
            right[mode.name] = list(tqdm(answers, total=len(asked), unit=" items", leave=False))
    return {
        "source": items.source,
        "items": len(asked),
        "items_left_out": len(items.items) - len(asked),
        "by_drafts": {
            str(mode.drafts): cloze_figures(right["standard"], right[mode.name])
            for mode in modes
            if mode.mode == "alternate"
        },
    }


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
    model = load(checkpoint.path, options.module, options.dtype, options.threads, options.device)
    if model.packed.module_config is None:
        raise RecycleError(
            f"no module is loaded for {checkpoint.config.name}; --module DIR names one, and "
            "`python -m recycle_ext.train` makes one"
        )
    torch.set_num_threads(_C.n_threads())
    encoded = encode_prompts(model, prompts, options.max_new_tokens)
    requests = sum(prompt.chat for prompt in prompts)
    has_template = model.tokenizer.chat_template is not None
    if requests and not has_template:
        print(
            f"this model has no chat template: {requests} requests are given as plain text",
            file=sys.stderr,
        )
    modes = setups(drafts)
    rows = run_prompts(model, prompts, encoded, modes, options)
    if options.quality:
        add_likelihoods(checkpoint, rows, encoded, modes, options)
    report = {
        "machine": machine(),
        "settings": {
            "model": checkpoint.path,
            "model_name": checkpoint.config.name,
            "module": str(options.module or default_module(checkpoint)),
            "formats": model.packed.formats,
            "dtype": options.dtype,
            "cache_dtype": options.cache_dtype,
            "reference_dtype": options.reference_dtype if options.quality else None,
            "device": options.device,
            "threads": _C.n_threads(),
            "drafts": drafts,
            "max_new_tokens": options.max_new_tokens,
            "chat_template": has_template,
            "bootstrap_level": bootstrap.LEVEL,
            "bootstrap_resamples": bootstrap.RESAMPLES,
            "bootstrap_seed": bootstrap.SEED,
        },
        "summaries": summaries(rows, drafts),
        "cloze": None if items is None else run_cloze(model, items, modes, options),
        "prompts": rows,
    }
    show(report, options)
    return said_of_differences(rows)


def show(report: dict, options: argparse.Namespace) -> None:
    """Prints the tables, writes the files."""
    print(f"{heading(report)}\n\n{tables(report)}", flush=True)
    if options.json is not None:
        try:
            Path(options.json).write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        except OSError as error:
            raise RecycleError(f"--json {options.json}: {error.strerror}") from None
    if options.plot is not None:
        plot(report, heading(report), options.plot)


def said_of_differences(rows: Sequence[dict]) -> int:
    """The exit status: 1 if verify once wrote what standard did not, which is then said."""
    wrong = [
        (name, row["prompt"])
        for row in rows
        for name, run in row["runs"].items()
        if not run.get("identical", True)
    ]
    if wrong:
        name, prompt = wrong[0]
        print(
            f"error: {len(wrong)} texts of verify are not standard's; the first: {name} on {prompt!r}",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; errors of the user's become one line and exit status 2."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except RecycleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough; keep Python from complaining once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
