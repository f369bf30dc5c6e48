"""Finds out where keys come from, by a walk through a jaxpr that numbers its values.

Values with the same number are equal. Each value also has the inputs and loops that it depends on
and, if it is small and computed from constants, the array itself. The walk collects the places
where a mask is made: this library's, by their marks, and `jax.random.bernoulli` if it zeroes
something.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jdropout._audit import masks
from jdropout._audit.places import Context, Places, draws_bernoulli
from jdropout._audit.values import (
    Carry,
    Loop,
    Place,
    Value,
    identity_of,
    is_integer,
    is_key,
    known_array,
    may_be_key,
    mesh_axes,
    rows_equal,
)
from jdropout._jaxprs import bodies_of, manual_axes, open_jaxpr, scan_counts
from jdropout._record import parse_mark

_UNCHANGED = {"copy", "copy_p", "device_put", "mesh_cast", "name", "optimization_barrier"}
_UNCHANGED |= {"pcast", "pvary", "reshard", "sharding_constraint"}
"""Operations that return their operands."""


class Flow(NamedTuple):
    """Result of a walk."""

    places: list[Place]
    outputs: list[Value]


def walk(closed: core.ClosedJaxpr, arguments: Sequence[Any]) -> Flow:
    """Walks through a jaxpr.

    Args:
      closed: the program.
      arguments: its inputs, abstract or arrays; the values of small arrays are used.

    Returns:
      The places where masks are made, in the order of the program, and the outputs.
    """
    walker = _Walker()
    # Compute constants now, even if the audit itself runs inside a trace.
    with jax.ensure_compile_time_eval():
        inputs = [
            walker.value(("input", i), frozenset([i]), known_array(argument))
            for i, argument in enumerate(arguments)
        ]
        outputs = walker.body(closed, inputs, Context((), {}, "", (), recording=True))
    return Flow([place for place in walker.places if place.applied], outputs)


def advanced_inputs(closed: core.ClosedJaxpr, flow: Flow) -> frozenset[int]:
    """The inputs whose next value is an output: keys, and integers such as a stream's count."""

    def is_next(i: int, before: Any, value: Value, after: Any) -> bool:
        if i not in value.sources - value.choices or value.number == i:
            return False
        made_from = value.sources - value.choices
        counts = is_integer(before) and is_integer(after) and made_from == {i}
        return counts or (may_be_key(before) and may_be_key(after))

    outputs = list(zip(flow.outputs, closed.jaxpr.outvars, strict=True))
    return frozenset(
        i
        for i, variable in enumerate(closed.jaxpr.invars)
        if any(is_next(i, variable.aval, value, after.aval) for value, after in outputs)
    )


class _Walker(Places):
    def __init__(self) -> None:
        super().__init__()
        self.with_places: dict[int, tuple[Any, bool]] = {}
        self.entered = 0
        """Number of loops and conditionals entered so far."""

    def body(self, body: Any, inputs: list[Value], context: Context) -> list[Value]:
        """Walks through an operation's body, a closed or open jaxpr."""
        jaxpr = open_jaxpr(body)
        constants = [self.constant(array) for array in getattr(body, "consts", ())]
        values: dict[Any, Value] = dict(zip(jaxpr.constvars, constants, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Value:
            return self.constant(atom.val) if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self.equation(equation, operands, context)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, operands: list[Value], context: Context) -> list[Value]:
        name = equation.primitive.name
        if name == "name":
            self.mark(equation, operands[0], context)
        if name in _UNCHANGED and len(operands) == len(equation.outvars):
            return operands
        if draws_bernoulli(equation):
            return [self.bernoulli(equation, operands, context)]
        bodies = list(bodies_of(equation))
        if any(self.worth_entering(name, body, operands) for body in bodies):
            inside = context.inside(equation)
            if name == "scan":
                return self.scan(equation, operands, inside)
            if name == "while":
                return self.while_loop(equation, operands, inside)
            if name == "cond":
                return self.cond(equation, operands, inside)
            if name == "shard_map":
                return self.shard_map(equation, operands, inside)
            if len(bodies) == 1 and len(open_jaxpr(bodies[0]).invars) == len(operands):
                return self.body(bodies[0], operands, inside)
        results = self.plain(equation, operands)
        if len(results) == 1:
            results = [masks.follow(equation, operands, results[0])]
            if context.recording:
                masks.drop(equation, operands, results[0], context.loops, context.branches)
        return results

    def worth_entering(self, name: str, body: Any, operands: list[Value]) -> bool:
        """Whether a body may contain a place, or return a key, a mask or a constant."""
        if any(operand.bernoulli is not None for operand in operands):
            return True
        if all(operand.fill is not None for operand in operands):
            return True
        # Most loops return a counter, and hardly any key is made from it: not worth walking them.
        of_key = may_be_key if name in ("scan", "while") else _may_make_key
        outputs = open_jaxpr(body).outvars
        return any(of_key(atom.aval) for atom in outputs) or self.has_places(body)

    def has_places(self, body: Any) -> bool:
        jaxpr = open_jaxpr(body)
        if id(jaxpr) not in self.with_places:  # stored with its id, which stays unique
            found = any(
                draws_bernoulli(equation)
                or (equation.primitive.name == "name" and parse_mark(equation.params["name"]))
                or any(self.has_places(inner) for inner in bodies_of(equation))
                for equation in jaxpr.eqns
            )
            self.with_places[id(jaxpr)] = (jaxpr, found)
        return self.with_places[id(jaxpr)][1]

    # --- operations with bodies -------------------------------------------------------------

    def scan(self, equation: Any, operands: list[Value], context: Context) -> list[Value]:
        constants, carry = scan_counts(equation)
        loop = self.loop("scan", equation.params["length"])
        slices = [self.slice_of(value, loop) for value in operands[constants + carry :]]
        start = operands[constants:][:carry]
        results = self.iterate(
            equation.params["jaxpr"], operands[:constants], start, slices, loop, context
        )
        return self.after_loop(equation, operands, start, results, loop)

    def while_loop(self, equation: Any, operands: list[Value], context: Context) -> list[Value]:
        condition, constants = (equation.params[f"{part}_nconsts"] for part in ("cond", "body"))
        start = operands[condition + constants :]
        loop = self.loop("while loop", None)
        results = self.iterate(
            equation.params["body_jaxpr"],
            operands[condition:][:constants],
            start,
            [],
            loop,
            context,
        )
        return self.after_loop(equation, operands, start, results, loop)

    def loop(self, kind: str, length: int | None) -> Loop:
        self.entered += 1
        return Loop(self.entered, kind, length)

    def slice_of(self, value: Value, loop: Loop) -> Value:
        """One row of an array that a loop scans; a constant if all rows are known to be equal."""
        if value.known is not None and rows_equal(value.known):
            return self.value(identity_of(value.known[0]), value.sources, value.known[0])
        return self.value(("slice", value.number), value.sources | {loop})

    def iterate(
        self,
        body: Any,
        constants: list[Value],
        start: list[Value],
        slices: list[Value],
        loop: Loop,
        context: Context,
    ) -> list[Value]:
        """Walks through a loop's body until it is clear which values vary between iterations."""
        silent = context._replace(recording=False)
        carry, grows = start, True
        while grows:
            results = self.body(body, [*constants, *carry, *slices], silent)
            grown = [
                self.carried(Carry(loop, i), *values)
                for i, values in enumerate(zip(start, carry, results, strict=False))
            ]
            grows = [value[:2] for value in grown] != [value[:2] for value in carry]
            carry = grown
        if not context.recording:
            return results
        # Carries with equal starts and equal updates are equal sequences, even in different loops.
        after = results[: len(start)]
        updates = list(zip(range(len(start)), _numbers(start), _numbers(after), strict=True))
        for i, value in enumerate(carry):
            if Carry(loop, i) in value.sources:
                made_of = tuple(x for x in updates if Carry(loop, x[0]) in value.sources)
                carry[i] = self.value(("carry", i, made_of), value.sources)
        inside = context._replace(loops=(*context.loops, loop))
        return self.body(body, [*constants, *carry, *slices], inside)

    def carried(self, source: Carry, start: Value, before: Value, after: Value) -> Value:
        """Joins the assumed and the returned carry."""
        if before.number == after.number:
            return before
        sources = before.sources | after.sources | {source.loop, source}
        return self.value(("carried", source.slot, start.number), sources)

    def after_loop(
        self,
        equation: Any,
        operands: list[Value],
        start: list[Value],
        results: list[Value],
        loop: Loop,
    ) -> list[Value]:
        own = {loop, *(Carry(loop, i) for i in range(len(start)))}
        outputs = [
            output._replace(sources=result.sources - own)
            for output, result in zip(self.plain(equation, operands), results, strict=True)
        ]
        for i, before in enumerate(start):
            if results[i].number == before.number:
                outputs[i] = before
            else:
                outputs[i] = outputs[i]._replace(sources=outputs[i].sources | before.sources)
        return outputs

    def cond(self, equation: Any, operands: list[Value], context: Context) -> list[Value]:
        self.entered += 1
        branches = []
        for branch, body in enumerate(equation.params["branches"]):
            inside = context._replace(branches={**context.branches, self.entered: branch})
            branches.append(self.body(body, operands[1:], inside))
        outputs = []
        for output, *results in zip(self.plain(equation, operands), *branches, strict=True):
            sources = frozenset().union(*(result.sources for result in results))
            choices = operands[0].sources - sources
            same = len(set(_numbers(results))) == 1
            chosen = output._replace(sources=sources | choices, choices=choices)
            outputs.append(results[0] if same else chosen)
        return outputs

    def shard_map(self, equation: Any, operands: list[Value], context: Context) -> list[Value]:
        parts = [
            self.part_of(value, spec)
            for value, spec in zip(operands, equation.params["in_specs"], strict=True)
        ]
        axes = mesh_axes(manual_axes(equation))
        [body] = bodies_of(equation)
        return [
            value._replace(sources=value.sources - axes)
            for value in self.body(body, parts, context)
        ]

    def part_of(self, value: Value, spec: Any) -> Value:
        """The part of a `shard_map` operand that one device sees."""
        axes = frozenset(axis for names in spec for axis in mesh_axes(names))
        if not axes:
            return value
        part = self.value(("part", value.number, str(spec)), value.sources | axes)
        return part._replace(fill=value.fill)


def _may_make_key(aval: Any) -> bool:
    return is_key(aval) or is_integer(aval)


def _numbers(values: Sequence[Value]) -> list[int]:
    return [value.number for value in values]
