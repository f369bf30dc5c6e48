"""Traces a function for a recording, and describes its program."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jdropout import _jaxprs
from jdropout._arrays import as_array, readable
from jdropout._inputs import Inputs, flatten, is_array
from jdropout.testing._fingerprint import has_fingerprint
from jdropout.testing._module_scopes import named_modules
from jdropout.testing._program import Aval, Block, Equation, Program
from jdropout.testing._sources import UNKNOWN, Source, source_of

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Equations that run one body once, by the parameter that holds it. They are looked through."""


class Traced(NamedTuple):
    """A function traced for its arguments."""

    program: Program
    closed: core.ClosedJaxpr
    leaves: list[Any]
    """The values of the traced leaves."""
    rebuild: Callable[[Sequence[Any]], Any]
    """Makes the function's result from the outputs of the program."""


def trace(
    fn: Callable[..., Any], args: tuple[Any, ...], limit: int, numbers: bool = False
) -> Traced:
    """Traces a function; its while loops get ``limit`` rows. Numbers are traced or static."""
    inputs = flatten(fn, args, {})
    traced = _traced(inputs, numbers)
    leaves = [inputs.leaves[i] for i in traced]
    result: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        again = dict(enumerate(inputs.leaves)) | dict(zip(traced, values, strict=True))
        outputs, definition = jax.tree.flatten(inputs.call(list(again.values())))
        arrays = [i for i, output in enumerate(outputs) if isinstance(output, jax.Array)]
        result[:] = [outputs, definition, arrays]
        return [outputs[i] for i in arrays]

    with named_modules(), jax.debug_key_reuse(False):
        closed = jax.make_jaxpr(flat)(*leaves)
    static, definition, arrays = result
    kept = [None if isinstance(output, jax.core.Tracer) else output for output in static]

    def rebuild(values: Sequence[Any]) -> Any:
        outputs = dict(enumerate(kept)) | dict(zip(arrays, values, strict=True))
        return jax.tree.unflatten(definition, list(outputs.values()))

    names = [inputs.names[i] for i in traced]
    return Traced(_describe(closed, names, limit), closed, leaves, rebuild)


def check_leaves(name: str, tree: Any, numbers: bool = False) -> None:
    """Checks that JAX can read what is to be recorded."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array | np.ndarray):
            readable(name, leaf)
        elif numbers and isinstance(leaf, int | float):
            as_array(name, leaf)


def leaves_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """The leaves that `trace` with numbers would trace."""
    inputs = flatten(fn, args, {})
    return [inputs.leaves[i] for i in _traced(inputs, numbers=True)]


def _traced(inputs: Inputs, numbers: bool) -> list[int]:
    return [
        i
        for i, leaf in enumerate(inputs.leaves)
        if is_array(leaf) or (numbers and type(leaf) in (int, float))
    ]


def inlined(equation: Any) -> Any:
    """The body of an equation that is looked through, otherwise None."""
    return equation.params.get(_CALLS.get(equation.primitive.name, ""))


def aval_of(atom: Any) -> Aval | None:
    if not has_fingerprint(atom.aval):
        return None
    return Aval(str(atom.aval.dtype), tuple(map(int, atom.aval.shape)))


def _describe(closed: core.ClosedJaxpr, names: Sequence[str], limit: int) -> Program:
    jaxpr = closed.jaxpr
    pairs = list(zip(names, map(aval_of, jaxpr.invars), strict=True))
    constants = [aval_of(variable) for variable in jaxpr.constvars]
    describer = _Describer(limit)
    operands = [f"constant {i}" for i in range(len(constants))]
    operands += [f"argument {name}" for name in names]
    equations, _ = describer.body(closed, operands, UNKNOWN)
    return Program(
        tuple((name, aval) for name, aval in pairs if aval is not None),
        tuple(aval for aval in constants if aval is not None),
        Block(tuple(equations)),
    )


class _Describer:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.numbers = itertools.count()

    def body(
        self, body: Any, operands: Sequence[str], outer: Source
    ) -> tuple[list[Equation], list[str]]:
        """Describes the equations of a body, and where its outputs come from.

        Args:
          body: a jaxpr, open or closed.
          operands: where its constants, if it is open or the whole program, and inputs come from.
          outer: source of the equation whose body it is.
        """
        jaxpr = _jaxprs.open_jaxpr(body)
        missing = len(jaxpr.constvars) + len(jaxpr.invars) - len(operands)
        operands = [*(f"constant {i} of a body" for i in range(missing)), *operands]
        origins: dict[Any, str] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True)
        )

        def origin(atom: Any) -> str:
            return _literal(atom.val) if isinstance(atom, core.Literal) else origins[atom]

        equations: list[Equation] = []
        for each in jaxpr.eqns:
            source = source_of(each, jaxpr, outer)
            own = [origin(atom) for atom in each.invars]
            inside = inlined(each)
            if inside is not None:
                more, results = self.body(inside, own, source)
                equations += more
            else:
                equations.append(self.equation(each, own, source))
                results = _outputs(equations[-1])
            origins.update(zip(each.outvars, results, strict=True))
        return equations, [origin(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[str], source: Source) -> Equation:
        number = next(self.numbers)
        name = equation.primitive.name
        bodies: list[tuple[Any, list[str]]] = []
        kind, length = "plain", 1
        axes: tuple[tuple[str, int], ...] = ()
        loop = f"equation {number} ({name})"
        if name == "scan":
            kind, length = name, int(equation.params["length"])
            constants, carry = _jaxprs.scan_counts(equation)
            inner = operands[:constants]
            inner += [f"carry {i} of {loop}" for i in range(carry)]
            inner += [f"a slice of {operand}" for operand in operands[constants + carry :]]
            bodies = [(equation.params["jaxpr"], inner)]
        elif name == "while":
            kind, length = name, self.limit
            ends = equation.params["cond_nconsts"], equation.params["body_nconsts"]
            carries = [f"carry {i} of {loop}" for i in range(len(operands) - sum(ends))]
            bodies = [
                (equation.params["cond_jaxpr"], operands[: ends[0]] + carries),
                (equation.params["body_jaxpr"], operands[ends[0] : sum(ends)] + carries),
            ]
        elif name == "cond":
            kind = name
            bodies = [(branch, operands[1:]) for branch in equation.params["branches"]]
        elif name == "shard_map":
            kind = name
            sizes = equation.params["mesh"].shape
            axes = tuple((axis, int(sizes[axis])) for axis in _jaxprs.manual_axes(equation))
            length = math.prod(size for _, size in axes)
            inner = [f"the device's part of {operand}" for operand in operands]
            bodies = [(equation.params["jaxpr"], inner)]
        return Equation(
            number=number,
            primitive=name,
            outputs=tuple(map(aval_of, equation.outvars)),
            operands=tuple(operands),
            params=", ".join(_parameters(equation.params)),
            source=source,
            kind=kind,
            bodies=tuple(Block(tuple(self.body(*body, source)[0])) for body in bodies),
            length=length,
            axes=axes,
        )


def _outputs(equation: Equation) -> list[str]:
    name = f"equation {equation.number} ({equation.primitive})"
    count = len(equation.outputs)
    return [name] if count == 1 else [f"output {i} of {name}" for i in range(count)]


def _literal(value: Any) -> str:
    return f"the number {value}" if np.ndim(value) == 0 else "a literal"


def _parameters(parameters: dict[str, Any]) -> Iterator[str]:
    """The parameters that are the same on every machine and for every sharding, in words."""
    for name, value in sorted(parameters.items()):
        if name in _TOLD or value is None or not _is_plain(value):
            continue
        yield f"{name}={value}"[:80]


_TOLD = {"name", "inline", "keep_unused", "unroll", "shape", "length", "num_consts", "num_carry"}
_TOLD |= {"sharding", "new_sizes", "cond_nconsts", "body_nconsts", "newly_manual_axes"}
"""Parameters that say nothing about a value, or that the types already say."""


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | np.dtype | np.generic)
