"""DropBlock: blocks in one, two and three dimensions, and an expected fraction that is the rate."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Draw, block_parts, cover, outside_blocks

import jdropout

RATE = 0.3
FIRST = dict(spatial_axes=(2, 3), channel_axis=1)
OWN = dict(shared_channels=False)
# Name: options, shape.
CALLS = {
    "map, odd": (dict(block_size=3), (2, 7, 9, 4)),
    "map, even": (dict(block_size=4), (2, 9, 6, 4)),
    "map, oblong block": (dict(block_size=(2, 5)), (2, 6, 11, 4)),
    "map, own channels": (dict(block_size=3, **OWN), (2, 7, 9, 11)),
    "map, channels first": (dict(block_size=3, **FIRST), (2, 4, 7, 9)),
    "sequence": (dict(block_size=4, spatial_axes=(-2,)), (3, 17, 5)),
    "volume": (dict(block_size=2, spatial_axes=(1, 2, 3)), (2, 4, 5, 3, 3)),
    "volume, own": (dict(block_size=(2, 3, 1), spatial_axes=(1, 2, 3), **OWN), (2, 4, 5, 3, 3)),
    "axes in another order": (dict(block_size=(4, 2), spatial_axes=(2, 1)), (2, 5, 8, 3)),
    "no batch": (dict(block_size=2, spatial_axes=(0, 1)), (6, 7, 3)),
    "two batch axes": (dict(block_size=2, spatial_axes=(2, 3)), (2, 3, 5, 6, 3)),
    "single elements": (dict(block_size=1), (2, 7, 9, 4)),
    "as large as the map, own": (dict(block_size=6, spatial_axes=(1,), **OWN), (3, 6, 12)),
    "larger than the map": (dict(block_size=9), (16, 5, 6, 3)),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def normal(shape):
    """Not of `jax.random`, whose normal numbers take longer to compile than a test."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def block_counts(shape, blocks):
    """In how many blocks every element of a map can lie, by laying down all of them."""
    counts = np.zeros(shape, int)
    for corner in np.ndindex(*(n - b + 1 for n, b in zip(shape, blocks, strict=True))):
        counts[tuple(slice(i, i + b) for i, b in zip(corner, blocks, strict=True))] += 1
    return counts


def dropped_fraction(gamma, shape, blocks):
    """Expected, by independence of the blocks."""
    return float(1 - ((1 - gamma) ** block_counts(shape, blocks).astype(np.float64)).mean())


# --- the mask ---------------------------------------------------------------------------------


def test_the_mask_is_the_twins(call, key):
    assert_is_the_twin(call, 32, key)


def test_the_mask_of_one_digit_is_the_twins(key):
    assert_is_the_twin(CALLS["map, own channels"], 16, key)


def assert_is_the_twin(call, precision, key):
    options, shape = call
    x = normal(shape)
    drop = functools.partial(jdropout.drop_block, rate=RATE, precision=precision, **options)
    y = jax.jit(lambda key, x: drop(key, x))(key, x)
    kept = outside_blocks(Draw(key, precision=precision), options, shape, RATE)
    np.testing.assert_array_equal(np.asarray(y) != 0, kept)
    assert not kept.all()
    np.testing.assert_allclose(y, np.where(kept, x / (1 - RATE), 0), rtol=1e-3 / RATE, atol=0)


def test_channels_have_their_blocks_together_or_each_its_own(key):
    x = np.ones((4, 12, 12, 16), np.float32)
    drop = functools.partial(jdropout.drop_block, rate=RATE, block_size=3)
    masks = jax.jit(lambda key, x: (drop(key, x) != 0, drop(key, x, **OWN) != 0))
    shared, own = map(np.asarray, masks(key, x))
    assert (shared == shared[..., :1]).all()
    assert len(np.unique(own.transpose(0, 3, 1, 2).reshape(64, -1), axis=0)) == 64
    assert len(np.unique(shared[..., 0].reshape(4, -1), axis=0)) == 4


# --- gamma ------------------------------------------------------------------------------------

MAPS = [
    ((4, 4), (2, 2)),
    ((3, 5), (3, 2)),
    ((4, 3), (3, 3)),
    ((12,), (3,)),
    ((7,), (7,)),
    ((5,), (1,)),
    ((3, 3, 3), (2, 2, 2)),
    ((2, 3, 3), (2, 1, 2)),
]


@pytest.mark.parametrize(("shape", "blocks"), MAPS, ids=str)
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_expected_dropped_fraction_is_the_rate_by_a_sum_over_all_masks(shape, blocks, rate):
    gamma = jdropout.drop_block_gamma(rate, shape, blocks)
    corners = [n - b + 1 for n, b in zip(shape, blocks, strict=True)]
    total = 0.0
    for bits in itertools.product([True, False], repeat=math.prod(corners)):
        mask = np.reshape(bits, corners)
        probability = gamma ** np.count_nonzero(~mask) * (1 - gamma) ** np.count_nonzero(mask)
        total += probability * (1 - cover(mask, dict(enumerate(blocks))).mean())
    assert abs(total - rate) < 1e-13
    if math.prod(blocks) > 1 and math.prod(corners) > 1:  # the control
        assert abs(dropped_fraction(published_gamma(rate, shape, blocks), shape, blocks) - rate) > (
            1e-3 * rate
        )


def published_gamma(rate, shape, blocks):
    """Equation 1 of the paper."""
    corners = math.prod(n - b + 1 for n, b in zip(shape, blocks, strict=True))
    return rate / math.prod(blocks) * math.prod(shape) / corners


def test_how_far_off_the_published_gamma_is():
    """With it a smaller fraction is dropped than asked for.

        map  block  rate   gamma  published  drops
      14,14    7,7  0.10  0.0068     0.0063  0.093
      14,14    7,7  0.25  0.0194     0.0156  0.210
      28,28    7,7  0.10  0.0035     0.0033  0.094
      56,56    7,7  0.10  0.0027     0.0026  0.095
        7,7    7,7  0.10  0.1000     0.1000  0.100
       8,32    3,5  0.50  0.0741     0.0508  0.383
        128      9  0.20  0.0262     0.0237  0.183
    8,16,16  3,3,3  0.10  0.0069     0.0064  0.094
    """
    _, *rows = test_how_far_off_the_published_gamma_is.__doc__.strip().splitlines()[2:]
    assert len(rows) == 8
    for size, block, rate, *numbers in map(str.split, rows):
        shape, blocks = ([int(n) for n in sizes.split(",")] for sizes in (size, block))
        ours = jdropout.drop_block_gamma(float(rate), shape, blocks)
        theirs = published_gamma(float(rate), shape, blocks)
        drops = dropped_fraction(theirs, shape, blocks)
        assert [f"{ours:.4f}", f"{theirs:.4f}", f"{drops:.3f}"] == numbers
        assert abs(dropped_fraction(ours, shape, blocks) - float(rate)) < 1e-12


@pytest.mark.parametrize("rate", [0.0, 1e-6, 1e-3, 0.1, 0.5, 0.99, 1.0])
def test_a_traced_gamma_is_the_static_one(rate):
    for shape, blocks in [((14, 14), 7), ((5, 6), (5, 6)), ((9,), (4,)), ((4, 5, 6), 2)]:
        static = jdropout.drop_block_gamma(rate, shape, blocks)
        traced = jdropout.drop_block_gamma(jnp.float32(rate), shape, blocks)
        assert traced.dtype == jnp.float32
        # At 0.99, a rounding in float32 is 6e-6 of what is kept.
        np.testing.assert_allclose(traced, static, rtol=1e-5 if rate == 0.99 else 2e-6)
        if rate in (0, 1):
            assert traced == static == rate
    assert jax.grad(lambda r: jdropout.drop_block_gamma(r, (14, 14), 7))(0.3) == 0


@pytest.mark.parametrize("kind", ["map, own channels", "volume"])
def test_the_dropped_fraction_is_the_rate_over_keys(kind):
    """n = 4096 keys; |z| < 5, false alarm 6e-7; the control is the published gamma's fraction."""
    options, shape = CALLS[kind]
    keys = jax.random.split(jax.random.key(2), 4096)
    drop = jax.vmap(
        lambda key: jdropout.drop_block(key, np.ones(shape, np.float32), 0.5, **options)
    )
    dropped = (np.asarray(jax.jit(drop)(keys)) == 0).reshape(len(keys), -1).mean(axis=1)
    blocks, _ = block_parts(options, shape)
    sizes = [shape[axis] for axis in blocks]
    theirs = published_gamma(0.5, sizes, list(blocks.values()))
    error = dropped.std() / np.sqrt(len(keys))
    assert abs(dropped.mean() - 0.5) < 5 * error
    assert abs(dropped.mean() - dropped_fraction(theirs, sizes, list(blocks.values()))) > 5 * error


def test_every_element_is_dropped_as_often_as_its_blocks_say():
    """n = 2^14 keys at 63 elements; |z| < 6, false alarm 2e-7; control: the rate everywhere."""
    keys = jax.random.split(jax.random.key(3), 1 << 14)
    drop = jax.vmap(
        lambda k: jdropout.drop_block(k, np.ones((1, 7, 9, 1), np.float32), RATE, block_size=3)
    )
    kept = np.asarray(jax.jit(drop)(keys))[:, 0, :, :, 0] != 0
    gamma = jdropout.drop_block_gamma(RATE, (7, 9), 3)

    def z_values(expected):
        return (kept.mean(axis=0) - expected) / np.sqrt(expected * (1 - expected) / len(keys))

    assert np.abs(z_values((1 - gamma) ** block_counts((7, 9), (3, 3)))).max() < 6
    assert np.abs(z_values(np.full((7, 9), 1 - RATE))).max() > 6


# --- the scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [16, 32])
def test_the_expected_scale_is_that_of_gamma_as_it_is_rounded(precision, key):
    rate = 0.05

    @jax.jit
    def static_and_traced(key, x, traced_rate):
        drop = functools.partial(jdropout.drop_block, block_size=7, precision=precision)
        return drop(key, x, rate), drop(key, x, traced_rate)

    y, traced = static_and_traced(key, np.ones((2, 14, 14, 4), np.float32), rate)
    gamma = jdropout.effective_rate(
        jdropout.drop_block_gamma(rate, (14, 14), 7), precision=precision
    )
    kept = 1 - dropped_fraction(gamma, (14, 14), (7, 7))
    assert y.max() == np.float32(1 / kept)
    assert abs(kept - (1 - rate)) < 49 * 2.0 ** -(precision + 1)
    np.testing.assert_array_equal(np.asarray(traced) == 0, np.asarray(y) == 0)
    np.testing.assert_allclose(traced, y, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, OWN], ids=["shared", "own"])
def test_the_realised_scale_keeps_the_mean_of_a_constant(options, key):
    x = np.full((3, 9, 8, 10), 2, np.float32)
    drop = functools.partial(jdropout.drop_block, rate=RATE, block_size=3, **options)
    both = jax.jit(lambda key, x: (drop(key, x, scale="realised"), drop(key, x)))
    y, expected = map(np.asarray, both(key, x))
    np.testing.assert_array_equal(y == 0, expected == 0)
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(), 2, rtol=2e-7)
    assert abs(expected.mean() - 2) > 0.01


def test_the_realised_scale_of_nothing_kept_is_no_nan(key):
    drop = functools.partial(jdropout.drop_block, block_size=3, scale="realised")
    f = jax.jit(lambda key, rate: drop(key, X, rate))
    np.testing.assert_array_equal(f(key, 1.0), np.zeros_like(X))
    np.testing.assert_array_equal(f(key, 0.0), X)
    static = jax.jit(lambda key, flag: drop(key, X, 1.0, deterministic=flag))
    np.testing.assert_array_equal(static(key, False), np.zeros_like(X))
    np.testing.assert_array_equal(static(key, True), X)


X = np.ones((4, 7, 9, 8), np.float32)


def test_empty_maps_pass(key):
    for shape in ((0, 5, 6, 3), (2, 0, 6, 3), (2, 5, 6, 0)):
        y = jdropout.drop_block(
            key, np.ones(shape, np.float32), RATE, block_size=3, scale="realised", **OWN
        )
        assert y.shape == shape


# --- cost -------------------------------------------------------------------------------------


def test_a_traced_rate_and_flag_store_nothing_that_grows_with_the_input(key):
    f = jax.jit(lambda x, r, d: jdropout.drop_block(key, x, r, block_size=3, deterministic=d))
    leaves = jax.tree.leaves(jax.vjp(lambda x: f(x, RATE, False), X)[1])
    counts = len({1, 2, 3, 4, 6, 9})  # of blocks over an element: constants of the program
    assert sum(leaf.size for leaf in leaves) <= 4 + 2 + 2 * counts


@pytest.mark.parametrize(
    ("options", "bits"),
    [({}, 1), (dict(scale="realised"), 1), (dict(precision=16, **OWN), 1), (OWN, 3)],
    ids=str,
)
def test_gradient_temporaries_are_a_bit_per_element_and_digit(options, bits, key):
    """Two digits, which own channels have by default, take three bits per corner of a block."""

    def loss(x, key):
        y = jdropout.drop_block(key, jnp.cos(x), 0.1, block_size=7, **options)
        return jnp.sin(y).sum()

    shape = (64, 32, 32, 64)
    compiled = (
        jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(shape, jnp.float32), key).compile()
    )
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries <= bits * math.prod(shape) / 8 + 2**20


# --- the audit and errors ---------------------------------------------------------------------


def test_an_audit_names_the_rate_of_elements_and_no_false_sharing(call, key):
    options, shape = call

    def step(key, x):
        return jdropout.drop_block(key, x, 0.1, **options)

    report = jdropout.audit(step, key, np.ones(shape, np.float32))
    (site,) = report.sites
    assert (site.kind, site.shape) == ("drop_block", shape)
    assert (site.rate, site.effective_rate) == (0.1, 0.1)
    _, channel = block_parts(options, shape)
    assert (channel in site.shared_axes) == options.get("shared_channels", True)
    assert report.findings == ()


ERRORS = [
    (dict(block_size=0), ValueError, "block_size must be at least 1, got 0"),
    (dict(block_size=2.0), TypeError, "block_size must be an integer or a sequence"),
    (dict(block_size=(2, 2.0)), TypeError, "block_size must be an integer, got 2.0"),
    (dict(block_size=(2, 3, 4)), ValueError, "one for each of 2 axes, got (2, 3, 4)"),
    (dict(spatial_axes=(1, 4)), ValueError, "spatial_axes is 4, but the array has 4 axes"),
    (dict(spatial_axes=(1, -3)), ValueError, "spatial_axes names an axis twice"),
    (dict(spatial_axes=1), TypeError, "spatial_axes must be a sequence of axes, got 1"),
    (dict(spatial_axes=(2, 3)), ValueError, "channel_axis is axis 3, which spatial_axes (2, 3)"),
    (dict(channel_axis=4), ValueError, "channel_axis is 4, but the array has 4 axes"),
    (dict(scale="realized"), ValueError, "scale must be 'expected' or 'realised', got 'realized'"),
    (dict(x=np.ones((2, 9, 4), np.float32)), ValueError, "Give each axis one role"),
]


@pytest.mark.parametrize(("changes", "error", "text"), ERRORS, ids=[case[2] for case in ERRORS])
def test_errors_name_the_argument_and_the_value(changes, error, text, key):
    arguments = dict(key=key, x=X, rate=0.5, block_size=3) | changes
    with pytest.raises(error, match=re.escape(text)):
        jdropout.drop_block(
            arguments.pop("key"), arguments.pop("x"), arguments.pop("rate"), **arguments
        )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((2, (4, 4), 2), ValueError, "rate must be in [0, 1], got 2"),
        ((0.5, 4, 2), TypeError, "map_shape must be a sequence of integers, got 4"),
        ((0.5, (4, -4), 2), ValueError, "map_shape must not have a negative size"),
        ((0.5, (4, 4), 0), ValueError, "block_size must be at least 1, got 0"),
        ((0.5, (4, 4), (2,)), ValueError, "one for each of 2 axes, got (2,)"),
    ],
)
def test_errors_of_gamma(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        jdropout.drop_block_gamma(*arguments)
