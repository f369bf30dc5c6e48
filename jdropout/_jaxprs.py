"""Reads the parameters of equations, in every version of JAX."""

from collections.abc import Iterator, Sequence
from typing import Any

from jax.extend import core
from jax.sharding import AxisType


def bodies_of(equation: Any) -> Iterator[Any]:
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, core.ClosedJaxpr | core.Jaxpr):
                yield part


def open_jaxpr(body: Any) -> Any:
    """The open jaxpr of a body that may be closed."""
    return getattr(body, "jaxpr", body)


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are the carry."""
    body = open_jaxpr(equation.params["jaxpr"])
    # Slices have an axis more outside the body. That is how to count them, and the carry: the
    # parameters with these counts have other names in JAX 0.12.
    scanned = _count_with_loop_axis(equation.invars, body.invars)
    carry = len(body.outvars) - _count_with_loop_axis(equation.outvars, body.outvars)
    return len(equation.invars) - carry - scanned, carry


def manual_axes(equation: Any) -> tuple[str, ...]:
    """The mesh axes that a `shard_map` makes manual, in the order of the mesh."""
    # Newer versions of JAX have newly_manual_axes.
    names = [equation.params.get(f"{name}manual_axes", ()) for name in ("newly_", "")]
    axes = names[0] or names[1]
    mesh = equation.params["mesh"]
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    # In JAX 0.8, manual_axes also holds those of the shard_map around it.
    return tuple(a for a, kind in kinds.items() if a in axes and kind != AxisType.Manual)


def _count_with_loop_axis(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """How many values have an axis of iterations outside the loop's body."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)
