"""Learned dropout: the formulas, their gradients, and that the rates learn what they should.

References are in float64 NumPy, from the uniform numbers of the law's twin.
"""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import integrate, special
from sklearn.datasets import load_digits

import jdropout
from jdropout import _learned as learned

SHAPE = (24, 16)
KEY = jax.random.key(2017)
X = jax.random.normal(jax.random.key(1), SHAPE)
LOGITS = jax.random.normal(jax.random.key(2), (1, 16))
WEIGHT = jax.random.normal(jax.random.key(3), (16, 8))
LOG_ALPHA = 3 * jax.random.normal(jax.random.key(4), (16, 8))
BIAS = jnp.arange(8.0)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

# Of (key, x, parameter), with further options.
FUNCTIONS = {
    "concrete_dropout": (learned.concrete_dropout, LOGITS),
    "variational_dropout": (learned.variational_dropout, LOGITS),
    "standout": (learned.standout, X[::-1]),
    "variational_dense": (
        lambda key, x, log_alpha, **options: learned.variational_dense(
            key, x, WEIGHT.astype(x.dtype), log_alpha, BIAS.astype(x.dtype), **options
        ),
        LOG_ALPHA,
    ),
}


def uniform(shape, key=KEY):
    return (law_twin.uniform(np.asarray(jax.random.key_data(key)), shape) + 0.5) / 2**32


def as_float(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def differences(function, *arguments, epsilon=1e-6):
    """Central differences of a scalar function with respect to every element of each argument."""
    gradients = []
    for position, argument in enumerate(arguments):
        gradient = np.zeros(np.shape(argument))
        for index in np.ndindex(gradient.shape):
            values = []
            for step in (epsilon, -epsilon):
                moved = np.array(argument, np.float64)
                moved[index] += step
                values.append(function(*arguments[:position], moved, *arguments[position + 1 :]))
            gradient[index] = (values[0] - values[1]) / (2 * epsilon)
        gradients.append(gradient)
    return gradients


# --- concrete dropout ---------------------------------------------------------------------


def concrete(x, logit, temperature, u):
    """As the paper has it."""
    p = special.expit(logit)
    argument = (np.log(p) - np.log(1 - p) + np.log(u) - np.log(1 - u)) / temperature
    return x * (1 - special.expit(argument)) / (1 - p)


@pytest.mark.parametrize("logit", [LOGITS, jnp.float32(-2.2), -2.2, X / 4], ids=lambda a: None)
def test_concrete_dropout_is_the_formula_of_the_paper(logit):
    for temperature in (0.1, 2 / 3):
        y = learned.concrete_dropout(KEY, X, logit, temperature=temperature)
        expected = concrete(*as_float(X, logit), temperature, uniform(SHAPE))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_concrete_dropout_and_its_gradients_are_exact_in_float64():
    x, logit, factor = as_float(X[:4, :4], LOGITS[:, :4], X[4:8, :4])
    u = uniform((4, 4))

    def reference(x, logit, temperature):
        return (np.sin(concrete(x, logit, temperature, u)) * factor).sum()

    with jax.enable_x64(True):

        def loss(x, logit, temperature):
            y = learned.concrete_dropout(KEY, x, logit, temperature=temperature)
            return (jnp.sin(y) * factor).sum()

        value, ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(x, logit, 0.5)
        tangent = jax.jit(jax.jvp, static_argnums=0)(loss, (x, logit, 0.5), (x, logit, 0.5))[1]
    np.testing.assert_allclose(value, reference(x, logit, 0.5), rtol=1e-12)
    for gradient, numeric in zip(ours, differences(reference, x, logit, 0.5), strict=True):
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    pairs = zip(ours, (x, logit, 0.5), strict=True)
    np.testing.assert_allclose(tangent, sum((np.asarray(g) * a).sum() for g, a in pairs), rtol=1e-9)


def test_a_low_temperature_gives_the_masks_of_the_law():
    for rate in (0.1, 0.5, 0.9):
        logit = special.logit(rate)
        y = learned.concrete_dropout(KEY, jnp.ones((64, 64)), logit, temperature=1e-5)
        keep = np.asarray(jdropout.keep_mask(KEY, rate, (64, 64), precision=32))
        undecided = np.abs(uniform((64, 64)) - (1 - rate)) < 1e-4
        error = np.abs(y - keep / (1 - rate))
        assert undecided.mean() < 1e-3
        assert (error < 1e-5 / (1 - rate))[~undecided].all()


def test_the_mean_of_concrete_dropout_is_off_by_what_is_documented():
    """By integration over the logistic distribution; and 2^20 elements agree to 5 sigma."""

    def mean(p, temperature):
        logit = special.logit(p)

        def integrand(v):
            return special.expit(-(logit + v) / temperature) * special.expit(v) * special.expit(-v)

        knots = [-logit - 1, -logit, -logit + 1, 0]
        return integrate.quad(integrand, -99, 99, points=knots, limit=500)[0] / (1 - p)

    for p in (0.05, 0.1, 0.3, 0.5):
        assert abs(mean(p, 0.1) - 1) < 0.002
        assert abs(mean(p, 2 / 3) - 1) < 0.06
    y = learned.concrete_dropout(KEY, jnp.ones((1024, 1024)), special.logit(0.1))
    y = np.asarray(y, np.float64)
    standard_error = y.std() / 1024
    assert abs(y.mean() - mean(0.1, 0.1)) < 5 * standard_error
    assert abs(y.mean() - mean(0.05, 0.1) * 0.99) > 5 * standard_error  # the control


@pytest.mark.parametrize("logit", [-1e4, -200.0, -100.0, 100.0, 200.0, 1e4])
def test_concrete_dropout_is_finite_for_large_logits(logit):
    y, pullback = jax.vjp(lambda x, a: learned.concrete_dropout(KEY, x, a), X, jnp.float32(logit))
    gradients = pullback(jnp.ones_like(X))
    np.testing.assert_allclose(y, X if logit < 0 else 0 * X, rtol=1e-5, atol=1e-30)
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_regularizer_is_the_formula_of_the_paper():
    logit = np.linspace(-12, 12, 25)
    p = special.expit(logit)
    entropy = -(special.xlogy(p, p) + special.xlog1py(1 - p, -p))
    expected = 1e-6 * 50 / (1 - p) - 1e-5 * 128 * entropy
    ours = learned.concrete_regularizer(jnp.float32(logit), 50.0, 128)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)
    expected = 0.3 * 50 / (1 - p) - 0.2 * 128 * entropy
    options = dict(weight_regularizer=0.3, dropout_regularizer=0.2)
    with jax.enable_x64(True):
        ours = learned.concrete_regularizer(logit, 50.0, 128, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-10)
        gradient = jax.grad(
            lambda a, s: learned.concrete_regularizer(a, s, 128, **options).sum(), (0, 1)
        )(jnp.asarray(logit), jnp.float64(50))
    slope = 0.3 * 50 * np.exp(logit) + 0.2 * 128 * logit * p * (1 - p)
    np.testing.assert_allclose(gradient[0], slope, rtol=1e-10)
    np.testing.assert_allclose(gradient[1], (0.3 / (1 - p)).sum(), rtol=1e-10)


def test_the_regularizer_is_finite_for_large_logits():
    logit = jnp.array([-1e30, -1000.0, -100.0, 88.0])
    value, slope = jax.vmap(
        jax.value_and_grad(lambda a: learned.concrete_regularizer(a, 50.0, 128))
    )(logit)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    entropy_alone = functools.partial(
        learned.concrete_regularizer, weight_sum_of_squares=0.0, num_inputs=1
    )
    np.testing.assert_allclose(jax.vmap(entropy_alone)(logit), 0, atol=1e-12)
    naive = jax.nn.sigmoid(logit)  # the control
    assert np.isnan(naive * jnp.log(naive) + (1 - naive) * jnp.log(1 - naive)).any()


def learned_rate(num_samples):
    """Of a network with one hidden layer on the toy data y = 2 x + 8 + noise, as in the paper."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (num_samples, 1))
    y = 2 * x + 8 + jax.random.normal(keys[1], x.shape)
    params = {
        "hidden": jax.random.normal(keys[2], (1, 32)),
        "shift": jnp.zeros((1, 32)),
        "out": jax.random.normal(keys[3], (32, 1)) / 6,
        "mean": jnp.zeros((1, 1)),
        "logit": jnp.float32(special.logit(0.1)),
    }

    def loss(params, key):
        hidden = jax.nn.relu(x @ params["hidden"] + params["shift"])
        hidden = learned.concrete_dropout(key, hidden, params["logit"])
        squared = jnp.square(hidden @ params["out"] + params["mean"] - y).mean()
        return squared + learned.concrete_regularizer(
            params["logit"],
            jnp.square(params["out"]).sum(),
            32,
            weight_regularizer=0.01 / num_samples,
            dropout_regularizer=2 / num_samples,
        )

    optimizer = optax.adam(0.02)

    def step(i, state):
        params, optimizer_state = state
        gradient = jax.grad(loss)(params, jax.random.fold_in(KEY, i))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state

    train = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, step, state))
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        return float(jax.nn.sigmoid(train((params, optimizer.init(params)))[0]["logit"]))


def test_the_learned_rate_falls_as_the_data_grow():
    """Gal et al. (2017), section 4.1: what the data explain away is the model's uncertainty."""
    rates = [learned_rate(num_samples) for num_samples in (16, 256)]
    assert rates[0] > 2 * rates[1]


# --- variational dropout ------------------------------------------------------------------


def test_variational_dropout_is_gaussian_dropout_with_that_variance():
    for rate in (0.1, 0.5):
        log_alpha = special.logit(rate)
        np.testing.assert_allclose(
            learned.variational_dropout(KEY, X, log_alpha),
            jdropout.gaussian_dropout(KEY, X, rate),
            rtol=1e-5,
            atol=1e-6,
        )


def test_log_alpha_is_clipped_at_eight():
    for beyond, limit in ((-50.0, -8.0), (50.0, 8.0)):
        y = learned.variational_dropout(KEY, X, beyond)
        np.testing.assert_array_equal(y, learned.variational_dropout(KEY, X, limit))
        y = learned.variational_dense(KEY, X, WEIGHT, beyond)
        np.testing.assert_array_equal(y, learned.variational_dense(KEY, X, WEIGHT, limit))
        assert learned.variational_kl(beyond) == learned.variational_kl(limit)
        assert jax.grad(learned.variational_kl)(beyond) == 0


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
    y = learned.variational_dense(KEY, X, WEIGHT, LOG_ALPHA, BIAS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    deep = learned.variational_dense(KEY, X.reshape(4, 6, 16), WEIGHT, LOG_ALPHA, BIAS)
    z = special.ndtri(uniform((4, 6, 8)))
    expected = reparameterised(*as_float(X, WEIGHT, LOG_ALPHA, BIAS), z.reshape(24, 8))
    np.testing.assert_allclose(deep, expected.reshape(4, 6, 8), rtol=1e-4, atol=1e-4)
    vector = learned.variational_dense(KEY, X[0], WEIGHT, LOG_ALPHA, BIAS)
    z = special.ndtri(uniform((8,)))
    expected = reparameterised(*as_float(X[:1], WEIGHT, LOG_ALPHA, BIAS), z)[0]
    np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-4)


def test_variational_dense_has_the_moments_of_noisy_weights():
    """2^14 draws of either; 5 standard errors; the control has alpha a tenth too large."""
    n = 1 << 14
    x, weight, log_alpha = X[:1, :4], WEIGHT[:4, :3], LOG_ALPHA[:4, :3] / 3
    repeated = jnp.broadcast_to(x, (n, 4))
    ours = np.asarray(learned.variational_dense(KEY, repeated, weight, log_alpha), np.float64)
    z = np.random.default_rng(0).standard_normal((n, 4, 3))
    theirs = dense(*as_float(repeated, weight, log_alpha), 0, z)
    variance = theirs.var(axis=0)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * np.sqrt(2 * variance / n)).all()
    assert (np.abs(ours.var(0) - variance) < 5 * variance * np.sqrt(4 / n)).all()
    wider = learned.variational_dense(KEY, repeated, weight, log_alpha + np.log(1.1))
    assert (np.abs(np.var(wider, 0) - variance) > 5 * variance * np.sqrt(4 / n)).any()


def test_gradients_of_variational_dense_are_those_of_finite_differences():
    arguments = as_float(X[:3, :4], WEIGHT[:4, :2], LOG_ALPHA[:4, :2] / 3, BIAS[:2])
    factor = np.asarray(X[3:6, :2], np.float64)
    z = special.ndtri(uniform((3, 2)))

    def reference(*arguments):
        return (np.sin(reparameterised(*arguments, z)) * factor).sum()

    with jax.enable_x64(True):

        def loss(*arguments):
            return (jnp.sin(learned.variational_dense(KEY, *arguments)) * factor).sum()

        value, ours = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arguments)
    np.testing.assert_allclose(value, reference(*arguments), rtol=1e-12)
    for gradient, numeric in zip(ours, differences(reference, *arguments), strict=True):
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)


def test_inputs_of_zero_have_finite_gradients():
    gradients = jax.grad(
        lambda x, w, a: learned.variational_dense(KEY, x, w, a).sum(), argnums=(0, 1, 2)
    )(jnp.zeros((3, 16)), WEIGHT, LOG_ALPHA)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    weight = jnp.zeros((2, 2))
    gradient = jax.grad(lambda w: learned.variational_log_alpha(w, -8.0).sum())(weight)
    np.testing.assert_array_equal(gradient, weight)


def test_an_additive_variance_frees_the_noise_of_the_weight():
    """The noise is that of exp(log_variance) whatever the weight is, and has no gradient in it."""
    log_variance = jnp.full(WEIGHT.shape, -4.0)

    def noise(weight):
        log_alpha = learned.variational_log_alpha(weight, log_variance)
        return learned.variational_dense(KEY, X, weight, log_alpha) - X @ weight

    z = special.ndtri(uniform((24, 8)))
    expected = np.sqrt(as_float(X)[0] ** 2 @ np.full((16, 8), np.exp(-4))) * z
    np.testing.assert_allclose(noise(WEIGHT), expected, atol=2e-5)
    gradient = jax.grad(lambda w: noise(w).sum())(WEIGHT)
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
    ours = np.asarray(learned.variational_kl(jnp.float32(log_alpha)))
    assert np.abs(ours - exact).max() < 0.0095
    assert (ours > 0).all()
    assert (np.diff(ours) < 0).all()
    assert ours[-1] < 2e-4
    without_sigmoid = 0.5 * np.log1p(np.exp(-log_alpha))  # the control
    assert np.abs(without_sigmoid - exact).max() > 0.3


def test_evaluation_prunes_beyond_the_threshold():
    y = learned.variational_dense(None, X, WEIGHT, LOG_ALPHA, BIAS, deterministic=True)
    pruned = np.where(LOG_ALPHA > 3, 0, WEIGHT)
    assert 0 < np.count_nonzero(pruned == 0) < pruned.size / 2
    np.testing.assert_allclose(y, np.asarray(X) @ pruned + BIAS[None], rtol=1e-5, atol=1e-5)
    all_kept = learned.variational_dense(
        None, X, WEIGHT, LOG_ALPHA, BIAS, deterministic=True, threshold=None
    )
    np.testing.assert_allclose(all_kept, X @ WEIGHT + BIAS[None], rtol=1e-5, atol=1e-5)
    evaluate = functools.partial(
        learned.variational_dropout, None, WEIGHT, LOG_ALPHA, deterministic=True
    )
    np.testing.assert_array_equal(evaluate(), pruned)
    np.testing.assert_array_equal(evaluate(threshold=1.0), np.where(LOG_ALPHA > 1, 0, WEIGHT))
    assert evaluate(threshold=None) is WEIGHT


def test_most_weights_of_a_network_on_digits_are_pruned_at_little_loss():
    """The short form of examples/sparse_digits.py."""
    digits = load_digits()
    images, labels = jnp.float32(digits.data) / 16, jnp.int32(digits.target)
    order = jax.random.permutation(jax.random.key(0), len(labels))
    train, test = order[:1000], order[1000:]
    shapes = [(64, 32), (32, 10)]
    weights = [
        jax.random.normal(jax.random.fold_in(KEY, i), shape) * (2 / shape[0]) ** 0.5
        for i, shape in enumerate(shapes)
    ]
    biases = [jnp.zeros(shape[1]) for shape in shapes]

    def logits(params, x, key, sparse):
        weights, biases, variances = params
        for i, (weight, bias, variance) in enumerate(zip(weights, biases, variances, strict=True)):
            x = jax.nn.relu(x) if i else x
            log_alpha = learned.variational_log_alpha(weight, variance)
            if sparse:
                x = learned.variational_dense(
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
            rows = train[jax.random.randint(jax.random.fold_in(key, 9), (64,), 0, 1000)]
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images[rows], key, sparse), labels[rows]
            )
            if not sparse:
                return losses.mean()
            divergence = sum(
                learned.variational_kl(learned.variational_log_alpha(w, v)).sum()
                for w, _, v in zip(*params, strict=True)
            )
            return losses.mean() + 0.2 * jnp.minimum(step / 500, 1) * divergence / 1000

        def step(i, state):
            params, optimizer_state = state
            updates, optimizer_state = optimizer.update(jax.grad(loss)(params, i), optimizer_state)
            return optax.apply_updates(params, updates), optimizer_state

        params = weights, biases, [jnp.full(shape, -8.0) for shape in shapes]
        loop = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, step, state))
        with jax.numpy_dtype_promotion("standard"):  # which Optax needs
            params, _ = loop((params, optimizer.init(params)))
        answers = logits(params, images[test], None, sparse).argmax(-1)
        pruned = [
            np.asarray(learned.variational_log_alpha(w, v) > 3)
            for w, _, v in zip(*params, strict=True)
        ]
        return (answers == labels[test]).mean(), np.concatenate([p.ravel() for p in pruned]).mean()

    plain_accuracy, _ = train_and_test(False)
    accuracy, pruned = train_and_test(True)
    # 57 % of the weights here, and 96.6 % right against 97.2 %.
    assert pruned > 0.5
    assert accuracy > plain_accuracy - 0.01
    assert accuracy > 0.95


# --- standout -----------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0.25, 0.5, 0.9, 2.0**-24])
def test_a_constant_probability_gives_the_mask_of_the_law(probability):
    logit = special.logit(probability)
    probability = float(jax.nn.sigmoid(jnp.float32(logit)))  # as rounded
    y = learned.standout(KEY, jnp.ones((64, 32)), logit)
    mask = jdropout.keep_mask(KEY, 1 - probability, (64, 32), precision=32)
    np.testing.assert_array_equal(y, np.float32(mask))


def test_standout_keeps_where_the_uniform_number_is_below_the_probability():
    options = dict(alpha=1.5, beta=-0.3)
    preactivation = X[::-1]
    probability = special.expit(1.5 * as_float(preactivation)[0] - 0.3)
    u = uniform(SHAPE)
    assert np.abs(u - probability).min() > 1e-6  # the rounding decides nowhere
    y = learned.standout(KEY, X, preactivation, **options)
    np.testing.assert_array_equal(y, np.where(u < probability, X, 0))
    y = learned.standout(None, X, preactivation, **options, deterministic=True)
    np.testing.assert_allclose(y, X * probability, rtol=1e-6)
    certain = jnp.where(X > 0, 200.0, -200.0)
    np.testing.assert_array_equal(learned.standout(KEY, X, certain), np.where(X > 0, X, 0))


def test_gradients_of_standout_are_those_documented():
    preactivation = X[::-1]

    def loss(x, preactivation, alpha, beta, deterministic):
        return learned.standout(
            KEY, x, preactivation, alpha=alpha, beta=beta, deterministic=deterministic
        ).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    to_x, *others = gradient(X, preactivation, 1.0, 0.0, False)
    mask = learned.standout(KEY, jnp.ones(SHAPE), preactivation)
    np.testing.assert_array_equal(to_x, mask)
    for other in others:
        np.testing.assert_array_equal(other, jnp.zeros_like(other))
    x, a = as_float(X, preactivation)
    q = special.expit(a)
    for ours, exact in zip(
        gradient(X, preactivation, 1.0, 0.0, True),
        (q, x * q * (1 - q), (x * q * (1 - q) * a).sum(), (x * q * (1 - q)).sum()),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-6)


# --- all ----------------------------------------------------------------------------------


def test_concrete_dropout_returns_the_input_itself_in_evaluation():
    for x in (X, np.asarray(X)):
        assert learned.concrete_dropout(None, x, -2.0, deterministic=True) is x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_traced_flags_and_parameters_equal_the_static_ones(name):
    function, parameter = FUNCTIONS[name]
    traced = jax.jit(lambda x, a, flag: function(KEY, x, a, deterministic=flag))
    for flag in (False, True):
        static = function(KEY, X, parameter, deterministic=flag)
        np.testing.assert_allclose(traced(X, parameter, flag), static, rtol=1e-5, atol=1e-5)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_keys_inputs_and_flags_equals_the_loop(name):
    function, parameter = FUNCTIONS[name]
    keys, flags = jax.random.split(KEY, 3), jnp.array([False, True, False])
    x = jnp.stack([X, X[::-1], 2 * X])

    @jax.jit
    def one(key, x, flag):
        return function(key, x, parameter, deterministic=flag)

    batched = jax.jit(jax.vmap(one))(keys, x, flags)
    for i in range(3):
        np.testing.assert_allclose(batched[i], one(keys[i], x[i], flags[i]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_narrow_dtypes_are_computed_in_float32(name, dtype):
    function, parameter = FUNCTIONS[name]
    x = X.astype(dtype)
    y = function(KEY, x, parameter)
    assert y.dtype == dtype
    wide = np.asarray(function(KEY, x.astype(jnp.float32), parameter))
    largest = np.abs(wide).max() if name == "variational_dense" else np.abs(wide)
    error = np.abs(np.asarray(y, np.float32) - wide)
    assert (error <= float(jnp.finfo(dtype).eps) * largest + 1e-7).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_residuals_are_the_arguments_that_the_gradient_needs(name):
    function, parameter = FUNCTIONS[name]

    def sizes(f, *arguments):
        return sorted(leaf.size for leaf in jax.tree.leaves(jax.vjp(f, *arguments)[1]))

    to_x = sizes(lambda x: function(KEY, x, parameter), X)
    both = sizes(lambda x, a: function(KEY, x, a), X, parameter)
    output = 24 * 8
    expected = {
        "concrete_dropout": ({2, 1, 16}, {2, 1, 16, X.size}),
        "variational_dropout": ({2, 1, 16}, {2, 1, 16, X.size}),
        "standout": ({2, 1, X.size}, {2, 1, X.size}),
        # The output is smaller than x here: what has its size is the variance.
        "variational_dense": ({2, X.size, WEIGHT.size, output},) * 2,
    }[name]
    assert set(to_x) <= expected[0]
    assert set(both) <= expected[1]
    assert sum(size >= output for size in to_x) <= {"variational_dense": 3, "standout": 1}.get(
        name, 0
    )


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same_on_eight_devices_without_a_collective(name, axis_type):
    function, parameter = FUNCTIONS[name]
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    # A dense layer's sum over a sharded axis is no matter of the noise.
    spec = P(("a", "b"), None) if name == "variational_dense" else P("a", "b")
    expected = function(KEY, X, parameter)
    with jax.set_mesh(mesh):
        x = jax.device_put(np.asarray(X), NamedSharding(mesh, spec))
        a = np.asarray(parameter)
        if name == "standout":
            a = jax.device_put(a, NamedSharding(mesh, spec))
        compiled = jax.jit(lambda x, a: function(KEY, x, a)).lower(x, a).compile()
        y = compiled(x, a)
    assert not any(name in compiled.as_text() for name in COLLECTIVES)
    assert y.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_block_is_a_part_of_the_whole(name):
    function, parameter = FUNCTIONS[name]
    whole = function(KEY, X, parameter)
    part = parameter[8:16] if parameter.shape == SHAPE else parameter
    block = function(KEY, X[8:16], part, start=(8, 0), global_shape=whole.shape)
    np.testing.assert_allclose(block, whole[8:16], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_audit_sees_the_call_and_its_key(name):
    function, parameter = FUNCTIONS[name]
    report = jdropout.audit(lambda key, x: function(key, x, parameter), KEY, X)
    (site,) = report.sites
    assert (site.kind, site.key_sources) == (name, ("key",))
    assert site.shape == function(KEY, X, parameter).shape


ERRORS = {
    "x integer": (lambda f, a: f(KEY, jnp.arange(16), a), TypeError, "x must be"),
    "x complex": (lambda f, a: f(KEY, X.astype(complex), a), TypeError, "x must be a real"),
    "no key": (lambda f, a: f(None, X, a), ValueError, "key is None, but dropout is on"),
    "flag": (lambda f, a: f(KEY, X, a, deterministic=1), TypeError, "deterministic must be"),
    "start": (lambda f, a: f(KEY, X, a, start=(0, 0)), ValueError, "without global_shape"),
    "parameter shape": (lambda f, a: f(KEY, X, jnp.ones((3, 3))), ValueError, "got shape (3, 3)"),
    "parameter rank": (lambda f, a: f(KEY, X, jnp.ones(16)), ValueError, "[None, :]"),
    "parameter dtype": (lambda f, a: f(KEY, X, jnp.int32(1)), TypeError, "got dtype int32"),
    "parameter type": (lambda f, a: f(KEY, X, "0"), TypeError, "must be an array, got str"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_name_the_argument_and_the_value(name, case):
    call, error, text = ERRORS[case]
    with pytest.raises(error, match=re.escape(text)):
        call(*FUNCTIONS[name])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: learned.concrete_dropout(KEY, X, 0.0, temperature=0),
            ValueError,
            "temperature must be above 0",
        ),
        (
            lambda: learned.concrete_dropout(KEY, X, 0.0, temperature=-1),
            ValueError,
            "temperature must be a finite number",
        ),
        (
            lambda: learned.concrete_regularizer(0.0, 1.0, 0),
            ValueError,
            "num_inputs must be at least 1, got 0",
        ),
        (
            lambda: learned.concrete_regularizer(0.0, 1.0, 1, weight_regularizer=-1),
            ValueError,
            "weight_regularizer must be a finite number of at least 0",
        ),
        (
            lambda: learned.variational_dropout(KEY, X, 0.0, threshold="3"),
            TypeError,
            "threshold must be None or a number",
        ),
        (
            lambda: learned.variational_dense(KEY, X, WEIGHT.T, 0.0),
            ValueError,
            "x and weight must have the shapes",
        ),
        (
            lambda: learned.variational_dense(KEY, X, WEIGHT, 0.0, BIAS[1:]),
            ValueError,
            "bias must have the shape (8,), got (7,)",
        ),
        (
            lambda: learned.variational_dense(KEY, X, WEIGHT.astype(jnp.bfloat16), 0.0),
            TypeError,
            "weight must have the dtype of x, float32, got bfloat16",
        ),
        (
            lambda: learned.standout(KEY, X, 0.0, alpha=jnp.ones(2)),
            TypeError,
            "alpha must be a floating-point scalar",
        ),
        (
            lambda: learned.variational_kl(jnp.arange(3)),
            TypeError,
            "log_alpha must be a floating-point array",
        ),
        (
            lambda: learned.variational_log_alpha(WEIGHT, BIAS),
            ValueError,
            "log_variance must be a scalar or have axes",
        ),
    ],
)
def test_further_errors_name_the_argument_and_the_value(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
