"""The settings of a benchmark as command-line options."""

import argparse
from dataclasses import fields
from typing import Any, TypeVar

__all__ = ["parse_args"]

Args = TypeVar("Args")


def parse_args(kind: type[Args], description: str, argv: list[str] | None = None) -> Args:
    """A dataclass from the command line: an option for each field, with its "help" of metadata.

    Args:
        kind: the dataclass; every field has a default.
        description: what `--help` begins with.
        argv: the options; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    for f in fields(kind):  # type: ignore[arg-type]
        given: dict[str, Any] = {"type": f.type, "default": f.default, "help": f.metadata["help"]}
        parser.add_argument("--" + f.name, **given)
    return kind(**vars(parser.parse_args(argv)))
