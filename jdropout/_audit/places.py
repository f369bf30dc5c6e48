"""Collects the places that make masks: ours, by their marks, and `jax.random.bernoulli`."""

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
        """The context inside the bodies of an operation."""
        scope = join(self.scope, equation)
        again = equation.params.get("differentiated") or "transpose(" in scope
        # A body may have been traced elsewhere, by an earlier call of a jitted function or by a
        # custom_vjp, and then lacks the frames of this call.
        frames = frames_of(equation) + self.frames
        # A mask that a backward pass recomputes counts once.
        recording = self.recording and not again
        return self._replace(scope=scope, frames=frames, recording=recording)


class Places(Numbering):
    """Collects all places of a walk, in program order."""

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
        # With a backward pass, JAX hoists a key that all iterations share out of the loop.
        place.loops, place.branches = context.loops, context.branches
        place.applied = mark.kind != "key"

    def bernoulli(self, equation: Any, operands: list[Value], context: Context) -> Value:
        [result] = self.plain(equation, operands)
        [(key, aval)] = [
            (value, atom.aval)
            for value, atom in zip(operands, equation.invars, strict=True)
            if is_key(atom.aval)
        ]
        # The probability comes last; a backward pass may add operands between it and the key.
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
    """Whether it is `jax.random.bernoulli`, perhaps split in two by a backward pass."""
    return (
        equation.params.get("name") == "_bernoulli"
        and "jaxpr" in equation.params
        and [variable.aval.dtype for variable in equation.outvars] == [np.bool_]
        and sum(is_key(atom.aval) for atom in equation.invars) == 1
    )


def join(scope: str, equation: Any) -> str:
    return f"{scope}/{equation.source_info.name_stack}"
