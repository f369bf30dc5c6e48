"""Compares traces of one function, made under conditions that are free to differ."""

import contextlib
import enum
import hashlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._jaxprs import bodies_of
from jdropout.testing._determinism.rules import Complaint
from jdropout.testing._determinism.trace import Operation, Traced

Found = Iterator[tuple[Complaint, Operation | None]]

_STATE = "two traces of the function differ, so something other than its arguments decides: "
_STATE += "a clock, a counter, or a generator of random numbers of Python or NumPy."
_BY_ITSELF = Complaint("python-state", ("runs", "machines"), _STATE)
_ORDER = "the program depends on the order in which a folder's files are listed, which is any."
_TIME = "the program depends on the time when it is traced."
_PROCESS = "the program depends on jax.process_index()."


def fingerprint(traced: Traced) -> str:
    digest = hashlib.sha256()
    for signature in _signatures(traced):
        digest.update(repr(signature).encode())
    return digest.hexdigest()[:16]


def differences(first: Traced, again: Callable[[], Traced]) -> Found:
    """What tracing once more changes: by itself, or with another process and order of files."""
    with _other_time(), _other_process(), _other_order():
        try:
            unchanged = _signatures(again()) == _signatures(first)
        except Exception:  # found out below which of them it is
            unchanged = False
    if unchanged:
        return
    # Of every two in a row, since a program may be another one every second time.
    second, third = again(), again()
    state = [_differing(_BY_ITSELF, *pair) for pair in ((first, second), (second, third))]
    found = next(filter(None, map(list, state)), [])
    yield from found
    causes = (
        (_other_time, _BY_ITSELF._replace(message=_TIME)),
        (_other_process, Complaint("process-index", ("machines",), _PROCESS)),
        (_other_order, Complaint("file-order", ("machines",), _ORDER)),
    )
    for condition, complaint in () if found else causes:
        with condition():
            try:
                other = again()
            except Exception as error:
                message = f"{complaint.message} With another one it fails: {error!r:.80}"
                yield complaint._replace(message=message), None
                continue
        yield from _differing(complaint, first, other)


def other_precision(first: Traced, again: Callable[[], Traced]) -> Found:
    """What changes if ``jax_enable_x64`` is switched over."""
    on = jnp.result_type(float) == jnp.float64
    message = f"jax_enable_x64 is {'on' if on else 'off'} here, and switching it"
    try:
        with jax.enable_x64(not on):
            other = again()
    except Exception as error:
        message += f" makes the function fail: {error!r:.80}"
        yield Complaint("x64", ("settings",), message), None
        return
    ours, theirs = _widths(first), _widths(other)
    complaint = Complaint("x64", ("settings",), f"{message} changes dtypes or random numbers.")
    lines = set()
    for key, (operation, widths) in ours.items():
        if key in theirs and theirs[key][1] != widths and key[:2] not in lines:
            lines.add(key[:2])  # one operation stands for its line
            yield complaint, operation


def _widths(traced: Traced) -> dict[Any, tuple[Operation, Counter[str]]]:
    """The floating-point types on each line, and the widths of random bits."""
    found: dict[Any, tuple[Operation, Counter[str]]] = {}
    for operation in traced.operations:
        if operation.name == "convert_element_type" or any(bodies_of(operation.equation)):
            continue
        widths = [
            str(atom.aval.dtype)
            for atom in operation.equation.outvars
            if hasattr(atom.aval, "dtype")
            and (jnp.issubdtype(atom.aval.dtype, jnp.inexact) or operation.name == "random_bits")
        ]
        if widths:
            key = (operation.source.location, operation.source.path, operation.name)
            found.setdefault(key, (operation, Counter()))[1].update(widths)
    return found


def _differing(complaint: Complaint, first: Traced, other: Traced) -> Found:
    """The operations that differ; if there are more in one trace, the first of them."""
    ours, theirs = _signatures(first), _signatures(other)
    if ours == theirs:
        return
    aligned = len(ours) == len(theirs)
    pairs = zip(ours, theirs, strict=False)
    different = [i for i, (a, b) in enumerate(pairs) if a != b] or [min(len(ours), len(theirs))]
    for i in different if aligned else different[:1]:
        operations = first.operations if i < len(first.operations) else other.operations
        yield complaint, operations[i] if i < len(operations) else None


def _signatures(traced: Traced) -> list[Any]:
    """What each operation does, to what; the same in every process with the same program."""
    found = [_signature(operation) for operation in traced.operations]
    return [*found, tuple(map(_constant, traced.outputs))]


def _signature(operation: Operation) -> Any:
    equation = operation.equation
    types = [str(atom.aval) for atom in (*equation.invars, *equation.outvars)]
    parameters = [(name, _plain(value)) for name, value in sorted(equation.params.items())]
    constants = tuple(map(_constant, operation.constants))
    return operation.name, types, operation.numbers, constants, parameters


def _constant(value: Any) -> Any:
    if hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return str(value.aval)
    array = np.asarray(value)
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest()


def _plain(value: Any) -> Any:
    """A parameter without what differs between processes, such as addresses."""
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, np.ndarray | jax.Array):
        return _constant(value)
    if isinstance(value, bool | int | float | str | np.generic | np.dtype | enum.Enum | None):
        return str(value)
    return type(value).__name__


_replacing = threading.RLock()


@contextlib.contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replaces a function of a module for a while, in this thread."""
    thread = threading.get_ident()
    with _replacing:
        before = getattr(owner, name)

        def replacement(*args: Any, **kwargs: Any) -> Any:
            chosen = function if threading.get_ident() == thread else before
            return chosen(*args, **kwargs)

        try:
            setattr(owner, name, replacement)
            yield
        finally:
            setattr(owner, name, before)


@contextlib.contextmanager
def _other_process() -> Iterator[None]:
    """Lets the user's code, but not JAX's own, see another process."""
    other = jax.process_index() + 1
    with _replaced(jax, "process_index", lambda *args, **kwargs: other):
        yield


@contextlib.contextmanager
def _other_time() -> Iterator[None]:
    """Lets Python see another day: in float32 the seconds of two traces are equal."""
    now, now_ns = time.time, time.time_ns
    with (
        _replaced(time, "time", lambda: now() + 1e5),
        _replaced(time, "time_ns", lambda: now_ns() + 10**14),
    ):
        yield


@contextlib.contextmanager
def _other_order() -> Iterator[None]:
    """Lists folders backwards: their order is not defined, and differs between file systems."""
    listdir, scandir = os.listdir, os.scandir

    with (
        _replaced(os, "listdir", lambda *args: listdir(*args)[::-1]),
        _replaced(os, "scandir", lambda *args: _Backwards(scandir(*args))),
    ):
        yield


class _Backwards:
    """The entries of `os.scandir`, last first."""

    def __init__(self, entries: Any) -> None:
        with entries:
            self.entries: Sequence[Any] = list(entries)[::-1]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.entries)

    def __enter__(self) -> "_Backwards":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.entries = ()
