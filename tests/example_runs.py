"""Runs the examples as a reader would, each in a process of its own, and again in this one."""

import contextlib
import importlib
import io
import os
import pathlib
import re
import subprocess
import sys

import jax
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


def run_here(name, *options):
    """Runs an example in this process, where starting and compiling it costs little."""
    module = load(name.removesuffix(".py"))
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(sys, "argv", [name, *map(str, options)])
        module.main()
    return printed.getvalue()


def run_twice(name, *options):
    """Runs an example in a process of its own, and checks that this one gives the same digest."""
    text = run_example(name, *options)
    assert last_digest(run_here(name, *options)) == last_digest(text)
    return text


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
    # Compiled as in the tests' own process, whose digests are compared. Optimizing would double the
    # time of a short run, nearly all of which is compilation.
    ours = {"JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
    return os.environ | ours | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | settings


def last_digest(text):
    match = re.fullmatch(r"digest: ([0-9a-f]{16})", text.splitlines()[-1])
    assert match, text
    return match[1]


def assert_is_picture(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 10_000
