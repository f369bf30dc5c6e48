"""Orbax checkpoints with checksums: damage is detected, and the last good checkpoint is used."""

import hashlib
import json
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

KEPT = 3

State = TypeVar("State")
Settings = Mapping[str, float]


def open_directory(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Opens a directory and removes incomplete checkpoints of killed processes from it.

    Raises:
      SystemExit: if it cannot be made or changed.
    """
    hide_late_failures()
    for path in sorted(directory.glob("*.orbax-checkpoint-tmp*")):
        say(f"{path} is half-written: it is not used")
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(KEPT),
        enable_async_checkpointing=False,  # save() returns once everything is on disk
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # otherwise one damaged checkpoint can prevent opening
    )
    try:
        return ocp.CheckpointManager(directory.absolute(), options=options)
    except Exception as error:  # see save()
        raise SystemExit(f"{directory} cannot be opened to write ({reason_of(error)})") from error


def save(manager: ocp.CheckpointManager, step: int, state: Any, settings: Settings) -> None:
    """Saves a checkpoint: the state, its settings and step, and a checksum of everything.

    Raises:
      SystemExit: if it cannot be written, as when the disk is full. The earlier ones stay.
    """
    label = {"step": step, "settings": dict(settings)}
    metadata = {
        "label": label,
        "sha256 of label": label_checksum(label),
        "sha256 of state": state_checksum(state),
    }
    items = {"state": ocp.args.StandardSave(state), "metadata": ocp.args.JsonSave(metadata)}
    try:
        manager.save(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and its dependencies raise errors of many types
        raise SystemExit(
            f"the checkpoint of step {step} could not be written to {manager.directory} "
            f"({reason_of(error)}). Make room, or mend what it says, and run the same command "
            "again: it resumes from the last checkpoint"
        ) from error


def load_newest(
    manager: ocp.CheckpointManager, start: State, settings: Settings
) -> tuple[int, State]:
    """Returns the newest good checkpoint, or 0 and `start` if there are no checkpoints.

    Args:
      manager: checkpoint manager of the directory.
      start: state before the first step. Its leaves are NumPy arrays, and so are the leaves that
        are returned, so they are not tied to the devices that made them.
      settings: required settings of a checkpoint, by option.

    Returns:
      The step and the state. Newer, damaged checkpoints have been removed.

    Raises:
      SystemExit: if there are checkpoints but no good one, or the settings differ.
    """
    damaged = []
    for step in sorted(manager.all_steps(), reverse=True):
        path = pathlib.Path(manager.directory) / str(step)
        try:
            state = load(manager, step, start, settings)
        except Exception as error:  # Orbax and its dependencies raise errors of many types
            say(f"{path} is damaged ({reason_of(error)}): it is not used")
            damaged.append(step)
        else:
            # Nothing is lost: the following steps will make them again, with the same bits.
            for newer in damaged:
                manager.delete(newer)
            return step, state
    if damaged:
        raise SystemExit(
            f"no checkpoint in {manager.directory} is good. Remove the directory to train from "
            "the start, or pass another --output"
        )
    return 0, start


def load(manager: ocp.CheckpointManager, step: int, like: State, settings: Settings) -> State:
    """Reads one checkpoint; any exception means that it is damaged."""
    metadata = read(manager, step, metadata=ocp.args.JsonRestore())
    label = metadata["label"]
    if label_checksum(label) != metadata["sha256 of label"]:
        raise ValueError("the settings are not those that were saved")
    if label["step"] != step:
        raise ValueError(f"it is the checkpoint of step {label['step']}")
    check_settings(label["settings"], settings, manager.directory)
    state = read(manager, step, state=ocp.args.StandardRestore(like))
    if state_checksum(state) != metadata["sha256 of state"]:
        raise ValueError("the arrays are not those that were saved")
    return state


def read(manager: ocp.CheckpointManager, step: int, **item: Any) -> Any:
    (name,) = item
    return manager.restore(step, args=ocp.args.Composite(**item))[name]


def check_settings(found: Settings, wanted: Settings, directory: Any) -> None:
    """Ends the process if a setting differs; SystemExit, since the checkpoint is good."""
    for option, value in wanted.items():
        if found.get(option) != value:
            raise SystemExit(
                f"argument {option}: got {value}, pass {found.get(option)}, with which the "
                f"checkpoints in {directory} were made, or another --output"
            )


def label_checksum(label: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(label, sort_keys=True).encode()).hexdigest()


def state_checksum(state: Any) -> str:
    """Returns a checksum of all arrays: Orbax reads large altered arrays without an error."""
    leaves = jax.tree.leaves(jax.device_get(state))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def hide_late_failures() -> None:
    """Keeps a damaged checkpoint or a full disk from printing tracebacks.

    Orbax reads and writes many arrays at once and raises the first failure, which we report. The
    others are logged, or come too late: nobody retrieves them, or they find the event loop closed,
    and each would print a traceback.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def reason_of(error: Exception) -> str:
    """Returns what failed, with which a long text begins, and why, with which it ends."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
