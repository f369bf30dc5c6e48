"""The places of a program where masks are made: ours by their marks, others' by what they draw."""

from typing import Any, NamedTuple

import numpy as np

from jdropout._audit.numbering import Numbering
from jdropout._audit.values import Bernoulli, Loop, Place, Value, frames_of, is_key
from jdropout._record import Frame, parse_mark


class Context(NamedTuple):
    loops: tuple[Loop, ...]
    branches: dict[int, int]
    scope: str
    frames: tuple[Frame, ...]
    recording: bool

    def inside(self, equation: Any) -> "Context":
        """Of the bodies of an operation."""
        scope = join(self.scope, equation)
        again = equation.params.get("differentiated") or "transpose(" in scope
        # What a backward pass makes again counts once.
        # A body may have been traced elsewhere: in a jitted function before, or by a custom_vjp.
        frames = frames_of(equation) + self.frames
        recording = self.recording and not again
        return self._replace(scope=scope, frames=frames, recording=recording)


class Places(Numbering):
    """All places of a walk, in the order of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []

    def mark(self, equation: Any, value: Value, context: Context) -> None:
        mark = parse_mark(equation.params["name"])
        scope = join(context.scope, equation)
        if mark is None or not context.recording or "transpose(" in scope:
            return
        batch_axes = equation.outvars[0].aval.ndim - mark.ndim
        if mark.kind in ("result", "start"):
            open_places = (
                place
                for place in reversed(self.places)
                if place.call == mark.call and not place.applied
            )
            place = next(open_places, None)
            if place is None:
                return
            if mark.kind == "start":
                place.start += (value.number,)
                return
        else:
            key = value if mark.kind == "key" else None
            frames = frames_of(equation) + context.frames
            place = Place(key, context.loops, context.branches, scope, frames, mark.call)
            place.key_batch_axes = batch_axes
            self.places.append(place)
        place.result_batch_axes, place.result_sources = batch_axes, value.sources
        # A key that all iterations share is made before the loop by a backward pass.
        place.loops, place.branches = context.loops, context.branches
        place.applied = mark.kind != "key"

    def bernoulli(self, equation: Any, operands: list[Value], context: Context) -> Value:
        [result] = self.plain(equation, operands)
        [(key, aval)] = [
            (value, atom.aval)
            for value, atom in zip(operands, equation.invars, strict=True)
            if is_key(atom.aval)
        ]
        # The last operand is the probability; a backward pass leaves others between them.
        place = Place(
            key=self.words(key, aval),
            loops=context.loops,
            branches=context.branches,
            scope=join(context.scope, equation),
            key_batch_axes=aval.ndim,
            frames=frames_of(equation) + context.frames,
            true_rate=operands[-1].fill,
        )
        if context.recording and "transpose(" not in place.scope:
            self.places.append(place)
        shape = equation.outvars[0].aval.shape
        return result._replace(known=None, bernoulli=Bernoulli(place, (False,) * len(shape)))


def draws_bernoulli(equation: Any) -> bool:
    """Whether it is `jax.random.bernoulli`, or the half of it that a backward pass left whole."""
    return (
        equation.params.get("name") == "_bernoulli"
        and "jaxpr" in equation.params
        and [variable.aval.dtype for variable in equation.outvars] == [np.bool_]
        and sum(is_key(atom.aval) for atom in equation.invars) == 1
    )


def join(scope: str, equation: Any) -> str:
    return f"{scope}/{equation.source_info.name_stack}"
