"""Finds the first value in which two recordings differ."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from jdropout._values import type_name
from jdropout.testing import _words
from jdropout.testing._program import Equation, Program, Spot
from jdropout.testing._recording import Recording


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference of two recordings, from `first_difference`.

    As text, ``str(difference)``, it has everything that is known.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout.testing import first_difference, record
      >>> def scaled(factor):
      ...     return record(lambda x: jnp.sin(x) * factor, jnp.ones(3))
      >>> difference = first_difference(scaled(2.0), scaled(3.0))
      >>> difference.kind, difference.name, difference.primitive
      ('program', 'equation 1 (mul)', 'mul')

    References:
      Lamport, "Time, clocks, and the ordering of events" (CACM 1978), for what comes first.
    """

    kind: str
    """``argument``, ``constant``, ``equation``, ``branch`` of a conditional, ``iterations`` (their
    number in a while loop), ``state`` of a training before a step, or ``program``."""
    name: str
    """Such as ``equation 12 (mul)``, ``argument params.w`` or ``state.w``."""
    primitive: str = ""
    """JAX's name of the operation."""
    dtype: str = ""
    shape: tuple[int, ...] = ()
    location: str = ""
    """File and line, such as ``train.py:12``."""
    function: str = ""
    """The function with this line."""
    path: str = ""
    """Names of the modules and scopes around it, joined by /."""
    step: int | None = None
    """The step of a training."""
    iterations: tuple[int, ...] = ()
    """The iteration of every loop around it, outermost first, counted from 0 as they ran."""
    device: tuple[tuple[str, int], ...] = ()
    """Position on the mesh, if it is in a `shard_map`."""
    operands: tuple[str, ...] = ()
    """Where the operands come from; all of them are equal."""
    elements: tuple[int, ...] | None = None
    """How many elements differ, and of how many; None without values."""
    description: str = dataclasses.field(default="", repr=False)

    def __str__(self) -> str:
        return self.description


def first_difference(a: Recording, b: Recording) -> Difference | None:
    """Finds the first value, in the order of execution, in which two recordings differ.

    Everything that the value was computed from is equal: the fault is in this operation or, for
    an argument, outside the function. If the programs differ, they are compared up to
    the first equation in which they do, and this equation is named if everything before it is
    equal. Two programs that split the same work over different numbers of devices are compared
    outside of their `jax.shard_map`.

    Args:
      a: a recording.
      b: another one, of the same function or of a similar one.

    Returns:
      None if there is no difference; otherwise a `Difference`. Its text names the operation, its
      type, line, module, iteration and operands, and the elements if both recordings have values.

    Raises:
      TypeError: if `a` or `b` is not a `Recording`.
      ValueError: if one of them is of a training and the other is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout.testing import first_difference, record
      >>> def double(x):
      ...     return x * 2
      >>> a, b = (record(double, jnp.float32(x), values=True) for x in (1, 3))
      >>> print(first_difference(a, b))
      argument x differs, before the first equation
        type      float32[]
        elements  1 of 1: 1.0 and 3.0 (2 apart, 12582912 ulps)

    References:
      Lamport, "Time, clocks, and the ordering of events" (CACM 1978), for what comes first.
    """
    for name, recording in {"a": a, "b": b}.items():
        if not isinstance(recording, Recording):
            raise TypeError(
                f"{name} must be a Recording, got {type_name(recording)}. Make one with record, or "
                "read one with Recording.load."
            )
    if a.steps and b.steps:
        return _of_trainings(a, b)
    if a.steps or b.steps:
        raise ValueError(
            f"{'a' if a.steps else 'b'} is a recording of a training and the other one is not. "
            "Compare recordings that were both made by record_training, or both by record."
        )
    return _of_programs(a, b, a._fingerprints, b._fingerprints, None, (0, 0))


def _of_trainings(a: Recording, b: Recording) -> Difference | None:
    state = a._about["state"]
    if state != b._about["state"]:
        return _structural("the states of the trainings have different leaves")
    every = a._about["every"], b._about["every"]
    steps = min(recording._about["steps"] for recording in (a, b))
    for step in range(steps + 1):
        rows = a._fingerprints[step], b._fingerprints[step]
        differs = rows[0][: len(state)] != rows[1][: len(state)]
        if differs.any():
            name, aval = state[int(differs.argmax())]
            before = _words.unrecorded(step, step == 0 or all((step - 1) % n == 0 for n in every))
            return Difference(
                "state",
                name,
                dtype=aval[0],
                shape=tuple(aval[1]),
                step=step,
                description=f"{name} differs before step {step}\n{before}",
            )
        if step < steps and all(step % n == 0 for n in every):
            own_a, own_b = (row[len(state) :] for row in rows)
            kept = (step // every[0], step // every[1])
            if found := _of_programs(a, b, own_a, own_b, step, kept):
                return found
    if a._about["steps"] != b._about["steps"]:
        return _structural(
            f"the trainings have {a._about['steps']} and {b._about['steps']} steps, which are "
            "equal as far as both go"
        )
    return None


def _structural(text: str) -> Difference:
    return Difference("program", "the program", description=text)


def _of_programs(
    a: Recording,
    b: Recording,
    rows_a: np.ndarray,
    rows_b: np.ndarray,
    step: int | None,
    kept: tuple[int, int],
) -> Difference | None:
    """Compares two runs; ``kept`` are the numbers of their steps among those with values."""
    aligned = _align(a._program, b._program)
    differs = rows_a[aligned.rows_a] != rows_b[aligned.rows_b]
    if not differs.any():
        return None if aligned.mismatch is None else _mismatch(a, b, aligned, step)
    first = int(differs.argmax())
    row_a, row_b = int(aligned.rows_a[first]), int(aligned.rows_b[first])
    spot = a._program.find(row_a, rows_a)
    values = None
    if a._values and b._values and spot.value >= 0:
        other = b._program.find(row_b, rows_b)
        values = (
            a._values[kept[0]][spot.value][_index(spot)],
            b._values[kept[1]][other.value][_index(other)],
        )
    return _describe(a._program, spot, (rows_a[row_a], rows_b[row_b]), step, values)


def _index(spot: Spot) -> tuple[int, ...]:
    """The index of a value among those of all iterations and devices."""
    return tuple(number for equation, number in spot.inside if equation.kind != "cond")


def _describe(
    program: Program,
    spot: Spot,
    fingerprints: tuple[Any, Any],
    step: int | None,
    values: tuple[np.ndarray, np.ndarray] | None,
) -> Difference:
    equation = spot.equation
    name = _words.name_of(program, spot)
    aval = _words.aval_of(program, spot)
    details = _words.details(program, spot, fingerprints, step, values)
    differing = None
    if values is not None:
        differing = int(_words.differs(*values).sum()), int(_words.differs(*values).size)
    loops = ("scan", "while")
    return Difference(
        kind=spot.kind,
        name=name,
        primitive=equation.primitive if equation else "",
        dtype=aval.dtype if aval else "",
        shape=aval.shape if aval else (),
        location=equation.source.location if equation else "",
        function=equation.source.function if equation else "",
        path=equation.source.path if equation else "",
        step=step,
        iterations=tuple(number for outer, number in spot.inside if outer.kind in loops),
        device=tuple(
            axis
            for outer, number in spot.inside
            if outer.kind == "shard_map"
            for axis in _words.position(outer.axes, number)
        ),
        operands=equation.operands if equation else (),
        elements=differing,
        description=details,
    )


# --- alignment ----------------------------------------------------------------------------


class _Aligned(NamedTuple):
    """The rows of two programs that can be compared, in the order of execution."""

    rows_a: np.ndarray
    rows_b: np.ndarray
    mismatch: tuple[Any, Any] | None
    """Where the programs begin to differ: equations, or words; None for an end."""


def _align(a: Program, b: Program) -> _Aligned:
    inputs = [len(program.arguments) + len(program.constants) for program in (a, b)]
    if a.arguments != b.arguments or a.constants != b.constants:
        empty = np.zeros(0, int)
        return _Aligned(empty, empty, (_words.inputs(a), _words.inputs(b)))
    if a.block == b.block:
        both = np.arange(a.rows)
        return _Aligned(both, both, None)
    parts = [(np.arange(inputs[0]), np.arange(inputs[1]))]
    mismatch = None
    offsets = inputs
    for one, other in itertools.zip_longest(a.block.equations, b.block.equations):
        mismatch = _mismatch_of(one, other)
        if mismatch is not None:
            break
        rows = _common_rows(one, other)
        parts.append((rows[0] + offsets[0], rows[1] + offsets[1]))
        offsets = [offsets[0] + one.rows, offsets[1] + other.rows]
    rows_a, rows_b = (np.concatenate(part) for part in zip(*parts, strict=True))
    return _Aligned(rows_a, rows_b, mismatch)


def _mismatch_of(one: Equation | None, other: Equation | None) -> tuple[Any, Any] | None:
    """The first pair of equations, of these two and in their bodies, that differ."""
    if one is None or other is None or _head(one) != _head(other):
        return one, other
    if one.kind == "shard_map" and one.axes != other.axes:
        return None
    if one.kind != "while" and one.length != other.length:
        return one, other
    if len(one.bodies) != len(other.bodies):
        return one, other
    for bodies in zip(one.bodies, other.bodies, strict=True):
        for pair in itertools.zip_longest(*(body.equations for body in bodies)):
            if (found := _mismatch_of(*pair)) is not None:
                return found
    return None


def _head(equation: Equation) -> Any:
    literals = tuple(
        operand if operand.startswith("the number") else "" for operand in equation.operands
    )
    return equation.primitive, equation.outputs, equation.params, literals


def _common_rows(one: Equation, other: Equation) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two equations without a mismatch."""
    if one.rows == other.rows and one.length == other.length and one.axes == other.axes:
        both = np.arange(one.rows)
        return both, both
    sizes = [sum(body.rows for body in equation.bodies) for equation in (one, other)]
    inside = np.zeros(0, int)
    if one.kind == "while" and sizes[0] == sizes[1]:  # with different numbers of kept iterations
        inside = np.arange(min(one.length, other.length) * sizes[0])
    own = len(one.own) + (one.kind == "while")
    ends = [np.arange(equation.rows - own, equation.rows) for equation in (one, other)]
    return np.concatenate([inside, ends[0]]), np.concatenate([inside, ends[1]])


def _mismatch(a: Recording, b: Recording, aligned: _Aligned, step: int | None) -> Difference:
    assert aligned.mismatch is not None
    words = [part if isinstance(part, str) else _words.equation(part) for part in aligned.mismatch]
    first = next((part for part in aligned.mismatch if isinstance(part, Equation)), None)
    source = first.source if first else None
    text = f"the programs differ\n  in a  {words[0]}\n  in b  {words[1]}"
    if first is not None:
        text += "\n  before this all values are equal"
    return Difference(
        "program",
        "the program" if first is None else f"equation {first.number} ({first.primitive})",
        primitive=first.primitive if first else "",
        location=source.location if source else "",
        function=source.function if source else "",
        path=source.path if source else "",
        step=step,
        description=text,
    )
