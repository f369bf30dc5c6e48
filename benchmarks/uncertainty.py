"""Section on Monte Carlo dropout: many masks relative to as many passes without dropout."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from common import KEY, RATE, jit, normal
from harness import Plan, Row, timed_row

import jdropout
from jdropout.keys import at_site

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


def mlp(key: jax.Array | None, params: list[jax.Array], x: jax.Array) -> jax.Array:
    """Two hidden layers with dropout; no key means no dropout."""
    *hidden, output = params
    for index, weight in enumerate(hidden):
        x = jax.nn.relu(x @ weight)
        site = None if key is None else at_site(key, index)
        x = jdropout.dropout(site, x, RATE, deterministic=key is None)
    return x @ output
