"""Averages over masks: values, gradients, and what they cost."""

import functools
import re

import cheap
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jdropout
from jdropout import layer_drop, multi_sample
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""

W = cheap.normal(12, 5, seed=3)


def head(key, x):
    return jnp.tanh(jdropout.dropout(key, x, 0.5) @ W)


def loop(fn, key, x, count):
    """The definition, in float64."""
    samples = jax.jit(jax.vmap(lambda i: fn(at_site(key, i), x)))(np.arange(count))
    return np.mean(np.float64(samples), 0)


@pytest.fixture
def x():
    return cheap.normal(4, 12)


def test_the_result_is_the_mean_over_the_documented_keys_whatever_the_batch_size(x, key):
    @jax.jit
    def means(key, x):
        return [multi_sample(head, key, x, 7, batch_size=size) for size in (None, 1, 3, 100)]

    expected = loop(head, key, x, 7)
    for y in means(key, x):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert y.dtype == jnp.float32


def test_gradients_are_the_means(x, key):
    def sample(key, x, w):
        return jnp.tanh(jdropout.dropout(key, x, 0.5) @ w)

    def f(x, w, batch_size):
        y = multi_sample(lambda k, x: sample(k, x, w), key, x, 5, batch_size=batch_size)
        return jnp.sum(y**2)

    def definition(x, w):
        samples = jax.vmap(lambda i: sample(at_site(key, i), x, w))(np.arange(5))
        return jnp.sum(samples.mean(0) ** 2)

    @jax.jit
    def passes(x, w):
        functions = [functools.partial(f, batch_size=batch_size) for batch_size in (None, 3)]
        tangents = [jax.jvp(lambda x, f=f: f(x, w), (x,), (x,))[1] for f in functions]
        gradients = [jax.grad(f, argnums=(0, 1))(x, w) for f in [*functions, definition]]
        return tangents, gradients

    tangents, (*ours, theirs) = passes(x, W)
    for tangent, gradients in zip(tangents, ours, strict=True):
        for a, b in zip(gradients, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tangent, np.vdot(theirs[0], x), rtol=1e-4)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_the_function_is_traced_once(batch_size, differentiate, x, key):
    traces = []

    def counted(key, x):
        traces.append(x)
        return head(key, x).sum()

    def f(x):
        return multi_sample(counted, key, x, 8, batch_size=batch_size)

    jax.eval_shape(jax.jit(jax.grad(f) if differentiate else f), x)
    assert len(traces) == 1


def test_a_batch_size_bounds_memory_whatever_the_number_of_samples():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 256), (256, 1024)))

    def temporaries(count, batch_size):
        @jax.jit
        @jax.grad
        def gradient(x, w):
            def wide(key, x):
                return jnp.sin(jnp.tanh(jdropout.dropout(key, x, 0.5) @ w)).sum()

            return multi_sample(wide, jax.random.key(0), x, count, batch_size=batch_size)

        return gradient.lower(x, w).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(4, 2), temporaries(32, 2)
    assert many <= 1.05 * few + 4096
    assert temporaries(32, None) > 4 * many  # the control: all at once


def test_trees_and_dtypes_of_the_function_are_kept_and_sums_are_wide(key):
    def fn(key, x):
        y = jdropout.dropout(key, x["a"], 0.5)
        return {"half": y, "wide": (y.astype(jnp.float32).sum(), np.ones(2, np.complex64))}

    x = {"a": np.ones(3000, jnp.bfloat16), "unused": "text"}

    @jax.jit
    def means(key):
        return [multi_sample(fn, key, x, 600, batch_size=size) for size in (None, 1, 16)]

    for y in means(key):
        assert y["half"].dtype == jnp.bfloat16
        assert y["wide"][1].dtype == jnp.complex64
        np.testing.assert_allclose(y["wide"][1], np.ones(2), rtol=1e-6)
        # One by one, bfloat16 sums of twos would stop at 512, and their mean be 0.85.
        assert 0.9 < np.float32(y["half"]).mean() < 1.1


def test_a_sample_that_fills_the_last_batch_does_not_count(key):
    def index_like(key, x):
        return jnp.where(jdropout.keep_mask(key, 0.5, (64,)), 1.0, 0.0)

    expected = loop(index_like, key, None, 5)
    y = multi_sample(index_like, key, None, 5, batch_size=3)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_one_sample_is_the_function_itself(x, key):
    np.testing.assert_allclose(multi_sample(head, key, x, 1), head(at_site(key, 0), x), rtol=1e-6)


def test_a_traced_key_rate_and_vmap_over_keys(x, key):
    def f(key, x, rate):
        return multi_sample(lambda k, x: jdropout.dropout(k, x, rate), key, x, 3)

    keys = jax.random.split(key, 2)
    rates = np.float32([0.25, 0.5])
    batched = jax.jit(jax.vmap(f, in_axes=(0, None, 0)))(keys, x, rates)
    alone = jax.jit(f)
    for i in range(2):
        np.testing.assert_allclose(batched[i], alone(keys[i], x, rates[i]), rtol=1e-6)
    np.testing.assert_allclose(alone(key, x, 0.0), x, rtol=1e-6)


def test_with_a_batch_size_of_one_layers_are_really_skipped(key):
    runs = []

    def fn(key, x):
        def run(x):
            jax.debug.callback(lambda: runs.append(1))
            return x + 1

        return layer_drop(key, run, x, 0.5)

    kept = sum(bool(jdropout.keep_mask(at_site(key, i), 0.5, ())) for i in range(16))
    y = jax.jit(lambda x: multi_sample(fn, key, x, 16, batch_size=1))(np.float32(0))
    y.block_until_ready()
    jax.effects_barrier()
    assert y == kept / 16
    assert len(runs) == kept


def test_the_variance_of_the_mean_is_the_samples_share():
    """n = 2^12 means of 8 samples of 32 units; chi-squared, false alarm 1e-8.

    At rate 0.5 a sample is 0 or 2: variance 1, and 1/8 for the mean. Products of 8 coins have a
    small negative excess kurtosis, so that the chi-squared bound is on the safe side.
    """
    keys = jax.random.split(jax.random.key(4), 1 << 12)

    def p_value(num_samples):
        f = jax.vmap(
            lambda k: multi_sample(
                lambda k, x: jdropout.dropout(k, x, 0.5), k, np.ones(32, np.float32), num_samples
            )
        )
        y = np.asarray(jax.jit(f)(keys), np.float64)
        statistic = ((y - 1) ** 2).sum() * 8
        law = stats.chi2(y.size)
        return 2 * min(law.cdf(statistic), law.sf(statistic))

    assert p_value(8) > FALSE_ALARM
    assert p_value(7) < FALSE_ALARM  # the control


def test_an_audit_finds_a_key_for_every_sample(x, key):
    for batch_size in (None, 1, 2):

        def step(key, x, step, batch_size=batch_size):
            key = jax.random.fold_in(key, step)
            return multi_sample(head, key, x, 4, batch_size=batch_size)

        report = jdropout.audit(step, key, x, 3)
        assert [site.kind for site in report.sites] == ["dropout"]
        assert not report.findings


MULTI_ERRORS = {
    "fn": (dict(fn=3), TypeError, "fn must be a function, got int"),
    "samples": (dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
    "samples float": (dict(num_samples=2.0), TypeError, "num_samples must be an integer"),
    "batch": (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
    "key": (dict(key=None), ValueError, "key is None, but keys are made from it"),
    "keys": (dict(key=jax.random.split(jax.random.key(0))), ValueError, "must be a single key"),
    "integers": (dict(fn=lambda k, x: jnp.arange(3)), TypeError, "got dtype int32"),
    "integers, batched": (
        dict(fn=lambda k, x: jnp.arange(3), batch_size=1),
        TypeError,
        "fn must return floating-point or complex arrays",
    ),
}


@pytest.mark.parametrize("case", MULTI_ERRORS)
def test_errors_of_multi_sample_name_the_argument(case, key, x):
    changes, error, text = MULTI_ERRORS[case]
    with pytest.raises(error, match=re.escape(text)):
        multi_sample(**(dict(fn=head, key=key, x=x, num_samples=3) | changes))
