"""Records calls for an audit while they are traced, and marks their values in the jaxpr.

Without an audit nothing is recorded and nothing is marked.
"""

import contextvars
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata


class Frame(NamedTuple):
    """A frame of the stack that led to a dropout."""

    file: str
    line: int
    function: str


class Call(NamedTuple):
    """A call of a dropout function, as Python saw it while tracing."""

    kind: str
    path: str
    """Path of the Flax module that made the call; empty if there is none."""
    frames: tuple[Frame, ...]
    """Innermost first, up to the audit."""
    shape: tuple[int, ...]
    rate: float | None
    """None if traced; the next two fields also."""
    effective_rate: float | None
    deterministic: bool | None
    shared_axes: tuple[int, ...]
    batch_axis: int | None
    """Axis of the examples, as far as the call knows it."""
    located: bool
    """Whether the call says which part of a larger mask it draws."""
    stored_bytes: int
    saved_work: float | None
    """Fraction of the work behind the site that dropping saves; None if the rate is traced."""


class Mark(NamedTuple):
    """The name of a marked value, parsed."""

    call: int
    kind: str
    """``key``, ``start`` (in a larger mask), ``result``, or ``without`` (a result without key)."""
    ndim: int
    """Number of axes when marked; any more of them in the jaxpr come from vmap."""


_calls: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("calls", default=None)
_audits = itertools.count()
_PREFIX = "jdropout"


def recorded(trace: Callable[..., Any], *args: Any) -> tuple[Any, list[Call]]:
    """Records the calls that a function traces, even in functions that JAX has in its cache.

    Returns:
      The result of the function, and the calls.
    """
    calls: list[Call] = []
    # A copy, which nothing has to undo: Ctrl-C may come at any moment.
    context = contextvars.copy_context()
    context.run(_calls.set, calls)
    # JAX caches traces per metadata context, so a fresh value forces everything to retrace.
    with set_xla_metadata(jdropout_audit=str(next(_audits))):
        return context.run(trace, *args), calls


def recording() -> bool:
    return _calls.get() is not None


def record(**facts: Any) -> int:
    """Records a call; returns its number in the audit.

    Args:
      **facts: the fields of `Call` that are not read off the stack.
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
    """Names a value in the jaxpr; `parse_mark` reads the name."""
    return checkpoint_name(value, f"{_PREFIX}/{call}/{kind}/{np.ndim(value)}")


def parse_mark(name: str) -> Mark | None:
    prefix, *fields = name.split("/")
    if prefix != _PREFIX or len(fields) != 3:
        return None
    return Mark(int(fields[0]), fields[1], int(fields[2]))


def is_library(file: str) -> bool:
    """Whether a file belongs to this library, JAX, or a layer library."""
    names = ("jdropout", "jax", "flax", "equinox", "haiku")
    modules = [sys.modules.get(name) for name in names]
    files = [module.__file__ for module in modules if module is not None and module.__file__]
    return any(file.startswith(os.path.dirname(name) + os.sep) for name in files)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames from the caller outwards, up to the audit."""
    while frame is not None and frame.f_globals.get("__name__") != "jdropout._audit.program":
        yield frame
        frame = frame.f_back


def _owner(frame: FrameType) -> Any:
    """The ``self`` of a method's frame; None for a function."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if hasattr(type(first), code.co_name) else None


def _module_path(owners: list[Any]) -> str:
    """Path of the innermost Flax module among the owners of the frames' methods."""
    # `import flax` would fail without Flax, which jdropout does not need: look at loaded modules.
    linen, nnx = (sys.modules.get(f"flax.{name}") for name in ("linen", "nnx"))
    kinds = tuple(framework.Module for framework in (linen, nnx) if framework is not None)
    modules = [owner for owner in owners if isinstance(owner, kinds)]
    if not modules:
        return ""
    inner = modules[0]
    if linen is not None and isinstance(inner, linen.Module):
        path = () if inner.scope is None else inner.path  # an unbound module has no path
        return "/".join([type(modules[-1]).__name__, *path])
    assert nnx is not None
    # An nnx module does not know its path, and the outermost module may be another copy of the
    # model: search from the outermost inwards for one that contains this very module.
    return next(
        "/".join([type(outer).__name__, *map(str, path)])
        for outer in reversed(modules)
        for path, node in nnx.iter_graph(outer)
        if node is inner
    )
