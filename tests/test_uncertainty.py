"""Monte Carlo prediction: its moments against closed forms, its keys, its one compilation."""

import functools
import math
import re

import cheap
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

import jdropout
from jdropout import MCPrediction, mc_predict
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""

W = cheap.normal(12, 5, seed=3)
RATE = 0.25


def linear(key, w, x):
    return jdropout.dropout(key, x, RATE) @ w


halve = functools.partial(jdropout.dropout, rate=0.5)
"""One function for many tests: every new one is compiled anew."""


@pytest.fixture
def x():
    return cheap.normal(6, 12)


@pytest.fixture
def traces():
    """A function like `linear`, and the list of the shapes that it was traced for."""
    shapes = []

    def fn(key, w, x):
        shapes.append(x.shape)
        return linear(key, w, x)

    return fn, shapes


def samples_of(fn, key, *args, count):
    return np.stack([fn(at_site(key, i), *args) for i in range(count)])


# --- moments ------------------------------------------------------------------------------


@pytest.mark.parametrize("consistent", [False, True])
def test_a_linear_model_has_its_exact_mean_and_variance(consistent, x, key):
    """Mean x w; variance rate / keep * sum (x w)^2."""
    count = 20_000
    prediction = mc_predict(linear, key, W, x, num_samples=count, consistent=consistent)
    keep = float(1 - jdropout.effective_rate(RATE))
    wide_x, wide_w = np.asarray(x, np.float64), np.asarray(W, np.float64)
    variance = (1 - keep) / keep * (wide_x**2) @ (wide_w**2)
    # The sum of twelve bounded terms has a kurtosis below 5, also where few of them matter.
    critical = stats.norm.isf(FALSE_ALARM / 2 / x.shape[0] / W.shape[1])
    z = (prediction.mean - wide_x @ wide_w) / np.sqrt(variance / count)
    assert np.abs(z).max() < critical
    assert np.abs(prediction.variance / variance - 1).max() < critical * math.sqrt(4 / count)
    np.testing.assert_allclose(
        prediction.standard_error, np.sqrt(prediction.variance / count), rtol=1e-6
    )
    # Control: the variance with the nominal scale forgotten is far off.
    assert np.abs(prediction.variance / (variance * keep) - 1).min() > critical * math.sqrt(
        4 / count
    )


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_the_moments_are_those_of_the_documented_samples(batch_size, x, key):
    prediction = mc_predict(linear, key, W, x, num_samples=7, batch_size=batch_size)
    samples = samples_of(linear, key, W, x, count=7).astype(np.float64)
    np.testing.assert_allclose(prediction.mean, samples.mean(0), rtol=1e-5, atol=1e-6)
    variance = samples.var(0, ddof=1)
    np.testing.assert_allclose(prediction.variance, variance, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(prediction.standard_error, np.sqrt(variance / 7), rtol=1e-4)
    assert prediction.num_samples == 7
    assert prediction.samples is None


def test_samples_are_returned_in_the_order_of_their_keys(x, key):
    prediction = mc_predict(halve, key, x, num_samples=7, batch_size=3, return_samples=True)
    samples = samples_of(halve, key, x, count=7)
    np.testing.assert_array_equal(prediction.samples, samples)
    np.testing.assert_allclose(prediction.mean, samples.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(prediction.variance, samples.var(0, ddof=1), rtol=1e-5, atol=1e-6)


def test_a_small_variance_survives_a_large_mean_over_many_samples(key):
    """The mean of the squares minus the square of the mean has no correct digit here."""

    def fn(key, x):
        return 10_000 + jdropout.dropout(key, x, 0.5)

    prediction = mc_predict(fn, key, jnp.ones(50), num_samples=10_000)
    # Values 10000 and 10002. Relative error of a fair coin's variance: below 1 / T.
    np.testing.assert_allclose(prediction.variance, 1, atol=0.01)
    np.testing.assert_allclose(prediction.mean, 10_001, atol=0.06)
    samples = np.float32(10_000) + 2 * np.resize(np.float32([0, 1]), 10_000)
    naive = np.mean(samples**2) - np.mean(samples) ** 2
    assert abs(naive - 1) > 0.01


@pytest.mark.parametrize("return_samples", [False, True])
def test_large_constants_such_as_masked_logits_have_no_variance(return_samples, x, key):
    large = np.float32([0, 0, *[-1e30] * 5, *[np.finfo(np.float32).min] * 5])

    def fn(key, x):
        return jnp.where(np.arange(12) < 2, jdropout.dropout(key, x[0], 0.5), large)

    prediction = mc_predict(fn, key, x, num_samples=20, return_samples=return_samples)
    np.testing.assert_array_equal(prediction.mean[2:], large[2:])
    np.testing.assert_array_equal(prediction.variance[2:], 0)
    assert (prediction.variance[:2] > 0).all()


def test_a_tree_of_outputs_has_a_tree_of_moments(x, key):
    def fn(key, x):
        y = jdropout.dropout(key, x, 0.5)
        return {"y": y, "more": (y.sum(), None)}

    prediction = mc_predict(fn, key, x, num_samples=9)
    expected = jax.jit(jax.vmap(lambda i: fn(at_site(key, i), x)))(np.arange(9))
    mean = jax.tree.map(lambda y: np.mean(y, 0), expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), prediction.mean, mean
    )
    assert jax.tree.structure(prediction.variance) == jax.tree.structure(mean)


def test_moments_of_narrow_dtypes_are_wide_and_the_variance_of_complex_numbers_is_real(x, key):
    x = np.asarray(x)
    xs = [x.astype(dtype) for dtype in (jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn)]
    xs.append(x + 1j * x[::-1])

    def fn(key, xs):
        return [halve(key, x) for x in xs]

    prediction = mc_predict(fn, key, xs, num_samples=40, return_samples=True)
    moments = zip(xs, prediction.samples, prediction.mean, prediction.variance, strict=True)
    for x, samples, mean, variance in moments:
        assert samples.dtype == x.dtype
        wide = np.complex64 if x.dtype == np.complex64 else np.float32
        assert (mean.dtype, variance.dtype) == (wide, np.float32)
        samples = np.asarray(samples).astype(wide)
        np.testing.assert_allclose(mean, samples.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(variance, samples.var(0, ddof=1), rtol=1e-5, atol=1e-6)


def test_double_precision_stays_double(x, key):
    with jax.enable_x64(True):
        prediction = mc_predict(linear, key, *map(np.float64, (W, x)), num_samples=5)
        assert prediction.mean.dtype == prediction.variance.dtype == jnp.float64


def test_what_has_no_dropout_has_no_variance(x, key):
    prediction = mc_predict(lambda key, x: jnp.tanh(x), key, x, num_samples=100)
    np.testing.assert_allclose(prediction.mean, np.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(prediction.variance, 0, atol=1e-12)


# --- consistent ---------------------------------------------------------------------------


def test_consistent_samples_are_functions(x, key):
    """Of a linear model with one mask: superposition holds, sample by sample."""
    examples = np.array(x)
    examples[2] = examples[0] + examples[1]
    consistent, independent = (
        np.asarray(
            mc_predict(
                linear, key, W, examples, num_samples=20, consistent=consistent, return_samples=True
            ).samples
        )
        for consistent in (True, False)
    )
    a, b, both = np.moveaxis(consistent, 1, 0)[:3]
    np.testing.assert_allclose(a + b, both, rtol=1e-4, atol=1e-4)
    a, b, both = np.moveaxis(independent, 1, 0)[:3]
    assert np.abs(a + b - both).mean() > 0.1


def test_consistent_samples_do_not_depend_on_how_the_data_set_is_cut(x, key):
    predict = functools.partial(
        mc_predict, linear, key, W, num_samples=5, consistent=True, return_samples=True
    )
    whole = predict(x).samples
    parts = [predict(part).samples for part in np.split(np.asarray(x), 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts, axis=1), rtol=1e-5, atol=1e-6)


def test_consistent_samples_have_the_masks_of_one_example(x, key):
    samples = mc_predict(halve, key, x, num_samples=5, consistent=True, return_samples=True).samples
    for i in range(5):
        mask = jdropout.keep_mask(at_site(key, i), 0.5, (1, 12))
        np.testing.assert_array_equal(samples[i], np.where(mask, 2 * x, 0))


def test_the_last_argument_may_be_a_tree_of_inputs(x, key):
    def fn(key, w, inputs):
        return linear(key, w, inputs["x"]) + inputs["offset"]

    offset = np.arange(6, dtype=np.float32)[:, None]
    prediction = mc_predict(fn, key, W, {"x": x, "offset": offset}, num_samples=4, consistent=True)
    plain = mc_predict(linear, key, W, x, num_samples=4, consistent=True)
    np.testing.assert_allclose(prediction.mean, plain.mean + offset, rtol=1e-5, atol=1e-5)


# --- compilation --------------------------------------------------------------------------


@pytest.mark.parametrize("consistent", [False, True])
def test_any_number_of_samples_is_one_compilation(consistent, traces, x, key):
    fn, shapes = traces
    for count in (2, 8, 9, 1000):
        mc_predict(fn, key, W, x, num_samples=count, consistent=consistent)
    assert shapes == [(1, 12) if consistent else (6, 12)]


def test_parameters_and_keys_are_no_part_of_what_is_compiled(traces, x, key):
    fn, shapes = traces
    first = mc_predict(fn, key, W, x, num_samples=4)
    second = mc_predict(fn, key, 2 * W, x, num_samples=4)
    third = mc_predict(fn, at_site(key, "other"), W, x, num_samples=4)
    np.testing.assert_allclose(second.mean, 2 * first.mean, rtol=1e-6)
    assert (third.mean != first.mean).all()
    assert len(shapes) == 1


class Model:
    """A pytree with a method, as modules of several libraries are."""

    traced = 0

    def __init__(self, w, name):
        self.w, self.name = w, name

    def predict(self, key, x):
        type(self).traced += 1
        return linear(key, self.w, x)

    __call__ = predict


jax.tree_util.register_pytree_node(
    Model, lambda model: ((model.w, model.name), None), lambda _, children: Model(*children)
)


@pytest.mark.parametrize("function", [lambda model: model, lambda model: model.predict])
def test_the_arrays_of_a_module_are_passed_anew_in_every_call(function, x, key, monkeypatch):
    monkeypatch.setattr(Model, "traced", 0)
    model = Model(W, "name")
    first = mc_predict(function(model), key, x, num_samples=4)
    model.w = 2 * W
    second = mc_predict(function(model), key, x, num_samples=4)
    np.testing.assert_allclose(second.mean, 2 * first.mean, rtol=1e-6)
    assert Model.traced == 1


def test_a_partial_function_may_hold_parameters(x, key):
    bound = Partial(lambda w, key, x: linear(key, w, x), W)
    np.testing.assert_array_equal(
        mc_predict(bound, key, x, num_samples=4).mean,
        mc_predict(linear, key, W, x, num_samples=4).mean,
    )


def test_memory_is_that_of_a_batch(x, key):
    def temporaries(batch_size, count):
        fn = functools.partial(mc_predict, linear, batch_size=batch_size, num_samples=count)
        lowered = jax.jit(fn).lower(key, W, jnp.ones((1000, 12)))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    sample = 1000 * (12 + 5) * 4
    small = temporaries(2, 10_000)
    assert small == temporaries(2, 100)
    assert small < 8 * sample
    assert temporaries(100, 10_000) > 50 * sample


def test_a_batch_of_one_skips_what_a_condition_skips(x, key):
    def fn(key, x):
        return jdropout.layer_drop(
            key, lambda x: jnp.tanh(x @ np.ones((12, 12), np.float32)), x, 0.5
        )

    def program(batch_size):
        predict = functools.partial(mc_predict, fn, num_samples=10, batch_size=batch_size)
        return jax.jit(predict).lower(key, x).as_text()

    assert "stablehlo.case" in program(1)
    assert "stablehlo.case" not in program(4)


# --- transformations ----------------------------------------------------------------------


def test_the_number_of_samples_may_be_traced(traces, x, key):
    fn, shapes = traces
    predict = jax.jit(lambda count: mc_predict(fn, key, W, x, num_samples=count))
    for count in (3, 20):
        expected = mc_predict(linear, key, W, x, num_samples=count)
        prediction = predict(count)
        np.testing.assert_allclose(prediction.mean, expected.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(prediction.variance, expected.variance, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(
            prediction.standard_error, expected.standard_error, rtol=1e-4, atol=1e-6
        )
    assert len(shapes) == 1


def test_a_prediction_passes_through_transformations(x, key):
    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def predict(key, x):
        return mc_predict(linear, key, W, x, num_samples=5)

    keys = jax.random.split(key, 3)
    batched = predict(keys, x)
    assert isinstance(batched, MCPrediction)
    for i in range(3):
        one = mc_predict(linear, keys[i], W, x, num_samples=5)
        np.testing.assert_allclose(batched.mean[i], one.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(batched.standard_error[i], one.standard_error, rtol=1e-4)


def test_the_mean_can_be_differentiated(x, key):
    def loss(w, **options):
        return mc_predict(linear, key, w, x, num_samples=5, **options).mean.sum()

    # The sum of the inputs that each sample keeps, for every output.
    kept = samples_of(jdropout.dropout, key, x, RATE, count=5).sum((0, 1)) / 5
    expected = np.repeat(kept[:, None], 5, 1)
    direction = cheap.normal(12, 5)
    _, forward = jax.jit(lambda w, w_dot: jax.jvp(loss, (w,), (w_dot,)))(W, direction)
    np.testing.assert_allclose(forward, np.vdot(expected, direction), rtol=1e-4)
    backward = jax.jit(jax.grad(functools.partial(loss, return_samples=True)))(W)
    np.testing.assert_allclose(backward, expected, rtol=1e-4, atol=1e-5)


def test_raw_and_typed_keys_give_the_same_samples(x, key):
    a = mc_predict(linear, np.asarray(jax.random.key_data(key)), W, x, num_samples=4)
    b = mc_predict(linear, key, W, x, num_samples=4)
    np.testing.assert_array_equal(a.mean, b.mean)


# --- progress -----------------------------------------------------------------------------


def test_progress_is_told_after_each_batch_and_changes_nothing(traces, x, key):
    fn, shapes = traces
    told = []
    prediction = mc_predict(
        fn, key, W, x, num_samples=10, batch_size=3, progress=lambda *done: told.append(done)
    )
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert len(shapes) == 2  # the first batch, and all others
    expected = mc_predict(linear, key, W, x, num_samples=10, batch_size=3)
    np.testing.assert_allclose(prediction.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(prediction.variance, expected.variance, rtol=1e-5)


# --- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_samples": 1}, ValueError, "num_samples must be at least 2, for there to be a var"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an integer, got 2.0"),
        ({"num_samples": 2**30}, ValueError, "num_samples must be .* below 2**30, got 1073741824"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"progress": True}, TypeError, "progress must be a function, got bool"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer, got 1.5"),
        (
            {"progress": print, "return_samples": True},
            ValueError,
            "progress cannot be told with return_samples=True",
        ),
    ],
)
def test_bad_options_are_named(options, error, message, x, key):
    message = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(error, match=message):
        mc_predict(linear, key, W, x, **{"num_samples": 4} | options)


def test_bad_functions_and_keys_are_named(x, key):
    with pytest.raises(TypeError, match="fn must be a function, got int"):
        mc_predict(3, key, x, num_samples=4)
    with pytest.raises(TypeError, match="fn must return arrays, got None"):
        mc_predict(lambda key, x: None, key, x, num_samples=4)
    with pytest.raises(TypeError, match="fn must return floating-point or complex arrays"):
        mc_predict(lambda key, x: x > 0, key, x, num_samples=4)
    with pytest.raises(ValueError, match="key"):
        mc_predict(linear, jax.random.split(key), W, x, num_samples=4)


@pytest.mark.parametrize("args", [(), (jnp.float32(1),), ((jnp.ones(3), jnp.ones(4)),), ({},)])
def test_consistent_samples_need_examples(args, key):
    with pytest.raises(ValueError, match="consistent=True needs the examples on the leading axis"):
        mc_predict(linear, key, *args, num_samples=4, consistent=True)


def test_consistent_samples_need_a_row_for_an_example(x, key):
    with pytest.raises(ValueError, match=r"gave shape \(5,\)\. Do what is over all examples"):
        mc_predict(lambda *args: linear(*args).mean(0), key, W, x, num_samples=4, consistent=True)


def test_what_cannot_be_done_under_jit_is_named(x, key):
    def predict(count, **options):
        return mc_predict(linear, key, W, x, num_samples=count, **options)

    with pytest.raises(ValueError, match="num_samples must be a Python integer with return_sampl"):
        jax.jit(functools.partial(predict, return_samples=True))(4)
    with pytest.raises(ValueError, match=r"progress cannot be told under jax\.jit"):
        jax.jit(functools.partial(predict, progress=print))(4)
    with pytest.raises(TypeError, match=r"num_samples must be an integer scalar, got float32\[\]"):
        jax.jit(predict)(4.0)
