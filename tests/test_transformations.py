"""Every transformation: the backward mask is the forward mask, and the values do not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Draw
from jax import export, lax

import jdropout
from jdropout.testing import assert_backward_uses_forward_mask

SHAPE = (37, 10)
RATE = 0.4


@pytest.fixture
def mask(key):
    return Draw(key).keep(RATE, SHAPE)


def scale():
    return np.float32(1 / (1 - jdropout.effective_rate(RATE)))


def f(key, x):
    return jdropout.dropout(key, x, RATE)


def passes(function):
    """Dropout on ones: the result, its gradient and its tangent."""
    x = jnp.ones(SHAPE)
    y, pullback = jax.vjp(function, x)
    return y, *pullback(x), jax.jvp(function, (x,), (x,))[1]


def assert_all_are_the_mask(results, mask):
    for result in results:
        np.testing.assert_array_equal(result, np.where(mask, scale(), 0))


POLICIES = {
    name: getattr(jax.checkpoint_policies, name)
    for name in (
        "everything_saveable",
        "nothing_saveable",
        "dots_saveable",
        "checkpoint_dots",
        "dots_with_no_batch_dims_saveable",
        "checkpoint_dots_with_no_batch_dims",
    )
} | {
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names("a"),
    "save_any_names_but_these": jax.checkpoint_policies.save_any_names_but_these("a"),
    "save_anything_except_these_names": jax.checkpoint_policies.save_anything_except_these_names(
        "a"
    ),
    "save_from_both_policies": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.nothing_saveable
    ),
}
WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "checkpoint of jit": lambda f: jax.checkpoint(jax.jit(f)),
    "checkpoint without cse": lambda f: jax.checkpoint(f, prevent_cse=False),
    "cond": lambda f: lambda x: lax.cond(x[0, 0] > -9, f, lambda x: x, x),
    "while": lambda f: lambda x: lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
    "vmap of one": lambda f: lambda x: jax.vmap(f)(x[None])[0],
    "map": lambda f: lambda x: lax.map(f, x[None])[0],
    "custom_jvp": lambda f: _identity_custom_jvp(f),
}


def _identity_custom_jvp(f):
    wrapped = jax.custom_jvp(f)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return wrapped


@pytest.mark.parametrize("name", WRAPPERS)
def test_forward_and_backward_masks_agree(name, key, mask):
    assert_all_are_the_mask(passes(WRAPPERS[name](lambda x: f(key, x))), mask)


def test_forward_and_backward_masks_agree_under_every_checkpoint_policy(key, mask):
    @jax.jit
    def results(key):
        def function(x):
            return f(key, x)

        policies = POLICIES.values()
        return [passes(jax.checkpoint(function, policy=policy)) for policy in policies]

    for result in results(key):
        assert_all_are_the_mask(result, mask)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_forward_and_backward_masks_agree_for_every_key_implementation(impl):
    key = jax.random.key(3, impl=impl)

    @jax.jit
    def results(key):
        raw = jax.random.key_data(key)
        return passes(lambda x: f(key, x)), passes(jax.checkpoint(lambda x: f(raw, x)))

    for result in results(key):
        assert_all_are_the_mask(result, Draw(key).keep(RATE, SHAPE))


def test_forward_and_backward_masks_agree_with_options(key):
    options = ({"precision": 32}, {"broadcast_dims": (0,)})

    def layer(x, own):
        return jdropout.dropout(key, x, 0.5, **own)

    results = jax.jit(lambda: [passes(functools.partial(layer, own=own)) for own in options])()
    for own, result in zip(options, results, strict=True):
        kept = Draw(key, precision=own.get("precision")).keep(
            0.5, SHAPE, own.get("broadcast_dims", ())
        )
        for array in result:
            np.testing.assert_array_equal(array, np.where(kept, 2, 0))
    assert_backward_uses_forward_mask(functools.partial(layer, own=options[1]), jnp.ones(SHAPE))


def test_jacobians_of_both_modes_are_diagonal_and_equal_the_mask(key):
    x = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
    expected = np.diag(np.where(Draw(key).keep(RATE, x.shape), scale(), 0).reshape(-1))
    modes = jax.jacfwd, jax.jacrev
    jacobians = jax.jit(lambda key, x: [mode(lambda x: f(key, x))(x) for mode in modes])
    for jacobian in jacobians(key, x):
        np.testing.assert_array_equal(jacobian.reshape(12, 12), expected)


def test_higher_orders_and_mixed_modes(key):
    """Of ``g = sum c sin(c x^2)``, where c is the mask times the scale."""

    def g(x):
        return f(key, jnp.sin(f(key, x) * x)).sum()

    def along_ones(function):  # forward mode
        return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    def of_the_sum(function):  # reverse mode
        return jax.grad(lambda x: function(x).sum())

    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    first = jax.grad(g)
    derivatives = [
        first,
        along_ones(first),
        of_the_sum(first),
        along_ones(of_the_sum(first)),
        of_the_sum(along_ones(first)),
        of_the_sum(of_the_sum(first)),
    ]
    results = jax.jit(lambda x: [*(h(x) for h in derivatives), along_ones(g)(x), jax.hessian(g)(x)])
    *ours, tangent, hessian = results(x)
    c = np.where(Draw(key).keep(RATE, x.shape), scale(), 0).astype(np.float64)
    sin, cos = np.sin(c * x**2), np.cos(c * x**2)
    one = 2 * c**2 * x * cos
    two = 2 * c**2 * cos - 4 * c**3 * x**2 * sin
    three = -12 * c**3 * x * sin - 8 * c**4 * x**3 * cos
    for derivative, exact in zip(ours, (one, two, two, three, three, three), strict=True):
        np.testing.assert_allclose(derivative, exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(tangent, one.sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        hessian.reshape(15, 15), np.diag(two.reshape(-1)), rtol=1e-4, atol=1e-4
    )


def test_linear_transpose_is_its_own_adjoint(key):
    x = np.random.default_rng(1).standard_normal(SHAPE, np.float32)
    transposed = jax.jit(lambda key, x: jax.linear_transpose(lambda x: f(key, x), x)(x)[0])
    expected = np.where(Draw(key).keep(RATE, SHAPE), x * scale(), 0)
    np.testing.assert_array_equal(transposed(key, x), expected)


def test_vmap_over_inputs_shares_the_mask(key, mask):
    x = jnp.ones((3, *SHAPE))
    y = jax.vmap(f, in_axes=(None, 0))(key, x)
    np.testing.assert_array_equal(y, np.broadcast_to(np.where(mask, scale(), 0), x.shape))


def test_vmap_over_keys_rates_and_flags_equals_the_loop():
    keys = jax.random.split(jax.random.key(1), 3)
    rates, flags = np.array([0.1, 0.5, 0.9], np.float32), np.array([False, True, False])
    x = jnp.ones((3, *SHAPE))

    def one(key, x, rate, flag):
        y, pullback = jax.vjp(lambda x: jdropout.dropout(key, x, rate, deterministic=flag), x)
        return y, *pullback(x)

    batched, single = jax.jit(jax.vmap(one)), jax.jit(one)
    for i, results in enumerate(zip(*batched(keys, x, rates, flags), strict=True)):
        loop = single(keys[i], x[i], rates[i], flags[i])
        kept = Draw(keys[i], precision=16).keep(rates[i], SHAPE) | flags[i]
        for result, expected in zip(results, loop, strict=True):
            np.testing.assert_array_equal(result, expected)
            np.testing.assert_array_equal(result != 0, kept)


def test_vmap_along_any_axis_equals_the_loop(key):
    x = np.random.default_rng(1).standard_normal((6, 5, 4), np.float32)

    @jax.jit
    def along_all_axes(key, x):
        return [jax.vmap(lambda x: f(key, x), in_axes=axis, out_axes=axis)(x) for axis in range(3)]

    for axis, y in enumerate(along_all_axes(key, x)):
        kept = Draw(key).keep(RATE, tuple(np.delete(x.shape, axis).tolist()))
        expected = np.where(np.expand_dims(kept, axis), x * scale(), 0)
        np.testing.assert_array_equal(y, expected)


def test_scan_over_layers_draws_one_mask_per_layer_and_its_gradient_uses_it(key):
    depth = 4
    weights = jnp.ones((depth, *SHAPE))

    def layer(x, inputs):
        index, weight = inputs
        return f(jax.random.fold_in(key, index), x * weight), None

    def scanned(x, weights):
        return lax.scan(layer, x, (jnp.arange(depth), weights))[0]

    def unrolled(x, weights):
        for i in range(depth):
            x, _ = layer(x, (i, weights[i]))
        return x

    x = jnp.ones(SHAPE)

    @jax.jit
    def all_passes(x, weights):
        def of(function):
            y, pullback = jax.vjp(function, x, weights)
            return y, *pullback(x)

        return of(scanned), of(unrolled)

    ours, theirs = all_passes(x, weights)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for gradient, expected in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    first, second = (Draw(jax.random.fold_in(key, i)).keep(RATE, SHAPE) for i in (0, 1))
    assert (first != second).any()


def test_a_loop_with_a_traced_step_equals_python_steps(key):
    x = jnp.ones(SHAPE)
    looped = lax.fori_loop(0, 3, lambda i, x: f(jax.random.fold_in(key, i), x), x)
    for i in range(3):
        x = f(jax.random.fold_in(key, i), x)
    np.testing.assert_array_equal(looped, x)


def test_evaluation_shape_and_ahead_of_time_compilation(key):
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    assert jax.eval_shape(f, key, x).dtype == jnp.bfloat16
    compiled = jax.jit(f).lower(key, jnp.ones(SHAPE)).compile()
    np.testing.assert_array_equal(compiled(key, jnp.ones(SHAPE)), f(key, jnp.ones(SHAPE)))


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_export_for_cpu_cuda_and_tpu(differentiate, key):
    def loss(key, x):
        return f(key, jnp.sin(x)).sum()

    function = jax.grad(loss, argnums=1) if differentiate else f
    x = jnp.linspace(0, 1, 370).reshape(SHAPE)
    exported = export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(key, x)
    restored = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(restored.call(key, x), jax.jit(function)(key, x))
