"""Damages checkpoints of two steps in every way, and prints what is then read.

A process of its own, since what Orbax still does after a failure ends up in process-wide hooks.
One line of JSON for each damage: its name, the step that is read, the steps that are left, whether
the arrays are those that were saved at this step, and what was reported.
"""

import contextlib
import io
import json
import pathlib
import shutil
import sys

from example_runs import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import _checkpoints
import jax
import numpy as np

SETTINGS = {"--seed": 0, "--rate": 0.1}


def main():
    folder = pathlib.Path(sys.argv[1])
    whole = folder / "whole"
    with _checkpoints.open_directory(whole) as manager:
        for step in (1, 2):
            _checkpoints.save(manager, step, state(step), SETTINGS)
    for name, damage in damages(whole / "2"):
        directory = folder / "damaged"
        shutil.copytree(whole, directory)
        damage(directory)
        print(json.dumps({"damage": name, **what_is_read(directory)}))
        shutil.rmtree(directory)


def state(step):
    return {
        "step": np.full((), step, np.int32),
        "a": np.random.default_rng(step).random((40, 50), np.float32),
        "b": np.full(7, step, np.float32),
    }


def damages(newest):
    """Yields what can befall the newest checkpoint."""
    changes = {"truncate": truncate, "flip": flip, "delete": pathlib.Path.unlink}
    for path in sorted(newest.rglob("*")):
        if path.is_file():
            name = path.relative_to(newest.parent)
            for verb, change in changes.items():
                yield f"{verb} {name}", lambda d, name=name, change=change: change(d / name)
    yield "nothing", lambda d: None
    yield "empty directory", empty
    yield "no metadata", lambda d: shutil.rmtree(d / "2" / "metadata")
    yield "arrays of another step", take_other_arrays
    yield "checkpoint of another step", take_other_checkpoint
    yield "settings edited", lambda d: edit(d / "2" / "metadata" / "metadata", b"0.1", b"0.2")


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Inverts every byte in the middle fifth of a file."""
    data = bytearray(path.read_bytes())
    middle = slice(2 * len(data) // 5, 3 * len(data) // 5 + 1)
    data[middle] = bytes(255 - byte for byte in data[middle])
    path.write_bytes(data)


def empty(directory):
    shutil.rmtree(directory / "2")
    (directory / "2").mkdir()


def take_other_arrays(directory):
    shutil.rmtree(directory / "2" / "state")
    shutil.copytree(directory / "1" / "state", directory / "2" / "state")


def take_other_checkpoint(directory):
    shutil.rmtree(directory / "2")
    shutil.copytree(directory / "1", directory / "2")


def edit(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def what_is_read(directory):
    report = io.StringIO()
    with contextlib.redirect_stderr(report), _checkpoints.open_directory(directory) as manager:
        step, read = _checkpoints.load_newest(manager, state(0), SETTINGS)
        left = sorted(manager.all_steps())
    same = jax.tree.map(np.array_equal, read, state(step))
    return {
        "read": step,
        "left": left,
        "same": all(jax.tree.leaves(same)),
        "report": report.getvalue(),
    }


if __name__ == "__main__":
    main()
