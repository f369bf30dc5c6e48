"""Measures of uncertainty: closed forms, float64 references, and what float32 must not lose."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special, stats

import jdropout
from jdropout import uncertainty

INF = float("inf")
RTOL = 3e-6
"""Of float32 against float64: a few roundings, more where exp and log enlarge them."""

# --- the definitions, in float64 ----------------------------------------------------------


def probabilities(logits):
    return special.softmax(np.asarray(logits).astype(np.float64), -1)


def reference_entropy(logits):
    return special.entr(probabilities(logits)).sum(-1)


def reference_predictive(logits):
    return special.entr(probabilities(logits).mean(0)).sum(-1)


def reference_expected(logits):
    return reference_entropy(logits).mean(0)


def reference_information(logits):
    p = probabilities(logits)
    return special.kl_div(p, np.broadcast_to(p.mean(0), p.shape)).sum(-1).mean(0)


def reference_variation(logits):
    predicted = np.asarray(logits).argmax(-1).reshape(len(logits), -1)
    most = [np.bincount(votes).max() for votes in predicted.T]
    return 1 - np.reshape(most, np.shape(logits)[1:-1]) / len(logits)


def reference_calibration(p, labels, num_bins):
    """Bin by bin, with the edges and the comparisons of the paper."""
    confidence, right = p.max(-1), p.argmax(-1) == labels
    error = 0.0
    for m in range(1, num_bins + 1):
        in_bin = (confidence > (m - 1) / num_bins) & (confidence <= m / num_bins)
        if in_bin.any():
            error += in_bin.mean() * abs(right[in_bin].mean() - confidence[in_bin].mean())
    return error


MEASURES = {
    "predictive_entropy": (uncertainty.predictive_entropy, reference_predictive),
    "expected_entropy": (uncertainty.expected_entropy, reference_expected),
    "mutual_information": (uncertainty.mutual_information, reference_information),
    "variation_ratio": (uncertainty.variation_ratio, reference_variation),
    "log_mean_probabilities": (
        uncertainty.log_mean_probabilities,
        lambda logits: np.log(probabilities(logits).mean(0)),
    ),
}
SMOOTH = [measure for name, (measure, _) in MEASURES.items() if name != "variation_ratio"]


def measured(logits, **options):
    """Every measure of the logits, by its name."""
    return {name: measure(logits, **options) for name, (measure, _) in MEASURES.items()}


measured_at_once = jax.jit(measured, static_argnames=("axis", "sample_axis"))
"""One program, for the sake of time: alone each takes nearly as long to compile."""


def assert_close_to_definition(results, logits, **tolerances):
    assert results.keys() == MEASURES.keys()
    for name, (_, reference) in MEASURES.items():
        np.testing.assert_allclose(results[name], reference(logits), err_msg=name, **tolerances)


def normal(shape, scale=1.0, seed=0):
    return np.float32(np.random.default_rng(seed).normal(size=shape) * scale)


# --- measures of several samples ----------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5), (7, 1), (30, 2, 3, 10)])
def test_they_are_the_definitions(shape):
    for scale in (0.1, 1.0, 4.0):
        logits = normal(shape, scale)
        results = measured_at_once(logits)
        assert {result.dtype for result in results.values()} == {jnp.dtype(jnp.float32)}
        assert_close_to_definition(results, logits, rtol=RTOL, atol=1e-12)


def test_any_axes_may_be_those_of_classes_and_samples():
    logits, axis, sample_axis = normal((4, 5, 6)), 1, -1
    results = measured_at_once(logits, axis=axis, sample_axis=sample_axis)
    kept_axis = axis % 3 - (sample_axis % 3 < axis % 3)
    log_p = results["log_mean_probabilities"]
    assert log_p.shape == tuple(np.delete(logits.shape, sample_axis))
    results["log_mean_probabilities"] = np.moveaxis(log_p, kept_axis, -1)
    moved = np.moveaxis(logits, (sample_axis, axis), (0, -1))
    assert_close_to_definition(results, moved, rtol=RTOL)


def test_transformations_change_nothing_but_rounding():
    logits = normal((7, 6, 5))
    moved = jax.jit(jax.vmap(functools.partial(measured, axis=0, sample_axis=1)))
    for results in (measured(logits), moved(logits.transpose(1, 2, 0))):
        assert all(isinstance(result, jax.Array) for result in results.values())
        assert_close_to_definition(results, logits, rtol=RTOL)


def test_narrow_logits_are_widened_first():
    logits = normal((7, 6, 5), 2).astype(jnp.bfloat16)
    results, wide = measured_at_once(logits), measured_at_once(logits.astype(np.float32))
    for name, result in results.items():
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, wide[name], name)
    assert_close_to_definition(results, logits, rtol=RTOL)


def test_64_bit_logits_have_64_bit_results():
    logits = np.random.default_rng(0).normal(size=(7, 6, 5))
    with jax.enable_x64(True):
        results, narrow = measured_at_once(logits), jax.eval_shape(measured, np.float32(logits))
        assert {result.dtype for result in results.values()} == {jnp.dtype(jnp.float64)}
        assert {result.dtype for result in narrow.values()} == {jnp.dtype(jnp.float32)}
    assert_close_to_definition(results, logits, rtol=1e-13)


def test_gradients_are_right():
    """Also where samples nearly agree, which has a series of its own."""
    generator, scales = np.random.default_rng(1), np.array([[1e-2], [1.0]])
    common = generator.normal(size=(1, 2, 4))
    logits = common + generator.normal(size=(3, 2, 4)) * scales

    def scaled(measure, x):
        y = measure(x).reshape(2, -1)
        return (y / scales**2).sum()

    first_derivative = jax.grad(functools.partial(scaled, uncertainty.mutual_information))
    together = jax.jit(lambda x: ([scaled(measure, x) for measure in SMOOTH], first_derivative(x)))
    with jax.enable_x64(True):
        check_grads(together, (logits,), 1, modes=["rev"], rtol=1e-3)


EXTREMES = np.float32(
    [
        [[100, -100, 0], [-100, 100, 0]],
        [[1e4, -1e4, 0], [-1e4, 1e4, 0]],
        [[1e30, 0, -1e30], [0, 1e30, 0]],
        [[1, -INF, 0], [0, -INF, 2]],
        [[1, -INF, 0], [-INF, 1, 0]],
        [[0, -INF, -INF], [-INF, 0, -INF]],
        [[16.2, 0, -1], [16.1, 0, 1]],
        [[0, 0, 0], [0, 0, 0]],
    ]
)


def test_extreme_logits_give_neither_nan_nor_negative_measures():
    def finite_sum(x, measure):
        y = measure(x)
        return jnp.where(jnp.isneginf(y), 0, y).sum(), y

    @jax.jit
    @jax.vmap
    def with_derivatives(x):
        """The value, the gradient, and the second derivatives in a direction."""
        results = {}
        for name, (measure, _) in MEASURES.items():
            f = jax.value_and_grad(functools.partial(finite_sum, measure=measure), has_aux=True)
            ((_, value), gradient), (_, second) = jax.jvp(f, (x,), (direction,))
            results[name] = value, (gradient, second)
        return results

    direction = normal(EXTREMES.shape[1:])
    for name, (value, derivatives) in with_derivatives(EXTREMES).items():
        result = np.asarray(value)
        if name == "log_mean_probabilities":
            assert (result <= 0).all()
            np.testing.assert_allclose(special.logsumexp(np.float64(result), -1), 0, atol=1e-6)
        else:
            assert ((result >= 0) & (result <= math.log(3) + 1e-6)).all(), name
        assert all(np.isfinite(derivative).all() for derivative in derivatives), name


def test_impossible_classes_change_nothing():
    logits = normal((7, 6, 5))
    impossible = np.concatenate([logits[..., :2], np.full((7, 6, 1), -INF), logits[..., 2:]], -1)
    results = measured_at_once(np.float32(impossible))
    log_p = np.asarray(results["log_mean_probabilities"])
    assert (log_p[..., 2] == -INF).all()
    results["log_mean_probabilities"] = np.delete(log_p, 2, -1)
    assert_close_to_definition(results, logits, rtol=RTOL)


def samples_of_logits():
    def samples(shape):
        numbers = st.lists(
            st.floats(-30, 30, width=32), min_size=math.prod(shape), max_size=math.prod(shape)
        )
        return numbers.map(lambda values: np.float32(values).reshape(shape))

    # Few shapes, since every new one compiles.
    return st.sampled_from([(1, 3), (5, 4)]).flatmap(samples)


@jax.jit
def parts(logits):
    return (
        uncertainty.predictive_entropy(logits),
        uncertainty.expected_entropy(logits),
        uncertainty.mutual_information(logits),
    )


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(samples_of_logits(), st.integers(0, 2**32 - 1))
def test_uncertainty_is_the_sum_of_its_two_parts(logits, seed):
    predictive, expected, information = before = [float(part) for part in parts(logits)]
    samples, classes = logits.shape
    assert expected >= 0
    assert 0 <= information <= min(predictive, math.log(samples)) + 1e-6
    assert predictive <= math.log(classes) + 1e-6
    assert predictive == pytest.approx(expected + information, rel=1e-6, abs=1e-6)

    # Neither the order of the samples nor what a sample adds to all logits makes a difference.
    generator = np.random.default_rng(seed)
    permuted = [float(part) for part in parts(generator.permutation(logits))]
    assert permuted[2] == pytest.approx(information, rel=1e-4, abs=1e-9)
    shifted = logits + np.float32(generator.integers(-20, 20, (samples, 1)))
    np.testing.assert_allclose(parts(shifted), before, rtol=1e-4, atol=1e-4)


# --- entropy ------------------------------------------------------------------------------


def test_entropy_has_its_closed_forms():
    for classes in (1, 1000):
        uniform = np.zeros(classes, np.float32)
        np.testing.assert_allclose(uncertainty.entropy(uniform), math.log(classes), rtol=1e-6)
    certain = uncertainty.entropy(np.float32([[0, -INF, -INF], [1e4, 0, 0]]))
    assert [str(h) for h in certain] == ["0.0", "0.0"]  # and no -0.0
    logits = normal((4, 5, 3))
    np.testing.assert_allclose(
        uncertainty.entropy(logits, axis=0),
        reference_entropy(np.moveaxis(logits, 0, -1)),
        rtol=RTOL,
    )


@pytest.mark.parametrize("gap", [2.0, 10.0, 16.0, 20.0, 40.0, 80.0])
def test_a_nearly_certain_distribution_keeps_its_digits(gap):
    """At a gap of 20 a softmax in float32 is 1: its logarithm is 0, and 5 % of the entropy gone."""
    rest = np.exp([-gap, 0.5 - gap])  # of a sum whose first term is 1
    expected = np.log1p(rest.sum()) + (rest * [gap, gap - 0.5]).sum() / (1 + rest.sum())
    logits = np.float32([0.0, gap, 0.5])
    np.testing.assert_allclose(uncertainty.entropy(logits), expected, rtol=RTOL)
    log_p = uncertainty.log_mean_probabilities(np.stack([logits, logits]))
    np.testing.assert_allclose(log_p[1], -np.log1p(rest.sum()), rtol=RTOL)
    if gap == 20:
        p = np.exp(logits - gap) / np.exp(logits - gap).sum()
        assert p.dtype == np.float32
        assert abs(-(p * np.log(p)).sum() / expected - 1) > 0.03


def test_running_means_serve_in_place_of_samples():
    logits = normal((7, 6, 5), 2)
    results = measured_at_once(logits)
    mean = special.softmax(logits, -1).mean(0)
    mean_entropy = np.asarray(uncertainty.entropy(logits)).mean(0)
    predictive = uncertainty.entropy(np.log(mean))
    np.testing.assert_allclose(predictive, results["predictive_entropy"], rtol=RTOL)
    np.testing.assert_allclose(predictive - mean_entropy, results["mutual_information"], atol=1e-6)
    assert uncertainty.entropy(np.float32([0.0, -INF])) == 0


# --- mutual information -------------------------------------------------------------------


def test_equal_samples_have_no_mutual_information_at_all():
    extreme = np.float32([[1e4, 0, -1e4], [0, -INF, 1], [0, 0, 0]])
    logits = np.repeat(np.concatenate([normal((17, 3), 3), extreme])[None], 7, 0)

    @jax.jit
    def with_gradient(x):
        y, pullback = jax.vjp(uncertainty.mutual_information, x)
        return y, pullback(jnp.ones_like(y))

    for result in with_gradient(logits):
        np.testing.assert_array_equal(result, 0)


def test_contradicting_samples_have_the_entropy_of_the_choice():
    logits = 200 * np.eye(10, 12, dtype=np.float32)
    predictive, expected, information = parts(logits)
    np.testing.assert_allclose(information, math.log(10), rtol=1e-6)
    np.testing.assert_allclose(predictive, information, rtol=1e-6)
    assert expected < 1e-30


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 1e-4])
def test_samples_that_nearly_agree_keep_the_digits_that_a_difference_loses(difference):
    generator = np.random.default_rng(0)
    common = generator.normal(size=(1, 200, 10)) * 3
    logits = np.float32(common + generator.normal(size=(20, 200, 10)) * difference)
    expected = reference_information(logits)
    predictive, mean_entropy, information = map(np.asarray, parts(logits))
    np.testing.assert_allclose(information, expected, rtol=2e-5)

    naive = predictive - mean_entropy
    error = np.abs(naive / expected - 1).max()
    if difference == 1e-2:
        assert error > 0.01
    if difference == 1e-4:
        assert error > 10
        assert (naive < 0).any()
    shifted = logits + np.float32(generator.integers(-4, 4, (20, 1, 1)) / 4)
    np.testing.assert_allclose(parts(shifted)[2], reference_information(shifted), rtol=1e-3)


@pytest.mark.parametrize("shift", [1000.0, 2.0**20])
def test_what_a_sample_adds_to_all_its_logits_is_nothing(shift):
    logits = np.float32(np.random.default_rng(0).integers(-4, 4, (7, 6, 5)))
    shifted = logits + np.float32([0, shift, -shift, 1, shift, 2, 0])[:, None, None]
    before, after = measured_at_once(logits), measured_at_once(shifted)
    for name in MEASURES:
        np.testing.assert_allclose(
            after[name], before[name], rtol=1e-3, atol=1e-3 * shift / 2**20, err_msg=name
        )


# --- variation ratio ----------------------------------------------------------------------


def test_variation_ratio_counts_the_votes():
    one_hot = np.eye(4, dtype=np.float32)
    for votes, expected in {
        (0, 0, 0, 0): 0,
        (3, 3, 3, 1): 0.25,
        (0, 0, 1, 1): 0.5,  # a tie of two classes
        (0, 1, 2, 3): 0.75,
        (2,): 0,
    }.items():
        assert uncertainty.variation_ratio(one_hot[list(votes)]) == expected
    # Of equal logits the first is predicted.
    ratio = jax.jit(jax.value_and_grad(uncertainty.variation_ratio))
    for logits, expected in {
        ((1, 1), (1, 0)): 0,
        ((1, 1), (0, 1)): 0.5,
    }.items():
        value, gradient = ratio(np.float32(logits))
        assert value == expected
        np.testing.assert_array_equal(gradient, 0)


# --- predictive log-likelihood ------------------------------------------------------------


@pytest.mark.parametrize("label_type", [np.int64, np.uint32, np.int16])
def test_the_likelihood_is_that_of_the_mean_distribution(label_type):
    logits = normal((11, 7, 4, 300), 3)
    labels = label_type(np.random.default_rng(1).integers(0, 300, (7, 4)))
    q = probabilities(logits).mean(0)
    expected = np.log(np.take_along_axis(q, np.asarray(labels, np.int64)[..., None], -1)[..., 0])
    result = uncertainty.predictive_log_likelihood(logits, labels)
    np.testing.assert_allclose(result, expected, rtol=RTOL)
    if label_type is not np.int64:
        return  # The rest is no matter of the type.
    moved = jax.jit(
        functools.partial(uncertainty.predictive_log_likelihood, axis=0, sample_axis=1)
    )(np.moveaxis(logits, (0, -1), (1, 0)), labels)
    np.testing.assert_allclose(moved, expected, rtol=RTOL)
    p = probabilities(logits)
    own = np.take_along_axis(np.log(p), np.int64(labels)[None, ..., None], -1)[..., 0]
    assert (result >= own.mean(0)).all()  # Jensen


def test_likelihoods_beyond_float32_are_right_on_both_sides():
    @jax.jit
    def likelihood(logits, label):
        def of_logits(logits):
            return uncertainty.predictive_log_likelihood(logits, label[None])[0]

        return jax.value_and_grad(of_logits)(logits)

    logits = np.float32([[[0.0, -300.0]], [[0.0, -310.0]]])
    least, gradient = likelihood(logits, 1)
    np.testing.assert_allclose(least, np.logaddexp(-300, -310) - math.log(2), rtol=1e-6)
    share = special.expit(10)  # the likelier sample's part of the mean
    expected = np.array([[[-share, share]], [[share - 1, 1 - share]]])
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)
    near_one, _ = likelihood(np.float32([[[18.0, 0.0]], [[19.0, 0.0]]]), 0)
    missing = special.expit(np.array([-18.0, -19.0])).mean()
    np.testing.assert_allclose(near_one, np.log1p(-missing), rtol=1e-5)
    impossible, gradient = likelihood(np.float32([[[0.0, -INF]], [[0.0, -INF]]]), 1)
    assert impossible == -INF
    assert not np.isnan(gradient).any()


def test_a_traced_label_that_is_no_class_gives_nan():
    logits, labels = np.zeros((3, 4, 5), np.float32), np.int8([0, -1, 5, 4])
    likelihoods, error = jax.jit(
        lambda logits, labels: (
            uncertainty.predictive_log_likelihood(logits, labels),
            uncertainty.expected_calibration_error(logits[0], labels),
        )
    )(logits, labels)
    np.testing.assert_array_equal(np.isnan(likelihoods), [False, True, True, False])
    assert np.isnan(error)


# --- calibration --------------------------------------------------------------------------


def two_classes(confidence):
    """Log-probabilities whose first class has a confidence of a half or more."""
    confidence = np.float64(confidence)
    return np.float32(np.log(np.stack([confidence, 1 - confidence], -1)))


def test_a_calibrated_set_has_no_calibration_error_and_an_overconfident_one_its_excess():
    confidence = np.repeat([0.55, 0.75, 0.9], 20)
    right = [np.arange(20) < 20 * share for share in (0.55, 0.75, 0.9)]
    calibrated = uncertainty.expected_calibration_error(
        two_classes(confidence), np.int32(~np.concatenate(right))
    )
    np.testing.assert_allclose(calibrated, 0, atol=1e-7)
    always = two_classes(np.full(40, 0.99))
    overconfident = uncertainty.expected_calibration_error(always, np.int32(np.arange(40) % 4 == 0))
    np.testing.assert_allclose(overconfident, 0.99 - 0.75, rtol=1e-6)


@pytest.mark.parametrize(("num_bins", "scale"), [(1, 1.0), (2, 3.0), (15, 0.5), (100, 3.0)])
def test_the_calibration_error_is_the_definition_bin_by_bin(num_bins, scale):
    logits = normal((40, 50, 6), scale)
    labels = np.random.default_rng(1).integers(0, 6, (40, 50))
    expected = reference_calibration(probabilities(logits).reshape(-1, 6), labels.ravel(), num_bins)
    compute = functools.partial(uncertainty.expected_calibration_error, num_bins=num_bins)
    for call in (compute, jax.jit(compute)) if num_bins == 15 else (compute,):
        np.testing.assert_allclose(call(logits, labels), expected, rtol=1e-5)
    shifted = logits + normal((40, 50, 1), 5, seed=2)
    np.testing.assert_allclose(compute(shifted, labels), expected, rtol=1e-4)


def test_bins_are_closed_on_the_right():
    """A confidence of exactly 1/2 falls in the lower of two bins, and just above in the upper."""
    half, above = [0.0, 0.0], [1e-6, 0.0]
    labels = np.array([0, 1])  # one right, one wrong: they cancel in one bin only
    error = functools.partial(uncertainty.expected_calibration_error, num_bins=2)
    together, apart = np.float32([half, half]), np.float32([half, above])
    np.testing.assert_allclose(error(together, labels), 0, atol=1e-7)
    np.testing.assert_allclose(error(apart, labels), 0.5, rtol=1e-5)
    both_above = np.float32([above, [0.5, 0.0]])
    assert error(both_above, labels) < 0.13
    # Confidences of exactly 1 / classes and of 1.
    for classes in (3, 10):
        logits = np.zeros((2, classes), np.float32)
        logits[1, 0] = 1e-4
        compute = functools.partial(uncertainty.expected_calibration_error, num_bins=classes)
        share = (1 / classes + (1 - 1 / classes)) / 2
        np.testing.assert_allclose(compute(logits, np.array([1, 0])), share, rtol=1e-4)
    assert error(np.float32([[200.0, 0.0]] * 2), np.array([0, 0])) == 0


def test_a_large_set_loses_no_digits():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1, 400_000)
    labels = np.int32(generator.random(400_000) > confidence - 0.1)
    logits = two_classes(confidence)
    expected = reference_calibration(probabilities(logits), labels, 15)
    result = uncertainty.expected_calibration_error(logits, labels)
    np.testing.assert_allclose(result, expected, rtol=2e-5)
    assert abs(expected - 0.1) < 0.01


def test_the_gradient_of_the_calibration_error_is_finite():
    logits = np.float32([[0.0, 0.0], [100.0, 0.0], [1.0, -INF], [1e4, -1e4]])
    labels = np.array([0, 1, 0, 1])
    gradient = jax.jit(jax.grad(uncertainty.expected_calibration_error))(logits, labels)
    assert np.isfinite(gradient).all()


def test_it_serves_what_samples_predict():
    logits = normal((20, 300, 5), 2)
    labels = np.random.default_rng(1).integers(0, 5, 300)
    expected = reference_calibration(probabilities(logits).mean(0), labels, 15)
    result = uncertainty.expected_calibration_error(
        uncertainty.log_mean_probabilities(logits), labels
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    of_means = uncertainty.expected_calibration_error(
        np.log(special.softmax(logits, -1).mean(0)), labels
    )
    np.testing.assert_allclose(of_means, expected, rtol=1e-5)


# --- regression ---------------------------------------------------------------------------


def reference_mixture(samples, y, precision, axes=()):
    densities = stats.norm.logpdf(
        np.float64(y), np.float64(samples), np.broadcast_to(precision, y.shape) ** -0.5
    )
    joint = densities.sum(tuple(axis + 1 for axis in axes))
    return special.logsumexp(joint, 0) - math.log(len(samples))


@pytest.mark.parametrize("precision", [1e-3, 50, np.float32([[1.0, 2.0, 30.0]])])
@pytest.mark.parametrize(("axes", "count"), [((), 1), ((1,), 2), ((0, 1), 40)])
def test_the_gaussian_likelihood_is_that_of_the_mixture(precision, axes, count):
    samples, y = normal((count, 5, 3), 2), normal((5, 3), 2, seed=1)
    expected = reference_mixture(samples, y, precision, axes)
    compute = functools.partial(uncertainty.gaussian_log_likelihood, output_axes=axes)
    result = compute(samples, y, precision)
    assert result.dtype == jnp.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=5e-6, atol=1e-6)
    if isinstance(precision, int):  # the axis is no matter of the precision
        moved = jax.jit(lambda f, y: compute(f, y, precision, sample_axis=1))(
            samples.swapaxes(0, 1), y
        )
        np.testing.assert_allclose(moved, expected, rtol=5e-6, atol=1e-6)


def test_equal_samples_are_one_gaussian():
    f, y = normal((6,)), normal((6,), seed=1)
    expected = stats.norm.logpdf(np.float64(y), np.float64(f), 0.5)
    for count in (1, 1000):
        result = uncertainty.gaussian_log_likelihood(np.repeat(f[None], count, 0), y, 4.0)
        np.testing.assert_allclose(result, expected, rtol=RTOL)
    np.testing.assert_allclose(uncertainty.gaussian_nll(f, 0.25, y), -expected, rtol=RTOL)


def test_outputs_that_are_predicted_together_are_not_a_sum():
    samples = np.float32([[5.0, 5.0], [-5.0, -5.0]])
    mixed = np.float32([5.0, -5.0])  # each output likely, but never both at once
    alone = uncertainty.gaussian_log_likelihood(samples, mixed, 1.0)
    together = uncertainty.gaussian_log_likelihood(samples, mixed, 1.0, output_axes=(0,))
    np.testing.assert_allclose(alone, -0.5 * math.log(2 * math.pi) - math.log(2), rtol=1e-6)
    np.testing.assert_allclose(together, -50 - math.log(2 * math.pi), rtol=1e-6)


def test_a_target_far_from_all_samples_has_a_likelihood_and_a_gradient():
    samples, y = np.float32([0.0, 1.0]), np.float32(1001.0)
    compute = jax.jit(jax.value_and_grad(uncertainty.gaussian_log_likelihood))
    value, gradient = compute(samples, y, 10.0)
    np.testing.assert_allclose(value, reference_mixture(samples, y, 10.0), rtol=1e-6)
    np.testing.assert_allclose(gradient, [0, 10_000], rtol=1e-6)
    value, gradient = compute(samples, np.float32(1e30), 10.0)
    assert value == -INF
    assert np.isfinite(gradient).all()


def test_a_gaussian_of_the_predictive_moments():
    samples, y = normal((30, 5, 3), 2), normal((5, 3), 2, seed=1)
    mean, variance = samples.mean(0), samples.var(0) + np.float32(1 / 4)
    expected = -stats.norm.logpdf(np.float64(y), np.float64(mean), np.float64(variance) ** 0.5)
    result = uncertainty.gaussian_nll(mean, variance, y)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    one_for_all = uncertainty.gaussian_nll(mean, np.full((1, 3), 0.5, np.float32), y)
    expected = -stats.norm.logpdf(np.float64(y), np.float64(mean), 0.5**0.5)
    np.testing.assert_allclose(one_for_all, expected, rtol=1e-5)


def test_the_dtypes_of_a_regression():
    samples, y, narrow = normal((4, 5)), normal((5,), seed=1), np.ones(5, jnp.bfloat16)
    likelihood, nll = uncertainty.gaussian_log_likelihood, uncertainty.gaussian_nll

    assert likelihood(samples.astype(jnp.bfloat16), y, jnp.bfloat16(2.0)).dtype == jnp.float32
    assert nll(narrow, 1.0, y).dtype == jnp.float32
    with jax.enable_x64(True):
        wide = np.float64(samples)
        for precision in (2.0, np.float32(2), np.float64(2), jnp.float32(2)):
            result = likelihood(wide, y, precision)
            assert result.dtype == jnp.float64
            np.testing.assert_allclose(result, reference_mixture(wide, y, 2.0), rtol=1e-12)
            assert likelihood(samples, y, precision).dtype == jnp.float32
            assert nll(samples[0], precision, y).dtype == jnp.float32


def test_gradients_of_the_regression_measures_are_right():
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        samples, y = generator.normal(size=(4, 3)), generator.normal(size=3)
        check_grads(
            jax.jit(lambda f, y, tau: uncertainty.gaussian_log_likelihood(f, y, tau).sum()),
            (samples, y, 2.0),
            order=1,
            modes=["rev"],
            rtol=1e-4,
        )
        check_grads(
            jax.jit(lambda m, v, y: uncertainty.gaussian_nll(m, v, y).sum()),
            (samples[0], samples[1] ** 2 + 1, y),
            order=1,
            modes=["rev"],
            rtol=1e-4,
        )


# --- model precision ----------------------------------------------------------------------


def test_the_precision_of_a_linear_model_is_that_of_its_posterior():
    """The minimum of the documented loss is the posterior mean at that precision and prior.

    Without dropout the formula is exact for a linear model: a prior of variance
    1 / length_scale**2 for the weights, noise of variance 1 / precision.
    """
    generator = np.random.default_rng(0)
    inputs, y = generator.normal(size=(50, 3)), generator.normal(size=50)
    length_scale, weight_decay = 1.5, 0.02
    tau = uncertainty.model_precision(
        0.0, length_scale=length_scale, weight_decay=weight_decay, num_examples=50
    )
    posterior_mean = np.linalg.solve(
        tau * inputs.T @ inputs + length_scale**2 * np.eye(3), tau * inputs.T @ y
    )

    def squared_error(w):
        return jnp.sum((y - inputs @ w) ** 2) / 50

    with jax.enable_x64(True):
        losses = {
            "the documented": lambda w: squared_error(w) / 2 + weight_decay * jnp.sum(w**2),
            "without the half": lambda w: squared_error(w) + 2 * weight_decay * jnp.sum(w**2),
            "decay alone": lambda w: squared_error(w) / 2,
        }
        gradients = jax.jit(lambda w: {name: jax.grad(f)(w) for name, f in losses.items()})
        found = {name: np.asarray(g) for name, g in gradients(posterior_mean).items()}
    found["decay alone"] = found["decay alone"] + 2 * weight_decay * posterior_mean
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, 0, atol=1e-12, err_msg=name)


def test_the_precision_is_the_published_formula():
    arguments = dict(length_scale=0.01, weight_decay=1e-6, num_examples=455)
    result = uncertainty.model_precision(0.05, **arguments)
    assert isinstance(result, float)
    assert result == pytest.approx(0.95 * 0.01**2 / (2 * 455 * 1e-6))
    for rate in (jnp.float32(0.05), jnp.bfloat16(0.5)):
        traced = jax.jit(functools.partial(uncertainty.model_precision, **arguments))(rate)
        assert traced.dtype == jnp.float32
        kept = (1 - float(rate)) / 0.95
        np.testing.assert_allclose(traced, kept * result, rtol=1e-6)


def test_the_precision_of_the_noise_is_the_likeliest():
    """500 samples of real dropout; 200 targets of another mask each, with noise of precision 4."""
    root, x, w = jax.random.key(0), normal((200, 40)), normal((40,), 40**-0.5, seed=1)
    noise = 0.5 * normal((200,), seed=2)

    @jax.jit
    def mean_likelihoods():
        def network(i):
            return jdropout.dropout(jdropout.keys.at_site(root, i), x, 0.2) @ w

        samples, y = jax.vmap(network)(np.arange(500)), network(999) + noise
        return [
            uncertainty.gaussian_log_likelihood(samples, y, precision).mean()
            for precision in (0.5, 4.0, 32.0)
        ]

    means = mean_likelihoods()
    assert means[1] > max(means[0], means[2])


# --- errors -------------------------------------------------------------------------------

TWO = jnp.zeros((2, 3, 4))
LABELS = jnp.zeros(3, jnp.int32)
PRECISION = dict(length_scale=1.0, weight_decay=1e-4, num_examples=10)

ERRORS = {
    "integer logits": (
        lambda: uncertainty.entropy(jnp.arange(3)),
        TypeError,
        "logits must be a floating-point array, got dtype int32. Convert it with logits.astype",
    ),
    "no array": (
        lambda: uncertainty.mutual_information([[0.0, 1.0]]),
        TypeError,
        "logits must be an array, got list",
    ),
    "no axis": (
        lambda: uncertainty.entropy(1.0),
        ValueError,
        "logits must have an axis of classes",
    ),
    "axis": (
        lambda: uncertainty.entropy(TWO, axis=3),
        ValueError,
        "axis is 3, but the array has 3 axes. Use -3 to 2",
    ),
    "sample axis": (
        lambda: uncertainty.predictive_entropy(TWO, sample_axis=-4),
        ValueError,
        "sample_axis is -4, but the array has 3 axes",
    ),
    "axis of another type": (
        lambda: uncertainty.expected_entropy(TWO, axis=1.0),
        TypeError,
        "axis must be an integer, got 1.0",
    ),
    "the same axis": (
        lambda: uncertainty.variation_ratio(jnp.zeros(3)),
        ValueError,
        "axis and sample_axis must differ, got axis 0 of shape (3,) for both. Stack the samples",
    ),
    "no classes": (
        lambda: uncertainty.entropy(jnp.zeros((3, 0))),
        ValueError,
        "logits must have classes, got shape (3, 0) with none on axis 1",
    ),
    "no samples": (
        lambda: uncertainty.log_mean_probabilities(jnp.zeros((0, 3))),
        ValueError,
        "sample_axis must have at least one sample, got size 0",
    ),
    "labels of another shape": (
        lambda: uncertainty.predictive_log_likelihood(TWO, jnp.zeros((2, 3), jnp.int32)),
        ValueError,
        "labels must have the shape (3,), which is that of the logits without classes",
    ),
    "floating labels": (
        lambda: uncertainty.predictive_log_likelihood(TWO, jnp.zeros(3)),
        TypeError,
        "labels must be an array of integers, got dtype float32. Of one-hot labels take labels.arg",
    ),
    "label too high": (
        lambda: uncertainty.predictive_log_likelihood(TWO, LABELS + 4),
        ValueError,
        "labels must be from 0 to 3, the classes of the logits, got 4",
    ),
    "label below 0": (
        lambda: uncertainty.expected_calibration_error(TWO[0], LABELS - 1),
        ValueError,
        "labels must be from 0 to 3, the classes of the logits, got -1. Leave out",
    ),
    "no bins": (
        lambda: uncertainty.expected_calibration_error(TWO[0], LABELS, num_bins=0),
        ValueError,
        "num_bins must be at least 1, got 0",
    ),
    "half a bin": (
        lambda: uncertainty.expected_calibration_error(TWO[0], LABELS, num_bins=1.5),
        TypeError,
        "num_bins must be an integer, got 1.5",
    ),
    "no examples": (
        lambda: uncertainty.expected_calibration_error(jnp.zeros((0, 3)), LABELS[:0]),
        ValueError,
        "logits must have at least one example, got shape (0, 3)",
    ),
    "target's shape": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, jnp.zeros(3), 1.0),
        ValueError,
        "y must have the shape (3, 4), which is that of samples without their axis, got (3,)",
    ),
    "target's type": (
        lambda: uncertainty.gaussian_nll(jnp.zeros(3), 1.0, LABELS),
        TypeError,
        "y must be a floating-point array, got dtype int32",
    ),
    "precision 0": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, TWO[0], 0),
        ValueError,
        "precision must be above 0, got 0.0",
    ),
    "precision NaN": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, TWO[0], jnp.full((3, 1), jnp.nan)),
        ValueError,
        "precision must be above 0, got nan",
    ),
    "precision's shape": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, TWO[0], jnp.ones(4)),
        ValueError,
        "precision must be a scalar or have axes of size 1 or of the sizes (3, 4), got shape (4,)",
    ),
    "precision's type": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, TWO[0], "1"),
        TypeError,
        "precision must be an array, got str",
    ),
    "output axis": (
        lambda: uncertainty.gaussian_log_likelihood(TWO, TWO[0], 1.0, output_axes=(2,)),
        ValueError,
        "output_axes is 2, but the array has 2 axes",
    ),
    "no samples of a regression": (
        lambda: uncertainty.gaussian_log_likelihood(TWO[:0], TWO[0], 1.0),
        ValueError,
        "sample_axis must have at least one sample",
    ),
    "variance 0": (
        lambda: uncertainty.gaussian_nll(jnp.zeros(3), jnp.array([1.0, 0.0, 1.0]), jnp.zeros(3)),
        ValueError,
        "variance must be above 0, got 0.0. The variance of a prediction is that of its samples "
        "plus that of the noise, which is 1 / precision",
    ),
    "rate": (
        lambda: uncertainty.model_precision(1.5, **PRECISION),
        ValueError,
        "rate must be in [0, 1], got 1.5",
    ),
    "rate 1": (
        lambda: uncertainty.model_precision(1.0, **PRECISION),
        ValueError,
        "rate must be below 1, got 1",
    ),
    "length scale": (
        lambda: uncertainty.model_precision(0.5, **PRECISION | dict(length_scale=0)),
        ValueError,
        "length_scale must be a finite number above 0, got 0",
    ),
    "weight decay": (
        lambda: uncertainty.model_precision(0.5, **PRECISION | dict(weight_decay=jnp.ones(()))),
        TypeError,
        "weight_decay must be a number, got Array(1., dtype=float32)",
    ),
    "examples": (
        lambda: uncertainty.model_precision(0.5, **PRECISION | dict(num_examples=0)),
        ValueError,
        "num_examples must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_traced_arguments_are_not_looked_at():
    result = jax.jit(uncertainty.gaussian_log_likelihood)(TWO, TWO[0], -1.0)
    assert jnp.isnan(result).all()
