"""Finds the line, the function and the module that an equation comes from."""

import functools
import itertools
import linecache
import os
import re
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

from jdropout import _record
from jdropout._record import Frame

_STOP = os.path.join(os.path.dirname(__file__), "_tracing.py")
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


class Source(NamedTuple):
    """Where an equation comes from, in words that another machine can read."""

    location: str
    """Such as ``train.py:12``; empty if unknown."""
    function: str
    text: str
    """The line itself."""
    library: str
    """The library's function that the line calls, such as ``Linear.__call__``."""
    path: str
    """Names of the modules and scopes around it, joined by /."""
    backward: bool
    """Whether it is part of a backward pass."""


UNKNOWN = Source("", "", "", "", "", False)


def source_of(equation: Any, body: Any, outer: Source) -> Source:
    """Describes an equation of a body, inside an equation with the source ``outer``."""
    stack = str(equation.source_info.name_stack)
    scope = re.sub(r"\w+\(|\)", "", stack).strip("/")
    path = "/".join(filter(None, (outer.path, scope)))
    backward = outer.backward or "transpose(" in stack
    frames = list(_frames(equation, body))
    own = next((frame for frame in frames if not _is_library(frame.file)), None)
    if own is None and outer.location:
        location, function, text = outer[:3]
    else:
        own = own or next(iter(frames), None)
        location, function, text = ("", "", "") if own is None else _words(own)
    called = itertools.takewhile(lambda frame: _is_library(frame.file), frames)
    public = [name for name in map(_name, called) if not _is_private(name)]
    library = public[-1] if public else ""
    return Source(location, function, text, library, path, backward)


def _frames(equation: Any, body: Any) -> Iterator[Frame]:
    """Frames innermost first, up to the function whose body it is.

    JAX traces a function once for all its calls, so the frames further out may be of another call.
    """
    traceback = equation.source_info.traceback
    if traceback is None:
        return
    info = body.debug_info
    for frame in traceback.frames:
        if frame.file_name == _STOP:
            return
        if not _is_machinery(frame.file_name):
            yield Frame(frame.file_name, frame.line_num, frame.function_name)
        if (
            frame.file_name == info.func_filename
            and frame.function_name.rpartition(".")[2] == info.func_name
        ):
            return


@functools.lru_cache(1024)
def _is_machinery(file: str) -> bool:
    """Whether a file of JAX's binds primitives and calls rules, rather than computing anything."""
    names: tuple[str, ...] = (
        "core.py",
        "api.py",
        "api_util.py",
        "linear_util.py",
        "pjit.py",
        "profiler.py",
    )
    names += ("traceback_util.py", "source_info_util.py", "ad_checkpoint.py", "tree_util.py")
    names += ("custom_derivatives.py", "partial_eval.py", "ad.py", "ufunc_api.py")
    folder, name = os.path.split(file)
    return name in names and f"{os.sep}jax{os.sep}_src" in folder


@functools.lru_cache(1024)
def _is_library(file: str) -> bool:
    installed = "site-packages" not in file and file.startswith(_STDLIB)
    return installed or file.startswith(("<string>", "<frozen")) or _record.is_library(file)


def _words(frame: Frame) -> tuple[str, str, str]:
    text = linecache.getline(frame.file, frame.line).strip()
    return f"{os.path.basename(frame.file)}:{frame.line}", _name(frame), text[:120]


def _is_private(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "op" or (last.startswith("_") and not last.endswith("__")) or "<" in last


def _name(frame: Frame) -> str:
    return frame.function.rpartition("<locals>.")[-1]
