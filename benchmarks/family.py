"""Section on the family: every variant of dropout relative to a copy, at 16 M elements."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from common import KEY, RATE, Function, compile_all, copy, normal, passes, temporary_bytes
from harness import Plan, Row, timed_row

import jdropout

MAP = (64, 64, 64, 64)
"""Examples, height, width, channels; 16 M elements."""
SEQUENCE = (128, 128, 1024)
"""Examples, time or tokens, features."""
MATRIX = (4096, 4096)
SMALL = {MAP: (8, 16, 16, 16), SEQUENCE: (16, 16, 64), MATRIX: (256, 256)}

VARIANTS: dict[str, tuple[tuple[int, ...], Function]] = {
    "dropout": (MATRIX, lambda key, x: jdropout.dropout(key, x, RATE)),
    "spatial_dropout": (MAP, lambda key, x: jdropout.spatial_dropout(key, x, RATE)),
    "locked_dropout": (SEQUENCE, lambda key, x: jdropout.locked_dropout(key, x, RATE)),
    "drop_path": (MAP, lambda key, x: jdropout.drop_path(key, x, RATE)),
    "embedding_dropout": (MATRIX, lambda key, x: jdropout.embedding_dropout(key, x, RATE)),
    "drop_block": (MAP, lambda key, x: jdropout.drop_block(key, x, RATE, block_size=7)),
    "drop_block, a mask for each channel": (
        MAP,
        lambda key, x: jdropout.drop_block(key, x, RATE, block_size=7, shared_channels=False),
    ),
    "word_dropout": (SEQUENCE, lambda key, x: jdropout.word_dropout(key, x, RATE, replacement=0)),
    "patch_dropout": (SEQUENCE, lambda key, x: jdropout.patch_dropout(key, x, RATE)[0]),
    "drop_connect": (MATRIX, lambda key, x: jdropout.drop_connect(key, x, RATE)),
    "targeted_dropout": (
        MATRIX,
        lambda key, x: jdropout.targeted_dropout(key, x, RATE, target_fraction=0.5),
    ),
    "zoneout": (MATRIX, lambda key, x: jdropout.zoneout(key, x, 2 * x, RATE)),
    "gaussian_dropout": (MATRIX, lambda key, x: jdropout.gaussian_dropout(key, x, RATE)),
    "gaussian_noise": (MATRIX, lambda key, x: jdropout.gaussian_noise(key, x, RATE)),
    "uniform_noise": (MATRIX, lambda key, x: jdropout.uniform_noise(key, x, RATE)),
    "alpha_dropout": (MATRIX, lambda key, x: jdropout.alpha_dropout(key, x, RATE)),
    "feature_alpha_dropout": (MAP, lambda key, x: jdropout.feature_alpha_dropout(key, x, RATE)),
    "variational_dropout": (MATRIX, lambda key, x: jdropout.variational_dropout(key, x, -2.0)),
    "concrete_dropout": (MATRIX, lambda key, x: jdropout.concrete_dropout(key, x, -2.0)),
    "standout": (MATRIX, lambda key, x: jdropout.standout(key, x, x)),
}


def family(plan: Plan) -> Iterator[Row]:
    """Every variant relative to x * 2, 16 M float32; temporaries of its gradient in n / 8 bytes."""
    for name, (shape, function) in VARIANTS.items():
        x = normal(shape if plan.max_size >= 2**24 else SMALL[shape])
        labels = {"variant": name, "shape": str(x.shape)}
        if name == "word_dropout":  # of integers, which have no gradient
            tokens = jnp.abs(1000 * x).astype(jnp.int32)
            jitted = passes({"ours": function, "copy": copy}, KEY, tokens)
            row = timed_row(labels, jitted["forward"], ("ours / copy",), plan)
            cells = dict.fromkeys((*jitted, "temporaries"), "-")
            cells["forward"] = row.cells["ours / copy"]
            yield Row(labels, cells, {"forward": row.details})
            continue
        jitted = passes({"ours": function, "copy": copy}, KEY, x)
        rows = {
            column: timed_row(labels, functions, ("ours / copy",), plan)
            for column, functions in jitted.items()
        }
        cells = {column: row.cells["ours / copy"] for column, row in rows.items()}
        details: dict[str, Any] = {column: row.details for column, row in rows.items()}

        def loss(x: jax.Array, key: jax.Array, function: Function = function) -> jax.Array:
            return jnp.sin(function(key, jnp.cos(x))).sum()

        size = temporary_bytes(compile_all({"ours": jax.grad(loss)}, x, KEY))["ours"]
        cells["temporaries"] = f"{size * 8 / x.size:.2f}"
        yield Row(labels, cells, details | {"bytes": size})
