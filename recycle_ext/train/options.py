"""The options of `python -m recycle_ext.train`, and their ranges."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from recycle_ext.checkpoint.config import MODULE_DTYPES
from recycle_ext.errors import RecycleError
from recycle_ext.train.frozen import MEASURED_DRAFT_TOKENS, Targets
from recycle_ext.train.trainer import TrainOptions

TARGETS = {"kl": (1.0, 0.0), "hard": (0.0, 1.0), "both": (0.5, 0.5)}  # weights: soft, hard


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.train",
        description="Trains a recyclable module.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", required=True, help="directory of the module, the run's text and its unfinished state"
    )
    _add_models(parser)
    _add_text(parser)
    _add_targets(parser)
    _add_run(parser)
    return parser.parse_args(arguments)


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("models").add_argument
    add("--base", help=".gguf file, Hugging Face directory or hub id; none: SmolLM2-135M-Instruct")
    add(
        "--joint",
        metavar="CONFIG",
        help="train a base from scratch too; CONFIG is a Llama's config.json with its sizes",
    )
    add("--from", dest="start", metavar="MODULE", help="directory of a module to start from")
    add("--layers", type=int, default=2, help="layers of the module")
    add(
        "--shape",
        choices=("recycle", "eagle"),
        default="recycle",
        help="eagle: no norms besides the layers' own, as in EAGLE-1 heads (vLLM reads these)",
    )
    add("--draft-vocab", type=int, default=8192, help="tokens the module may draft; 0: all")
    add(
        "--module-dtype",
        choices=MODULE_DTYPES,
        default="q4",
        help="format the module will run in; training rounds its matrices to it (not with --joint)",
    )
    add("--shard-base", action="store_true", help="under torchrun: split the frozen base's weights over the processes")


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text").add_argument
    add(
        "--text",
        nargs="+",
        metavar="FILE",
        help="UTF-8 text, .jsonl, .ndjson, .json or .parquet; none: the base writes the text",
    )
    add("--text-field", default="text", help="field of the objects or rows with the text")
    add(
        "--self-generate",
        type=int,
        default=3_047_424,
        metavar="TOKENS",
        help="text that the base writes, from the prompts in recycle_ext/train/prompts.txt",
    )
    add("--length", type=int, default=384, help="tokens of a sequence")
    add("--held-out", type=float, default=0.02, help="share of the sequences for measuring alone")
    add("--online", action="store_true", help="run the base in each step and store no states")


def _add_targets(parser: argparse.ArgumentParser) -> None:
    targets = Targets()
    add = parser.add_argument_group("loss").add_argument
    add(
        "--targets",
        choices=TARGETS,
        default="kl",
        help="kl: the base's distribution; hard: the text's tokens; both: half of each",
    )
    add(
        "--regression",
        type=float,
        default=targets.regression,
        metavar="WEIGHT",
        help="weight of the distance to the base's next state",
    )
    add(
        "--chain",
        type=int,
        default=targets.num_draft_tokens,
        help=f"train for 1 to {MEASURED_DRAFT_TOKENS} draft tokens a step",
    )
    add(
        "--chain-from",
        type=float,
        default=targets.chain_from,
        metavar="SHARE",
        help="share of the steps after which draft tokens 2 and on are trained too",
    )
    add("--module-weight", type=float, default=1.0, help="with --joint: weight of the module's loss; 0: no module")


def _add_run(parser: argparse.ArgumentParser) -> None:
    defaults = TrainOptions()
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=int, default=defaults.steps)
    add("--batch-sequences", type=int, default=defaults.batch_sequences, help="sequences of a step, over all processes")
    add(
        "--accumulate",
        type=int,
        default=defaults.accumulate,
        help="micro-batches of a step; more of them need less memory",
    )
    add("--lr", type=float, default=defaults.learning_rate, help="highest learning rate")
    add("--warmup", type=int, default=defaults.warmup_steps, metavar="STEPS")
    add("--weight-decay", type=float, default=defaults.weight_decay)
    add("--clip", type=float, default=defaults.clip, help="max norm of the gradient")
    add("--ema", type=float, default=defaults.ema, help="decay of the weights' average; 0: none")
    add("--seed", type=int, default=defaults.seed)
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--evaluate-every", type=int, default=defaults.evaluate_every, metavar="STEPS")
    add("--save-seconds", type=float, default=defaults.save_seconds, help="time between saves of the unfinished run")
    add("--resume", action="store_true", help="go on with the run in --output")


def check_options(options: argparse.Namespace) -> None:
    """Raises RecycleError for a number out of range, and for options that exclude each other."""

    def refuse(name: str, needed: str) -> None:
        flag = "--" + name.replace("_", "-")
        raise RecycleError(f"{flag} is {getattr(options, name)}; it must be {needed}")

    at_least_one = ("steps", "batch_sequences", "layers", "self_generate", "accumulate")
    for name in (*at_least_one, "evaluate_every"):
        if getattr(options, name) < 1:
            refuse(name, "at least 1")
    for name in ("draft_vocab", "warmup", "weight_decay", "regression", "module_weight"):
        if not getattr(options, name) >= 0:
            refuse(name, "0 or positive")
    for name in ("lr", "clip"):
        if not getattr(options, name) > 0:
            refuse(name, "positive")
    if options.length < 3:
        refuse("length", "3 or more, because a row needs two tokens after it")
    if not 0 < options.held_out < 1:
        refuse("held_out", "between 0 and 1")
    if not 0 <= options.ema < 1:
        refuse("ema", "in [0, 1)")
    if not 0 <= options.chain_from <= 1:
        refuse("chain_from", "in [0, 1]")
    if not 1 <= options.chain <= MEASURED_DRAFT_TOKENS:
        refuse("chain", f"1 to {MEASURED_DRAFT_TOKENS}")
    if options.joint and not options.text:
        raise RecycleError("--joint needs --text: there is no base yet to write the text")
    if options.joint and options.start:
        raise RecycleError("--joint trains a module from scratch; --from names an existing one")
    if options.joint and options.base:
        raise RecycleError("--joint trains a base from scratch; --base names an existing one")
    if options.shard_base and not (options.online and options.text):
        raise RecycleError("--shard-base needs --online and --text: only a whole base can write text or store states")


def train_options(options: argparse.Namespace) -> TrainOptions:
    """The trainer's part of the command line."""
    return TrainOptions(
        steps=options.steps,
        batch_sequences=options.batch_sequences,
        accumulate=options.accumulate,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        clip=options.clip,
        ema=options.ema,
        seed=options.seed,
        evaluate_every=options.evaluate_every,
        save_seconds=options.save_seconds,
    )
