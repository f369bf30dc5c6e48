"""Where keys come from: a walk through a jaxpr that numbers its values.

Two values with one number are equal. A value also knows which inputs and loops it depends on, and,
if it is small and follows from known numbers, what it is. The walk yields the places where a mask
is made: ours, by their marks, and `jax.random.bernoulli` where it zeroes something.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from jdropout._audit.values import (
    Bernoulli,
    Loop,
    Place,
    Value,
    bodies_of,
    compute,
    follow_mask,
    hashable,
    identity_of,
    invars_of,
    is_key,
    known_array,
    may_be_key,
    mesh_axes,
    rows_equal,
    split_over_devices,
)
from jdropout._sites import Frame, Mark, parse_mark


class Flow(NamedTuple):
    """Result of a walk."""

    places: list[Place]
    outputs: list[Value]


def walk(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> Flow:
    """Walks through a jaxpr.

    Args:
      closed: the program.
      arguments: its inputs; arrays whose values are used where they are small, or abstract ones.

    Returns:
      The places where masks are made, in the order of the program, and the outputs.
    """
    walker = _Walker()
    inputs = [
        walker.value(("input", i), frozenset([i]), known_array(argument))
        for i, argument in enumerate(arguments)
    ]
    outputs = walker.closed(closed, inputs, _Context((), {}, recording=True))
    return Flow(
        [place for place in walker.places if place.call is not None or place.applied], outputs
    )


def advanced_keys(closed: core.ClosedJaxpr, flow: Flow) -> frozenset[int]:
    """The inputs that are keys, of which another key among the outputs is made."""
    successors = [
        value
        for value, variable in zip(flow.outputs, closed.jaxpr.outvars, strict=True)
        if may_be_key(variable.aval)
    ]
    return frozenset(
        i
        for i, variable in enumerate(closed.jaxpr.invars)
        if may_be_key(variable.aval)
        and any(i in value.sources and value.number != i for value in successors)
    )


class _Context(NamedTuple):
    loops: tuple[Loop, ...]
    branches: dict[int, int]
    recording: bool
    computing: bool = True


class _Walker:
    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.places: list[Place] = []
        self.wrapped: dict[int, Value] = {}
        """Words of typed keys, by the number of the key."""
        self.with_places: dict[int, tuple[Any, bool]] = {}
        self.loops = 0

    def value(self, identity: Hashable, sources: frozenset[Any], known: Any = None) -> Value:
        number = self.numbers.setdefault(identity, len(self.numbers))
        fill = None
        if known is not None and np.size(known) == 1 and not is_key(known):
            fill = complex(np.asarray(known).reshape(())).real
        return Value(number, sources, known, fill)

    def constant(self, array: Any) -> Value:
        known = known_array(array)
        if known is None:
            return self.value(("constant", id(array)), frozenset())
        return self.value(identity_of(known), frozenset(), known)

    def closed(self, closed: Any, inputs: list[Value], context: _Context) -> list[Value]:
        """Walks through the body of an operation: a jaxpr, with or without constants."""
        jaxpr = getattr(closed, "jaxpr", closed)
        constants = [self.constant(array) for array in getattr(closed, "consts", ())]
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self.equation(equation, operands, context)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[Value], context: _Context) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        if parameters.get("name") == "_bernoulli" and "jaxpr" in parameters:
            return [self.bernoulli(equation, operands, context)]
        if name == "name":
            mark = parse_mark(parameters["name"])
            if mark is not None and context.recording:
                self.mark(mark, operands[0], equation.outvars[0].aval.ndim, context)
            return operands
        if name == "scan":
            return self.scan(equation, operands, context)
        if name == "while":
            return self.while_loop(equation, operands, context)
        if name == "cond":
            return self.cond(equation, operands, context)
        bodies = list(bodies_of(equation))
        inlined = len(bodies) == 1 and len(invars_of(bodies[0])) == len(operands)
        if inlined and self.matters(bodies[0], operands):
            if parameters.get("differentiated"):  # what a backward pass makes again
                context = context._replace(recording=False)
            if name == "shard_map":
                context = context._replace(computing=False)
                operands = list(map(split_over_devices, operands, parameters["in_specs"]))
            return self.closed(bodies[0], operands, context)
        results = self.plain(equation, operands, context)
        return [follow_mask(equation, operands, result) for result in results]

    def matters(self, body: Any, operands: list[Value]) -> bool:
        """Whether a place, or what a key may be made of, can come out of a body."""
        if any(operand.bernoulli is not None for operand in operands):
            return True
        outputs = getattr(body, "jaxpr", body).outvars
        if any(is_key(atom.aval) or atom.aval.dtype.kind in "iu" for atom in outputs):
            return True
        return self.has_places(body)

    def has_places(self, body: Any) -> bool:
        jaxpr = getattr(body, "jaxpr", body)
        if id(jaxpr) not in self.with_places:  # it is kept, so that no other one has its id
            found = any(
                equation.params.get("name") == "_bernoulli"
                or (equation.primitive.name == "name" and parse_mark(equation.params["name"]))
                or any(self.has_places(inner) for inner in bodies_of(equation))
                for equation in jaxpr.eqns
            )
            self.with_places[id(jaxpr)] = (jaxpr, found)
        return self.with_places[id(jaxpr)][1]

    def plain(self, equation: Any, operands: list[Value], context: _Context) -> list[Value]:
        """An operation without a body."""
        if equation.primitive.name == "random_unwrap":
            return [self.words(operands[0], equation.invars[0].aval)]
        sources = frozenset().union(*(operand.sources for operand in operands))
        if equation.primitive.name == "axis_index":
            sources |= mesh_axes(equation.params["axis_name"])
        identity = (
            equation.primitive.name,
            hashable(equation.params),
            tuple(operand.number for operand in operands),
        )
        known = compute(equation, operands) if context.computing else None
        results = [
            self.value((*identity, i), sources, None if known is None else known[i])
            for i in range(len(equation.outvars))
        ]
        if equation.primitive.name == "random_wrap":
            self.wrapped[results[0].number] = operands[0]
        return results

    def words(self, key: Value, aval: Any) -> Value:
        """The words of a typed key: those that it was made of, if it was."""
        if not is_key(aval):
            return key
        known = None if key.known is None else jax.random.key_data(key.known)
        words = self.value(("words", key.number), key.sources, known)
        return self.wrapped.get(key.number, words)

    # --- operations with bodies -------------------------------------------------------------

    def scan(self, equation: Any, operands: list[Value], context: _Context) -> list[Value]:
        parameters = equation.params
        constants, carry = parameters["num_consts"], parameters["num_carry"]
        loop = self.loop("scan", parameters["length"])
        slices = [self.slice_of(value, loop) for value in operands[constants + carry :]]
        body = parameters["jaxpr"]
        self.iterate(
            body, operands[:constants], operands[constants:][:carry], slices, loop, context
        )
        return self.plain(equation, operands, context)

    def while_loop(self, equation: Any, operands: list[Value], context: _Context) -> list[Value]:
        condition, constants = (equation.params[f"{part}_nconsts"] for part in ("cond", "body"))
        body = equation.params["body_jaxpr"]
        start = operands[condition + constants :]
        loop = self.loop("while loop", None)
        self.iterate(body, operands[condition:][:constants], start, [], loop, context)
        return self.plain(equation, operands, context)

    def loop(self, kind: str, length: int | None) -> Loop:
        self.loops += 1
        return Loop(self.loops, kind, length)

    def varying(self, value: Value, loop: Loop, role: Hashable) -> Value:
        return self.value((loop, role, value.number), value.sources | {loop})

    def slice_of(self, value: Value, loop: Loop) -> Value:
        """A row of what is scanned over; it does not vary if all rows are known to be equal."""
        if value.known is not None and rows_equal(value.known):
            return self.value(identity_of(value.known[0]), value.sources, value.known[0])
        return self.varying(value, loop, "slice")

    def iterate(
        self,
        body: Any,
        constants: list[Value],
        start: list[Value],
        slices: list[Value],
        loop: Loop,
        context: _Context,
    ) -> None:
        """Walks through a loop's body, with what varies between iterations set apart."""
        if not self.has_places(body):
            return
        silent = context._replace(recording=False)
        carry = list(start)
        changed = [True]
        while any(changed):
            results = self.closed(body, [*constants, *carry, *slices], silent)[: len(carry)]
            changed = [
                loop not in value.sources and value.number != result.number
                for value, result in zip(carry, results, strict=True)
            ]
            carry = [
                self.varying(value, loop, i) if new else value
                for i, (value, new) in enumerate(zip(carry, changed, strict=True))
            ]
        if context.recording:
            inside = context._replace(loops=(*context.loops, loop))
            self.closed(body, [*constants, *carry, *slices], inside)

    def cond(self, equation: Any, operands: list[Value], context: _Context) -> list[Value]:
        self.loops += 1
        for branch, body in enumerate(equation.params["branches"]):
            inside = context._replace(branches={**context.branches, self.loops: branch})
            self.closed(body, operands[1:], inside)
        return self.plain(equation, operands, context)

    # --- masks --------------------------------------------------------------------------------

    def mark(self, mark: Mark, value: Value, ndim: int, context: _Context) -> None:
        if mark.is_key:
            place = Place(value, context.loops, context.branches, mark.call)
            place.key_batch_axes = place.result_batch_axes = ndim - mark.ndim
            self.places.append(place)
            return
        keyed = (place for place in reversed(self.places) if place.call == mark.call)
        found = next(keyed, None)
        if found is None or found.applied:  # no mask was drawn, so that there is no key
            found = Place(None, context.loops, context.branches, mark.call)
            self.places.append(found)
        found.result_batch_axes = ndim - mark.ndim
        found.result_sources = value.sources
        found.applied = True

    def bernoulli(self, equation: Any, operands: list[Value], context: _Context) -> Value:
        [result] = self.plain(equation, operands, context)
        shape = equation.outvars[0].aval.shape
        kept = operands[1].fill
        place = Place(
            key=self.words(operands[0], equation.invars[0].aval),
            loops=context.loops,
            branches=context.branches,
            key_batch_axes=equation.invars[0].aval.ndim,
            result_batch_axes=equation.invars[0].aval.ndim,
            rate=None if kept is None else round(1 - kept, 6),
            stored_bytes=math.prod(shape),
            frames=tuple(
                Frame(frame.file_name, frame.line_num, frame.function_name)
                for frame in equation.source_info.traceback.frames
            ),
            scope=str(equation.source_info.name_stack),
        )
        if context.recording:
            self.places.append(place)
        return result._replace(known=None, bernoulli=Bernoulli(place, (False,) * len(shape)))
