"""The settings of a benchmark as command-line options."""

import argparse
from dataclasses import field, fields
from typing import Any, TypeVar

Args = TypeVar("Args")


def option(default: Any, text: str) -> Any:
    """Make a field of a dataclass with its line of help."""
    return field(default=default, metadata={"help": text})


def parse_args(kind: type[Args], description: str, argv: list[str] | None = None) -> Args:
    """Read a dataclass of `option` fields from the command line.

    Args:
        kind: the dataclass; a field that is False becomes a flag.
        description: the beginning of what `--help` says.
        argv: the options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for one in fields(kind):  # type: ignore[arg-type]
        given = {"action": "store_true"} if one.default is False else {"type": type(one.default)}
        name = f"--{one.name.replace('_', '-')}"
        parser.add_argument(name, default=one.default, help=one.metadata["help"], **given)
    return kind(**vars(parser.parse_args(argv)))
