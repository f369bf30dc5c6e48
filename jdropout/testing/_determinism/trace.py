"""Traces a function for a check of determinism, and lists its operations."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from jdropout import _jaxprs
from jdropout._inputs import flatten, is_array
from jdropout.testing._module_scopes import named_modules
from jdropout.testing._sources import UNKNOWN, Source, source_of
from jdropout.testing._tracing import inlined

_traces = itertools.count()


class Operation(NamedTuple):
    """An equation of a program, wherever it is nested."""

    equation: Any
    source: Source
    numbers: tuple[int | None, ...]
    """Numbers of the operands; None for a literal."""
    constants: tuple[Any, ...]
    """Operands that are constants of the program."""
    of_device: bool
    """Whether an operand depends on the index of the device in a `jax.shard_map`."""
    in_kernel: bool
    """Whether it is inside a Pallas kernel."""

    @property
    def name(self) -> str:
        return str(self.equation.primitive.name)


class Traced(NamedTuple):
    operations: list[Operation]
    outputs: list[Any]
    """Outputs of the program that are constants."""


def trace(fn: Callable[..., Any], args: tuple[Any, ...]) -> Traced:
    """Traces a function and everything it calls, whether JAX has traced it before or not."""
    inputs = flatten(fn, args, {})
    traced = [i for i, leaf in enumerate(inputs.leaves) if is_array(leaf)]

    def flat(*values: Any) -> list[Any]:
        leaves = dict(enumerate(inputs.leaves)) | dict(zip(traced, values, strict=True))
        outputs = jax.tree.leaves(inputs.call(list(leaves.values())))
        return [output for output in outputs if is_array(output) or _is_number(output)]

    # JAX caches traces per metadata context, so a fresh value forces everything to retrace.
    fresh = set_xla_metadata(jdropout_check=str(next(_traces)))
    with named_modules(), fresh, jax.debug_key_reuse(False):
        closed = jax.make_jaxpr(flat)(*(inputs.leaves[i] for i in traced))
    walker = _Walker()
    outputs = walker.body(closed, [walker.fresh(False) for _ in closed.jaxpr.invars], UNKNOWN)
    known = [value.constant for value in outputs if value.constant is not None]
    return Traced(walker.operations, known)


def _is_number(output: Any) -> bool:
    return isinstance(output, bool | int | float | complex)


class _Value(NamedTuple):
    number: int | None
    of_device: bool
    constant: Any = None


class _Walker:
    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self.numbers = itertools.count()
        self.in_kernel = False

    def fresh(self, of_device: bool) -> _Value:
        return _Value(next(self.numbers), of_device)

    def body(self, body: Any, operands: Sequence[_Value], outer: Source) -> list[_Value]:
        """Lists the operations of a body, closed or open, and returns its outputs."""
        jaxpr = _jaxprs.open_jaxpr(body)
        constants = [_Value(None, False, array) for array in getattr(body, "consts", ())]
        constants += [self.fresh(False) for _ in jaxpr.constvars[len(constants) :]]
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *operands], strict=True))

        def read(atom: Any) -> _Value:
            if isinstance(atom, core.Literal):
                return _Value(None, False, atom.val)
            return values[atom]

        for equation in jaxpr.eqns:
            source = source_of(equation, jaxpr, outer)
            results = self.equation(equation, [read(atom) for atom in equation.invars], source)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[_Value], source: Source) -> list[_Value]:
        inside = inlined(equation)
        if inside is not None:
            return self.body(inside, operands, source)
        name = equation.primitive.name
        of_device = name == "axis_index" or any(value.of_device for value in operands)
        constants = tuple(value.constant for value in operands if value.constant is not None)
        numbers = tuple(value.number for value in operands)
        self.operations.append(
            Operation(equation, source, numbers, constants, of_device, self.in_kernel)
        )
        before, self.in_kernel = self.in_kernel, self.in_kernel or name == "pallas_call"
        for body in _jaxprs.bodies_of(equation):
            inputs = operands if name == "shard_map" else operands[1:] if name == "cond" else None
            if inputs is None:  # a loop's, mostly: any iteration has what an earlier one made
                inputs = [self.fresh(of_device) for _ in _jaxprs.open_jaxpr(body).invars]
            results = self.body(body, inputs, source)
            of_device = of_device or any(value.of_device for value in results)
        self.in_kernel = before
        # Outside of the shard_map it is one array, the same everywhere.
        return [self.fresh(of_device and name != "shard_map") for _ in equation.outvars]
