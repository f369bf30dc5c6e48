"""The sections: for each one a function that yields the rows of its table."""

import functools
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention import (
    attention,
    attention_blocks,
    attention_length,
    attention_memory,
    attention_options,
)
from common import (
    DTYPES,
    KEY,
    RATE,
    Function,
    arrays,
    bind,
    compile_all,
    copy,
    identity,
    jit,
    labels,
    libraries,
    normal,
    passes,
    step_rows,
    temporary_bytes,
)
from family import family
from harness import Plan, Row, interleave, ratio_row, timed_row
from sharded import sharded
from subset import lora, subset
from transformer import fused, transformer
from uncertainty import few_samples, stratified_masks, uncertainty

from jdropout import dropout as dropout_function
from jdropout import schedules
from jdropout.keys import in_batch, site_key

SHAPES = ((32, 128), (256, 512), (1024, 784), (4096, 4096), (16384, 128), (256, 10), (65536,))
SHAPES += ((128, 197, 768), (64, 56, 56, 64), (8, 8, 512, 512))
OVER_COPY = ("ours / copy", "flax / copy", "equinox / copy", "haiku / copy", "flax / ours")


def dropout(plan: Plan) -> Iterator[Row]:
    """Dropout under jit, relative to x * 2."""
    functions = libraries() | {"copy": copy}
    for x in arrays(SHAPES, plan):
        for name, jitted in passes(functions, KEY, x).items():
            yield timed_row(labels(x, name), jitted, OVER_COPY, plan)


def chain(plan: Plan) -> Iterator[Row]:
    """The chain residual + dropout(gelu(x + bias)) under jit, relative to no dropout."""

    def with_dropout(drop: Function) -> Function:
        return lambda key, x, bias, residual: residual + drop(key, jax.nn.gelu(x + bias))

    drops = {"ours": libraries()["ours"], "flax": libraries()["flax"], "without": identity}
    functions = {name: with_dropout(drop) for name, drop in drops.items()}
    columns = ("ours / without", "flax / without", "flax / ours")
    for x in arrays(((4096, 4096), (1024, 784)), plan):
        for name, jitted in passes(functions, KEY, x, x[0], x).items():
            yield timed_row(labels(x, name), jitted, columns, plan)


def vmap(plan: Plan) -> Iterator[Row]:
    """Vmap over 256 keys, relative to one call with one key."""
    ours, flax = libraries()["ours"], libraries()["flax"]
    keys = jax.random.split(KEY, 256)
    columns = ("ours / one key", "flax / one key", "flax / ours", "one key / copy")
    for shape in ((32, 128), (64, 64)):
        x = normal((256, *shape))
        functions = jit({"ours": jax.vmap(ours), "flax": jax.vmap(flax)}, keys, x)
        functions |= jit({"one key": ours, "copy": copy}, KEY, x)
        yield timed_row(labels(x), functions, columns, plan)


def temporaries(plan: Plan) -> Iterator[Row]:
    """Temporaries of the gradient of sum(sin(dropout(cos(x)))): MB (multiple of n / 8 bytes)."""
    names = ("ours", "flax", "equinox", "haiku", "without")
    for dtype in DTYPES:
        x = jax.ShapeDtypeStruct((4096, 4096), dtype)
        gradients = {
            name: jax.grad(lambda x, key, drop=drop: jnp.sin(drop(key, jnp.cos(x))).sum())
            for name, drop in (libraries() | {"without": identity}).items()
        }
        sizes = temporary_bytes(compile_all(gradients, x, KEY))
        cells = {
            name: f"{size / 1e6:.1f} ({size * 8 / x.size:.2f})" for name, size in sizes.items()
        }
        yield Row(labels(x), dict.fromkeys(names, "-") | cells, {"bytes": sizes})


def compilation(plan: Plan) -> Iterator[Row]:
    """Gradient of layers dropout(tanh(x @ w)) in one jit: compilation, then a step."""
    drops = {"ours": libraries()["ours"], "flax": libraries()["flax"], "without": identity}
    gradients = {name: layers(drop, jax.random.fold_in, plan) for name, drop in drops.items()}
    columns = ("ours / flax", "without / flax", "ours / without", "flax / without")
    yield from compiled_rows(gradients, columns, plan)


def keys(plan: Plan) -> Iterator[Row]:
    """The same layers, with keys from site_key(root, step=..., site=...) instead of fold_in."""
    ours = libraries()["ours"]

    def by_name(key: jax.Array, i: int) -> jax.Array:
        return site_key(key, step=1000, site=f"layer{i}")

    def by_index(key: jax.Array, i: int) -> jax.Array:
        return site_key(key, step=1000, site=("layer", i))

    makers = {"fold_in": jax.random.fold_in, "name": by_name, "name and index": by_index}
    gradients = {name: layers(ours, make_key, plan) for name, make_key in makers.items()}
    columns = ("name / fold_in", "name and index / fold_in")
    yield from compiled_rows(gradients, columns, plan)


def microbatches(plan: Plan) -> Iterator[Row]:
    """Gradient of layers over 8 microbatches in a scan: keys of their places in the batch, over
    keys of their numbers.
    """
    batch, count = 256, 8

    def by_place(key: jax.Array, number: jax.Array) -> jax.Array:
        return in_batch(key, batch // count * number, batch)

    def accumulated(part_key: Function) -> Function:
        def loss(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
            for i in range(4):
                x = dropout_function(jax.random.fold_in(key, i), jnp.tanh(x @ w), RATE)
            return x.sum()

        def gradient(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
            def add(total: jax.Array, part: Any) -> tuple[jax.Array, None]:
                return total + jax.grad(loss)(w, part[1], part_key(key, part[0])), None

            return jax.lax.scan(add, jnp.zeros_like(w), (jnp.arange(count), x))[0]

        return gradient

    makers = {"place": by_place, "number": jax.random.fold_in}
    gradients = {name: accumulated(part_key) for name, part_key in makers.items()}
    for features in (128, 512):
        arguments = normal((features, features)), normal((count, batch // count, features)), KEY
        programs = compile_all(gradients, *arguments)
        network = f"{batch} x {features}"
        yield from step_rows(network, programs, arguments, ("place / number",), plan)


def layers(drop: Function, make_key: Function, plan: Plan) -> Function:
    """Returns the gradient of a deep network of dropout(tanh(x @ w))."""

    def loss(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        for i in range(plan.layers):
            x = drop(make_key(key, i), jnp.tanh(x @ w))
        return x.sum()

    return jax.grad(loss)


def compiled_rows(
    gradients: dict[str, Function], columns: tuple[str, ...], plan: Plan
) -> Iterator[Row]:
    arguments = (0.05 * normal((512, 512)), normal((256, 512)), KEY)
    steps: dict[str, Any] = {}

    def compile_step(name: str) -> tuple[float, float]:
        jax.clear_caches()
        cpu, wall = time.process_time(), time.perf_counter()
        steps[name] = jax.jit(gradients[name]).lower(*arguments).compile()
        return time.process_time() - cpu, time.perf_counter() - wall

    samplers = {name: functools.partial(compile_step, name) for name in gradients}
    interleave(samplers, 1)  # starts the compiler's threads
    times = interleave(samplers, plan.few_rounds)
    for index, clock in enumerate(("CPU time", "wall time")):
        of_clock = {name: samples[:, index] for name, samples in times.items()}
        quantity = f"{plan.layers} layers: trace, lower, compile: {clock}"
        yield ratio_row({"quantity": quantity}, of_clock, columns)
    yield from step_rows(f"{plan.layers} layers", steps, arguments, columns, plan)


def eager(plan: Plan) -> Iterator[Row]:
    """Dropout without jit, relative to a jitted x * 2."""
    for x in (normal((32, 128)), normal((256, 512))):
        calls = bind(libraries() | {"copy": jax.jit(copy)}, KEY, x)
        yield timed_row(labels(x), calls, OVER_COPY, plan)


def dispatch(plan: Plan) -> Iterator[Row]:
    """A call of a compiled function of 200 small parameters: a scheduled rate over a fixed one."""
    params = {f"w{i}": jnp.ones(4) for i in range(200)}
    x, schedule = normal((4, 4)), schedules.early(0.1, cutoff_step=1000)

    def step(rate: Function) -> Function:
        def update(params: Any, x: jax.Array, count: Any) -> Any:
            y = dropout_function(site_key(KEY, step=count, site="x"), x, rate(count))
            return jax.tree.map(lambda w: w + y[0], params)

        return jax.jit(update)

    calls = {
        name: functools.partial(step(rate), params, x, np.int32(3))
        for name, rate in {"scheduled": schedule, "fixed": lambda count: 0.1}.items()
    }
    yield timed_row({"function": "200 parameters"}, calls, ("scheduled / fixed",), plan)


def importing(plan: Plan) -> Iterator[Row]:
    """Time of `import jax`, then of `import jdropout`; minimum over several processes."""
    code = "import jax, jdropout, sys; print(*sys.modules)"
    command = [sys.executable, "-X", "importtime", "-c", code]
    times: dict[str, float] = {"jax": float("inf"), "jdropout": float("inf")}
    for _ in range(plan.rounds):
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        for line in process.stderr.splitlines():
            *_, module = fields = [field.strip() for field in line.split("|")]
            if module in times:
                times[module] = min(times[module], int(fields[1]) / 1e6)
    cells = {
        "jax": f"{times['jax'] * 1e3:.0f} ms",
        "+ jdropout": f"{times['jdropout'] * 1e3:.1f} ms",
    }
    for name in ("flax", "matplotlib", "optax"):
        cells[f"imports {name}"] = "yes" if name in process.stdout.split() else "no"
    yield Row({}, cells, {"seconds": times})


SECTIONS = {
    "dropout": dropout,
    "chain": chain,
    "vmap": vmap,
    "temporaries": temporaries,
    "compile": compilation,
    "keys": keys,
    "microbatches": microbatches,
    "eager": eager,
    "dispatch": dispatch,
    "import": importing,
    "attention": attention,
    "attention_memory": attention_memory,
    "attention_length": attention_length,
    "attention_options": attention_options,
    "attention_blocks": attention_blocks,
    "transformer": transformer,
    "fused": fused,
    "family": family,
    "subset": subset,
    "lora": lora,
    "uncertainty": uncertainty,
    "stratified-masks": stratified_masks,
    "few-samples": few_samples,
    "sharded": sharded,
}
