"""Shared by the sections: inputs, competitors, programs and rows."""

import functools
from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from harness import Plan, Row, timed_row

import jdropout

try:
    import equinox
except ImportError:
    equinox = None
try:
    import haiku
except ImportError:
    haiku = None

RATE = 0.1
KEY = jax.random.key(0, impl="threefry2x32")
DTYPES = (jnp.float32, jnp.bfloat16)

Function = Callable[..., Any]
Compiled = jax.stages.Compiled


def libraries() -> dict[str, Function]:
    """Dropout as a function of key and array, for every installed library."""
    flax_layer = nnx.Dropout(RATE, deterministic=False)
    found: dict[str, Function] = {
        "ours": lambda key, x: jdropout.dropout(key, x, RATE),
        "flax": lambda key, x: flax_layer(x, rngs=key),
    }
    if equinox is not None:
        equinox_layer = equinox.nn.Dropout(RATE)
        found["equinox"] = lambda key, x: equinox_layer(x, key=key)
    if haiku is not None:
        found["haiku"] = lambda key, x: haiku.dropout(key, RATE, x)
    return found


def copy(key: jax.Array, x: jax.Array) -> jax.Array:
    return x * 2


def identity(key: jax.Array, x: jax.Array) -> jax.Array:
    return x


def arrays(shapes: tuple[tuple[int, ...], ...], plan: Plan) -> Iterator[jax.Array]:
    for shape in shapes:
        if prod(shape) <= plan.max_size:
            yield from (normal(shape, dtype) for dtype in DTYPES)


def normal(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(KEY, shape, dtype)


def labels(x: jax.Array | jax.ShapeDtypeStruct, name: str | None = None) -> dict[str, str]:
    return {"shape": str(x.shape), "dtype": x.dtype.name} | ({"pass": name} if name else {})


def jit(functions: Mapping[str, Function], *arguments: Any) -> dict[str, Function]:
    return bind({name: jax.jit(f) for name, f in functions.items()}, *arguments)


def bind(functions: Mapping[str, Function], *arguments: Any) -> dict[str, Function]:
    return {name: functools.partial(f, *arguments) for name, f in functions.items()}


def passes(
    functions: Mapping[str, Function], key: jax.Array, x: jax.Array, *others: jax.Array
) -> dict[str, dict[str, Function]]:
    """The jitted forward pass, and both passes with (a part of) x as every cotangent."""

    def both(function: Function) -> Function:
        def forward_and_backward(key: jax.Array, g: jax.Array, *inputs: jax.Array) -> Any:
            y, pullback = jax.vjp(functools.partial(function, key), *inputs)
            return y, pullback(jax.tree.map(lambda part: g[tuple(map(slice, part.shape))], y))

        return forward_and_backward

    return {
        "forward": jit(functions, key, x, *others),
        "forward + backward": jit(
            {name: both(function) for name, function in functions.items()}, key, x, x, *others
        ),
    }


def compile_all(functions: Mapping[str, Function], *arguments: Any) -> dict[str, Compiled]:
    return {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}


def temporary_bytes(programs: Mapping[str, Compiled]) -> dict[str, int]:
    return {
        name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()
    }


def step_rows(
    network: str,
    steps: Mapping[str, Compiled],
    arguments: tuple[Any, ...],
    columns: tuple[str, ...],
    plan: Plan,
) -> Iterator[Row]:
    """Yields time and temporaries of a network's compiled steps, in the same columns."""
    calls = bind(steps, *arguments)
    yield timed_row({"quantity": f"{network}: time of a step"}, calls, columns, plan)

    sizes = temporary_bytes(steps)
    pairs = {column: [sizes[name] for name in column.split(" / ")] for column in columns}
    cells = {column: f"{over / under:.2f}" for column, (over, under) in pairs.items()}
    yield Row({"quantity": f"{network}: temporaries"}, cells, {"bytes": sizes})
