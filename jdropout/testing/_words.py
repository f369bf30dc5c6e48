"""Puts the place and the size of a difference into words."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdropout.testing._program import Aval, Equation, Program, Spot
from jdropout.testing._sources import Source


def name_of(program: Program, spot: Spot) -> str:
    if spot.kind == "argument":
        return f"argument {program.arguments[spot.item][0]}"
    if spot.kind == "constant":
        return f"constant {spot.item}"
    assert spot.equation is not None
    return f"equation {spot.equation.number} ({spot.equation.primitive})"


def aval_of(program: Program, spot: Spot) -> Aval | None:
    if spot.kind == "argument":
        return program.arguments[spot.item][1]
    if spot.kind == "constant":
        return program.constants[spot.item]
    assert spot.equation is not None
    return spot.equation.own[spot.item] if spot.kind == "equation" else None


def details(
    program: Program,
    spot: Spot,
    fingerprints: tuple[Any, Any],
    step: int | None,
    values: tuple[np.ndarray, np.ndarray] | None,
) -> str:
    """Everything about a difference: a sentence, and a line for each fact."""
    equation = spot.equation
    name = name_of(program, spot)
    facts: list[tuple[str, str]] = []
    if step is not None:
        facts.append(("step", str(step)))
    if (aval := aval_of(program, spot)) is not None:
        output = f", output {spot.item}" if equation and len(equation.own) > 1 else ""
        facts.append(("type", f"{aval}{output}"))
    if equation is not None:
        facts += _of_source(equation.source)
    facts += [("in", _around(outer, number)) for outer, number in spot.inside[::-1]]
    if values is not None:
        facts.append(("elements", _elements(*values)))
    elif spot.kind in ("branch", "iterations"):
        facts.append(("number", f"{fingerprints[0]} and {fingerprints[1]}"))
    else:
        facts.append(("bits", f"{fingerprints[0]:016x} and {fingerprints[1]:016x}"))
    if equation is None:
        head = f"{name} differs, before the first equation"
    else:
        what = {
            "equation": "differs",
            "branch": "takes another branch",
            "iterations": "has another number of iterations",
        }[spot.kind]
        head = f"{name} of {program.equations} {what}"
        facts += [("operand", f"{_with_place(program, x)}: equal") for x in equation.operands]
        facts.append(("before", "every value that was computed before is equal"))
    width = max(len(label) for label, _ in facts)
    return "\n".join([head, *(f"  {label:{width}}  {text}" for label, text in facts)])


def unrecorded(step: int, recorded: bool) -> str:
    """What to do about a state that differs before a step."""
    if step == 0:
        return "  the trainings start from different states"
    if recorded:
        return (
            f"  no equation of step {step - 1} differs in its recording, but the step itself ended "
            "with other bits:\n  what differs needs the plain program, without the fingerprints"
        )
    return (
        f"  step {step - 1} made it, which was not recorded: record again with every={step - 1}"
        if step > 1
        else "  step 0 made it, which was not recorded: record again with every=1"
    )


def equation(one: Equation | None) -> str:
    if one is None:
        return "the end"
    params = f"[{one.params}]" if one.params else ""
    types = ", ".join(str(output) for output in one.outputs)
    length = f" of length {one.length}" if one.kind == "scan" else ""
    numbers = [operand for operand in one.operands if operand.startswith("the number")]
    given = f" with {', '.join(numbers)}" if numbers else ""
    source = "; ".join(text for _, text in _of_source(one.source))
    return f"equation {one.number}, {one.primitive}{params}{length}{given} -> {types}; {source}"


def inputs(program: Program) -> str:
    named = [f"{name}: {aval}" for name, aval in program.arguments]
    return ", ".join([*named, *(f"constant {aval}" for aval in program.constants)]) or "no inputs"


def position(axes: tuple[tuple[str, int], ...], number: int) -> tuple[tuple[str, int], ...]:
    """The position of a device on a mesh."""
    indices = np.unravel_index(number, [size for _, size in axes])
    return tuple((name, int(i)) for (name, _), i in zip(axes, indices, strict=True))


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (_bytes(a) != _bytes(b)).any(axis=-1)


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.dtype.itemsize)


def _of_source(source: Source) -> list[tuple[str, str]]:
    facts = []
    if source.location:
        function = f" in {source.function}" if source.function else ""
        text = f": {source.text}" if source.text else ""
        facts.append(("line", f"{source.location}{function}{text}"))
    if source.library and source.library != source.function:
        facts.append(("within", source.library))
    if source.path:
        facts.append(("module", source.path))
    if source.backward:
        facts.append(("pass", "backward"))
    return facts


def _around(outer: Equation, number: int) -> str:
    place = f" at {outer.source.location}" if outer.source.location else ""
    if outer.kind == "cond":
        return f"branch {number} of the conditional{place}"
    if outer.kind == "shard_map":
        where = ", ".join(f"{name}={i}" for name, i in position(outer.axes, number))
        return f"the shard_map{place}, on device {where}"
    if outer.kind == "while":
        later = " or later (see max_iterations)" if number == outer.length else ""
        return f"iteration {number}{later} of the while loop{place}"
    index = outer.length - 1 - number
    backwards = f", which has index {index}," if "reverse=True" in outer.params else ""
    return f"iteration {number}{backwards} of {outer.length} of the scan{place}"


def _with_place(program: Program, operand: str) -> str:
    """Adds the line to the name of an equation."""

    def add(match: re.Match[str]) -> str:
        source = program.sources[int(match[1])]
        return f"{match[0]} at {source.location}" if source.location else match[0]

    return re.sub(r"equation (\d+) \([^)]*\)", add, operand)


def _elements(a: np.ndarray, b: np.ndarray) -> str:
    wrong = differs(a, b)
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    where = f", first at {index}" if index else ""
    text = f"{np.count_nonzero(wrong)} of {wrong.size}{where}: {a[index]} and {b[index]}"
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return text
    one, other = (x[index] for x in (a, b))
    apart = abs(float(one) - float(other))
    return f"{text} ({apart:g} apart, {_ulps(one, other)} ulps)"


def _ulps(a: Any, b: Any) -> int:
    """How many floating-point numbers lie between two; 0.0 and -0.0 are neighbours."""
    bits = jnp.finfo(a.dtype).bits
    numbers = []
    for x in (a, b):
        number = int(np.asarray(x).view(f"u{a.dtype.itemsize}")) & (1 << bits) - 1
        negative, size = number >> bits - 1, number & (1 << bits - 1) - 1
        numbers.append(-1 - size if negative else size)
    return abs(numbers[0] - numbers[1])
