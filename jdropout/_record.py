"""What an audit sees of a call: a record made while it is traced, and marks in its jaxpr.

Without an audit nothing is recorded and nothing is marked.
"""

import contextlib
import contextvars
import itertools
import os
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata


class Frame(NamedTuple):
    """A call on the way to a dropout."""

    file: str
    line: int
    function: str


class Call(NamedTuple):
    """A call of this library that drops, as Python saw it while tracing."""

    kind: str
    path: str
    """Of the Flax module that it was called in; may be empty."""
    frames: tuple[Frame, ...]
    """Innermost first, up to the audit."""
    shape: tuple[int, ...]
    rate: float | None
    """None if it is traced, as are the next two."""
    effective_rate: float | None
    deterministic: bool | None
    shared_axes: tuple[int, ...]
    batch_axis: int | None
    """That of the examples, as far as the call tells."""
    located: bool
    """Whether the caller says which part of a larger mask it is."""
    stored_bytes: int


class Mark(NamedTuple):
    """What the name of a marked value says."""

    call: int
    kind: str
    """A ``key``, the ``start`` in a larger mask, or a ``result``, of a call ``without`` key too."""
    ndim: int
    """Number of axes when it was marked: further ones in a jaxpr come from vmap."""


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("calls", default=None)
_audits = itertools.count()
_PREFIX = "jdropout"


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Records the calls that are traced inside, in functions that were traced before as well."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        # JAX keeps a trace per context of metadata: a new one lets nothing come from its caches.
        with set_xla_metadata(jdropout_audit=str(next(_audits))):
            yield calls
    finally:
        _calls.reset(token)


def recording() -> bool:
    return _calls.get() is not None


def record(**facts: Any) -> int:
    """Records a call; returns its number in the audit.

    Args:
      **facts: the fields of `Call`, but for those that are read off the stack here.
    """
    calls = _calls.get()
    assert calls is not None  # see recording()
    frames = list(_frames(sys._getframe(1)))
    call = Call(
        path=_module_path([_owner(frame) for frame in frames]),
        frames=tuple(
            Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
            for frame in frames
        ),
        **facts,
    )
    calls.append(call)
    return len(calls) - 1


def mark(value: jax.Array, call: int, kind: str) -> jax.Array:
    """Names a value in the jaxpr: `parse_mark` reads the name."""
    return checkpoint_name(value, f"{_PREFIX}/{call}/{kind}/{np.ndim(value)}")


def parse_mark(name: str) -> Mark | None:
    prefix, *fields = name.split("/")
    if prefix != _PREFIX or len(fields) != 3:
        return None
    return Mark(int(fields[0]), fields[1], int(fields[2]))


def is_library(file: str) -> bool:
    """Whether a file belongs to this library, to JAX, or to one with layers on top of it."""
    names = ("jdropout", "jax", "flax", "equinox", "haiku")
    modules = [sys.modules.get(name) for name in names]
    files = [module.__file__ for module in modules if module is not None and module.__file__]
    return any(file.startswith(os.path.dirname(name) + os.sep) for name in files)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """From the caller of this library outwards, up to the audit."""
    while frame is not None and frame.f_globals.get("__name__") != "jdropout._audit.program":
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """What a method calls self."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if hasattr(type(first), code.co_name) else None


def _module_path(owners: list[Any]) -> str:
    """Path of the innermost Flax module among the owners of the frames' methods."""
    # Only if the program itself has imported them; this package does not need Flax.
    linen, nnx = (sys.modules.get(f"flax.{name}") for name in ("linen", "nnx"))
    kinds = tuple(framework.Module for framework in (linen, nnx) if framework is not None)
    modules = [owner for owner in owners if isinstance(owner, kinds)]
    if not modules:
        return ""
    inner = modules[0]
    if linen is not None and isinstance(inner, linen.Module):
        path = () if inner.scope is None else inner.path  # a module that is not bound has none
        return "/".join([type(modules[-1]).__name__, *path])
    assert nnx is not None
    # The outermost one that it is a part of; further out may be other copies of the model.
    return next(
        "/".join([type(outer).__name__, *map(str, path)])
        for outer in reversed(modules)
        for path, node in nnx.iter_graph(outer)
        if node is inner
    )
