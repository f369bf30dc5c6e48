"""Subsets on eight devices: the choice of one device, and no collective where groups are local."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout

KEY = jax.random.key(20140614)
RATE = 0.3
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}
SHARDS = {"a": 2, "b": 4}


def mesh(mode):
    return jax.make_mesh(tuple(SHARDS.values()), tuple(SHARDS), axis_types=(MODES[mode],) * 2)


def collectives(compiled):
    """The number of collectives in a program."""
    return len(re.findall(rf" (?:{COLLECTIVES})(?:-start)?\(", compiled.as_text()))


def shards(names):
    names = (names,) if isinstance(names, str) else names
    return int(np.prod([SHARDS[name] for name in names]))


def passes(function, *arrays):
    """The result and the gradients, as arrays of one program."""
    y, pullback = jax.vjp(function, *arrays)
    return y, *pullback(2 * y)


def assert_same(results, expected):
    for ours, one in zip(results, expected, strict=True):
        np.testing.assert_array_equal(ours, one)


def on(devices, specs, function, arrays, results):
    """Compiles a function for sharded arrays, and applies it."""
    with jax.set_mesh(devices):
        placed = [
            jax.device_put(array, NamedSharding(devices, spec))
            for array, spec in zip(arrays, specs, strict=True)
        ]
        compiled = jax.jit(function).lower(*placed).compile()
        ours = compiled(*placed)
    for y, spec in zip(ours, results, strict=True):
        assert y.sharding.is_equivalent_to(NamedSharding(devices, spec), y.ndim)
    return ours, collectives(compiled)


# Where the examples and the features are; every place and mode, not every pair.
PLACES = [
    ("auto", P("a", "b")),
    ("explicit", P(("a", "b"), None)),
    ("explicit", P("b", None)),
    ("manual", P(("a", "b"), None)),
    ("manual", P("a", "b")),
]


@pytest.mark.parametrize(("mode", "spec"), PLACES, ids=str)
def test_stochastic_depth_of_a_sharded_batch(mode, spec):
    x, scale = np.asarray(normal(32, 8)), np.asarray(normal(32, 8, seed=1))
    devices = mesh(mode)

    def add(x, scale, **options):
        options = dict(groups=8) | options
        return jdropout.stochastic_depth(
            KEY, lambda x, scale: x * x * scale, x, RATE, args=(scale,), **options
        )

    def local(x, scale):
        start = (jax.lax.axis_index(spec[0]) * len(x),)
        return add(x, scale, groups=8 // shards(spec[0]), start=start, global_shape=(32,))

    whole = function = functools.partial(passes, add)
    if mode == "manual":
        function = jax.shard_map(
            functools.partial(passes, local), mesh=devices, in_specs=spec, out_specs=spec
        )
    results, count = on(devices, [spec] * 2, function, (x, scale), [spec] * 3)
    assert_same(results, jax.jit(whole)(x, scale))
    assert count == 0


@pytest.mark.parametrize("mode", ["auto", "explicit"])
def test_a_group_that_crosses_devices_is_kept_right_with_collectives(mode):
    """The control: one group over the whole batch cannot be local."""
    x, both = np.asarray(normal(32, 8)), functools.partial(passes, square)
    devices = mesh(mode)
    with jax.set_mesh(devices):
        placed = jax.device_put(x, NamedSharding(devices, P("b", None)))
        compiled = jax.jit(both).lower(placed).compile()
        results = compiled(placed)
    assert_same(results, jax.jit(both)(x))
    assert collectives(compiled) > 0


def square(x):
    return jdropout.stochastic_depth(KEY, jnp.square, x, RATE)


def turned(x, positions):
    angle, index = positions
    return x + x * angle[..., None] + index[..., None].astype(x.dtype)


def shifted(x, index):
    return x * index[..., None].astype(x.dtype)


ROUTED = [
    ("auto", P("b", None, "a")),
    ("explicit", P(("a", "b"), None, None)),
    ("manual", P(("a", "b"), None, None)),
    ("manual", P("b", None, "a")),
]


@pytest.mark.parametrize(("mode", "spec"), ROUTED, ids=str)
def test_route_tokens_of_a_sharded_batch(mode, spec):
    """With positions that all examples share, and with the tokens' indices."""
    x, angle = np.asarray(normal(16, 9, 4)), np.asarray(normal(1, 9, seed=1))
    devices = mesh(mode)

    def route(x, **options):
        route = functools.partial(jdropout.route_tokens, KEY, num_prefix_tokens=1, **options)
        y = route(turned, x, RATE, positions=(angle, np.arange(9)[None]))
        return route(shifted, y, RATE)

    def local(x):
        start = (jax.lax.axis_index(spec[0]) * len(x), 0)
        return route(x, start=start, global_shape=(16, 8))

    whole = function = functools.partial(passes, route)
    if mode == "manual":
        function = jax.shard_map(
            functools.partial(passes, local), mesh=devices, in_specs=spec, out_specs=spec
        )
    results, count = on(devices, [spec], function, (x,), [spec] * 2)
    assert_same(results, jax.jit(whole)(x))
    assert count == 0


def integers(*shape, seed):
    """Whose sums are exact in every order."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


# Axes of the mesh of the examples and of the units, and the number of tiles.
UNITS = [
    ("auto", "a", "b", 2),
    ("explicit", None, ("a", "b"), 1),
    ("explicit", "a", "b", 1),
    ("manual", "a", "b", 1),
    ("manual", "a", "b", 2),
]


@pytest.mark.parametrize(("mode", "batch", "axis", "tiles"), UNITS, ids=str)
def test_unit_subset_needs_the_collectives_of_the_block(mode, batch, axis, tiles):
    w, v, x = integers(4, 32, seed=0), integers(32, 4, seed=1), integers(16, 4, seed=2)
    devices = mesh(mode)
    specs = (P(None, axis), P(axis, None), P(batch, None))

    def block(w, v, x):
        sharding = jax.typeof(x).sharding
        out = sharding.spec if sharding.mesh.explicit_axes else None
        return jnp.matmul(jnp.square(x @ w), v, out_sharding=out)

    def drop(w, v, x, **options):
        options = dict(groups=8, tiles=tiles) | options
        return jdropout.unit_subset(KEY, block, w, v, x, 0.5, **options)

    def local(w, v, x):
        number = tiles // shards(batch) if tiles > 1 else 1
        start = (
            jax.lax.axis_index(batch) * number if tiles > 1 else 0,
            jax.lax.axis_index(axis) * w.shape[1],
        )
        y = drop(
            w,
            v,
            x,
            groups=8 // shards(axis),
            tiles=number,
            start=start,
            global_shape=(tiles, 32),
        )
        return jax.lax.psum(y, axis)

    def undropped(w, v, x):
        y = block(w, v, x)
        return jax.lax.psum(y, axis) if mode == "manual" else y

    whole, functions = functools.partial(passes, drop), []
    for function in (drop if mode != "manual" else local, undropped):
        function = functools.partial(passes, function)
        if mode == "manual":
            function = jax.shard_map(
                function, mesh=devices, in_specs=specs, out_specs=(specs[2], *specs)
            )
        functions.append(function)
    (results, count), (_, least) = (
        on(devices, specs, function, (w, v, x), (specs[2], *specs)) for function in functions
    )
    assert_same(results, jax.jit(whole)(w, v, x))
    assert count == least > 0


@pytest.mark.parametrize("mode", MODES)
def test_layer_subset_of_sharded_parameters_and_examples(mode):
    factors, x, devices = integers(6, 1, 8, seed=0), integers(4, 8, seed=1), mesh(mode)
    specs = (P(None, None, "b"), P("a", "b"))

    def layers(factors, x):
        return jdropout.layer_subset(KEY, lambda p, x: x + p * x, factors, x, RATE)

    def gradient(factors, x):
        y, pullback = jax.vjp(lambda x: layers(factors, x), x)
        return y, *pullback(y)

    function = gradient
    if mode == "manual":
        function = jax.shard_map(gradient, mesh=devices, in_specs=specs, out_specs=specs[1])
    results, count = on(devices, specs, function, (factors, x), specs[1:] * 2)
    assert_same(results, jax.jit(gradient)(factors, x))
    assert count == 0


def test_devices_with_keys_of_their_own_add_up_their_gradients():
    """The weights are the same on all devices, their subsets are not."""
    w, v, x = integers(4, 8, seed=0), integers(8, 4, seed=1), integers(16, 4, seed=2)
    keys, spec, devices = jax.random.split(KEY, 8), P(("a", "b")), mesh("manual")

    def drop(w, v, keys, x):
        def block(w, v, x):
            return jnp.square(x @ w) @ v

        return jdropout.unit_subset(keys[0], block, w, v, x, 0.5)

    def both(drop):
        def passes(w, v, keys, x):
            y, pullback = jax.vjp(lambda w, v: drop(w, v, keys, x), w, v)
            return y, *pullback(y)

        return jax.jit(passes)

    parts = P(), P(), spec, spec
    split = jax.shard_map(drop, mesh=devices, in_specs=parts, out_specs=spec)
    one = both(drop)
    results = [one(w, v, keys[i : i + 1], x[2 * i : 2 * i + 2]) for i in range(8)]
    y, w_bar, v_bar = zip(*results, strict=True)
    assert_same(both(split)(w, v, keys, x), (np.concatenate(y), sum(w_bar), sum(v_bar)))


def test_an_axis_of_the_mesh_may_have_the_units_and_the_tiles():
    """As where the weights are split over the axis of the batch, and gathered to be used."""
    w, v, x = integers(4, 32, seed=0), integers(32, 4, seed=1), integers(16, 4, seed=2)

    def block(w, v, x):
        if jax.typeof(x).sharding.mesh.explicit_axes:
            w, v = (jax.sharding.reshard(weight, P(None, None)) for weight in (w, v))
        return jnp.square(x @ w) @ v

    def drop(w, v, x):
        return jdropout.unit_subset(KEY, block, w, v, x, 0.5, groups=8, tiles=4)

    specs, both = (P(None, "b"), P("b", None), P("b", None)), functools.partial(passes, drop)
    results, _ = on(mesh("explicit"), specs, both, (w, v, x), (specs[2], *specs))
    assert_same(results, jax.jit(both)(w, v, x))
