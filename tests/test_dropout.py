"""The semantics of `dropout`: what docs/semantics.md says of it and test_contract.py does not."""

import functools
import inspect
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Draw, masked

import jdropout


def normal(shape):
    """Not from `jax.random`, whose normal numbers take longer to compile than a test."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def reference(key, x, rate, **options):
    """The definition, in float64 NumPy and rounded once."""
    x = np.asarray(x)
    draw = Draw(key, precision=options.get("precision"))
    shared = [axis % x.ndim for axis in options.get("broadcast_dims", ())]
    keep, kept = draw.keep(rate, x.shape, shared), draw.kept(rate)
    wide = np.complex128 if np.iscomplexobj(x) else np.float64
    return np.where(keep, x.astype(wide) / kept, 0).astype(x.dtype)


def test_argument_order_and_names_are_the_documented_ones():
    signature = inspect.signature(jdropout.dropout)
    assert list(signature.parameters)[:3] == ["key", "x", "rate"]
    for name in list(signature.parameters)[3:]:
        assert signature.parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.parameters["deterministic"].default is False


def test_numpys_flag_is_a_static_one(key):
    x = jnp.ones(3)
    assert jdropout.dropout(None, x, 0.5, deterministic=np.bool_(True)) is x


@pytest.mark.parametrize("rate", [0, 0.0, np.float32(0), np.array(0.0), 1e-12])
def test_a_static_rate_that_rounds_to_zero_returns_the_input_itself(rate):
    x = jnp.ones(3)
    assert jdropout.dropout(None, x, rate) is x
    assert jdropout.effective_rate(rate) == 0
    assert jdropout.keep_mask(None, rate, (3,)).all()


@pytest.mark.parametrize("rate", [1, 1.0, np.float64(1), 1 - 1e-12])
def test_rate_one_gives_exact_zeros_and_zero_gradients_without_a_key(rate):
    x = jnp.array([1.0, jnp.nan, jnp.inf, -2.0])
    y, pullback = jax.vjp(lambda x: jdropout.dropout(None, x, rate), x)
    np.testing.assert_array_equal(y, np.zeros(4))
    np.testing.assert_array_equal(pullback(jnp.full(4, jnp.nan))[0], np.zeros(4))
    assert not jdropout.keep_mask(None, rate, (3,)).any()


def test_traced_rate_is_exact_at_both_ends(key):
    f = jax.jit(lambda rate, x: jdropout.dropout(key, x, rate))
    x = jnp.array([1.0, -3.5, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(f(0.0, x), x)
    np.testing.assert_array_equal(f(1.0, x), np.zeros(4))
    gradient = jax.jit(jax.grad(lambda x, rate: jdropout.dropout(key, x, rate).sum()))
    np.testing.assert_array_equal(gradient(jnp.ones(4), 1.0), np.zeros(4))
    np.testing.assert_array_equal(gradient(jnp.ones(4), 0.0), np.ones(4))


@pytest.mark.parametrize("precision", [16, 32])
def test_traced_rate_equals_static_rate(precision, key):
    x = normal((50, 40))
    traced = jax.jit(functools.partial(jdropout.dropout, precision=precision))
    for rate in (0.1, 0.25, 0.5, 0.73, 0.999):
        rate = float(np.float32(rate))
        y = traced(key, x, rate)
        static = masked()(Draw(key, precision=precision), x, rate)
        if precision == 16:
            np.testing.assert_array_equal(y, static)
        else:  # t / 2^32 is not a float32: the scale may be off by one unit in the last place
            np.testing.assert_array_equal(y == 0, static == 0)
            np.testing.assert_allclose(y, static, rtol=2**-22, atol=0)
        eager = jdropout.dropout(key, x, jnp.float32(rate), precision=precision)
        np.testing.assert_array_equal(eager, y)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_a_traced_rate_of_any_float_dtype_is_exact_in_its_own_value(dtype, key):
    rate = jnp.asarray(0.3, dtype)
    traced = jax.jit(lambda key, r: jdropout.keep_mask(key, r, (64, 64)))(key, rate)
    expected = Draw(key, precision=16).keep(float(rate), (64, 64))
    np.testing.assert_array_equal(traced, expected)


def test_the_tangent_of_the_rate_is_zero(key):
    def f(rate):
        return jdropout.dropout(key, jnp.ones((8, 8)), rate).sum()

    assert jax.jit(lambda rate: jax.jvp(f, (rate,), (1.0,))[1])(0.3) == 0


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_traced_flag_switches_dropout_off_and_on(wrap, key):
    x, rates = normal((300, 40)), (0.3, 1e-4, 1.0)
    x[0, 0] = np.inf
    f = wrap(
        lambda key, flag: [jdropout.dropout(key, x, rate, deterministic=flag) for rate in rates]
    )
    for rate, off, on in zip(rates, f(key, jnp.array(True)), f(key, jnp.array(False)), strict=True):
        np.testing.assert_array_equal(off, x)
        np.testing.assert_array_equal(on, masked()(Draw(key), x, rate))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_at_rate_a_tenth_every_half_precision_value_is_the_correctly_rounded_quotient(dtype, key):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    size = np.abs(x.astype(np.float32))
    x = x[np.isfinite(size) & (size >= np.finfo(np.float32).tiny)]  # XLA may flush float32's rest
    y = jdropout.dropout(key, x, 0.1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(y, reference(key, x, 0.1))


def test_64_bit_types_keep_their_precision_also_with_a_traced_rate(key):
    x = np.random.default_rng(0).standard_normal((61, 37))
    with jax.enable_x64(True):
        f = jax.jit(lambda key, xs, rate: [jdropout.dropout(key, x, rate) for x in xs])
        xs = (x, x + 1j * x[::-1])
        for x, y in zip(xs, f(key, xs, jnp.float64(0.1)), strict=True):
            assert y.dtype == x.dtype
            np.testing.assert_allclose(y, reference(key, x, 0.1), rtol=2**-52, atol=0)


def test_complex_parts_are_dropped_together_and_infinities_stay_in_their_part(key):
    x = jnp.full((40, 40), jax.lax.complex(jnp.inf, 2.0))
    y = np.asarray(jdropout.dropout(key, x, 0.5))
    keep = np.asarray(jdropout.keep_mask(key, 0.5, x.shape))
    np.testing.assert_array_equal(y.real, np.where(keep, np.inf, 0))
    np.testing.assert_array_equal(y.imag, np.where(keep, 4.0, 0))


def test_the_mean_is_unbiased_because_the_scale_is_the_effective_one(key):
    scale = jdropout.dropout(key, jnp.ones((200, 200)), 0.1).max()
    assert scale == np.float32(1 / (1 - jdropout.effective_rate(0.1)))
    assert scale != np.float32(1 / 0.9)


def test_masks_do_not_depend_on_x64(key):
    narrow = np.asarray(jdropout.dropout(key, jnp.ones((40, 9)), 0.4))
    traced = np.asarray(jax.jit(lambda r: jdropout.keep_mask(key, r, (40, 9)))(0.4))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(jdropout.dropout(key, jnp.float32(narrow != 7), 0.4), narrow)
        wide = jax.jit(lambda r: jdropout.keep_mask(key, r, (40, 9)))(jnp.float64(0.4))
        np.testing.assert_array_equal(wide, traced)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_masks_do_not_depend_on_the_default_implementation(impl, key):
    typed, raw = key, jax.random.key_data(key)
    expected = jdropout.keep_mask(key, 0.4, (40, 9))
    with jax.default_prng_impl(impl):
        np.testing.assert_array_equal(jdropout.keep_mask(typed, 0.4, (40, 9)), expected)
        np.testing.assert_array_equal(jdropout.keep_mask(raw, 0.4, (40, 9)), expected)


def test_options_and_their_blocks_equal_the_definition(key):
    x = normal((33, 17))
    options = ({"broadcast_dims": (0,)}, {"precision": 32}, {"broadcast_dims": (-1,)})
    place = {"start": (5, 3), "global_shape": x.shape}  # on broadcast axes it does not count

    @jax.jit
    def results(key, x):
        f = functools.partial(jdropout.dropout, key, rate=0.3)
        return [(f(x, **own), f(x[5:20, 3:9], **own, **place)) for own in options]

    for own, (y, block) in zip(options, results(key, x), strict=True):
        expected = reference(key, x, 0.3, **own)
        np.testing.assert_array_equal(y == 0, expected == 0)
        np.testing.assert_allclose(y, expected, rtol=2**-23, atol=0)
        np.testing.assert_array_equal(block, y[5:20, 3:9])


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 1e-3, 1e-7])
def test_effective_rate_is_the_kept_fractions_expectation(rate):
    effective = jdropout.effective_rate(rate)
    assert abs(effective - rate) <= max(rate / 1000, 2**-33)
    fine = jdropout.effective_rate(rate, precision=32)
    assert abs(fine - rate) <= 2**-33
    traced = jax.jit(functools.partial(jdropout.effective_rate, precision=32))(rate)
    np.testing.assert_allclose(traced, fine, rtol=1e-3 if rate < 1e-6 else 1e-5)


@pytest.mark.parametrize("rate", [jnp.bfloat16.dtype.type(0.5), np.float16(0.5), np.array(0.5)])
def test_numpy_rates_of_any_dtype_are_static(rate, key):
    expected = jdropout.keep_mask(key, 0.5, (9, 9))
    np.testing.assert_array_equal(jdropout.keep_mask(key, rate, (9, 9)), expected)
    assert isinstance(jdropout.effective_rate(rate), float)


def test_numpy_and_python_inputs_are_accepted(key):
    x = np.ones((4, 4), np.float32)
    np.testing.assert_array_equal(
        jdropout.dropout(key, x, 0.5), jdropout.dropout(key, jnp.asarray(x), 0.5)
    )
    assert jdropout.dropout(key, 1.0, 0.5).shape == ()


EAGER = {
    "dropout": lambda key, x: jdropout.dropout(key, x, 0.5),
    "raw key": lambda key, x: jdropout.dropout(np.array([1, 2], np.uint32), x, 0.5),
    "two digits": lambda key, x: jdropout.dropout(key, x, 0.5, precision=32),
    "rate array": lambda key, x: jdropout.dropout(key, x, RATE_ARRAY),
    "flag array": lambda key, x: jdropout.dropout(key, x, 0.5, deterministic=FLAG_ARRAY),
    "block": lambda key, x: jdropout.dropout(key, x, 0.5, start=(5, 3), global_shape=(99, 99)),
    "block, array": lambda key, x: jdropout.dropout(
        key, x, 0.5, start=(START_ARRAY, 0), global_shape=(99, 99)
    ),
    "keep_mask": lambda key, x: jdropout.keep_mask(key, 0.5, (17, 3)),
    "effective_rate": lambda key, x: jdropout.effective_rate(RATE_ARRAY),
}
RATE_ARRAY, FLAG_ARRAY, START_ARRAY = jnp.float32(0.3), jnp.array(True), jnp.int32(7)


@pytest.mark.parametrize("name", EAGER)
def test_an_eager_call_is_one_compiled_function(name, key, caplog):
    x = jnp.ones((16, 16))
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        EAGER[name](key, x)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    assert len(compiled) == 1, compiled


def test_one_key_in_two_dropouts_is_reported():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)

        def twice(x):
            return jdropout.dropout(key, jdropout.dropout(key, x, 0.5), 0.5)

        with pytest.raises(jax.errors.KeyReuseError):
            twice(jnp.ones(4))
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key, x: jdropout.dropout(key, jdropout.dropout(key, x, 0.5), 0.5))(
                jax.random.key(1), jnp.ones(4)
            )


@pytest.mark.parametrize(
    ("wrap", "rate"), [(jax.jit, 0.5), (lambda f: f, 1e-4)], ids=["jit", "eager"]
)
def test_one_key_in_one_dropout_is_not_reported_under_grad(wrap, rate):
    with jax.debug_key_reuse(True):

        def f(key, x):
            return jdropout.dropout(key, jnp.sin(x), rate).sum()

        wrap(jax.grad(f, argnums=1))(jax.random.key(0), jnp.ones(4))
        wrap(lambda k, x: jax.jvp(lambda x: f(k, x), (x,), (x,)))(jax.random.key(1), jnp.ones(4))
        jax.jit(jax.hessian(f, argnums=1))(jax.random.key(2), jnp.ones(4))
