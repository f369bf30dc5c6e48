"""Every evaluation of the mask law, bit for bit against the NumPy twin."""

import itertools
import json
import pathlib

import jax
import jax.extend
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import normal, users_jit
from jax import export
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import jdropout
from jdropout import _law, _threshold

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_masks.json").read_text())

EVALUATIONS = {"elementwise": _law._elementwise, "packed": _law._packed}

SHAPES = [(), (197,), (33, 5), (3, 1, 33), (2, 2, 33, 3)]
# One digit and two digits; 0.9 is another constant in the program of 0.1.
RATES_AND_SHAPES = [*itertools.product([0.1], SHAPES), (1e-4, (33, 5)), (0.9, (33, 5))]


def key_words(key):
    return np.asarray(jax.random.key_data(key))


def evaluations(key, rate, shape, block=None, start=None, precision=None):
    """The mask, or a block of it, by every evaluation."""
    threshold = _threshold.static_threshold(rate, precision)
    layout, origin = _law.locate(shape, block or shape, start)
    keys = _law.mask_keys(_law.key_words(key), threshold.digits)
    return {
        name: evaluate(keys, threshold, layout, origin).reshape(block or shape)
        for name, evaluate in EVALUATIONS.items()
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_evaluation_equals_the_twin(shape, key):
    cases = [(0.1, None), (0.37, 32)]

    @users_jit  # of all masks together, to compile once
    def masks(key):
        return [evaluations(key, rate, shape, precision=precision) for rate, precision in cases]

    for (rate, precision), ours in zip(cases, masks(key), strict=True):
        twin = law_twin.keep_mask(key_words(key), rate, shape, precision=precision)
        for name in EVALUATIONS:
            np.testing.assert_array_equal(ours[name], twin, name)


def test_an_element_is_kept_above_its_own_number_and_not_at_it(key):
    number = law_twin.uniform(key_words(key), (8, 3))[4, 1]
    high, low = (np.uint32(digit) for digit in divmod(number, 2**16))
    layout, origin = _law.locate((8, 3), (8, 3), None)

    @jax.jit
    def kept(key, *thresholds):
        thresholds = [_threshold.Threshold(*digits) for digits in thresholds]
        keys = _law.mask_keys(_law.key_words(key), 2)
        return [
            evaluate(keys[: threshold.digits], threshold, layout, origin)[4, 1]
            for evaluate in EVALUATIONS.values()
            for threshold in thresholds
        ]

    assert kept(key, (high,), (high, low)) == [False, False] * len(EVALUATIONS)
    assert kept(key, (high + 1,), (high, low + 1)) == [True, True] * len(EVALUATIONS)


def test_a_traced_flag_keeps_the_largest_number_as_well():
    largest = [jnp.uint32(2**16 - 1)] * 2
    for threshold in (_threshold.Threshold(0), _threshold.Threshold(2**16 - 1, 1)):
        for flag in (False, True):
            traced = _threshold.keep_all_if(jnp.array(flag), threshold)
            assert _threshold.below(traced, largest) == flag


@pytest.mark.parametrize(("rate", "shape"), RATES_AND_SHAPES, ids=str)
def test_keep_mask_equals_the_twin(rate, shape, key):
    ours = jdropout.keep_mask(key, rate, shape)
    assert ours.shape == shape
    assert ours.dtype == jnp.bool_
    np.testing.assert_array_equal(ours, law_twin.keep_mask(key_words(key), rate, shape))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (4, 5, 0)], ids=str)
def test_empty_masks_are_empty(shape, key):
    mask = jdropout.keep_mask(key, 0.5, shape)
    assert mask.shape == shape
    assert jdropout.dropout(key, jnp.zeros(shape), 0.5).shape == shape


@pytest.mark.parametrize(("block", "whole"), [((0, 5), (1, 5)), ((0,), (1,)), ((2, 0), (2, 1))])
def test_an_empty_block_of_an_axis_of_one_is_empty(block, whole, key):
    start = (0,) * len(block)
    assert jdropout.keep_mask(key, 0.3, block, start=start, global_shape=whole).shape == block


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 33, 4)], ids=str)
def test_broadcast_axes_share_the_twins_mask(shape, key):
    choices = [(0,), (1,), (0, 1), (-1,)] if len(shape) == 2 else [(0,), (1, 2), (0, -1)]

    @users_jit
    def masks(key):
        return [jdropout.keep_mask(key, 0.4, shape, broadcast_dims=dims) for dims in choices]

    for dims, ours in zip(choices, masks(key), strict=True):
        positive = [dim % len(shape) for dim in dims]
        twin = law_twin.keep_mask(key_words(key), 0.4, shape, broadcast_dims=positive)
        np.testing.assert_array_equal(ours, twin)


BLOCKS = [
    # global shape, start, block shape
    ((33, 31), (4, 3), (8, 5)),
    ((33, 31), (30, 0), (3, 31)),
    ((197,), (3,), (101,)),
    ((1, 33, 1, 5), (0, 6, 0, 1), (1, 27, 1, 4)),
    ((2, 3, 33, 5), (1, 1, 5, 1), (1, 2, 17, 3)),
    ((5, 6, 7), (2, 3, 4), (0, 2, 3)),
]


def in_turn(cases):
    """The cases with one digit and two digits in turn: pairs would take twice the time."""
    return [(*case, 32 if number % 2 else 16) for number, case in enumerate(cases)]


@pytest.mark.parametrize(("whole", "start", "block", "precision"), in_turn(BLOCKS), ids=str)
def test_a_block_equals_the_slice_of_the_whole_mask(whole, start, block, precision, key):
    slices = tuple(slice(a, a + n) for a, n in zip(start, block, strict=True))
    expected = law_twin.keep_mask(key_words(key), 0.3, whole, precision=precision)[slices]

    def ours(start):
        return jdropout.keep_mask(
            key, 0.3, block, start=start, global_shape=whole, precision=precision
        )

    @users_jit
    def masks(start_traced):
        masks = {"static start": ours(start), "traced start": ours(start_traced)}
        if expected.size:
            masks |= evaluations(key, 0.3, whole, block, start, precision)
        return masks

    index = jnp.uint32 if precision == 32 else jnp.int32
    for name, mask in masks(tuple(map(index, start))).items():
        np.testing.assert_array_equal(mask, expected, name)


def test_a_mask_does_not_depend_on_its_tiling(key):
    whole, tile = (37, 41), (5, 7)
    expected = jdropout.keep_mask(key, 0.3, whole)
    tiled = np.zeros(whole, bool)
    for row in range(0, whole[0], tile[0]):
        for column in range(0, whole[1], tile[1]):
            block = (min(tile[0], whole[0] - row), min(tile[1], whole[1] - column))
            tiled[row : row + tile[0], column : column + tile[1]] = jdropout.keep_mask(
                key, 0.3, block, start=(row, column), global_shape=whole
            )
    np.testing.assert_array_equal(tiled, expected)


FAR = [
    # global shape, start, block shape: positions beyond 2^32, 2^34, 2^40 and 2^60 elements
    ((2**18, 2**17), (2**17 + 1, 2**16 + 3), (9, 5)),
    ((2**35,), (2**34 + 5,), (70,)),
    ((2**33 + 3,), (2**32 + 2,), (70,)),
    ((512, 64, 8192, 8192), (511, 63, 8100, 8190), (1, 1, 92, 2)),
    ((2**30, 2**30), (2**30 - 40, 2**30 - 3), (40, 3)),
    # the carry from the low to the high word falls inside the block
    ((2**18, 2**16), (2**18 - 8, 2**16 - 4), (8, 4)),
    ((2**16 + 8, 2**18), (2**16 - 8, 2**18 - 40), (16, 40)),
]


@pytest.mark.parametrize(
    ("block", "start"),
    [
        ((2, 1, 8, 5), None),
        ((1, 3, 12, 4), (0, 0, 3, 2)),
        ((1, 3, 12, 4), (0, 1, 8, 0)),
        ((2, 3, 6, 9), (0, 0, 3, 2)),
        ((1, 1, 3, 1), (0, 1, 8, 0)),
    ],
    ids=str,
)
def test_a_tile_equals_the_block_at_its_start(block, start, key):
    whole, tile = (4, 5, 40, 30), (1, 1, 2, 3)
    words = _law.mask_key_words(_law.key_words(key), 1)
    layouts = []

    def keep(start, tile):
        layout, origin = _law.locate(whole, block, start, tile)
        layouts.append(layout)
        return _law.keep(words, _threshold.static_threshold(0.5, None), layout, origin)

    first = tuple(s + t * b for s, t, b in zip(start or (0,) * 4, tile, block, strict=True))
    traced = jax.jit(lambda tile_traced: (keep(start, tile), keep(start, tuple(tile_traced))))
    expected = law_twin.keep_mask(key_words(key), 0.5, block, start=first, whole=whole)
    for mask in traced(jnp.array(tile)):
        np.testing.assert_array_equal(mask.reshape(block), expected)
    if block[-2] % 4 == 0:  # no dynamic slice is needed
        assert layouts[1].phase == (start or (0,) * 4)[-2] % 4


@pytest.mark.parametrize(("whole", "start", "block", "precision"), in_turn(FAR), ids=str)
def test_positions_beyond_32_bits_equal_the_twin(whole, start, block, precision, key):
    twin = law_twin.keep_mask(
        key_words(key), 0.5, block, start=start, whole=whole, precision=precision
    )

    @users_jit
    def masks(*start_traced):
        masks = evaluations(key, 0.5, whole, block, start, precision)
        if start_traced:
            masks["traced start"] = jdropout.keep_mask(
                key, 0.5, block, start=start_traced, global_shape=whole, precision=precision
            )
        return masks

    traced = map(jnp.uint32, start) if max(start) < 2**32 else ()
    for name, mask in masks(*traced).items():
        np.testing.assert_array_equal(mask, twin, name)


def test_traced_64_bit_starts_reach_beyond_32_bits(key):
    whole, start, block = (2**35,), (2**34 + 5,), (70,)
    twin = law_twin.keep_mask(key_words(key), 0.5, block, start=start, whole=whole)
    with jax.enable_x64(True):
        traced = jax.jit(
            lambda start: jdropout.keep_mask(key, 0.5, block, start=(start,), global_shape=whole)
        )
        np.testing.assert_array_equal(traced(jnp.int64(start[0])), twin)


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: str(v["shape"]))
def test_golden_masks_are_reproduced(vector):
    key = jnp.array([int(word, 16) for word in vector["key_words"]], jnp.uint32)
    mask = jdropout.keep_mask(
        key,
        vector["rate"],
        vector["shape"],
        broadcast_dims=vector["broadcast_dims"],
        start=vector["start"],
        global_shape=vector["global_shape"],
        precision=vector["precision"],
    )
    assert GOLDEN["law_version"] == _law.LAW_VERSION
    threshold = _threshold.static_threshold(vector["rate"], vector["precision"])
    assert threshold.digits == vector["digits"]
    assert (
        _threshold.keep_probability(threshold) * 2 ** (16 * threshold.digits) == vector["threshold"]
    )
    assert np.packbits(np.asarray(mask).reshape(-1)).tobytes().hex() == vector["mask"]


def implementations():
    """Names of the key implementations that this JAX registers."""
    names = ["threefry2x32", "rbg", "unsafe_rbg"]
    for name in ("philox4x32", "threefry4x32"):
        try:
            jax.random.key(0, impl=name)
        except ValueError:
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("impl", implementations())
def test_typed_and_raw_keys_of_every_implementation_equal_the_twin(impl):
    key = jax.random.key(11, impl=impl)
    data = jax.random.key_data(key)
    twin = law_twin.keep_mask(np.asarray(data), 0.3, (13, 9))
    np.testing.assert_array_equal(jdropout.keep_mask(key, 0.3, (13, 9)), twin)
    np.testing.assert_array_equal(jdropout.keep_mask(data, 0.3, (13, 9)), twin)
    np.testing.assert_array_equal(jdropout.keep_mask(np.asarray(data), 0.3, (13, 9)), twin)


@pytest.mark.parametrize("shape", [(1,), (5,), (2, 2)], ids=str)
def test_keys_of_a_users_own_implementation_equal_the_twin(shape):
    implementation = jax.extend.random.define_prng_impl(
        key_shape=shape,
        seed=lambda seed: jnp.zeros(shape, jnp.uint32),
        split=lambda key, sizes: jnp.zeros((*sizes, *shape), jnp.uint32),
        random_bits=lambda key, width, sizes: jnp.zeros(sizes, jnp.uint32),
        fold_in=lambda key, data: key,
        name=f"own{len(shape)}{shape[0]}",
        tag=f"own{len(shape)}{shape[0]}",
    )
    words = np.arange(7, 7 + np.prod(shape), dtype=np.uint32)
    key = jax.random.wrap_key_data(jnp.array(words).reshape(shape), impl=implementation)
    twin = law_twin.keep_mask(words, 0.3, (13, 9))
    np.testing.assert_array_equal(jdropout.keep_mask(key, 0.3, (13, 9)), twin)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_vmap_over_keys_equals_the_loop(impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 6)
    x = normal(6, 37, 10)
    one = jax.jit(lambda k, x: jdropout.dropout(k, x, 0.3))
    looped = jnp.stack([one(k, x) for k, x in zip(keys, x, strict=True)])
    batched = jax.jit(lambda *keys: [jax.vmap(one)(k, x) for k in keys])
    for ours in batched(keys, jax.random.key_data(keys)):
        np.testing.assert_array_equal(ours, looped)


def test_vmap_over_starts_equals_the_loop(key):
    starts = jnp.array([0, 3, 17, 40])
    whole = jdropout.keep_mask(key, 0.3, (64, 5))
    blocks = jax.vmap(
        lambda s: jdropout.keep_mask(key, 0.3, (24, 5), start=(s, 0), global_shape=(64, 5))
    )(starts)
    expected = np.stack([whole[s : s + 24] for s in starts])
    np.testing.assert_array_equal(blocks, expected)


def test_masks_of_one_key_are_nested_in_the_rate(key):
    rates = [0.0001, 0.1, 0.5, 0.9, 0.999]
    together = jax.jit(lambda key: [jdropout.keep_mask(key, rate, (500, 400)) for rate in rates])
    masks = [np.asarray(mask) for mask in together(key)]
    for low, high in itertools.pairwise(masks):
        assert not (high & ~low).any()
        assert high.sum() < low.sum()


def test_more_precision_never_reshuffles_a_mask(key):
    coarse = jdropout.keep_mask(key, 0.1, (1000, 1000), precision=16)
    fine = jdropout.keep_mask(key, 0.1, (1000, 1000), precision=32)
    # They differ only where the first digit ties: on average 2^-16 of a million.
    assert (coarse != fine).sum() < 60


def test_mask_keys_are_no_child_keys():
    key = jax.random.key(7)
    mask_keys = {tuple(map(int, words)) for words in _law.mask_keys(_law.key_words(key), 2)}
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    children = [fold_in(key, np.arange(512)), jax.random.split(key, 512)]
    child_words = {tuple(words) for some in children for words in key_words(some).tolist()}
    assert len(mask_keys) == 2
    assert not mask_keys & child_words


def test_products_of_block_indices_are_exact_modulo_64_bits():
    generator = np.random.default_rng(0)
    index = generator.integers(0, 2**32, 2000, np.uint32)
    factors = [1, 3, 2**16 - 1, 2**16, 2**32 - 1, 2**32, 2**40 + 12345, 2**63 + 7]
    for factor in [*factors, *generator.integers(0, 2**63, 20).tolist()]:
        high, low = (np.asarray(w, np.uint64) for w in _law._multiply64(jnp.array(index), factor))
        expected = index.astype(np.uint64) * np.uint64(factor)
        np.testing.assert_array_equal(high << np.uint64(32) | low, expected)


def test_the_law_runs_inside_a_pallas_kernel(key):
    """A kernel makes the tile of the mask that it needs: no random bits of the backend."""
    shape, tile = (128, 256), (64, 128)

    def kernel(words, x, y):
        start = tuple(pl.program_id(axis) * size for axis, size in enumerate(tile))
        mask = jdropout.keep_mask(words[:], 0.3, tile, start=start, global_shape=shape)
        y[...] = jnp.where(mask, x[...], 0)

    block = pl.BlockSpec(tile, lambda i, j: (i, j))
    masked = pl.pallas_call(
        kernel,
        grid=(2, 2),
        in_specs=[pl.BlockSpec((2,), lambda i, j: (0,)), block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        interpret=True,
    )(jax.random.key_data(key), jnp.ones(shape))
    np.testing.assert_array_equal(masked != 0, jdropout.keep_mask(key, 0.3, shape))


def test_the_elementwise_evaluation_lowers_in_a_kernel_for_a_tpu():
    shape, tile = (128, 256), (64, 128)

    def kernel(words, x, y):
        layout, origin = _law.locate(shape, tile, (0, 0), (pl.program_id(0), pl.program_id(1)))
        keys = [(words[0], words[1])]  # of the mask, made once outside
        threshold = _threshold.static_threshold(0.3, 16)
        y[...] = jnp.where(_law._elementwise(keys, threshold, layout, origin), x[...], 0)

    block = pl.BlockSpec(tile, lambda i, j: (i, j))
    masked = pl.pallas_call(
        kernel,
        grid=(2, 2),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), block],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    arguments = jax.ShapeDtypeStruct((2,), jnp.uint32), jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(jax.jit(masked), platforms=["tpu"])(*arguments)
    assert "tpu_custom_call" in exported.mlir_module()
