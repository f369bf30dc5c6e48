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
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from jdropout import _law, _threshold
from jdropout._mask import Mask, Operands


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


class Site:
    """A call that is not audited: marks nothing."""

    def operands(self, operands: Operands) -> Operands:
        return operands

    def result(self, y: jax.Array) -> jax.Array:
        return y


class _AuditedSite(Site):
    def __init__(self, call: int) -> None:
        self.call = call
        self.has_key = False

    def operands(self, operands: Operands) -> Operands:
        self.has_key = True
        words = self.mark(_law.key_words(operands.key), "key")
        starts = [self.mark(leaf, "start") for leaf in jax.tree.leaves(operands.origin)]
        # The words need the starts, so that no transformation drops the marks of these.
        words, *_ = lax.optimization_barrier((words, *starts))
        return operands._replace(key=words)

    def result(self, y: jax.Array) -> jax.Array:
        return self.mark(y, "result" if self.has_key else "without")

    def mark(self, value: jax.Array, kind: str) -> jax.Array:
        return checkpoint_name(value, f"{_PREFIX}/{self.call}/{kind}/{np.ndim(value)}")


_NOT_AUDITED = Site()


def site(
    kind: str,
    shape: tuple[int, ...],
    rate: Any,
    deterministic: bool | jax.Array,
    mask: Mask | None,
    operands: Operands | None,
    batch_axis: int | None = 0,
) -> Site:
    """Records a call if an audit is going on, and returns what marks its key and its result."""
    calls = _calls.get()
    if calls is None:
        return _NOT_AUDITED
    frames = list(_frames(sys._getframe(1)))
    static = not isinstance(rate, jax.Array)
    threshold = None if mask is None else mask.threshold
    effective: float | None
    if threshold is not None:
        effective = float(1 - _threshold.keep_probability(threshold))
    elif not static or rate is None:
        effective = None
    else:
        effective = 0.0 if mask is None else float(rate)
    call = Call(
        kind=kind,
        path=_module_path([_owner(frame) for frame in frames]),
        frames=tuple(
            Frame(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
            for frame in frames
        ),
        shape=shape,
        rate=None if rate is None or not static else float(rate),
        effective_rate=effective,
        deterministic=None if isinstance(deterministic, jax.Array) else deterministic,
        shared_axes=()
        if mask is None
        else tuple(a for a, size in enumerate(shape) if size > 1 and mask.shape[a] == 1),
        batch_axis=batch_axis,
        located=operands is not None and operands.origin is not None,
        stored_bytes=0 if operands is None or mask is None else _bytes(operands, mask),
    )
    calls.append(call)
    return _AuditedSite(len(calls) - 1)


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


def _bytes(operands: Operands, mask: Mask) -> int:
    stored = jax.tree.leaves(operands._replace(key=_law.key_words(operands.key)))
    total = sum(np.size(leaf) * leaf.dtype.itemsize for leaf in stored)
    unused = operands.origin is not None and not mask.layout.wide  # the high word
    return total - 4 if unused else total


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
