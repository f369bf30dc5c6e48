"""A program in words: its equations, where they come from, and the rows of their fingerprints.

A recording is an array with one row for every output of every equation, in the order of execution:
an equation in a loop has a row for every iteration, and in a `shard_map` one for every device. The
first row that differs is the first difference, and `Program.find` says what it belongs to.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jdropout.testing._sources import Source


class Aval(NamedTuple):
    """Type of a value."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation of a program, with the bodies that it runs."""

    number: int
    primitive: str
    outputs: tuple[Aval | None, ...]
    """None for an output without bits, which has no row."""
    operands: tuple[str, ...]
    """Where they come from, in words."""
    params: str
    source: Source
    kind: str = "plain"
    """``plain``, ``scan``, ``while``, ``cond`` or ``shard_map``."""
    bodies: tuple["Block", ...] = ()
    """For a while loop its condition and its body, for a conditional its branches."""
    length: int = 1
    """Iterations of a scan; iterations of a while loop with rows of their own; devices."""
    axes: tuple[tuple[str, int], ...] = ()
    """Mesh axes of a `shard_map`, with their sizes."""

    @functools.cached_property
    def own(self) -> tuple[Aval, ...]:
        """The outputs that have rows, which come after those of the bodies."""
        return tuple(output for output in self.outputs if output is not None)

    @functools.cached_property
    def rows(self) -> int:
        bodies = [body.rows for body in self.bodies]
        inside = {
            "plain": 0,
            "scan": self.length * sum(bodies),
            # The last iteration stands for all further ones; then comes the number of iterations.
            "while": (self.length + 1) * sum(bodies) + 1,
            "cond": 1 + max(bodies, default=0),  # the branch, and what is in it
            "shard_map": self.length * sum(bodies),
        }
        return inside[self.kind] + len(self.own)

    @functools.cached_property
    def values(self) -> int:
        """Number of values that are kept: those of a body's iterations are in one array."""
        return sum(body.values for body in self.bodies) + len(self.own)


@dataclasses.dataclass(frozen=True)
class Block:
    """The equations of a program or of a body."""

    equations: tuple[Equation, ...]

    @functools.cached_property
    def rows(self) -> int:
        return sum(equation.rows for equation in self.equations)

    @functools.cached_property
    def values(self) -> int:
        return sum(equation.values for equation in self.equations)

    def walk(self) -> Iterator[Equation]:
        for equation in self.equations:
            yield equation
            for body in equation.bodies:
                yield from body.walk()


class Spot(NamedTuple):
    """What a row belongs to."""

    kind: str
    """``argument``, ``constant``, ``equation``, ``branch`` or ``iterations``."""
    item: int
    """Number of the argument or constant, or of the output among those with rows."""
    equation: Equation | None
    inside: tuple[tuple[Equation, int], ...]
    """The loops and conditionals around it, with the iteration or branch; for a `shard_map` the
    number of the device. Outermost first."""
    value: int
    """Number of its value among those that are kept; -1 if there is none."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced function."""

    arguments: tuple[tuple[str, Aval], ...]
    constants: tuple[Aval, ...]
    block: Block

    @functools.cached_property
    def rows(self) -> int:
        return len(self.arguments) + len(self.constants) + self.block.rows

    @functools.cached_property
    def equations(self) -> int:
        return sum(1 for _ in self.block.walk())

    @functools.cached_property
    def sources(self) -> dict[int, Source]:
        """Sources of the equations by their numbers."""
        return {equation.number: equation.source for equation in self.block.walk()}

    def find(self, row: int, rows: np.ndarray) -> Spot:
        """Finds what a row belongs to; needs the rows, which say what branches were taken."""
        arguments, inputs = len(self.arguments), len(self.arguments) + len(self.constants)
        if row < arguments:
            return Spot("argument", row, None, (), row)
        if row < inputs:
            return Spot("constant", row - arguments, None, (), row)
        return _find(self.block, row - inputs, inputs, 1, rows, (), inputs)


def _find(
    block: Block,
    row: int,
    offset: int,
    stride: int,
    rows: np.ndarray,
    inside: tuple[tuple[Equation, int], ...],
    value: int,
) -> Spot:
    """Finds a row of a block, whose row i is row ``offset + stride * i`` of the program."""
    for equation in block.equations:
        if row < equation.rows:
            break
        row -= equation.rows
        offset += stride * equation.rows
        value += equation.values
    before_own = equation.rows - len(equation.own)
    if row >= before_own:
        index = row - before_own
        own_value = value + equation.values - len(equation.own) + index
        return Spot("equation", index, equation, inside, own_value)
    if equation.kind == "cond":
        branch = int(rows[offset])
        if row == 0:
            return Spot("branch", 0, equation, inside, -1)
        value += sum(body.values for body in equation.bodies[:branch])
        within = (*inside, (equation, branch))
        body = equation.bodies[branch]
        return _find(body, row - 1, offset + stride, stride, rows, within, value)
    if equation.kind == "shard_map":
        row, device = divmod(row, equation.length)
        within = (*inside, (equation, device))
        offset, stride = offset + stride * device, stride * equation.length
        return _find(equation.bodies[0], row, offset, stride, rows, within, value)
    size = sum(body.rows for body in equation.bodies)
    if size == 0 or row == (equation.length + 1) * size:  # of a while loop
        return Spot("iterations", 0, equation, inside, -1)
    iteration, row = divmod(row, size)
    offset += stride * iteration * size
    within = (*inside, (equation, iteration))
    for body in equation.bodies:
        if row < body.rows:
            break
        row -= body.rows
        offset += stride * body.rows
        value += body.values
    return _find(body, row, offset, stride, rows, within, value)
