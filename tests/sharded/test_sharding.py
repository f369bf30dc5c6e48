"""The same bits on one device and on eight, in every axis mode, with no collective."""

import functools
import itertools
import math

import jax
import numpy as np
import pytest
from cheap import normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout
from jdropout.keys import in_batch

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SIZES = {"a": 2, "b": 4}
RAGGED = [(24, 16), (16, 24, 8)]  # 3 rows a device, where the rows are on both axes of the mesh
# Shapes, and which of their shardings are tested: all, every second one, and so on.
SHAPES = {
    (40, 8): 2,  # 5 rows a device
    (200, 1000): 3,
    (24, 1024): 2,
    (8, 96, 64): 3,
    (4, 8, 64, 16): 4,
    (64,): 1,
}
MODES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "manual": AxisType.Auto}


def mesh(axis_type):
    return jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(axis_type,) * 2)


def specs(shape):
    """Every placement of the mesh's axes on the array's axes that divides them."""
    for spec in itertools.product([None, "a", "b", ("a", "b")], repeat=len(shape)):
        used = [[] if s is None else [s] if isinstance(s, str) else list(s) for s in spec]
        names = list(itertools.chain(*used))
        parts = [math.prod(SIZES[name] for name in names) for names in used]
        divides = all(size % part == 0 for size, part in zip(shape, parts, strict=True))
        if names and len(names) == len(set(names)) and divides:
            yield P(*spec)


def collectives(compiled):
    return [name for name in COLLECTIVES if name in compiled.as_text()]


def in_shardings(function, x, devices, tested):
    """Applies a function of (x, spec) to x in several shardings, all in one program."""
    shardings = [NamedSharding(devices, spec) for spec in tested]
    with jax.set_mesh(devices):
        placed = jax.device_put([x] * len(shardings), shardings)
        apply = jax.jit(
            lambda placed: [function(*pair) for pair in zip(placed, tested, strict=True)]
        )
        compiled = apply.lower(placed).compile()
        results = compiled(placed)
    assert collectives(compiled) == []
    for result, sharding in zip(results, shardings, strict=True):
        for y in jax.tree.leaves(result):
            assert y.sharding.is_equivalent_to(sharding, y.ndim), sharding
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_sharding_gives_the_same_bits_without_a_collective(shape, key):
    """The shapes in automatic and explicit mode in turn."""
    x = np.asarray(normal(*shape))
    drop = functools.partial(jdropout.dropout, rate=0.3)
    devices = mesh([AxisType.Auto, AxisType.Explicit][list(SHAPES).index(shape) % 2])
    tested = list(specs(shape))[:: SHAPES[shape]]
    for y in in_shardings(lambda x, spec: drop(key, x), x, devices, tested):
        np.testing.assert_array_equal(y, drop(key, x))


def manual(function, devices, spec, shape, **options):
    """The function of (key, x, start=...) in manual mode: every device knows where x begins."""

    def local(key, x):
        start = [
            0 if names is None else jax.lax.axis_index(names) * size
            for names, size in zip(spec, x.shape, strict=True)
        ]
        return function(key, x, start=start, global_shape=shape)

    return jax.shard_map(local, mesh=devices, in_specs=(P(), spec), out_specs=spec, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", RAGGED, ids=str)
def test_both_passes_are_the_same_in_every_mode_and_sharding(shape, mode, key):
    x, y_bar = (np.asarray(normal(*shape, seed=seed)) for seed in (0, 1))
    drop = functools.partial(jdropout.dropout, rate=0.3)
    devices = mesh(MODES[mode])

    def passes(arrays, spec):
        x, y_bar = arrays
        function = manual(drop, devices, spec, shape) if mode == "manual" else drop
        y, pullback = jax.vjp(functools.partial(function, key), x)
        return y, *pullback(y_bar)

    tested = list(specs(shape))[list(MODES).index(mode) :: len(MODES)]  # each in one mode
    for result in in_shardings(passes, (x, y_bar), devices, tested):
        for ours, array in zip(result, (x, y_bar), strict=True):
            np.testing.assert_array_equal(ours, drop(key, array))


def test_parts_of_a_mask_at_the_wrong_places_are_not_the_whole(key):
    """The control: equality with the whole is no accident of the positions."""
    x, devices, spec = np.ones((24, 16), np.float32), mesh(AxisType.Auto), P(("a", "b"), None)

    def off_by_one(key, x, start, global_shape):
        start = [(start[0] + 1) % (24 - 3), 0]
        return jdropout.dropout(key, x, 0.3, start=start, global_shape=global_shape)

    shifted = jax.jit(manual(off_by_one, devices, spec, x.shape))(key, x)
    assert (shifted != jdropout.dropout(key, x, 0.3)).any()


def test_positions_by_hand_on_one_axis_and_by_the_compiler_on_the_other(key):
    x = np.asarray(normal(24, 16))
    drop = functools.partial(jdropout.dropout, rate=0.3)
    devices = mesh(AxisType.Auto)
    for by_hand, by_compiler in [("a", "b"), ("b", "a")]:
        mixed = jax.jit(manual(drop, devices, P(by_hand, None), x.shape, axis_names={by_hand}))
        placed = jax.device_put(x, NamedSharding(devices, P(by_hand, by_compiler)))
        compiled = mixed.lower(key, placed).compile()
        np.testing.assert_array_equal(compiled(key, placed), drop(key, x))
        assert collectives(compiled) == []


def test_explicit_sharding_survives_broadcast_axes(key):
    x = np.ones((8, 16, 4), np.float32)

    def dropped(x):
        dims = [(0,), (1,), (0, 1), (2,)]
        return [jdropout.dropout(key, x, 0.5, broadcast_dims=shared) for shared in dims]

    expected = jax.jit(dropped)(x)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(x, P("a", "b", None))
        for wrap in (jax.jit, lambda f: f):
            for y, whole in zip(wrap(dropped)(placed), expected, strict=True):
                assert jax.typeof(y).sharding.spec == P("a", "b", None)
                np.testing.assert_array_equal(y, whole)


@pytest.mark.parametrize("options", [{"rate": 1.0}, {"rate": 0.0}, {"deterministic": True}])
def test_explicit_sharding_survives_the_shortcuts(options, key):
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(np.ones((8, 16), np.float32), P("a", "b"))
        y = jdropout.dropout(key, placed, **({"rate": 0.5} | options))
        assert jax.typeof(y).sharding.spec == P("a", "b")


def test_explicit_sharding_works_with_traced_rate_and_flag_and_their_gradient(key):
    x = np.ones((8, 16), np.float32)
    expected = np.asarray(jdropout.dropout(key, x, 0.5))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(x, P("b", None))

        @jax.jit
        def gradient(x, rate, flag):
            return jax.grad(lambda x: jdropout.dropout(key, x, rate, deterministic=flag).sum())(x)

        np.testing.assert_array_equal(gradient(placed, 0.5, False), expected)
        np.testing.assert_array_equal(gradient(placed, 0.5, True), x)


def test_an_explicitly_sharded_batch_of_rates_works(key):
    x, rates = np.ones((4, 16, 24), np.float32), np.array([0.1, 0.3, 0.5, 0.9], np.float32)
    drop = jax.jit(jax.vmap(lambda x, rate: jdropout.dropout(key, x, rate)))
    expected = drop(x, rates)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        y = drop(jax.device_put(x, P("a", None, "b")), jax.device_put(rates, P("a")))
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("shape", "spec", "check_vma"),
    [
        ((24, 16), P(("a", "b"), None), False),  # 3 rows a device: some begin within a group
        ((2, 4, 64, 16), P("a", None, "b", None), True),
        ((64,), P(("a", "b")), True),
    ],
    ids=str,
)
def test_shard_map_with_global_positions_equals_the_whole(shape, spec, check_vma, key):
    x = np.asarray(normal(*shape))
    drop = functools.partial(jdropout.dropout, rate=0.3)
    split = manual(drop, mesh(AxisType.Auto), spec, shape, check_vma=check_vma)

    @jax.jit
    def passes(x):
        y, pullback = jax.vjp(functools.partial(split, key), x)
        return y, *pullback(x)

    compiled = passes.lower(x).compile()
    for result in compiled(x):
        np.testing.assert_array_equal(result, drop(key, x))
    assert collectives(compiled) == []


def test_shard_map_without_positions_repeats_the_mask_and_with_folded_keys_does_not(key):
    def shared(key, x):
        return jdropout.dropout(key, x, 0.5)

    def folded(key, x):
        return jdropout.dropout(jax.random.fold_in(key, jax.lax.axis_index("b")), x, 0.5)

    def both(key, x):
        devices = mesh(AxisType.Auto)
        split = functools.partial(
            jax.shard_map, mesh=devices, in_specs=(P(), P("b")), out_specs=P("b")
        )
        return [split(function)(key, x) for function in (shared, folded)]

    x = np.ones((32, 16), np.float32)
    results = [np.asarray(y).reshape(4, 8, 16) for y in jax.jit(both)(key, x)]
    assert all((results[0][0] == results[0][i]).all() for i in range(1, 4))
    assert all((results[1][0] != results[1][i]).any() for i in range(1, 4))


@pytest.mark.parametrize("shape", [(64, 24), (32, 8, 16)])
def test_microbatches_on_eight_devices_have_the_masks_of_the_whole_batch(shape, key):
    count, size = 4, shape[0]
    x = np.ones(shape, np.float32)

    def of_part(part):
        return jdropout.dropout(in_batch(key, part[0], size), part[1], 0.3)

    firsts = size // count * np.arange(count)
    sharding = NamedSharding(mesh(AxisType.Auto), P(None, ("a", "b")))
    parts = jax.device_put(x.reshape(count, -1, *shape[1:]), sharding)
    compiled = jax.jit(functools.partial(jax.lax.map, of_part)).lower((firsts, parts)).compile()
    np.testing.assert_array_equal(
        compiled((firsts, parts)).reshape(shape), jdropout.dropout(key, x, 0.3)
    )
    assert not collectives(compiled)


def test_the_mask_does_not_depend_on_the_number_of_devices(key):
    x = np.ones((64, 48), np.float32)
    expected = jdropout.dropout(key, x, 0.5)
    for count, spec in ((1, P("d")), (2, P(None, "d")), (4, P("d")), (8, P(None, "d"))):
        devices = jax.make_mesh(
            (count,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
        )
        placed = jax.device_put(x, NamedSharding(devices, spec))
        y = jax.jit(lambda x: jdropout.dropout(key, x, 0.5))(placed)
        np.testing.assert_array_equal(y, expected)
