"""The command line: parse, call the library, print. Nothing is computed here.

Exit codes: 0 when the work is done, 2 for a wrong call, 1 for anything else, with one line that says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from saekit.cli import catalog, reading, steering, training
from saekit.errors import InvalidInput, SaekitError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        parser.exit(2)
    options = _options(parser, arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:
        return _fail(options, InvalidInput("interrupted"))
    except SaekitError as error:
        return _fail(options, error)
    except Exception as error:  # a defect, or a library's own error: one line all the same
        return _fail(options, error, f"unexpected {type(error).__name__}: {error} (--debug shows where)")
    return 0


def _options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments parsed; overrides of a recipe may also come after options, where argparse takes none."""
    options, left = parser.parse_known_args(arguments)
    late = [argument for argument in left if "=" in argument and not argument.startswith("-")]
    if late == left and hasattr(options, "overrides"):
        options.overrides += late
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return options


def _fail(options: argparse.Namespace, error: BaseException, text: str | None = None) -> int:
    if options.debug:
        raise error
    rank = os.environ.get("RANK") or "0"  # of torchrun
    if not getattr(error, "told", False):
        print(
            f"saekit: {text or error}" if rank == "0" else f"saekit, process {rank}: {text or error}",
            file=sys.stderr,
        )
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saekit", description="Train sparse autoencoders, read their features, and steer with them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (training, catalog, steering, reading):
        part.add(commands)
    return parser
