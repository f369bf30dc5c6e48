"""Every transformation: the backward mask is the forward mask, and the values do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.test_util import check_grads

import jdropout
from jdropout.testing import assert_backward_uses_forward_mask

SHAPE = (37, 10)
RATE = 0.4


@pytest.fixture
def mask(key):
    return np.asarray(jdropout.keep_mask(key, RATE, SHAPE))


def scale():
    return np.float32(1 / (1 - jdropout.effective_rate(RATE)))


def f(key, x):
    return jdropout.dropout(key, x, RATE)


def assert_jacobian_is_the_mask(function, mask):
    """Checks both modes of a function that is dropout on ones: y, pullback and pushforward."""
    x = jnp.ones(SHAPE)
    expected = np.where(mask, scale(), 0)
    y, pullback = jax.vjp(function, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pullback(x)[0], expected)
    np.testing.assert_array_equal(jax.jvp(function, (x,), (x,))[1], expected)
    np.testing.assert_array_equal(jax.grad(lambda x: function(x).sum())(x), expected)


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
    "jit of jit": lambda f: jax.jit(jax.jit(f)),
    "checkpoint": jax.checkpoint,
    "checkpoint of jit": lambda f: jax.checkpoint(jax.jit(f)),
    "checkpoint of checkpoint": lambda f: jax.checkpoint(jax.checkpoint(f)),
    "checkpoint without cse": lambda f: jax.checkpoint(f, prevent_cse=False),
    **{
        f"checkpoint {name}": lambda f, policy=policy: jax.jit(jax.checkpoint(f, policy=policy))
        for name, policy in POLICIES.items()
    },
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
    assert_jacobian_is_the_mask(WRAPPERS[name](lambda x: f(key, x)), mask)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_forward_and_backward_masks_agree_for_every_key_implementation(impl, wrap):
    key = jax.random.key(3, impl=impl)
    mask = np.asarray(jdropout.keep_mask(key, RATE, SHAPE))
    assert_jacobian_is_the_mask(wrap(lambda x: f(key, x)), mask)
    assert_jacobian_is_the_mask(wrap(lambda x: f(jax.random.key_data(key), x)), mask)


@pytest.mark.parametrize("options", [{"precision": 32}, {"broadcast_dims": (0,)}])
def test_forward_and_backward_masks_agree_with_options(options, key):
    mask = np.asarray(jdropout.keep_mask(key, 0.5, SHAPE, **options))
    x = jnp.ones(SHAPE)

    def layer(x):
        return jdropout.dropout(key, x, 0.5, **options)

    y, pullback = jax.vjp(layer, x)
    np.testing.assert_array_equal(y, np.where(mask, 2, 0))
    np.testing.assert_array_equal(pullback(x)[0], np.where(mask, 2, 0))
    assert_backward_uses_forward_mask(layer, x)


def test_jacobians_of_both_modes_are_diagonal_and_equal_the_mask(key):
    x = jnp.arange(1.0, 13.0).reshape(6, 2)
    mask = np.asarray(jdropout.keep_mask(key, RATE, x.shape)).reshape(-1)
    for mode in (jax.jacfwd, jax.jacrev):
        jacobian = mode(lambda x: f(key, x))(x).reshape(12, 12)
        np.testing.assert_array_equal(jacobian, np.diag(np.where(mask, scale(), 0)))


def test_higher_orders_and_mixed_modes(key):
    def g(x):
        return f(key, jnp.sin(f(key, x) * x)).sum()

    x = jax.random.normal(jax.random.key(1), (7, 3))
    check_grads(g, (x,), order=3, modes=["fwd", "rev"], rtol=0.05)
    forward_over_reverse = jax.jvp(jax.grad(g), (x,), (x,))[1]
    hessian = jax.hessian(g)(x).reshape(21, 21)
    np.testing.assert_allclose(
        forward_over_reverse.reshape(-1), hessian @ x.reshape(-1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-4, atol=1e-5)


def test_linear_transpose_is_its_own_adjoint(key):
    x = jax.random.normal(jax.random.key(1), SHAPE)
    (transposed,) = jax.linear_transpose(lambda x: f(key, x), x)(x)
    np.testing.assert_array_equal(transposed, f(key, x))


def test_vmap_over_inputs_shares_the_mask(key, mask):
    x = jnp.ones((3, *SHAPE))
    y = jax.vmap(f, in_axes=(None, 0))(key, x)
    np.testing.assert_array_equal(y, np.broadcast_to(np.where(mask, scale(), 0), x.shape))


def test_vmap_over_keys_rates_and_flags_equals_the_loop():
    keys = jax.random.split(jax.random.key(1), 3)
    rates, flags = jnp.array([0.1, 0.5, 0.9]), jnp.array([False, True, False])
    x = jnp.ones((3, *SHAPE))

    def one(key, x, rate, flag):
        return jdropout.dropout(key, x, rate, deterministic=flag)

    batched = jax.vmap(one)(keys, x, rates, flags)
    for i in range(3):
        np.testing.assert_array_equal(batched[i], one(keys[i], x[i], rates[i], flags[i]))
    gradients = jax.vmap(jax.grad(lambda k, x, r, d: one(k, x, r, d).sum(), argnums=1))
    np.testing.assert_array_equal(gradients(keys, x, rates, flags), batched)


def test_vmap_along_any_axis_equals_the_loop(key):
    x = jax.random.normal(key, (6, 5, 4))
    for axis in range(3):
        y = jax.vmap(lambda x: f(key, x), in_axes=axis, out_axes=axis)(x)
        for i in range(x.shape[axis]):
            row = jnp.take(x, i, axis=axis)
            np.testing.assert_array_equal(jnp.take(y, i, axis=axis), f(key, row))


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
    np.testing.assert_array_equal(scanned(x, weights), unrolled(x, weights))
    for argument in (0, 1):
        ours = jax.grad(lambda *a: scanned(*a).sum(), argument)(x, weights)
        theirs = jax.grad(lambda *a: unrolled(*a).sum(), argument)(x, weights)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    masks = [
        np.asarray(jdropout.keep_mask(jax.random.fold_in(key, i), RATE, SHAPE)) for i in (0, 1)
    ]
    assert (masks[0] != masks[1]).any()


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
