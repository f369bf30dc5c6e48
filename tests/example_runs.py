"""Runs the examples as a reader would: each in a process of its own."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest

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


def load(name):
    """Imports an example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # they import each other, as scripts do
        return importlib.import_module(name)


def error_of(name, *options):
    """What an example says of options that are wrong, in this process: it ends before it starts."""
    module = load(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            module.main()
    return ended.value.code


def environment(**settings):
    # The tests' own settings are not what a reader of the examples has.
    own = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    return inherited | {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"} | settings


def last_digest(text):
    match = re.fullmatch(r"digest: ([0-9a-f]{16})", text.splitlines()[-1])
    assert match, text
    return match[1]
