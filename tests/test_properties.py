"""Hypothesis: the definition holds for any shape, dtype, rate, axes and block."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import law_twin
import numpy as np

import jdropout

# Derandomised: the same examples on every run. Few of them where every example compiles.
settings = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
compiling = hypothesis.settings(settings, max_examples=14)

shapes = st.lists(st.integers(0, 13), max_size=4).map(tuple)
seeds = st.integers(0, 2**32 - 1)
rates = st.floats(0, 1, exclude_min=True, exclude_max=True, allow_subnormal=False)
dtypes = st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])


@st.composite
def shapes_and_axes(draw):
    shape = draw(shapes)
    axes = draw(st.lists(st.integers(-len(shape), len(shape) - 1), max_size=3)) if shape else []
    return shape, tuple(axes)


@st.composite
def blocks(draw):
    whole = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    start = tuple(draw(st.integers(0, size - 1)) for size in whole)
    block = tuple(draw(st.integers(1, size - at)) for size, at in zip(whole, start, strict=True))
    return whole, start, block


@compiling
@hypothesis.given(shapes_and_axes(), seeds, rates, dtypes)
def test_dropout_is_its_definition(shape_and_axes, seed, rate, dtype):
    shape, axes = shape_and_axes
    key = jax.random.key(seed)
    # Not of `jax.random`, which would compile for every shape.
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32).astype(dtype))
    y = jdropout.dropout(key, x, rate, broadcast_dims=axes)
    assert y.shape == x.shape
    assert y.dtype == x.dtype

    words = np.asarray(jax.random.key_data(key))
    keep = law_twin.keep_mask(words, rate, shape, [axis % len(shape) for axis in axes])
    effective = jdropout.effective_rate(rate)
    if effective == 1:
        expected = np.zeros(shape, dtype)
    else:
        wide = np.asarray(x).astype(np.complex128 if dtype == jnp.complex64 else np.float64)
        with np.errstate(over="ignore"):
            expected = np.where(keep, wide / (1 - effective), 0).astype(dtype)
    if jnp.finfo(dtype).bits < 32:
        np.testing.assert_array_equal(y, expected)
    else:
        np.testing.assert_allclose(y, expected, rtol=2**-23)


@compiling
@hypothesis.given(blocks(), seeds, rates)
def test_any_block_is_a_slice_of_the_whole(case, seed, rate):
    whole, start, block = case
    key = jax.random.key(seed)
    slices = tuple(slice(at, at + size) for at, size in zip(start, block, strict=True))
    expected = law_twin.keep_mask(np.asarray(jax.random.key_data(key)), rate, whole)[slices]
    ours = jdropout.keep_mask(key, rate, block, start=start, global_shape=whole)
    np.testing.assert_array_equal(ours, expected)


@settings
@hypothesis.given(rates)
def test_effective_rate_is_the_nearest_representable_one(rate):
    coarse = jdropout.effective_rate(rate, precision=16)
    fine = jdropout.effective_rate(rate, precision=32)
    default = jdropout.effective_rate(rate)
    assert abs(coarse - rate) <= 2**-17
    assert abs(fine - rate) <= 2**-33
    assert default == coarse if abs(coarse - rate) <= rate / 1000 else default == fine


@jax.jit
def mask_at(key, rate):
    return jdropout.keep_mask(key, rate, (16, 16), precision=32)


@settings
@hypothesis.given(seeds, rates, rates)
def test_a_higher_rate_drops_a_superset(seed, rate, other):
    key = jax.random.key(seed)
    low, high = sorted((rate, other))
    kept_low, kept_high = (np.asarray(mask_at(key, jnp.float32(r))) for r in (low, high))
    assert not (kept_high & ~kept_low).any()
