"""Sections on a transformer: a training step, and the fused ends of its layers."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from attention import attentions
from common import (
    KEY,
    RATE,
    Function,
    arrays,
    compile_all,
    copy,
    identity,
    labels,
    libraries,
    normal,
    passes,
    step_rows,
)
from harness import Plan, Row, timed_row

import jdropout

BATCH, LENGTH, HEADS, WIDTH = 4, 512, 8, 512
EPSILON = 1e-6


def transformer(plan: Plan) -> Iterator[Row]:
    """Training step of a stack of pre-norm blocks: causal attention, MLP and AdamW."""
    params = [block_params(key) for key in jax.random.split(KEY, plan.transformer_blocks)]
    optimizer = optax.adamw(1e-3)
    arguments = (params, optimizer.init(params), KEY, normal((BATCH, LENGTH, WIDTH)))
    attention, drops = attentions(is_causal=True), libraries()
    functions = {
        "ours": (attention["ours"], drops["ours"]),
        "ours without": (attention["ours without"], identity),
        "flax": (attention["flax"], drops["flax"]),
        "flax without": (attention["jax.nn"], identity),  # this is what Flax calls at rate 0
    }
    steps = {name: training_step(optimizer, *pair) for name, pair in functions.items()}
    columns = ("ours / ours without", "flax / flax without", "ours / flax")
    network = f"{plan.transformer_blocks} blocks"
    yield from step_rows(network, compile_all(steps, *arguments), arguments, columns, plan)


def training_step(
    optimizer: optax.GradientTransformation, attend: Function, drop: Function
) -> Function:
    def loss(params: list[dict[str, Any]], key: jax.Array, x: jax.Array) -> jax.Array:
        for block, block_key in zip(params, jax.random.split(key, len(params)), strict=True):
            x = apply_block(block, block_key, x, attend, drop)
        return jnp.square(x).mean()

    def step(params: Any, state: Any, key: jax.Array, x: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, key, x)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def apply_block(
    params: dict[str, Any], key: jax.Array, x: jax.Array, attend: Function, drop: Function
) -> jax.Array:
    """Dropout where GPT-2 has it: on the probabilities, after attention and after the MLP."""
    attention_key, residual_key, mlp_key = jax.random.split(key, 3)
    projected = layer_norm(x, *params["attention norm"]) @ params["to query, key, value"]
    inputs = jnp.moveaxis(projected.reshape(*x.shape[:-1], 3, HEADS, -1), -3, 0)
    attended = attend(attention_key, *inputs).reshape(x.shape)
    x = x + drop(residual_key, attended @ params["from attention"])
    hidden = jax.nn.gelu(layer_norm(x, *params["mlp norm"]) @ params["into mlp"])
    return x + drop(mlp_key, hidden @ params["out of mlp"])


def block_params(key: jax.Array) -> dict[str, Any]:
    shapes = {
        "to query, key, value": (WIDTH, 3 * WIDTH),
        "from attention": (WIDTH, WIDTH),
        "into mlp": (WIDTH, 4 * WIDTH),
        "out of mlp": (4 * WIDTH, WIDTH),
    }
    keys = jax.random.split(key, len(shapes))
    weights = {
        name: 0.02 * jax.random.normal(k, shape)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    norm = (jnp.ones(WIDTH), jnp.zeros(WIDTH))
    return {"attention norm": norm, "mlp norm": norm, **weights}


def fused(plan: Plan) -> Iterator[Row]:
    """Fused ends of a layer relative to the unfused code and x * 2; kept bytes in sizes of x."""
    columns = ("fused / unfused", "fused / copy")
    for x in arrays(((8192, 1024), (512, 1024)), plan):
        inputs = (x, x[::-1], x[0], x[1])
        copies = passes({"copy": copy}, KEY, x)
        for function, pair in fused_and_unfused().items():
            sizes = {name: residual_bytes(f, *inputs) for name, f in pair.items()}
            multiples = {f"{k} keeps": f"{n / x.nbytes:.2f}" for k, n in sizes.items()}
            for name, jitted in passes(pair, KEY, *inputs).items():
                label = {"function": function, **labels(x, name)}
                row = timed_row(label, jitted | copies[name], columns, plan)
                more = dict.fromkeys(multiples, "-") if name == "forward" else multiples
                yield Row(label, row.cells | more, row.details | {"bytes": sizes})


def fused_and_unfused() -> dict[str, dict[str, Function]]:
    """Functions of a key, x, residual, scale and bias; not all need the last two."""
    drop = libraries()["ours"]

    def add_norm(norm: Function) -> Function:
        def unfused(key: jax.Array, x: jax.Array, residual: jax.Array, *parameters: Any) -> Any:
            total = residual + drop(key, x)
            return norm(total, *parameters), total

        return unfused

    return {
        "bias_dropout_add": {
            "fused": lambda key, x, residual, _, bias: jdropout.bias_dropout_add(
                key, x, bias, residual, RATE
            ),
            "unfused": lambda key, x, residual, _, bias: residual + drop(key, x + bias),
        },
        "dropout_add_norm, layer": {
            "fused": lambda key, x, residual, scale, bias: jdropout.dropout_add_norm(
                key, x, residual, RATE, scale=scale, bias=bias, norm="layer"
            ),
            "unfused": add_norm(layer_norm),
        },
        "dropout_add_norm, rms": {
            "fused": lambda key, x, residual, scale, _: jdropout.dropout_add_norm(
                key, x, residual, RATE, scale=scale, norm="rms"
            ),
            "unfused": add_norm(lambda total, scale, _: rms_norm(total, scale)),
        },
    }


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Normalises as Flax does: in float32, with the variance as a difference of means."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    factor = jax.lax.rsqrt(variance + EPSILON) * scale
    return ((wide - mean) * factor + bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + EPSILON) * scale
    return (wide * factor).astype(x.dtype)


def residual_bytes(function: Function, *inputs: jax.Array) -> int:
    """Returns the bytes that the forward pass keeps for the backward pass, including inputs."""
    _, pullback = jax.vjp(lambda *inputs: jax.jit(function)(KEY, *inputs), *inputs)
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(pullback)}
    return sum(leaf.nbytes for leaf in leaves.values())
