"""R-Drop's loss, against SciPy."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

import jdropout
from jdropout import r_drop_loss
from jdropout.keys import at_site


def normal(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@jax.jit
def loss_and_gradients(a, b):
    loss, pullback = jax.vjp(r_drop_loss, a, b)
    return loss, pullback(jnp.ones_like(loss))


def scipy_loss(a, b, axis=-1):
    p, q = (special.softmax(np.asarray(x, np.float64), axis) for x in (a, b))
    return (special.rel_entr(p, q) + special.rel_entr(q, p)).sum(axis) / 2


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_it_is_half_the_symmetric_divergence_of_scipy(axis):
    a, b = normal((2, 5, 7, 3)) * 4
    y = r_drop_loss(a, b, axis=axis)
    expected = scipy_loss(a, b, axis)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=2e-5)
    np.testing.assert_array_equal(y, r_drop_loss(b, a, axis=axis))
    assert (y >= 0).all()


def test_equal_logits_give_exactly_zero_and_a_gradient_of_zero():
    logits = np.float32([[-3, 0, 1, 3], [1e30] * 4, [0, -np.inf, 1, 2]])
    loss, gradients = loss_and_gradients(logits, logits)
    np.testing.assert_array_equal(loss, np.zeros(3))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros((3, 4)))


def test_large_logits_neither_overflow_nor_give_nan():
    sizes = np.float32([100, 1e4, 1e30])
    a, b = (sizes[:, None] * np.float32(row) for row in ([1, 0, -1, -1], [0, 1, -1, -1]))
    y, gradients = loss_and_gradients(a, b)
    np.testing.assert_allclose(y, sizes, rtol=1e-6)
    assert np.isfinite(gradients).all()
    shifted, _ = loss_and_gradients(a + 3, b - 5)
    np.testing.assert_allclose(shifted, y, rtol=1e-5)


def test_impossible_classes_have_no_part_and_a_contradiction_is_infinite():
    inf = np.inf
    a = np.float32([[1, -inf, 0, -inf]] * 3)
    b = np.float32([[0, -inf, 2, -inf], [0, 0, 0, 0], [0, -1e4, 0, -inf]])
    loss, (gradient, _) = loss_and_gradients(a, b)
    np.testing.assert_array_equal(loss[1:], [inf, inf])
    possible, (expected, _) = loss_and_gradients(a[:1, ::2], b[:1, ::2])
    np.testing.assert_allclose(possible, scipy_loss(a[0, ::2], b[0, ::2]), rtol=1e-5)
    np.testing.assert_allclose(loss[0], possible[0], rtol=1e-5)
    np.testing.assert_array_equal(gradient[0, 1::2], [0, 0])
    np.testing.assert_allclose(gradient[0, ::2], expected[0], rtol=1e-5)


def test_gradients_of_both_orders_are_right():
    a, b = normal((2, 3, 4))
    check_grads(
        jax.jit(lambda a, b: r_drop_loss(a, b).sum()),
        (a, b),
        order=1,
        modes=["rev"],
        rtol=0.02,
        atol=0.02,
    )
    # At equal logits the Hessian is the covariance of one-hot labels: no shortcut hides it.
    hessian = jax.jit(jax.hessian(r_drop_loss))(a[0], a[0])
    p = special.softmax(np.asarray(a[0], np.float64))
    np.testing.assert_allclose(hessian, np.diag(p) - np.outer(p, p), rtol=1e-4, atol=1e-6)


def test_it_is_computed_in_float32_at_least():
    a, b = normal((2, 6, 30)).astype(jnp.bfloat16)
    y = r_drop_loss(a, b)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, scipy_loss(a, b), rtol=1e-5)
    with jax.enable_x64(True):
        wide = r_drop_loss(np.asarray(a, np.float64), np.asarray(b, np.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, scipy_loss(a, b), rtol=1e-13)


def test_its_mean_grows_with_the_rate_of_dropout(key):
    """Not a law but the use: passes that differ more are punished more; n = 256 pairs."""
    x, w = normal((256, 64)), normal((64, 10), 8) / 8

    @jax.jit
    def mean(rate):
        passes = [jdropout.dropout(at_site(key, i), x, rate) @ w for i in range(2)]
        return r_drop_loss(*passes).mean()

    losses = [float(mean(rate)) for rate in (0.0, 0.25, 0.5)]
    assert losses[0] == 0
    assert losses == sorted(losses)
    assert math.isfinite(losses[-1])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((jnp.ones(3), jnp.ones(4)), ValueError, "the same shape, got (3,) and (4,)"),
        ((jnp.arange(3), jnp.ones(3)), TypeError, "logits_a must be a floating-point array"),
        ((jnp.ones(3), [1.0]), TypeError, "logits_b must be an array, got list"),
        ((jnp.float32(0), jnp.float32(0)), ValueError, "axis is -1, but the array has 0 axes"),
    ],
)
def test_errors_of_r_drop_loss_name_the_argument(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        r_drop_loss(*arguments)
