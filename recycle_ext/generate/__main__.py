"""python -m recycle_ext.generate: a prompt in, text and figures out."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence

from recycle_ext.command_line import INTERRUPTED, exit_status
from recycle_ext.decoding.decoder import MODES
from recycle_ext.errors import RecycleError
from recycle_ext.generate import generate
from recycle_ext.generate.generation import Generation, Statistics
from recycle_ext.generate.options import add_model_options, model_of, number_of_drafts
from recycle_ext.measuring.bandwidth import read_bandwidth


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.generate",
        usage="%(prog)s [OPTION ...] [--] PROMPT",
        description="Continues a prompt with a Llama-family model and its recyclable module.",
    )
    add = parser.add_argument
    add(
        "prompt",
        metavar="PROMPT",
        help="the text to continue; - reads it from standard input; write -- before a text that begins with -",
    )
    add_model_options(parser)
    add(
        "--mode",
        choices=MODES,
        help="standard: the base model alone; verify: the same tokens, faster; alternate: the module's tokens are always "
        "accepted (default: verify if there is a module)",
    )
    add(
        "--drafts",
        type=number_of_drafts,
        default=1,
        metavar="K",
        help="draft tokens per step, 1 to 4 (default: 1), or auto: 0 to 4, chosen by measured speed, in verify mode; with "
        "auto and a temperature a seed does not repeat its text",
    )
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, default=0.0, help="0: greedy (default)")
    add("--top-k", type=int, default=0, help="0: all tokens (default)")
    add("--top-p", type=float, default=1.0, help="1: all tokens (default)")
    add("--seed", type=int, help="of the draws (default: a new one, which --stats and --json report)")
    add("--chat", action="store_true", help="the prompt is a message: use the model's chat template")
    add(
        "--stats",
        action=argparse.BooleanOptionalAction,
        help="figures on standard error at the end (default: on a terminal)",
    )
    add("--json", action="store_true", help="one JSON object and nothing else")
    return parser.parse_args(arguments)


def figures(statistics: Statistics, read_bandwidth: float) -> str:
    """A few aligned lines. read_bandwidth: bytes per second that this machine reads."""
    s = statistics
    prefill_rate = s.prompt_tokens / s.prefill_seconds if s.prefill_seconds else 0.0
    lines = [
        f"prefill     {s.prompt_tokens:6d} tokens  {s.prefill_seconds:7.3f} s  {prefill_rate:8.1f} tokens/s",
        f"decode      {s.decoded_tokens:6d} tokens  {s.decode_seconds:7.3f} s  "
        f"{s.tokens_per_second:8.1f} tokens/s  ({s.mode})",
    ]
    if s.acceptance_rate is not None:
        saved = max(s.decoded_tokens - s.steps, 0)
        lines += [
            f"acceptance  {s.acceptance_rate:6.1%} of {s.offered_drafts} draft tokens",
            f"base steps  {s.steps:6d} for {s.decoded_tokens} tokens: {saved} saved",
        ]
    share = s.gigabytes_per_second * 1e9 / read_bandwidth
    lines.append(
        f"weights     {s.weight_bytes / 1e6:6.1f} MB, read at {s.gigabytes_per_second:.1f} GB/s: "
        f"{share:.0%} of this machine's {read_bandwidth / 1e9:.1f} GB/s"
    )
    if s.seed is not None:
        lines.append(f"seed        {s.seed}")
    return "\n".join(lines)


_JSON_KEYS = [
    "prompt_tokens",
    "new_tokens",
    "mode",
    "drafts",
    "seed",
    "steps",
    "acceptance_rate",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "weight_bytes",
    "gigabytes_per_second",
]


def json_object(generation: Generation) -> dict:
    """The object that --json prints."""
    values = generation.statistics.as_dict()
    return {"text": generation.text, "token_ids": generation.token_ids} | {key: values[key] for key in _JSON_KEYS}


def run(options: argparse.Namespace) -> int:
    """Generates and prints; returns the exit status."""
    prompt = options.prompt
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecycleError(f"standard input is not UTF-8: {error.reason}") from None
        except OSError as error:
            raise RecycleError(f"standard input cannot be read: {error.strerror}") from None
        # The shell adds a line end, and some shells a byte order mark before the text.
        prompt = re.sub(r"\r?\n\Z", "", prompt)
    generation = generate(
        model := model_of(options),
        prompt,
        mode=options.mode,
        drafts=options.drafts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        chat=options.chat,
        cache_dtype=options.cache_dtype,
    )
    status = 0
    try:
        for piece in generation:
            if not options.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        status = INTERRUPTED
    print(json.dumps(json_object(generation)) if options.json else "", flush=True)
    if options.stats or (options.stats is None and sys.stderr.isatty() and not options.json):
        weights = model.packed.weights
        bandwidth = read_bandwidth(weights.device, weights.numel())
        print("\n" + figures(generation.statistics, bandwidth), file=sys.stderr)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return exit_status(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
