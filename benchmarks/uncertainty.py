"""Sections on Monte Carlo dropout: many masks relative to as many passes without dropout."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from common import KEY, RATE, bind, jit, normal
from harness import Plan, Row, timed_row

import jdropout
from jdropout.keys import at_site, stratified_key

SAMPLES = 100
INPUTS, OUTPUTS = 64, 10
SIZES = ((32, 256), (256, 128), (256, 256), (256, 1024))
"""Number of examples, and units in each of the two hidden layers."""
COLUMNS = ("mc / passes", "consistent / passes", "stacked / passes", "1 / passes", "32 / passes")


def uncertainty(plan: Plan) -> Iterator[Row]:
    """mc_predict of an MLP, 100 samples, relative to 100 passes without dropout in one batch."""
    for examples, width in SIZES:
        params = [
            normal(shape) / shape[0] ** 0.5
            for shape in ((INPUTS, width), (width, width), (width, OUTPUTS))
        ]
        x = normal((examples, INPUTS))
        predict = functools.partial(jdropout.mc_predict, mlp, KEY, params, x, num_samples=SAMPLES)
        functions = {
            "mc": predict,
            "consistent": functools.partial(predict, consistent=True),
            "stacked": functools.partial(predict, return_samples=True),
            "1": functools.partial(predict, batch_size=1),
            "32": functools.partial(predict, batch_size=32),
        }
        functions |= jit({"passes": mlp}, None, params, jnp.tile(x, (SAMPLES, 1)))
        labels = {"examples": str(examples), "width": str(width)}
        yield timed_row(labels, functions, COLUMNS, plan)


FEW = 10
SHAPES = ((32, 256), (256, 1024), (2048, 2048))
GROUPS = (8, 10, 16, 20)
NETWORKS = ((64, 64, 64, 10), (64, 256, 128, 10), (784, 512, 256, 10), (784, *[256] * 6, 10))
"""Units of the layers; the last two layers have dropout before them."""


def stratified_masks(plan: Plan) -> Iterator[Row]:
    """Dropout of copies of an array with coupled masks, relative to independent masks."""

    def independent(key: jax.Array, x: jax.Array, size: int) -> jax.Array:
        def one(index: jax.Array) -> jax.Array:
            return jdropout.dropout(at_site(key, index), x, RATE)

        return jax.vmap(one)(np.arange(size))

    def stratified(key: jax.Array, x: jax.Array, size: int) -> jax.Array:
        def one(index: jax.Array) -> jax.Array:
            sample = stratified_key(key, index, size, axis_name="samples")
            return jdropout.dropout(sample, x, RATE)

        return jax.vmap(one, axis_name="samples")(np.arange(size))

    def alone(key: jax.Array, x: jax.Array, size: int) -> jax.Array:
        def one(index: jax.Array) -> jax.Array:
            return jdropout.dropout(stratified_key(key, index, size), x, RATE)

        return jax.vmap(one)(np.arange(size))

    for shape in SHAPES:
        for size in GROUPS:
            if shape[0] * shape[1] > plan.max_size:
                continue
            competitors = {"independent": independent, "stratified": stratified, "alone": alone}
            functions = {
                name: jax.jit(functools.partial(function, size=size))
                for name, function in competitors.items()
            }
            labels = {"shape": str(shape), "samples": str(size)}
            columns = ("stratified / independent", "alone / independent")
            calls = bind(functions, KEY, normal(shape))
            yield timed_row(labels, calls, columns, plan, always_warm=True)


def few_samples(plan: Plan) -> Iterator[Row]:
    """mc_predict with 10 masks before the last two layers, relative to a plain pass."""
    for units in NETWORKS:
        params = [normal(shape) / shape[0] ** 0.5 for shape in itertools.pairwise(units)]
        for examples in (1, 32, 128, 512):
            x = normal((examples, units[0]))
            functions = jit({"plain": functools.partial(mlp, None)}, params, x)
            for sampling in ("independent", "stratified"):
                predict = functools.partial(
                    jdropout.mc_predict, mlp, num_samples=FEW, batch_size=FEW, sampling=sampling
                )
                functions |= jit({sampling: predict}, KEY, params, x)
            labels = {"units": "-".join(map(str, units)), "examples": str(examples)}
            columns = ("stratified / plain", "independent / plain")
            yield timed_row(labels, functions, columns, plan)


def mlp(key: jax.Array | None, params: list[jax.Array], x: jax.Array) -> jax.Array:
    """Dropout before the last two layers; no key means no dropout."""
    *hidden, output = params
    for index, weight in enumerate(hidden):
        x = jax.nn.relu(x @ weight)
        if index >= len(hidden) - 2:
            site = None if key is None else at_site(key, index)
            x = jdropout.dropout(site, x, RATE, deterministic=key is None)
    return x @ output
