"""Variational dropout: its noise, gradients and divergence, and what is pruned.

References are in float64 NumPy, from the uniform numbers of the law's twin.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import Draw, differences
from scipy import integrate, special
from sklearn.datasets import load_digits

import jdropout


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


SHAPE = (24, 16)
KEY = jax.random.key(2017)
X = normal(SHAPE, 1)
WEIGHT, LOG_ALPHA = normal((16, 8), 3), 3 * normal((16, 8), 4)
BIAS = jnp.arange(8.0)


def as_float(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def uniform(shape):
    return Draw(KEY).uniform(shape)


def test_variational_dropout_is_gaussian_dropout_with_that_variance():
    for rate in (0.1, 0.5):
        log_alpha = special.logit(rate)
        np.testing.assert_allclose(
            jdropout.variational_dropout(KEY, X, log_alpha),
            jdropout.gaussian_dropout(KEY, X, rate),
            rtol=1e-5,
            atol=1e-6,
        )


def test_log_alpha_is_clipped_at_eight():

    @jax.jit
    def results(log_alpha):
        y = jdropout.variational_dropout(KEY, X, log_alpha)
        dense = jdropout.variational_dense(KEY, X, WEIGHT, log_alpha)
        return (y, dense), jax.value_and_grad(jdropout.variational_kl)(log_alpha)

    for beyond, limit in ((-50.0, -8.0), (50.0, 8.0)):
        ys, (divergence, slope) = results(beyond)
        expected, (divergence_at_limit, _) = results(limit)
        jax.tree.map(np.testing.assert_array_equal, ys, expected)
        assert divergence == divergence_at_limit
        assert slope == 0


def dense(x, weight, log_alpha, bias, z):
    """The definition: every example has weights of its own; z has axes (example, in, out)."""
    noisy = weight * (1 + np.exp(log_alpha / 2) * z)
    return np.einsum("ni,nio->no", x, noisy) + bias


def reparameterised(x, weight, log_alpha, bias, z):
    variance = x**2 @ (np.exp(np.clip(log_alpha, -8, 8)) * weight**2)
    return x @ weight + bias + np.sqrt(variance) * z


def test_variational_dense_is_the_local_reparameterisation():
    z = special.ndtri(uniform((24, 8)))
    expected = reparameterised(*as_float(X, WEIGHT, LOG_ALPHA, BIAS), z)
    y = jdropout.variational_dense(KEY, X, WEIGHT, LOG_ALPHA, BIAS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    deep = jdropout.variational_dense(KEY, X.reshape(4, 6, 16), WEIGHT, LOG_ALPHA, BIAS)
    z = special.ndtri(uniform((4, 6, 8)))
    expected = reparameterised(*as_float(X, WEIGHT, LOG_ALPHA, BIAS), z.reshape(24, 8))
    np.testing.assert_allclose(deep, expected.reshape(4, 6, 8), rtol=1e-4, atol=1e-4)
    vector = jdropout.variational_dense(KEY, X[0], WEIGHT, LOG_ALPHA, BIAS)
    z = special.ndtri(uniform((8,)))
    expected = reparameterised(*as_float(X[:1], WEIGHT, LOG_ALPHA, BIAS), z)[0]
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4)


def test_variational_dense_has_the_moments_of_noisy_weights():
    """2^14 draws of either; 5 standard errors; the control has alpha a tenth too large."""
    n = 1 << 14
    x, weight, log_alpha = X[:1, :4], WEIGHT[:4, :3], LOG_ALPHA[:4, :3] / 3
    repeated = jnp.broadcast_to(x, (n, 4))
    ours = np.asarray(jdropout.variational_dense(KEY, repeated, weight, log_alpha), np.float64)
    z = np.random.default_rng(0).standard_normal((n, 4, 3))
    theirs = dense(*as_float(repeated, weight, log_alpha), 0, z)
    variance = theirs.var(axis=0)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * np.sqrt(2 * variance / n)).all()
    assert (np.abs(ours.var(0) - variance) < 5 * variance * np.sqrt(4 / n)).all()
    wider = jdropout.variational_dense(KEY, repeated, weight, log_alpha + np.log(1.1))
    assert (np.abs(np.var(wider, 0) - variance) > 5 * variance * np.sqrt(4 / n)).any()


def test_gradients_of_variational_dense_are_those_of_finite_differences():
    arguments = as_float(X[:3, :4], WEIGHT[:4, :2], LOG_ALPHA[:4, :2] / 3, BIAS[:2])
    factor = np.asarray(X[3:6, :2], np.float64)
    z = special.ndtri(uniform((3, 2)))

    def reference(*arguments):
        return (np.sin(reparameterised(*arguments, z)) * factor).sum()

    with jax.enable_x64(True):

        def loss(*arguments):
            return (jnp.sin(jdropout.variational_dense(KEY, *arguments)) * factor).sum()

        value, ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    np.testing.assert_allclose(value, reference(*arguments), rtol=1e-12)
    for gradient, numeric in zip(ours, differences(reference, *arguments), strict=True):
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_inputs_of_zero_have_finite_gradients():
    gradients = jax.jit(
        jax.grad(lambda x, w, a: jdropout.variational_dense(KEY, x, w, a).sum(), argnums=(0, 1, 2))
    )(jnp.zeros((3, 16)), WEIGHT, LOG_ALPHA)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    weight = jnp.zeros((2, 2))
    gradient = jax.grad(lambda w: jdropout.variational_log_alpha(w, -8.0).sum())(weight)
    np.testing.assert_array_equal(gradient, weight)


def test_an_additive_variance_frees_the_noise_of_the_weight():
    """The noise is that of exp(log_variance) whatever the weight is, and has no gradient in it."""
    log_variance = jnp.full(WEIGHT.shape, -4.0)
    weight = jnp.where(jnp.abs(WEIGHT) < 0.01, 0.01, WEIGHT)  # log_alpha is at most 8

    def noise(weight):
        log_alpha = jdropout.variational_log_alpha(weight, log_variance)
        return jdropout.variational_dense(KEY, X, weight, log_alpha) - X @ weight

    z = special.ndtri(uniform((24, 8)))
    expected = np.sqrt(as_float(X)[0] ** 2 @ np.full((16, 8), np.exp(-4))) * z
    y, pullback = jax.vjp(jax.jit(noise), weight)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    (gradient,) = pullback(jnp.ones_like(y))
    np.testing.assert_allclose(gradient, 0, atol=1e-4)


def true_kl(log_alpha):
    """By integration of log|w| over the posterior, with the constant that makes it end at 0."""
    scale = np.exp(log_alpha / 2)

    def integrand(t):
        densities = np.exp(-0.5 * ((np.array([t - 1, t + 1])) / scale) ** 2).sum()
        return np.log(t) * densities / (scale * np.sqrt(2 * np.pi))

    knots = {0.0, 1e-6, 1e-3, *(max(0.0, 1 + k * scale) for k in (-40, -9, -3, 0, 3, 9, 40))}
    ends = sorted(knots)
    log_mean = sum(
        integrate.quad(integrand, low, high, epsabs=1e-11, limit=200)[0]
        for low, high in itertools.pairwise(ends)
    )
    return log_mean - log_alpha / 2 + (np.euler_gamma + np.log(2)) / 2


def test_the_divergence_is_right_to_what_is_documented():
    log_alpha = np.linspace(-8, 8, 65)
    exact = np.array([true_kl(value) for value in log_alpha])
    ours = np.asarray(jdropout.variational_kl(jnp.float32(log_alpha)))
    sigmoid = 1 / (1 + np.exp(-1.8732 - 1.48695 * log_alpha))
    published = 0.63576 - 0.63576 * sigmoid + np.log1p(np.exp(-log_alpha)) / 2
    np.testing.assert_allclose(ours, published, rtol=1e-5, atol=1e-6)
    assert np.abs(ours - exact).max() < 0.0095
    assert (ours > 0).all()
    assert (np.diff(ours) < 0).all()
    assert ours[-1] < 2e-4
    without_sigmoid = 0.5 * np.log1p(np.exp(-log_alpha))  # the control
    assert np.abs(without_sigmoid - exact).max() > 0.3


def test_evaluation_prunes_beyond_the_threshold():
    y = jdropout.variational_dense(None, X, WEIGHT, LOG_ALPHA, BIAS, deterministic=True)
    pruned = np.where(LOG_ALPHA > 3, 0, WEIGHT)
    assert 0 < np.count_nonzero(pruned == 0) < pruned.size / 2
    np.testing.assert_allclose(y, np.asarray(X) @ pruned + BIAS[None], rtol=1e-5, atol=1e-5)
    all_kept = jdropout.variational_dense(
        None, X, WEIGHT, LOG_ALPHA, BIAS, deterministic=True, threshold=None
    )
    np.testing.assert_allclose(all_kept, X @ WEIGHT + BIAS[None], rtol=1e-5, atol=1e-5)
    evaluate = functools.partial(
        jdropout.variational_dropout, None, WEIGHT, LOG_ALPHA, deterministic=True
    )
    np.testing.assert_array_equal(evaluate(), pruned)
    np.testing.assert_array_equal(evaluate(threshold=1.0), np.where(LOG_ALPHA > 1, 0, WEIGHT))
    assert evaluate(threshold=None) is WEIGHT


@pytest.mark.examples
def test_most_weights_of_a_network_on_digits_are_pruned_at_little_loss():
    """The short form of examples/sparse_digits.py."""
    digits = load_digits()
    images, labels = jnp.float32(digits.data) / 16, jnp.int32(digits.target)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1000], order[1000:]
    shapes = [(64, 32), (32, 10)]
    weights = [normal(shape, i) * (2 / shape[0]) ** 0.5 for i, shape in enumerate(shapes)]
    biases = [jnp.zeros(shape[1]) for shape in shapes]

    def logits(params, x, key, sparse):
        weights, biases, variances = params
        for i, (weight, bias, variance) in enumerate(zip(weights, biases, variances, strict=True)):
            x = jax.nn.relu(x) if i else x
            log_alpha = jdropout.variational_log_alpha(weight, variance)
            if sparse:
                x = jdropout.variational_dense(
                    None if key is None else jax.random.fold_in(key, i),
                    *(x, weight, log_alpha, bias),
                    deterministic=key is None,
                )
            else:
                x = x @ weight + bias[None]
        return x

    def train_and_test(sparse):
        optimizer = optax.adam(0.01)

        def loss(params, step):
            key = jax.random.fold_in(KEY, step)
            rows = jnp.asarray(train)[
                jax.random.randint(jax.random.fold_in(key, 9), (64,), 0, 1000)
            ]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images[rows], key, sparse), labels[rows]
            )
            if not sparse:
                return losses.mean()
            divergence = sum(
                jdropout.variational_kl(jdropout.variational_log_alpha(w, v)).sum()
                for w, _, v in zip(*params, strict=True)
            )
            return losses.mean() + 0.2 * jnp.minimum(step / 500, 1) * divergence / 1000

        def step(i, state):
            params, optimizer_state = state
            updates, optimizer_state = optimizer.update(jax.grad(loss)(params, i), optimizer_state)
            return optax.apply_updates(params, updates), optimizer_state

        params = weights, biases, [np.full(shape, -8.0, np.float32) for shape in shapes]
        loop = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, step, state))
        with jax.numpy_dtype_promotion("standard"):  # which Optax needs
            params, _ = loop((params, jax.jit(optimizer.init)(params)))
        answers = jax.jit(logits, static_argnums=3)(params, images[test], None, sparse).argmax(-1)
        log_alphas = [
            np.asarray(jdropout.variational_log_alpha(w, v)).ravel()
            for w, _, v in zip(*params, strict=True)
        ]
        right = np.asarray(answers) == np.asarray(labels)[test]
        return right.mean(), (np.concatenate(log_alphas) > 3).mean()

    plain_accuracy, _ = train_and_test(False)
    accuracy, pruned = train_and_test(True)
    # 57 % of the weights here, and 96.6 % right against 97.2 %.
    assert pruned > 0.5
    assert accuracy > plain_accuracy - 0.01
    assert accuracy > 0.95


ERRORS = {
    "x integer": (dict(x=jnp.arange(16)), TypeError, "x must be"),
    "x complex": (dict(x=X.astype(complex)), TypeError, "x must be a real"),
    "parameter shape": (dict(log_alpha=jnp.ones((3, 3))), ValueError, "got shape (3, 3)"),
    "parameter rank": (dict(log_alpha=jnp.ones(16)), ValueError, "[None, :]"),
    "parameter dtype": (dict(log_alpha=jnp.int32(1)), TypeError, "got dtype int32"),
    "parameter type": (dict(log_alpha="0"), TypeError, "must be an array, got str"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_variational_dense_name_the_argument_and_the_value(case):
    changes, error, text = ERRORS[case]
    arguments = dict(key=KEY, x=X, weight=WEIGHT, log_alpha=LOG_ALPHA, bias=BIAS) | changes
    with pytest.raises(error, match=re.escape(text)):
        jdropout.variational_dense(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jdropout.variational_dropout(KEY, X, 0.0, threshold="3"),
            TypeError,
            "threshold must be None or a number",
        ),
        (
            lambda: jdropout.variational_dense(KEY, X, WEIGHT.T, 0.0),
            ValueError,
            "x and weight must have the shapes",
        ),
        (
            lambda: jdropout.variational_dense(KEY, X, WEIGHT, 0.0, BIAS[1:]),
            ValueError,
            "bias must have the shape (8,), got (7,)",
        ),
        (
            lambda: jdropout.variational_dense(KEY, X, WEIGHT.astype(jnp.bfloat16), 0.0),
            TypeError,
            "weight must have the dtype of x, float32, got bfloat16",
        ),
        (
            lambda: jdropout.variational_kl(jnp.arange(3)),
            TypeError,
            "log_alpha must be a floating-point array",
        ),
        (
            lambda: jdropout.variational_log_alpha(WEIGHT, BIAS),
            ValueError,
            "log_variance must be a scalar or have axes",
        ),
    ],
)
def test_further_errors_name_the_argument_and_the_value(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
