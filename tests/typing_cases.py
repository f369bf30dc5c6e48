"""What type checkers say about calls of the public API. Nothing here runs.

`mypy` checks this file, and so does `pyright`. A line with an ignored error must have that error:
both report an ignore that nothing needs.
"""

from collections.abc import Callable
from typing import Any, assert_type

import equinox
import flax.linen
import jax
import numpy as np
from flax import nnx

import jdropout
import jdropout.by_position as by_position
import jdropout.equinox
import jdropout.keys as keys
import jdropout.linen
import jdropout.nnx
import jdropout.schedules as schedules
import jdropout.testing as testing
import jdropout.uncertainty as uncertainty


def functions(key: jax.Array, raw: np.ndarray, x: jax.Array, traced: jax.Array) -> None:
    assert_type(jdropout.dropout(key, x, 0.1), jax.Array)
    jdropout.dropout(None, x, 0.1, deterministic=True)
    jdropout.dropout(raw, np.ones((2, 3)), traced, deterministic=traced > 0, broadcast_dims=[0])
    jdropout.dropout(key, x, np.float32(0.1), start=(traced, 4), global_shape=(8, 8), precision=32)
    jdropout.dropout(key, x, 0.1, implementation="pallas")
    assert_type(jdropout.keep_mask(key, 0.1, (2, 3)), jax.Array)
    assert_type(jdropout.effective_rate(0.1), float)
    assert_type(jdropout.dropout_add_norm(key, x, x, 0.1), tuple[jax.Array, jax.Array])
    assert_type(jdropout.patch_dropout(key, x, 0.5), tuple[jax.Array, jax.Array])
    assert_type(jdropout.drop_path_rates(0.1, 12), list[float])
    assert_type(jdropout.keep_indices(key, 0.5, 16), jax.Array)
    assert_type(jdropout.dot_product_attention(x, x, x, dropout_key=key, dropout_rate=0), jax.Array)
    jdropout.dot_product_attention(
        x, x, x, dropout_key=None, dropout_rate=0, mask_fn=by_position.sliding_window(4)
    )

    jdropout.dropout(key, x)  # type: ignore[call-arg]
    jdropout.dropout(0, x, 0.1)  # type: ignore[arg-type]
    jdropout.dropout(key, [1.0], 0.1)  # type: ignore[arg-type]
    jdropout.dropout(key, x, "0.1")  # type: ignore[arg-type]
    jdropout.dropout(key, x, 0.1, True)  # type: ignore[call-arg]
    jdropout.dropout(key, x, 0.1, deterministic="no")  # type: ignore[arg-type]
    jdropout.dropout(key, x, 0.1, implementation="triton")  # type: ignore[arg-type]
    jdropout.keep_indices(key, traced, 16)  # type: ignore[arg-type]
    jdropout.drop_path(key, x, 0.1, mode="rows")  # type: ignore[arg-type]


def trees(key: jax.Array, x: jax.Array, state: tuple[jax.Array, jax.Array]) -> None:
    """Functions of trees return the tree's type."""
    assert_type(jdropout.zoneout(key, state, state, 0.1), tuple[jax.Array, jax.Array])
    assert_type(
        jdropout.drop_connect_tree(key, {"kernel": x}, 0.1, select=["kernel"]),
        dict[str, jax.Array],
    )
    assert_type(jdropout.layer_drop(key, jax.numpy.tanh, x, 0.1), jax.Array)
    assert_type(jdropout.stochastic_depth(key, jax.numpy.tanh, x, 0.1), jax.Array)


def predictions(key: jax.Array, x: jax.Array, model: nnx.Module, module: flax.linen.Module) -> None:
    def fn(key: jax.Array, x: jax.Array) -> jax.Array:
        return jdropout.dropout(key, x, 0.5)

    prediction = jdropout.mc_predict(fn, key, x, num_samples=10, sampling="stratified")
    assert_type(prediction, jdropout.MCPrediction)
    assert_type(jdropout.nnx.mc_predict(model, x, key, num_samples=10), jdropout.MCPrediction)
    assert_type(
        jdropout.linen.mc_predict(module, {}, x, key, num_samples=10), jdropout.MCPrediction
    )
    assert_type(jdropout.multi_sample(fn, key, x, 4), jax.Array)
    assert_type(uncertainty.mutual_information(prediction.samples), jax.Array)
    assert_type(uncertainty.expected_calibration_error(x, np.zeros(3, int)), jax.Array)

    jdropout.mc_predict(fn, key, x)  # type: ignore[call-arg]
    jdropout.mc_predict(fn, key, x, num_samples=10, sampling="both")  # type: ignore[arg-type]
    jdropout.nnx.mc_predict(fn, x, key, num_samples=10)  # type: ignore[arg-type]


def keys_and_schedules(root: jax.Array, step: jax.Array, x: jax.Array) -> None:
    assert_type(keys.site_key(root, step=step, site=("decoder", 3, "mlp")), jax.Array)
    assert_type(keys.at_site(keys.step_key(root, step=7), "mlp"), jax.Array)
    assert_type(keys.in_batch(root, 0, 32), jax.Array)
    schedule = schedules.warmup(0.1, 1000)
    assert_type(schedule, schedules.Schedule)
    assert_type(schedule(step), jax.Array)
    jdropout.dropout(root, x, schedule(step))
    schedules.join([schedule, lambda step: 0.1], [1000])
    assert_type(schedules.buckets(schedule, [0.1, 0.2])(7), float)

    keys.site_key(root, 7, "mlp")  # type: ignore[call-arg]
    keys.at_site(root, 0.5)  # type: ignore[arg-type]
    schedules.linear(0.1, 0.2, 0.5)  # type: ignore[arg-type]


def nnx_layers(x: jax.Array, key: jax.Array) -> None:
    rngs = nnx.Rngs(0)
    layer = jdropout.nnx.Dropout(0.1, rngs=rngs)
    assert_type(layer(x, deterministic=False, rngs=key), jax.Array)
    assert_type(layer.rate, float)
    flax_layer: nnx.Dropout = layer  # it is one
    assert_type(flax_layer(x), jax.Array)
    assert_type(jdropout.nnx.DropPath(0.1, mode="batch", rngs=rngs)(x), jax.Array)
    assert_type(jdropout.nnx.GaussianNoise(0.1)(x), jax.Array)
    attention = jdropout.nnx.MultiHeadAttention(8, 64, decode=False, rngs=rngs)
    assert_type(attention(x, is_causal=True), jax.Array)
    cell = jdropout.nnx.Zoneout(nnx.GRUCell(2, 3, rngs=rngs), 0.1, rngs=rngs)
    assert_type(cell(x, x), tuple[Any, jax.Array])
    assert_type(jdropout.nnx.replace_dropout(attention), int)
    jdropout.nnx.set_site_keys(attention, key, step=7)

    jdropout.nnx.Dropout()  # type: ignore[call-arg]
    jdropout.nnx.Dropout(0.1, rngs=0)  # type: ignore[arg-type]
    jdropout.nnx.Dropout("0.1")  # type: ignore[arg-type]
    layer(x, True)  # type: ignore[call-arg]
    jdropout.nnx.DropPath(0.1, mode="rows")  # type: ignore[arg-type]


def linen_layers(x: jax.Array, key: jax.Array) -> None:
    layer = jdropout.linen.Dropout(0.1, deterministic=False)
    assert_type(layer(x, rng=key), jax.Array)
    flax_layer: flax.linen.Dropout = layer  # it is one
    flax_layer(x)
    jdropout.linen.Dropout(rate=0.1, broadcast_dims=(1,), name="dropout")
    assert_type(jdropout.linen.DropPath(0.1)(x, True), jax.Array)
    assert_type(jdropout.linen.SelfAttention(8)(x, deterministic=True), jax.Array)
    model = flax.linen.Sequential([layer])
    apply: Callable[..., Any] = jdropout.linen.with_site_keys(model.apply, key, step=7)
    apply({}, x)

    jdropout.linen.Dropout("0.1")  # type: ignore[arg-type]
    jdropout.linen.Dropout(0.1, p=0.2)  # type: ignore[call-arg]
    layer([1.0])  # type: ignore[arg-type]


def equinox_layers(x: jax.Array, key: jax.Array) -> None:
    layer = jdropout.equinox.Dropout(p=0.1)
    assert_type(layer(x, key=key, inference=False), jax.Array)
    equinox.nn.inference_mode(layer)
    layer(x, key)  # type: ignore[call-arg]
    layer(x, key="key")  # type: ignore[arg-type]


def tests(step: Callable[..., Any], x: jax.Array, key: jax.Array) -> None:
    report = jdropout.audit(step, x)
    assert_type(report, jdropout.AuditReport)
    assert_type(report.sites[0], jdropout.AuditedSite)
    report.assert_clean(allow=["shared-mask"])
    assert_type(testing.mask_fingerprint(key, 0.1, (2, 3)), str)
    assert_type(testing.check_determinism(step, x), testing.DeterminismReport)
    recording = testing.record(step, x)
    assert_type(testing.first_difference(recording, recording), testing.Difference | None)

    testing.first_difference(recording, x)  # type: ignore[arg-type]
    testing.assert_unbiased(step, x, key=key, rate=x)  # type: ignore[arg-type]
