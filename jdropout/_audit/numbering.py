"""Value numbering: values computed in the same way get the same number, and are equal."""

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from jdropout._audit.values import (
    Value,
    compute,
    hashable,
    identity_of,
    is_key,
    known_array,
    mesh_axes,
)

_EQUAL_ON_DEVICES = {"all_gather", "all_gather_invariant", "pmax", "pmin", "psum"}
_EQUAL_ON_DEVICES |= {"psum2", "psum_invariant"}
"""Operations whose results are equal on all devices along their axes."""


class Numbering:
    """Numbers the values of one walk."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.wrapped: dict[int, Value] = {}
        """The words that a typed key was made of, by the key's number."""

    def value(self, identity: Hashable, sources: frozenset[Any], known: Any = None) -> Value:
        number = self.numbers.setdefault(identity, len(self.numbers))
        fill = None
        number_like = known is not None and not is_key(known) and known.dtype != jax.dtypes.float0
        if number_like and known.size == 1:
            fill = complex(np.asarray(known).reshape(())).real
        return Value(number, sources, known=known, fill=fill)

    def constant(self, array: Any) -> Value:
        known = known_array(array)
        if known is None:
            return self.value(("constant", id(array)), frozenset())
        return self.value(identity_of(known), frozenset(), known)

    def plain(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Numbers the results of an operation that is not walked into."""
        name = equation.primitive.name
        if name == "random_unwrap":
            return [self.words(operands[0], equation.invars[0].aval)]
        sources = frozenset().union(*(operand.sources for operand in operands))
        axes = mesh_axes(equation.params.get("axis_name", equation.params.get("axes")))
        if name == "axis_index":
            sources |= axes
        elif name in _EQUAL_ON_DEVICES:
            sources -= axes
        identity = (name, hashable(equation.params), tuple(x.number for x in operands))
        known = compute(equation, operands)
        results = [
            self.value((*identity, i), sources, None if known is None else known[i])
            for i in range(len(equation.outvars))
        ]
        if name == "random_wrap":
            self.wrapped[results[0].number] = operands[0]
        return results

    def words(self, key: Value, aval: Any) -> Value:
        """The words of a typed key: the value that it was wrapped from, if known."""
        if not is_key(aval):
            return key
        known = None if key.known is None else jax.random.key_data(key.known)
        words = self.value(("words", key.number), key.sources, known)
        return self.wrapped.get(key.number, words)
