"""Sections on attention with dropout on its probabilities."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import (
    DTYPES,
    KEY,
    RATE,
    Function,
    bind,
    compile_all,
    jit,
    labels,
    normal,
    temporary_bytes,
)
from flax import nnx
from harness import Plan, Row, ratio_row, time_all, timed_row

import jdropout
from jdropout import by_position

HEADS, FEATURES = 8, 64
LONGEST_MATRIX = 4096
"""Longest length at which competitors that store the probability matrix are timed."""


def attentions(is_causal: bool) -> dict[str, Function]:
    """Attention as functions of a PRNG key, queries, keys and values, with and without dropout."""
    flax = functools.partial(
        nnx.dot_product_attention, dropout_rate=RATE, broadcast_dropout=False, is_causal=is_causal
    )
    return {
        "ours": ours(is_causal=is_causal),
        "ours without": ours(is_causal=is_causal, deterministic=True),
        "flax": lambda key, *inputs: flax(*inputs, dropout_rng=key),
        "flax without": lambda key, *inputs: flax(*inputs, deterministic=True),
        "jax.nn": lambda key, *inputs: jax.nn.dot_product_attention(*inputs, is_causal=is_causal),
    }


def attention(plan: Plan) -> Iterator[Row]:
    """Attention under jit: (B, T, N, H) queries, keys and values."""
    plan = plan._replace(rounds=plan.few_rounds)
    columns = ("ours / jax.nn", "ours / flax", "ours / ours without", "flax / flax without")
    for dtype in DTYPES:
        inputs = normal_inputs(1, plan.attention_length, dtype)
        for is_causal in (False, True):
            causal = {"causal": "yes" if is_causal else "no"}
            for name, functions in attention_passes(attentions(is_causal)).items():
                jitted = jit(functions, KEY, *inputs)
                yield timed_row(labels(inputs[0], name) | causal, jitted, columns, plan)


def attention_memory(plan: Plan) -> Iterator[Row]:
    """Temporaries of the gradient of attention; ours / T is relative to its first row."""
    names = ("ours", "ours without", "flax", "jax.nn")
    functions = attentions(is_causal=False)
    gradients = attention_passes({name: functions[name] for name in names})["gradient"]
    ours_of_first = None
    for length in plan.compiled_lengths:
        x = jax.ShapeDtypeStruct((1, length, HEADS, FEATURES), jnp.float32)
        sizes = temporary_bytes(compile_all(gradients, KEY, x, x, x))
        ours_per_length = sizes["ours"] / length
        ours_of_first = ours_of_first or ours_per_length
        cells = {name: megabytes(size) for name, size in sizes.items()} | {
            "ours / T": f"{ours_per_length / ours_of_first:.2f}",
            "flax / ours": f"{sizes['flax'] / sizes['ours']:.1f}",
        }
        yield Row(labels(x), cells, {"bytes": sizes})


def attention_length(plan: Plan) -> Iterator[Row]:
    """Causal attention by length T: "quadratic" is ours at the first length times (T / first)²."""
    plan = plan._replace(rounds=plan.few_rounds)
    causal = attentions(is_causal=True)
    functions = {name: causal[name] for name in ("ours", "jax.nn")}
    columns = ("ours / quadratic", "ours / jax.nn")
    first, *_ = plan.lengths
    first_inputs = normal_inputs(1, first)
    for length in plan.lengths:
        inputs = normal_inputs(1, length)
        for name, competitors in attention_passes(functions).items():
            jitted = jit(competitors, KEY, *inputs)
            jitted |= jit({"first": competitors["ours"]}, KEY, *first_inputs)
            if length > LONGEST_MATRIX:
                del jitted["jax.nn"]
            times = time_all(jitted, plan)
            times["quadratic"] = times.pop("first") * (length / first) ** 2
            yield ratio_row(labels(inputs[0], name), times, columns)


def attention_options(plan: Plan) -> Iterator[Row]:
    """Causal attention with an option, relative to the same without: time, and temporaries."""
    plan = plan._replace(rounds=min(plan.few_rounds, 3))
    length = plan.lengths[-2]
    inputs = normal_inputs(1, length)
    documents = np.arange(length, dtype=np.int32) * 8 // length
    window = length // 16
    options: dict[str, dict[str, Any]] = {
        "plain": {},
        "8 documents": {"query_segment_ids": documents[None]},
        "8 documents, by position": {"mask_fn": by_position.document(documents)},
        "window of 1/16": {"local_window_size": (window, 0)},
        "window of 1/16, by position": {"mask_fn": by_position.sliding_window(window)},
        "soft cap": {"logits_soft_cap": 50.0},
        "alibi": {"bias_fn": by_position.alibi(HEADS)},
        "relative_bias": {"bias_fn": by_position.relative_bias(normal((32, HEADS)))},
        "dropped logits": {"dropout_on": "logits"},
    }
    functions = {name: ours(is_causal=True, **given) for name, given in options.items()}
    for name, competitors in attention_passes(functions).items():
        programs = compile_all(competitors, KEY, *inputs)
        sizes = temporary_bytes(programs)
        times = time_all(bind(programs, KEY, *inputs), plan)
        for option in list(options)[1:]:
            column = f"{option} / plain"
            row = ratio_row(labels(inputs[0], name) | {"option": option}, times, (column,))
            cells = {
                "time": row.cells[column],
                "temporaries": f"{sizes[option] / sizes['plain']:.2f}",
            }
            found = {key: sizes[key] for key in (option, "plain")}
            yield row._replace(cells=cells, details=row.details | {"bytes": found})


def attention_blocks(plan: Plan) -> Iterator[Row]:
    """Attention by block size (queries, keys): time relative to the default; temporaries."""
    plan = plan._replace(rounds=plan.few_rounds)
    columns = tuple(f"{size} keys / default" for size in plan.block_sizes)
    base = plan.attention_length
    for batch, length in ((1, base), (8, base // 4)):
        inputs = normal_inputs(batch, length)
        sizes = [size for size in plan.block_sizes if size <= length]
        blocks = {f"{rows} x {keys}": (rows, keys) for rows in sizes for keys in sizes}
        functions = {name: ours(block_sizes=pair) for name, pair in blocks.items()}
        for name, competitors in attention_passes(functions | {"default": ours()}).items():
            programs = compile_all(competitors, KEY, *inputs)
            times = time_all(bind(programs, KEY, *inputs), plan)
            found = temporary_bytes(programs)
            for rows in sizes:
                label = labels(inputs[0], name) | {"queries": str(rows)}
                of_row = {"default": times["default"]} | in_block_row(rows, sizes, times)
                yield ratio_row(label, of_row, columns)
            for rows in sizes:
                label = labels(inputs[0], f"{name}: temporaries") | {"queries": str(rows)}
                of_row = in_block_row(rows, sizes, found)
                cells = {f"{keys} / default": megabytes(size) for keys, size in of_row.items()}
                details = {"bytes": {"default": found["default"]} | of_row}
                yield Row(label, dict.fromkeys(columns, "-") | cells, details)


def in_block_row(rows: int, sizes: list[int], found: Mapping[str, Any]) -> dict[str, Any]:
    """Results for blocks with a given number of queries, by number of keys."""
    return {f"{keys} keys": found[f"{rows} x {keys}"] for keys in sizes}


def attention_passes(functions: Mapping[str, Function]) -> dict[str, dict[str, Function]]:
    """Returns attention, and the gradient of sum(attention * queries) for all three inputs."""

    def gradient(attend: Function) -> Function:
        def loss(inputs: tuple[jax.Array, ...], key: jax.Array) -> jax.Array:
            return (attend(key, *inputs) * inputs[0]).sum()

        return lambda key, *inputs: jax.grad(loss)(inputs, key)

    gradients = {name: gradient(function) for name, function in functions.items()}
    return {"forward": dict(functions), "gradient": gradients}


def ours(**options: Any) -> Function:
    return lambda key, *inputs: jdropout.dot_product_attention(
        *inputs, dropout_key=key, dropout_rate=RATE, **options
    )


def normal_inputs(batch: int, length: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    return tuple(normal((3, batch, length, HEADS, FEATURES), dtype))


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
