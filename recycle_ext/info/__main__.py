"""The command line of python -m recycle_ext.info."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from recycle_ext.command_line import exit_status
from recycle_ext.info import info, text


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, described by --help."""
    parser = argparse.ArgumentParser(
        prog="python -m recycle_ext.info",
        description="Prints the facts that a bug report needs: versions, build, processor, threads, memory, GPUs.",
    )
    parser.add_argument(
        "--bandwidth",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the memory bandwidth, in a second (default: yes)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Prints the report; returns the exit status."""
    report = info(options.bandwidth)
    print(json.dumps(report, indent=2) if options.json else text(report))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    return exit_status(lambda: run(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
