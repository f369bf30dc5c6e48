"""Runs the examples as a reader would: each in a process of its own."""

import os
import pathlib
import re
import subprocess
import sys

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def run(*command, **settings):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=environment(**settings),
        encoding="utf-8",
        capture_output=True,
        check=False,
        timeout=120,
    )


def run_example(name, *options, **settings):
    result = run(EXAMPLES / name, *options, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def environment(**settings):
    # The tests' own settings, such as eight devices, are not what a reader of the examples has.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return inherited | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"} | settings


def last_digest(text):
    match = re.fullmatch(r"digest: ([0-9a-f]{16})", text.splitlines()[-1])
    assert match, text
    return match[1]
