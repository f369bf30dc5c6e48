"""Command-line options whose errors say which values are valid."""

import argparse
from collections.abc import Callable
from typing import Any


def checked(kind: type, fits: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    """Makes a type for an option whose errors say which values are valid."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"got {text}, pass {wanted}")
        return value

    return parse


def parse_and_make_output(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line and creates the directory of ``--output``."""
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: got {options.output}, pass a directory ({error})")
    return options
