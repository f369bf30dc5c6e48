"""DropBlock: blocks in one, two and three dimensions, and an expected fraction that is the rate."""

import functools
import itertools
import logging
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    "map, channels first, own": (dict(block_size=2, **FIRST, **OWN), (2, 9, 5, 7)),
    "sequence": (dict(block_size=4, spatial_axes=(1,)), (3, 17, 5)),
    "sequence, own": (dict(block_size=3, spatial_axes=(-2,), **OWN), (3, 17, 8)),
    "volume": (dict(block_size=2, spatial_axes=(1, 2, 3)), (2, 4, 5, 3, 3)),
    "volume, own": (dict(block_size=(2, 3, 1), spatial_axes=(1, 2, 3), **OWN), (2, 4, 5, 3, 3)),
    "axes in another order": (dict(block_size=(4, 2), spatial_axes=(2, 1)), (2, 5, 8, 3)),
    "no batch": (dict(block_size=2, spatial_axes=(0, 1)), (6, 7, 3)),
    "two batch axes": (dict(block_size=2, spatial_axes=(2, 3)), (2, 3, 5, 6, 3)),
    "single elements": (dict(block_size=1), (2, 7, 9, 4)),
    "as large as the map": (dict(block_size=(5, 6)), (16, 5, 6, 3)),
    "as large as the map, own": (dict(block_size=6, spatial_axes=(1,), **OWN), (3, 6, 12)),
    "larger than the map": (dict(block_size=9), (16, 5, 6, 3)),
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def normal(shape):
    """Not of `jax.random`, whose normal numbers take longer to compile than a test."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def parts(options, shape):
    """Spatial axes with their block sizes, and the channel axis, counted from the front."""
    axes = [axis % len(shape) for axis in options.get("spatial_axes", (1, 2))]
    size = options["block_size"]
    sizes = [size] * len(axes) if isinstance(size, int) else size
    blocks = {axis: min(size, shape[axis]) for axis, size in zip(axes, sizes, strict=True)}
    return blocks, options.get("channel_axis", -1) % len(shape)


def gamma_of(options, shape, rate=RATE):
    blocks, _ = parts(options, shape)
    return jdropout.drop_block_gamma(rate, [shape[a] for a in blocks], list(blocks.values()))


def cover(corners, blocks):
    """True where an element lies in no block; block by block, with no window."""
    grown = [
        size + blocks[axis] - 1 if axis in blocks else size
        for axis, size in enumerate(corners.shape)
    ]
    kept = np.ones(grown, bool)
    for corner in np.argwhere(~corners):
        where = (slice(i, i + blocks.get(axis, 1)) for axis, i in enumerate(corner))
        kept[tuple(where)] = False
    return kept


def twin(key, options, shape, rate=RATE, precision=32):
    blocks, channel = parts(options, shape)
    corners = [size - blocks.get(axis, 1) + 1 for axis, size in enumerate(shape)]
    shared = options.get("shared_channels", True)
    corners[channel] = 1 if shared else corners[channel]
    words = np.asarray(jax.random.key_data(key))
    gamma = gamma_of(options, shape, rate)
    mask = law_twin.keep_mask(words, gamma, tuple(corners), precision=precision)
    return np.broadcast_to(cover(mask, blocks), shape)


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


def test_the_mask_is_that_of_the_numpy_twin(call, key):
    assert_is_the_twin(call, 32, key)


@pytest.mark.parametrize("kind", ["map, odd", "map, own channels"])
def test_the_mask_of_one_digit_is_that_of_the_numpy_twin(kind, key):
    assert_is_the_twin(CALLS[kind], 16, key)


def assert_is_the_twin(call, precision, key):
    options, shape = call
    x = normal(shape)
    y = jdropout.drop_block(key, x, RATE, precision=precision, **options)
    kept = twin(key, options, shape, precision=precision)
    np.testing.assert_array_equal(np.asarray(y) != 0, kept)
    assert not kept.all()
    np.testing.assert_allclose(y, np.where(kept, x / (1 - RATE), 0), rtol=1e-3 / RATE, atol=0)


def test_channels_have_their_blocks_together_or_each_its_own(key):
    x = jnp.ones((4, 12, 12, 16))
    shared = np.asarray(jdropout.drop_block(key, x, RATE, block_size=3)) != 0
    own = np.asarray(jdropout.drop_block(key, x, RATE, block_size=3, shared_channels=False)) != 0
    assert (shared == shared[..., :1]).all()
    assert len(np.unique(own.transpose(0, 3, 1, 2).reshape(64, -1), axis=0)) == 64
    assert len(np.unique(shared[..., 0].reshape(4, -1), axis=0)) == 4


# --- gamma ------------------------------------------------------------------------------------

MAPS = [
    ((4, 5), (2, 2)),
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
        np.testing.assert_allclose(traced, static, rtol=2e-6)
        if rate in (0, 1):
            assert traced == static == rate
    assert jax.grad(lambda r: jdropout.drop_block_gamma(r, (14, 14), 7))(0.3) == 0


@pytest.mark.parametrize("kind", ["map, odd", "map, own channels", "sequence", "volume"])
def test_the_dropped_fraction_is_the_rate_over_keys(kind):
    """n = 4096 keys; |z| < 5, false alarm 6e-7; the control is the published gamma's fraction."""
    options, shape = CALLS[kind]
    keys = jax.random.split(jax.random.key(2), 4096)
    drop = jax.vmap(lambda key: jdropout.drop_block(key, jnp.ones(shape), 0.5, **options))
    dropped = (np.asarray(jax.jit(drop)(keys)) == 0).reshape(len(keys), -1).mean(axis=1)
    blocks, _ = parts(options, shape)
    sizes = [shape[axis] for axis in blocks]
    theirs = published_gamma(0.5, sizes, list(blocks.values()))
    error = dropped.std() / np.sqrt(len(keys))
    assert abs(dropped.mean() - 0.5) < 5 * error
    assert abs(dropped.mean() - dropped_fraction(theirs, sizes, list(blocks.values()))) > 5 * error


def test_every_element_is_dropped_as_often_as_its_blocks_say():
    """n = 2^14 keys at 63 elements; |z| < 6, false alarm 2e-7; control: the rate everywhere."""
    keys = jax.random.split(jax.random.key(3), 1 << 14)
    drop = jax.vmap(lambda k: jdropout.drop_block(k, jnp.ones((1, 7, 9, 1)), RATE, block_size=3))
    kept = np.asarray(jax.jit(drop)(keys))[:, 0, :, :, 0] != 0
    gamma = jdropout.drop_block_gamma(RATE, (7, 9), 3)

    def z_values(expected):
        return (kept.mean(axis=0) - expected) / np.sqrt(expected * (1 - expected) / len(keys))

    assert np.abs(z_values((1 - gamma) ** block_counts((7, 9), (3, 3)))).max() < 6
    assert np.abs(z_values(np.full((7, 9), 1 - RATE))).max() > 6


# --- the scale --------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [16, 32])
@pytest.mark.parametrize("rate", [0.05, RATE])
def test_the_expected_scale_is_that_of_gamma_as_it_is_rounded(rate, precision, key):
    x = jnp.ones((2, 14, 14, 4))
    y = jdropout.drop_block(key, x, rate, block_size=7, precision=precision)
    gamma = jdropout.effective_rate(
        jdropout.drop_block_gamma(rate, (14, 14), 7), precision=precision
    )
    kept = 1 - dropped_fraction(gamma, (14, 14), (7, 7))
    assert y.max() == np.float32(1 / kept)
    assert abs(kept - (1 - rate)) < 49 * 2.0 ** -(precision + 1)
    traced = jax.jit(lambda r: jdropout.drop_block(key, x, r, block_size=7, precision=precision))(
        rate
    )
    np.testing.assert_array_equal(traced == 0, y == 0)
    np.testing.assert_allclose(traced, y, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, OWN], ids=["shared", "own"])
def test_the_realised_scale_keeps_the_mean_of_a_constant(options, key):
    x = jnp.full((3, 9, 8, 10), 2.0)
    y = jdropout.drop_block(key, x, RATE, block_size=3, scale="realised", **options)
    expected = jdropout.drop_block(key, x, RATE, block_size=3, **options)
    np.testing.assert_array_equal(y == 0, expected == 0)
    np.testing.assert_allclose(np.asarray(y, np.float64).mean(), 2, rtol=2e-7)
    assert abs(expected.mean() - 2) > 0.01


def test_the_realised_scale_of_nothing_kept_is_no_nan(key):
    f = jax.jit(lambda r: jdropout.drop_block(key, X, r, block_size=3, scale="realised"))
    np.testing.assert_array_equal(f(1.0), jnp.zeros_like(X))
    np.testing.assert_array_equal(f(0.0), X)


# --- limits, evaluation, dtypes ---------------------------------------------------------------

X = jnp.ones((4, 7, 9, 8))
KEY = jax.random.key(3)
SCALES = pytest.mark.parametrize("scale", ["expected", "realised"])


@SCALES
def test_rate_zero_and_evaluation_return_the_input_itself_without_a_key(scale):
    for x in (X, np.ones(X.shape, np.float32)):
        for rate in (0, 0.0, 1e-12):
            assert jdropout.drop_block(None, x, rate, block_size=3, scale=scale) is x
        assert jdropout.drop_block(None, x, 0.3, block_size=3, scale=scale, deterministic=True) is x


@SCALES
def test_rate_one_gives_exact_zeros_and_zero_gradients_without_a_key(scale):
    x = jnp.full(X.shape, jnp.nan)
    f = functools.partial(jdropout.drop_block, None, rate=1.0, block_size=3, scale=scale)
    y, pullback = jax.vjp(lambda x: f(x), x)
    np.testing.assert_array_equal(y, jnp.zeros_like(x))
    np.testing.assert_array_equal(pullback(x)[0], jnp.zeros_like(x))


@pytest.mark.parametrize(("scale", "options"), [("expected", {}), ("realised", OWN)])
def test_a_traced_rate_and_flag_equal_static_ones(scale, options, key):
    x = normal(X.shape)
    drop = functools.partial(jdropout.drop_block, key, x, block_size=3, scale=scale, **options)
    f = jax.jit(lambda rate, flag: drop(rate, deterministic=flag))
    for rate in (0.0, 0.25, 1.0):
        y, static = f(rate, False), drop(rate)
        np.testing.assert_allclose(y, static, rtol=1e-6)
        np.testing.assert_array_equal(y == 0, static == 0)
        np.testing.assert_array_equal(f(rate, True), x)
    static = jax.jit(lambda flag: drop(1.0, deterministic=flag))
    np.testing.assert_array_equal(static(True), x)
    np.testing.assert_array_equal(static(False), jnp.zeros_like(x))
    assert f._cache_size() == 1


@SCALES
def test_a_traced_rate_outside_its_range_gives_nan_and_an_error_under_checkify(scale, key):
    f = jax.jit(lambda r: jdropout.drop_block(key, X, r, block_size=3, scale=scale))
    checked = checkify.checkify(f, errors=checkify.user_checks)
    for bad in (1.5, -0.1, jnp.nan):
        assert jnp.isnan(f(bad)).all()
        with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
            checked(bad)[0].throw()
    checked(RATE)[0].throw()
    gradient = jax.grad(lambda r: jdropout.drop_block(key, X, r, block_size=3, scale=scale).sum())
    assert gradient(RATE) == 0


@functools.lru_cache
def ones_dropped(scale):
    return np.asarray(jdropout.drop_block(KEY, X, RATE, block_size=3, scale=scale))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        *itertools.product(
            [jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.complex64], ["expected"]
        ),
        *itertools.product([jnp.bfloat16, jnp.float64, jnp.complex128], ["expected", "realised"]),
    ],
)
def test_every_dtype_is_kept_and_has_the_same_mask(dtype, scale):
    expected = ones_dropped(scale)
    with jax.enable_x64(True):
        y = np.asarray(jdropout.drop_block(KEY, X.astype(dtype), RATE, block_size=3, scale=scale))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y != 0, expected != 0)
        if jnp.finfo(dtype).bits < 32:
            np.testing.assert_array_equal(y, expected.astype(dtype))
        else:
            factor = 1 / (1 - RATE) if scale == "expected" else 1 / (expected != 0).mean()
            rtol = 1e-8 if jnp.finfo(dtype).bits == 64 else 1e-7
            np.testing.assert_allclose(y, np.where(expected, factor, 0), rtol=rtol)


def test_dropped_nan_and_infinity_become_zero_and_empty_maps_pass(key):
    options = dict(block_size=3)
    kept = twin(key, options, X.shape)
    for bad in (jnp.nan, jnp.inf):
        x = jnp.full(X.shape, bad)
        y = jdropout.drop_block(key, x, RATE, **options)
        np.testing.assert_array_equal(y, np.where(kept, np.asarray(x), 0))
    for shape in ((0, 5, 6, 3), (2, 0, 6, 3), (2, 5, 6, 0)):
        y = jdropout.drop_block(key, jnp.ones(shape), RATE, scale="realised", **OWN, **options)
        assert y.shape == shape


# --- transformations --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["map, channels first, own", "sequence", "volume"])
@SCALES
def test_both_passes_are_the_mask_and_store_the_key_alone(kind, scale, key):
    options, shape = CALLS[kind]
    x = jnp.ones(shape)
    f = functools.partial(jdropout.drop_block, key, rate=RATE, scale=scale, **options)

    @jax.jit
    def passes(x):
        y, pullback = jax.vjp(jax.checkpoint(lambda x: f(x)), x)
        return y, *pullback(x), jax.jvp(lambda x: f(x), (x,), (x,))[1]

    kept = twin(key, options, shape)
    factor = 1 / kept.mean() if scale == "realised" else 1 / (1 - RATE)
    for result in passes(x):
        np.testing.assert_array_equal(np.asarray(result) != 0, kept)
        np.testing.assert_allclose(result, np.where(kept, factor, 0), rtol=3e-7)
    (leaf,) = jax.tree.leaves(jax.vjp(lambda x: f(x), x)[1])
    np.testing.assert_array_equal(leaf, jax.random.key_data(key))


def test_a_traced_rate_and_flag_store_nothing_that_grows_with_the_input(key):
    f = jax.jit(lambda x, r, d: jdropout.drop_block(key, x, r, block_size=3, deterministic=d))
    leaves = jax.tree.leaves(jax.vjp(lambda x: f(x, RATE, False), X)[1])
    counts = len({1, 2, 3, 4, 6, 9})  # of blocks over an element: constants of the program
    assert sum(leaf.size for leaf in leaves) <= 2 + 2 + 2 * counts


@pytest.mark.parametrize("options", [OWN, dict(scale="realised")], ids=str)
def test_vmap_equals_the_loop(options):
    keys = jax.random.split(jax.random.key(5), 3)
    x = normal((3, *X.shape))
    rates = jnp.array([0.1, 0.5, 0.9])
    drop = functools.partial(jdropout.drop_block, block_size=3, **options)
    batched = jax.jit(jax.vmap(drop))(keys, x, rates)
    one = jax.jit(drop)
    for i in range(3):
        np.testing.assert_allclose(batched[i], one(keys[i], x[i], rates[i]), rtol=3e-7)
        np.testing.assert_array_equal(batched[i] == 0, one(keys[i], x[i], rates[i]) == 0)


@pytest.mark.parametrize("options", [{}, OWN, dict(scale="realised")], ids=str)
def test_an_eager_call_is_one_compiled_function(options, key, caplog):
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jdropout.drop_block(key, X, RATE, block_size=3, **options)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    assert len(compiled) == 1, compiled


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
SHARDED = {
    "batch": (P(("a", "b")), {}),
    "batch, own": (P(("a", "b")), OWN),
    "channels": (P(None, None, None, ("a", "b")), {}),
    "channels, own": (P(None, None, None, ("a", "b")), OWN),
    "both, own": (P("a", None, None, "b"), OWN),
    "map": (P(None, "a", "b"), {}),
    "map, own": (P(None, "a", "b"), OWN),
    "batch, realised": (P(("a", "b")), dict(scale="realised")),
}


@pytest.mark.parametrize(
    ("axis_type", "kind"),
    [
        *((AxisType.Auto, kind) for kind in SHARDED),
        *((AxisType.Explicit, kind) for kind in ("both, own", "map", "batch, realised")),
    ],
)
def test_sharding_changes_no_bit_and_needs_no_collective_outside_of_windows(axis_type, kind, key):
    spec, options = SHARDED[kind]
    x, y_bar = normal((2, 16, 12, 8, 16))
    options = dict(block_size=3, **options)
    f = functools.partial(jdropout.drop_block, key, rate=RATE, **options)
    kept = twin(key, options, x.shape)
    factor = 1 / kept.mean() if "realised" in kind else 1 / (1 - RATE)
    expected = [np.where(kept, array * np.float32(factor), 0) for array in (x, y_bar)]
    devices = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(devices):
        sharding = NamedSharding(devices, spec)

        @jax.jit
        def passes(x, y_bar):
            y, pullback = jax.vjp(lambda x: f(x), x)
            return y, *pullback(y_bar)

        placed = jax.device_put((x, y_bar), sharding)
        compiled = passes.lower(*placed).compile()
        for result, whole in zip(compiled(*placed), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(result) != 0, kept)
            np.testing.assert_allclose(result, whole, rtol=3e-7)
            assert result.sharding.is_equivalent_to(sharding, 4)
        if not kind.startswith("map") and "realised" not in kind:
            assert not any(name in compiled.as_text() for name in COLLECTIVES)


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

    report = jdropout.audit(step, key, jnp.ones(shape))
    (site,) = report.sites
    assert (site.kind, site.shape) == ("drop_block", shape)
    assert (site.rate, site.effective_rate) == (0.1, 0.1)
    _, channel = parts(options, shape)
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
    (dict(x=jnp.ones((2, 3, 4), int)), TypeError, "got dtype int32"),
    (dict(x=[1.0]), TypeError, "x must be an array, got list"),
    (dict(x=jnp.ones((2, 9, 4))), ValueError, "Give each axis one role"),
    (dict(rate=-1), ValueError, "rate must be in [0, 1], got -1"),
    (dict(key=None), ValueError, "Pass key=jax.random.key(seed)"),
    (dict(deterministic=1), TypeError, "deterministic must be True, False"),
    (dict(precision=8), ValueError, "precision must be None, 16 or 32"),
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
