"""Gives the operations of a Flax nnx module its path as a name, as linen does.

Flax nnx modules do not name what they compute. While a program is traced for a recording, the
`__call__` of every class of modules therefore opens a `jax.named_scope`.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

_naming = threading.RLock()


@contextlib.contextmanager
def named_modules() -> Iterator[None]:
    """Names the operations traced inside the context, even of functions that JAX has cached.

    Only those of this thread; a second thread waits, since all threads share the classes.
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        yield
        return
    with _naming:
        calls = [
            (kind, kind.__dict__["__call__"])
            for kind in _subclasses(nnx.Module)
            if callable(kind.__dict__.get("__call__"))
        ]

        def restore() -> None:
            for kind, call in calls:
                kind.__call__ = call

        opened: list[tuple[Any, tuple[str, ...]]] = []
        thread = threading.get_ident()
        try:
            for kind, call in calls:
                kind.__call__ = _named(call, opened, thread)
            # JAX caches traces per metadata context. One value for all recordings, so that the
            # second recording of a function finds the traces and the compiled program of the first.
            with set_xla_metadata(jdropout_recording="1"):
                yield
        finally:
            try:
                restore()
            except KeyboardInterrupt:
                restore()
                raise


def _subclasses(kind: type) -> set[Any]:
    direct: set[Any] = set(kind.__subclasses__())
    return direct.union(*(_subclasses(subclass) for subclass in direct))


def _named(
    call: Callable[..., Any], opened: list[tuple[Any, tuple[str, ...]]], thread: int
) -> Callable[..., Any]:
    @functools.wraps(call)
    def named(self: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return call(self, *args, **kwargs)
        if opened and opened[-1][0] is self:  # super().__call__
            return call(self, *args, **kwargs)
        path = _path_from(opened[-1][0], self) if opened else ()
        opened.append((self, path))
        try:
            with jax.named_scope("/".join(path) or type(self).__name__):
                return call(self, *args, **kwargs)
        finally:
            opened.pop()

    return named


def _path_from(outer: Any, inner: Any) -> tuple[str, ...]:
    """Path of a module inside another; empty if it is not there, as in a transformed copy."""
    nnx = sys.modules["flax.nnx"]
    return next(
        (tuple(map(str, path)) for path, node in nnx.iter_graph(outer) if node is inner), ()
    )
