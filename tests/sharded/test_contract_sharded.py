"""The functions of the table in contract.py on eight devices: the same values, no collective."""

import dataclasses
import functools
import itertools

import contract
import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from audit_cases import in_turn
from contract import RATE, ROWS, Draw
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout
from jdropout.keys import at_site

KEY = jax.random.key(20140614)
BOTH = ("a", "b")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh(axis_type):
    return jax.make_mesh((2, 4), BOTH, axis_types=(axis_type,) * 2)


def collectives(compiled):
    return [name for name in COLLECTIVES if name in compiled.as_text()]


def on_axes(ndim, axes):
    return P(*(axes.get(axis) for axis in range(ndim)))


def zoned_out(key, x, rate, **options):
    return jdropout.zoneout(key, 2 * x, x, rate, **options)


def zoneout_formula(draw, x, rate):
    return np.where(draw.keep(rate, x.shape), x, 2 * x)


# What is made of a constant beside x, or has no element of x in its place, is tested below, and
# subsets in a file of their own.
OTHERS = ("drop_connect_tree", "layer_drop", "bias_dropout_add", "dropout_add_norm")
SUBSETS = ("stochastic_depth", "route_tokens", "unit_subset", "layer_subset")
CASES = {name: row for name, row in ROWS.items() if name not in (*OTHERS, *SUBSETS)} | {
    "zoneout": dataclasses.replace(ROWS["zoneout"], call=zoned_out, formula=zoneout_formula)
}
SHAPES = {
    "drop_block": (16, 12, 8, 16),
    "drop_block, realised": (16, 12, 8, 16),
    "patch_dropout": (16, 9, 8),
    "variational_dense": (16, 10),
}
# In explicit mode each axis of the mesh is on an axis of x, in automatic mode both are on one.
SPECS = {
    "patch_dropout": ({0: "a", 2: "b"}, {0: BOTH}),
    "variational_dense": ({0: BOTH},),  # the sum over inputs is no matter of the noise
    "drop_block": ({0: "a", 3: "b"}, {3: BOTH}),
    "drop_block, realised": ({0: "a", 3: "b"}, {0: BOTH}),
}
IN_BOTH_MODES = itertools.product(("drop_block", "alpha_dropout"), AXIS_TYPES)
MEETING = ("drop_block, realised", "targeted_dropout")  # sums and ranks over the whole array


@pytest.mark.parametrize(("name", "mode"), in_turn(CASES, list(AXIS_TYPES), also=IN_BOTH_MODES))
def test_sharding_changes_no_value_and_needs_no_collective(name, mode):
    row = CASES[name]
    shape = SHAPES.get(name, tuple(-(-size // 8) * 8 for size in row.shape))
    last = len(shape) - 1
    placements = SPECS.get(name, ({0: "a", last: "b"}, {min(1, last): BOTH}))
    axes = placements[0 if mode == "explicit" else -1]
    x, strength = row.inputs(shape), row.strength
    if np.ndim(strength):
        columns = strength.shape[1] if name == "variational_dense" else shape[1]
        rows = shape[0] if row.array_strength else strength.shape[0]
        strength = np.resize(strength, (rows, columns))
    draw = Draw(KEY, precision=row.precision)
    y_bar = row.inputs(row.formula(draw, x, strength).shape, seed=7)
    expected = [row.formula(draw, x, strength)]
    if row.differentiable:
        expected.append(row.gradient(draw, x, strength, y_bar))

    @jax.jit
    def passes(key, x, traced_strength, y_bar):
        strength = row.strength if traced_strength is None else traced_strength
        if not row.differentiable:
            return [row.call(key, x, strength)]
        y, pullback = jax.vjp(lambda x: row.call(key, x, strength), x)
        return [y, *pullback(y_bar)]

    devices = mesh(AXIS_TYPES[mode])
    sharding = NamedSharding(devices, on_axes(len(shape), axes))
    with jax.set_mesh(devices):
        x, y_bar = jax.device_put((x, y_bar), sharding)
        if row.array_strength and name != "variational_dense":
            strength = jax.device_put(strength, sharding)
        traced_strength = strength if np.ndim(strength) else None
        compiled = passes.lower(KEY, x, traced_strength, y_bar).compile()
        results = compiled(KEY, x, traced_strength, y_bar)
    for result, whole in zip(results, expected, strict=True):
        if row.rtol == 0:
            np.testing.assert_array_equal(result, whole)
        else:
            np.testing.assert_allclose(result, whole, rtol=row.rtol, atol=row.atol)
        assert result.sharding.is_equivalent_to(sharding, len(shape))
    if name not in MEETING:
        assert collectives(compiled) == []


@pytest.mark.parametrize(
    ("options", "mode"), [({}, "explicit"), (dict(shared_channels=False), "auto")]
)
def test_blocks_reach_over_the_parts_of_a_map(options, mode):
    options = dict(block_size=3, **options)
    shape, spec = (16, 12, 8, 16), P(None, "a", "b")
    x = ROWS["drop_block"].inputs(shape)
    kept = contract.outside_blocks(Draw(KEY, precision=32), options, shape, RATE)
    devices = mesh(AXIS_TYPES[mode])
    with jax.set_mesh(devices):
        placed = jax.device_put(x, NamedSharding(devices, spec))

        @jax.jit
        def passes(key, x):
            y, pullback = jax.vjp(lambda x: jdropout.drop_block(key, x, RATE, **options), x)
            return y, *pullback(x)

        for result in passes(KEY, placed):
            expected = np.where(kept, x / np.float32(1 - RATE), 0)
            np.testing.assert_allclose(result, expected, rtol=3e-7)
            assert result.sharding.is_equivalent_to(placed.sharding, 4)


@pytest.mark.parametrize("name", ["gaussian_dropout", "alpha_dropout"])
def test_traced_strengths_and_flags_work_with_explicit_shardings(name):
    row, shape, devices = ROWS[name], (24, 16), mesh(AxisType.Explicit)
    x = row.inputs(shape)

    @jax.jit
    def passes(key, x, strength, flag):
        y, pullback = jax.vjp(lambda x: row.call(key, x, strength, deterministic=flag), x)
        return y, *pullback(x)

    draw = Draw(KEY, precision=16)
    with jax.set_mesh(devices):
        placed = jax.device_put(x, NamedSharding(devices, P("a", "b")))
        compiled = passes.lower(KEY, placed, 0.25, False).compile()
        y, x_bar = compiled(KEY, placed, 0.25, False)
        np.testing.assert_array_equal(compiled(KEY, placed, 0.25, True)[0], x)
    assert collectives(compiled) == []
    np.testing.assert_allclose(y, row.formula(draw, x, 0.25), rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(x_bar, row.gradient(draw, x, 0.25, x), rtol=3e-6, atol=3e-6)


def test_noise_in_shard_map_with_global_positions_is_the_whole():
    spec, shape = P(BOTH, None), (24, 16)

    def local(key, x):
        start = (jax.lax.axis_index(BOTH) * x.shape[0], 0)
        return jdropout.uniform_noise(key, x, 1.0, start=start, global_shape=shape)

    split = functools.partial(jax.shard_map, mesh=mesh(AxisType.Auto), out_specs=spec)
    with jax.enable_x64(True):
        y = jax.jit(split(local, in_specs=(P(), spec)))(KEY, np.zeros(shape))
    bits = ((np.asarray(y) + 1) * 2**31 - 0.5).astype(np.uint64)  # exact in float64
    words = np.asarray(jax.random.key_data(KEY))
    np.testing.assert_array_equal(bits, law_twin.uniform(words, shape))


def test_layers_of_a_shard_map_agree_on_what_is_skipped():
    devices = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    x = np.random.default_rng(1).standard_normal((16, 4), np.float32)

    def f(key, x):
        return jdropout.layer_drop(key, lambda x: x + jnp.tanh(x), x, 0.5, unbiased=True)

    specs = dict(in_specs=(P(), P("a")), out_specs=P("a"))
    sharded = jax.jit(jax.shard_map(f, mesh=devices, **specs))
    fates = set()
    for index in range(4):
        key = at_site(KEY, index)
        kept = bool(Draw(key).keep(0.5, ()))
        fates.add(kept)
        expected = x + 2 * np.tanh(x) if kept else x
        np.testing.assert_allclose(sharded(key, x), expected, rtol=1e-5)
    assert fates == {False, True}
