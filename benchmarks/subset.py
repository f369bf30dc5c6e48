"""Sections on dropout that saves work: a stack of transformer blocks, and adapters of low rank."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import KEY, Function, bind, compile_all, normal, temporary_bytes
from harness import Plan, Row, ratio_row, time_all, timed_row

import jdropout
from jdropout.keys import at_site

BATCH, LENGTH, HEADS, WIDTH = 32, 256, 8, 512
BLOCKS, SCANNED_BLOCKS = 2, 10
RATES = (0.1, 0.2, 0.4, 0.5)
LORA_RATE, LORA_RANK = 0.05, 8

Params = dict[str, jax.Array]


def subset(plan: Plan) -> Iterator[Row]:
    """Gradient step of transformer blocks without and with subsets, relative to no dropout."""
    plan = plan._replace(rounds=min(plan.few_rounds, 3))
    yield from subset_rows(stacks(), BLOCKS, plan)
    yield from subset_rows(scanned(), SCANNED_BLOCKS, plan)


def subset_rows(functions: dict[str, Function], num_blocks: int, plan: Plan) -> Iterator[Row]:
    batch, length = (BATCH, LENGTH) if plan.max_size == float("inf") else (8, 32)
    arguments = (
        jax.vmap(block_params)(jax.random.split(KEY, num_blocks)),
        KEY,
        normal((batch, length, WIDTH)),
    )
    none = functools.partial(functions.pop("none"), rate=0.0)
    names = [(name, rate) for name in functions for rate in RATES]
    steps = {
        f"{name} {rate}": functools.partial(functions[name], rate=rate) for name, rate in names
    }
    steps = {name: gradient(step) for name, step in {"none": none, **steps}.items()}
    programs = compile_all(steps, *arguments)
    sizes = temporary_bytes(programs)
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    times = time_all(bind(programs, *arguments), plan, always_warm=True)
    for name, rate in names:
        step = f"{name} {rate}"
        column = f"{step} / none"
        row = ratio_row({"dropout": name, "rate": f"{rate:g}"}, times, (column,))
        # The compiler counts the body of a loop once.
        work = "-" if name == "layer_subset" else f"{flops[step] / flops['none']:.2f}"
        cells = {
            "time": row.cells[column],
            "temporaries": f"{sizes[step] / sizes['none']:.2f}",
            "FLOPs": work,
        }
        seconds = {key: float(np.median(times[key])) for key in (step, "none")}
        details = {"seconds": seconds, "bytes": {key: sizes[key] for key in (step, "none")}}
        yield Row(row.labels, cells, details)


def stacks() -> dict[str, Function]:
    """Unrolled stacks, as functions of stacked parameters, key, input and rate."""

    def stacked(block: Function) -> Function:
        def run(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
            for i in range(len(params["down"])):
                one = jax.tree.map(lambda leaf, i=i: leaf[i], params)
                x = block(one, at_site(key, i), x, rate)
            return x

        return run

    def parts(drop: Function) -> Function:
        """A block with something around each of its two branches."""

        def block(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
            attend = functools.partial(attention, params["qkv"], params["out"])
            x = drop(at_site(key, 0), attend, x, rate)
            feed = functools.partial(mlp, params["up"], params["down"])
            return drop(at_site(key, 1), feed, x, rate)

        return block

    def drop_path(key: jax.Array, branch: Function, x: jax.Array, rate: float) -> jax.Array:
        return x + jdropout.drop_path(key, branch(x), rate)

    def units(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
        keys = [at_site(key, i) for i in range(2)]
        qkv, out, up, down = (params[name] for name in ("qkv", "out", "up", "down"))
        x = x + jdropout.unit_subset(keys[0], attention, qkv, out, x, rate, incoming_axis=2)
        return x + jdropout.unit_subset(keys[1], mlp, up, down, x, rate)

    none = stacked(lambda params, key, x, rate: apply_block(params, x))

    def tokens(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
        return jdropout.route_tokens(key, lambda x, _: none(params, key, x, rate), x, rate)

    return {
        "none": none,
        "drop_path": stacked(parts(drop_path)),
        "stochastic_depth": stacked(parts(jdropout.stochastic_depth)),
        "route_tokens": tokens,
        "unit_subset": stacked(units),
    }


def scanned() -> dict[str, Function]:
    def none(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
        return jax.lax.scan(lambda x, one: (apply_block(one, x), None), x, params)[0]

    def layers(params: Params, key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
        return jdropout.layer_subset(key, apply_block, params, x, rate)

    return {"none": none, "layer_subset": layers}


def lora(plan: Plan) -> Iterator[Row]:
    """Gradient step of a block with adapters at q, k and v, each with a mask of its own."""
    batch, length = (BATCH, LENGTH) if plan.max_size == float("inf") else (8, 32)
    x = normal((batch, length, WIDTH))
    frozen = block_params(KEY)
    features = WIDTH // HEADS
    adapters = [
        (normal((WIDTH, LORA_RANK)) / WIDTH, normal((LORA_RANK, HEADS, features))) for _ in range(3)
    ]

    def drop(x: jax.Array, key: jax.Array, a: jax.Array) -> jax.Array:
        return jdropout.dropout(key, x, LORA_RATE) @ a

    def mapped(x: jax.Array, keys: jax.Array, into: jax.Array) -> jax.Array:
        one = jax.checkpoint(functools.partial(drop, x), prevent_cse=False)
        return jax.lax.map(lambda each: one(*each), (keys, into))

    kinds: dict[str, Function] = {
        "none": lambda x, keys, into: [x @ a for a in into],
        "ours": mapped,
        "written out": lambda x, keys, into: [
            drop(x, *each) for each in zip(keys, into, strict=True)
        ],
    }

    def step(into: Function) -> Function:
        def loss(adapters: Any, key: jax.Array, x: jax.Array) -> jax.Array:
            normed = norm(x)
            projected = jnp.einsum("btd,dchf->cbthf", normed, frozen["qkv"])
            down, up = (jnp.stack(part) for part in zip(*adapters, strict=True))
            low = into(normed, jnp.stack([at_site(key, i) for i in range(3)]), down)
            query, keys, values = (
                base + jnp.einsum("btr,rhf->bthf", z, b)
                for base, z, b in zip(projected, low, up, strict=True)
            )
            attended = jax.nn.dot_product_attention(query, keys, values)
            x = x + jnp.einsum("bthf,hfd->btd", attended, frozen["out"])
            return jnp.square(x + mlp(frozen["up"], frozen["down"], x)).sum()

        return jax.grad(loss, argnums=(0, 2))

    programs = compile_all({name: step(into) for name, into in kinds.items()}, adapters, KEY, x)
    columns = ("ours / none", "written out / none")
    calls = bind(programs, adapters, KEY, x)
    yield timed_row({"quantity": "time of a step"}, calls, columns, plan, always_warm=True)
    sizes = temporary_bytes(programs)
    cells = {c: f"{sizes[c.split(' / ')[0]] / sizes['none']:.2f}" for c in columns}
    yield Row({"quantity": "temporaries"}, cells, {"bytes": sizes})


def gradient(function: Function) -> Function:
    def loss(params: Params, key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.square(function(params, key, x)).sum()

    return jax.grad(loss, argnums=(0, 2))


def apply_block(params: Params, x: jax.Array) -> jax.Array:
    x = x + attention(params["qkv"], params["out"], x)
    return x + mlp(params["up"], params["down"], x)


def attention(qkv: jax.Array, out: jax.Array, x: jax.Array) -> jax.Array:
    query, key, value = jnp.einsum("btd,dchf->cbthf", norm(x), qkv)
    attended = jax.nn.dot_product_attention(query, key, value)
    return jnp.einsum("bthf,hfd->btd", attended, out)


def mlp(up: jax.Array, down: jax.Array, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(norm(x) @ up) @ down


def norm(x: jax.Array) -> jax.Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6)


def block_params(key: jax.Array) -> Params:
    features = WIDTH // HEADS
    shapes = {
        "qkv": (WIDTH, 3, HEADS, features),
        "out": (HEADS, features, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: 0.02 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
