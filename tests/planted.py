"""Plants faults into traced programs: one bit, or one unit in the last place, of one element."""

import functools
import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout.testing import _probes, _recording, _tracing
from jdropout.testing._fingerprint import plain

DEPTH = 8
"""Most loops and meshes around a value."""


class Fault(NamedTuple):
    """A fault, all of whose fields are traced: one program has all faults."""

    equation: Any
    """-1 for an argument, -2 for a constant, -3 for no fault."""
    output: Any
    place: Any
    """Iterations and devices around the value."""
    element: Any
    flip: Any
    """Bits to flip."""
    add: Any
    """What to add to the bits."""


NONE = Fault(-3, 0, np.zeros(DEPTH, np.uint32), np.uint32(0), np.uint32(0), np.uint32(0))


class Planted:
    """A function's program, compiled to run with any fault."""

    def __init__(self, fn: Any, *args: Any, max_iterations: int = 16):
        self.traced = _tracing.trace(fn, args, max_iterations)
        self.program = self.traced.program
        self.shared: set[tuple[int, int]] = set()
        """Outputs that are the same on some devices, all of which get the fault."""

        recorder = _recording.Recorder(self.traced, values=False)
        _, rows, _ = recorder(self.traced.leaves)
        found = {int(row): self.program.find(row, rows) for row in np.flatnonzero(rows)}
        self.spots = {
            row: spot
            for row, spot in found.items()
            if spot.kind not in ("branch", "iterations")
            and all(number < outer.length for outer, number in spot.inside)
        }

    def prepare(self, rows: Iterable[int]) -> None:
        """Compiles the program with faults in the values of these rows, and records it without."""
        places = {output_of(self.spots[row]) for row in rows}

        def tap(fault: Fault, x: Any, equation: int, output: int, place: Any) -> Any:
            if (equation, output) not in places:
                return x
            return plant(fault, self.shared, x, equation, output, place)

        @jax.jit
        def run(fault: Fault, on: Any, constants: Any, leaves: Any) -> Any:
            own = functools.partial(tap, fault)
            return _probes.probe(self.traced.closed, self.program, False, own)(
                on, constants, leaves
            )

        self.run = run
        self.clean = self.record(NONE)

    def record(self, fault: Fault) -> _recording.Recording:
        _, rows, _ = self.run(fault, True, self.traced.closed.consts, self.traced.leaves)
        fingerprints = _recording.as_64_bits(rows)
        return _recording.Recording(self.program, fingerprints, _recording.about(), [])

    def choose(self, random: random.Random, row: int) -> tuple[Fault, str]:
        """A random fault in the value of a row, and what kind of fault it is."""
        spot = self.spots[row]
        place = np.zeros(DEPTH, np.uint32)
        numbers = [number for outer, number in spot.inside if outer.kind != "cond"]
        place[: len(numbers)] = numbers
        equation, output = output_of(spot)
        aval = spot.equation.own[spot.item] if spot.equation else self.avals(spot.kind)[spot.item]
        floating = aval.dtype.startswith(("float", "bfloat"))
        # A flipped high bit of a loop's counter would make a loop of 2**31 iterations.
        looping = any(outer.kind == "while" for outer, _ in spot.inside) and not floating
        bits = 1 if looping or aval.dtype == "bool" else 8 * _size(aval.dtype)
        if floating and random.random() < 0.5:
            flip, add, what = 0, 1, "one ulp"
        else:
            flip, add, what = 1 << random.randrange(bits), 0, "one bit"
        element = random.randrange(max(1, int(np.prod(aval.shape))))
        words = map(np.uint32, (element, flip, add))
        return Fault(equation, output, place, *words), f"{what} in {_kind(spot)}"

    def avals(self, kind: str) -> list[Any]:
        if kind == "argument":
            return [aval for _, aval in self.program.arguments]
        return list(self.program.constants)


def output_of(spot: Any) -> tuple[int, int]:
    """Numbers of the equation and of its output, as in a fault."""
    if spot.equation is None:
        return {"argument": -1, "constant": -2}[spot.kind], spot.item
    with_bits = [i for i, x in enumerate(spot.equation.outputs) if x is not None]
    return spot.equation.number, with_bits[spot.item]


def plant(
    fault: Fault,
    shared: set[tuple[int, int]],
    x: jax.Array,
    equation: int,
    output: int,
    place: Any,
) -> jax.Array:
    """Puts the fault into a value if it is meant."""
    data = plain(x)
    if data.size == 0:
        return x
    hit = jnp.logical_and(fault.equation == equation, fault.output == output)
    for i, number in enumerate(place):
        same = fault.place[i] == number
        # Where all devices have one value, they must keep one: all of them get the fault.
        if getattr(jax.typeof(same), "vma", set()) <= getattr(jax.typeof(x), "vma", set()):
            hit = jnp.logical_and(hit, same)
        else:
            shared.add((equation, output))
    # A conditional, which XLA cannot fuse with what surrounds it, so that it compiles in time.
    faulty = lax.cond(hit, functools.partial(change, fault), lambda data: data, data)
    return faulty if data is x else jax.random.wrap_key_data(faulty, impl=jax.random.key_impl(x))


def change(fault: Fault, data: jax.Array) -> jax.Array:
    """Changes one element."""
    index, stride = jnp.zeros(data.shape, jnp.uint32), 1
    for axis in reversed(range(data.ndim)):
        index += lax.broadcasted_iota(jnp.uint32, data.shape, axis) * jnp.uint32(stride)
        stride *= data.shape[axis]
    hit = index == fault.element
    if data.dtype == jnp.bool_:
        return jnp.logical_xor(data, hit)
    kind = f"uint{8 * data.dtype.itemsize}"
    bits = lax.bitcast_convert_type(data, kind)
    faulty = (bits ^ fault.flip.astype(kind)) + fault.add.astype(kind)
    return lax.bitcast_convert_type(jnp.where(hit, faulty, bits), data.dtype)


def located(planted: Planted, row: int, difference: Any) -> bool:
    """Whether a difference names exactly the value of a row."""
    spot = planted.spots[row]
    loops = tuple(n for outer, n in spot.inside if outer.kind in ("scan", "while"))
    if difference is None or difference.kind != spot.kind or difference.iterations != loops:
        return False
    if spot.equation is None:
        return difference.name.endswith(
            planted.program.arguments[spot.item][0] if spot.kind == "argument" else str(spot.item)
        )
    devices = [
        tuple(i for _, i in difference.device)
        for outer, number in spot.inside
        if outer.kind == "shard_map"
    ]
    if output_of(spot) in planted.shared:  # the first of the devices
        return f"equation {spot.equation.number} " in difference.name
    wanted = [
        tuple(map(int, np.unravel_index(number, [size for _, size in outer.axes])))
        for outer, number in spot.inside
        if outer.kind == "shard_map"
    ]
    return f"equation {spot.equation.number} " in difference.name and devices == wanted


def _size(dtype: str) -> int:
    return 4 if dtype.startswith("key") else jnp.dtype(dtype).itemsize


def _kind(spot: Any) -> str:
    if spot.equation is None:
        return f"an {spot.kind}" if spot.kind == "argument" else f"a {spot.kind}"
    if any(outer.kind == "shard_map" for outer, _ in spot.inside):
        return "one device's shard"
    if spot.equation.source.backward:
        return "a gradient"
    if spot.inside:
        return "an iteration or branch"
    return "an operation"
