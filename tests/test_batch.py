"""Masks that do not depend on how a batch is cut into microbatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx
from jax import lax

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout import _batch
from jdropout._key_kinds import part_of
from jdropout.keys import at_site, in_batch, step_key
from jdropout.linen import with_site_keys
from jdropout.nnx import set_site_keys

KEY = jax.random.key(20140614)
SIZE = 16


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def in_parts(apply, x, number, axis=0):
    """The results of (key of the part, part of x) for all parts, in a scan, joined again."""
    parts = jnp.stack(jnp.split(x, number, axis))
    firsts = SIZE // number * jnp.arange(number)
    made = lax.map(
        lambda part: apply(in_batch(KEY, part[0], SIZE, axis=axis), part[1]), (firsts, parts)
    )
    return jnp.concatenate(list(made), axis)


def drop(key, x):
    return jdropout.dropout(key, x, 0.5)


# --- functions ----------------------------------------------------------------------------

# The others are in test_contract.py. All values are small integers, so that nothing is rounded.
FUNCTIONS = {
    "patch_dropout": lambda key, x: jdropout.patch_dropout(key, x, 0.5)[0],
    "route_tokens": lambda key, x: jdropout.route_tokens(key, lambda x, _: 2 * x, x, 0.5),
    "stochastic_depth": lambda key, x: jdropout.stochastic_depth(
        key, lambda x: 2 * x, x, 0.5, groups=4
    ),
    "keep_indices": lambda key, x: jdropout.keep_indices(key, 0.5, 12, shape=x.shape[:1]),
    "unit_subset": lambda key, x: units(key, x, 1),
    "unit_subset, tiles": lambda key, x: units(key, x, 4),
    "layer_drop": lambda key, x: jdropout.layer_drop(key, lambda x: 2 * x, x, 0.5),
    "multi_sample": lambda key, x: jdropout.multi_sample(
        lambda key, x: jdropout.dropout(key, x, 0.5), key, x, 2
    ),
    "attention": lambda key, x: attention(key, x),
    "attention, heads before": lambda key, x: attention(key, x, broadcast_dims=(1,)),
    "rows of examples": lambda key, x: jdropout.dropout(
        with_count(key, x), x.reshape(-1, 4), 0.5
    ).reshape(x.shape),
    "a row for all": lambda key, x: x + jdropout.dropout(with_count(key, x), x[:1] * 0 + 1, 0.5),
}


def units(key, x, tiles):
    weights = jnp.arange(12.0).reshape(3, 4)

    def block(w, v, x):
        return (x[..., 0] @ w) @ v

    return jdropout.unit_subset(key, block, weights, weights.T, x[:, :3], 0.5, tiles=tiles)


def attention(key, x, broadcast_dims=()):
    """Of queries and keys that are zero: every weight is 1/4 or dropped."""
    zeros, values = jnp.zeros((len(x), 4, 2, 4)), x[:, :4, None] * jnp.ones((1, 1, 2, 1))
    return jdropout.dot_product_attention(
        zeros, zeros, values, dropout_key=key, dropout_rate=0.5,
        dropout_broadcast_dims=broadcast_dims,
    )  # fmt: skip


def with_count(key, x):
    """The key with the number of examples, as a user makes it who knows it."""
    part = part_of(key)
    return key if part is None else _batch.with_count(key, len(x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_parts_of_a_function_are_those_of_the_whole(name):
    x = jnp.round(4 * normal(SIZE, 12, 4))

    @jax.jit
    def whole_and_parts(x):
        return FUNCTIONS[name](KEY, x), in_parts(FUNCTIONS[name], x, 4)

    whole, parts = whole_and_parts(x)
    assert_same(parts, whole)
    if name not in ("layer_drop", "unit_subset", "a row for all"):  # one decision for all
        quarters = np.asarray(whole).reshape(4, SIZE // 4, -1)
        assert len({quarter.tobytes() for quarter in quarters}) == 4


def test_a_ragged_last_part_and_parts_of_one_have_the_masks_of_the_whole():
    x = np.ones((10, 7), np.float32)
    whole = jdropout.dropout(KEY, x, 0.5)
    parts = [
        jdropout.dropout(in_batch(KEY, first, 10), x[first:end], 0.5)
        for first, end in ((0, 4), (4, 8), (8, 9), (9, 10))
    ]
    assert_same(jnp.concatenate(parts), whole)


def test_batches_that_do_not_come_first_need_the_axis_and_the_size():
    """The size of an inner axis counts in the positions of the outer ones."""
    x = jnp.ones((3, SIZE, 5))
    assert_same(jax.jit(functools.partial(in_parts, drop, number=4, axis=1))(x), drop(KEY, x))
    locked = functools.partial(jdropout.locked_dropout, rate=0.5, time_axis=0)
    one = in_batch(KEY, 4, SIZE)  # axis 0, but the function knows its own
    assert_same(locked(one, x[:, 4:8]), locked(KEY, x)[:, 4:8])


# --- keys ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "impl",
    ["threefry2x32", "raw"]
    + [
        pytest.param(impl, marks=pytest.mark.one_version)
        for impl in ("rbg", "unsafe_rbg", "raw of 4")
    ],
)
def test_keys_derived_from_the_key_of_a_part_are_for_the_part(impl):
    if impl.startswith("raw"):
        root = jnp.arange(4 if impl == "raw of 4" else 2, dtype=jnp.uint32)
        typed = jax.random.wrap_key_data(root, impl="rbg" if root.size == 4 else "threefry2x32")
    else:
        root = typed = jax.random.key(3, impl=impl)
    x = np.ones((4, 6), np.float32)
    part = in_batch(root, 8, SIZE)

    @jax.jit
    def masks(part, typed):
        def derived(key):
            return [
                jax.random.fold_in(key, 7),
                *jax.random.split(key, 2),
                at_site(key, ("decoder", 3)),
                step_key(key, step=5),
                jax.random.wrap_key_data(jax.random.key_data(key), impl=jax.random.key_impl(key)),
            ]

        place = dict(start=(8, 0), global_shape=(SIZE, 6))
        return (
            [jdropout.dropout(key, x, 0.5) for key in derived(part)],
            [jdropout.dropout(key, x, 0.5, **place) for key in derived(typed)],
        )

    for mask, expected in zip(*masks(part, typed), strict=True):
        assert_same(mask, expected)
    assert jax.random.key(0, impl=jax.random.key_impl(part)).dtype == part.dtype


def test_numbers_from_jax_differ_between_parts():
    a, b = (jax.random.bits(in_batch(KEY, first, SIZE), (8,)) for first in (0, 4))
    assert not np.array_equal(a, b)


def test_the_part_of_a_key_is_replaced():
    key = in_batch(in_batch(KEY, 4, 8), 2, SIZE, axis=1)
    assert key.dtype == in_batch(KEY, 0, SIZE, axis=1).dtype
    assert_same(jax.random.key_data(key)[:2], jax.random.key_data(KEY))


def test_the_key_reuse_checker_sees_a_key_of_a_part():
    x = jnp.ones((4, 8))
    key = in_batch(KEY, 4, SIZE)
    with jax.debug_key_reuse(True):
        jax.jit(jax.grad(lambda x: jnp.sin(drop(key, x)).sum()))(x)
        with pytest.raises(jax.errors.KeyReuseError):
            jax.jit(lambda key, x: drop(key, x) + drop(key, x))(key, x)


def test_an_audit_sees_that_microbatches_have_masks_of_their_own():
    def microbatches(key, x):
        firsts = 4 * jnp.arange(4)
        return lax.map(lambda part: drop(in_batch(key, part[0], SIZE), part[1]), (firsts, x))

    x = jnp.ones((4, 4, 8))
    assert not jdropout.audit(microbatches, KEY, x).findings
    same = jdropout.audit(lambda key, x: lax.map(functools.partial(drop, key), x), KEY, x)
    assert same.findings


ERRORS = {
    "float": (lambda x: in_batch(KEY, 1.0, SIZE), TypeError, r"first must be an integer .*1\.0"),
    "array": (lambda x: jax.jit(in_batch, static_argnums=2)(KEY, x, 4), TypeError, "first must"),
    "several": (
        lambda x: jax.jit(in_batch, static_argnums=2)(KEY, jnp.arange(2), 4),
        ValueError,
        r"first must be a scalar, got an array of shape \(2,\)",
    ),
    "negative": (lambda x: in_batch(KEY, -1, SIZE), ValueError, "at most 15, .* got -1"),
    "after the end": (lambda x: in_batch(KEY, 14, SIZE, count=4), ValueError, "most 12, .* got 14"),
    "huge": (lambda x: in_batch(KEY, 0, 2**32), ValueError, r"size must be below 2\*\*32, got"),
    "no size": (lambda x: in_batch(KEY, 0, 0), ValueError, "size must be at least 1, got 0"),
    "negative axis": (lambda x: in_batch(KEY, 0, 4, axis=-1), ValueError, "at least 0, got -1"),
    "no key": (lambda x: in_batch(None, 0, 4), ValueError, "key is None"),
    "outside": (lambda x: drop_part(x, 13, SIZE), ValueError, "4 rows .* begin at row 13"),
    "too many rows": (lambda x: drop_part(x, 0, 3), ValueError, "4 rows .* the batch has 3 examp"),
    "other rows": (lambda x: drop_part(x, 0, SIZE, count=3), ValueError, "multiple of the 3 exam"),
    "too many": (lambda x: drop_part(x, 0, 2**31, count=1), ValueError, r"fewer than 2\*\*32 rows"),
    "no such axis": (lambda x: drop_part(x, 0, SIZE, axis=3), ValueError, r"axis 3, but .* \(4, 6"),
    "groups": (
        lambda x: jdropout.stochastic_depth(in_batch(KEY, 0, SIZE), jnp.sin, x, 0.5, groups=2),
        ValueError,
        "2 of 16 examples do not also divide its part of 4",
    ),
    "within a group": (
        lambda x: jdropout.stochastic_depth(in_batch(KEY, 2, SIZE), jnp.sin, x, 0.5, groups=4),
        ValueError,
        "begins at row 2, within a group or tile of 4",
    ),
    "a number": (lambda x: set_site_keys(Model(), KEY, step=0, batch=4), TypeError, "got 4"),
    "two ways": (
        lambda x: set_site_keys(Model(), KEY, step=0, microbatch=1, batch=(0, 4)),
        ValueError,
        "microbatch must not be given with batch, got 1",
    ),
}  # fmt: skip


def drop_part(x, *part, **options):
    return jdropout.dropout(in_batch(KEY, *part, **options), x, 0.5)


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_named(name):
    call, error, match = ERRORS[name]
    with pytest.raises(error, match=match):
        call(jnp.ones((4, 6)))


# --- models -------------------------------------------------------------------------------


class Model(nnx.Module):
    """A model that knows nothing of parts, with layers of every kind; integers stay integers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(4, 4, kernel_init=UNIFORM, rngs=rngs)
        self.linear.kernel[...] = jnp.round(8 * self.linear.kernel[...])
        self.weights = jdropout.nnx.DropConnect(self.linear, 0.5, rngs=rngs)
        self.path = jdropout.nnx.DropPath(0.5, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(0.5, rngs=rngs)
        self.shared = jdropout.nnx.SpatialDropout(0.5, rngs=rngs)
        self.depth = jdropout.nnx.StochasticDepth(jnp.negative, 0.5, groups=4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            1, 4, dropout_rate=0.5, attention_fn=jdropout.nnx.dot_product_attention,
            kernel_init=nnx.initializers.zeros, use_bias=False, decode=False, rngs=rngs,
        )  # fmt: skip
        # Queries and keys are 0, so all weights are equal.
        for part in (self.attention.value, self.attention.out):
            part.kernel[...] = jnp.ones_like(part.kernel[...])
        self.time_major = jdropout.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = x + self.path(self.weights(x))
        x = self.depth(self.shared(self.dropout(x)))
        x = x + self.attention(x, deterministic=False)
        return jnp.swapaxes(self.time_major(jnp.swapaxes(x, 0, 1)), 0, 1)


def axis_of(path):
    return 1 if path[0] == "time_major" else 0


def test_an_unchanged_nnx_model_has_the_masks_and_gradients_of_the_whole_batch():
    structure, params, rest = nnx.split(Model(), nnx.Param, ...)
    x = jnp.round(4 * normal(SIZE, 4, 4))

    def output(params, x, **part):
        model = nnx.merge(structure, params, rest, copy=True)
        set_site_keys(model, KEY, step=7, batch_axis=axis_of, **part)
        return model(x)

    @jax.jit
    def whole(params):
        y, pullback = jax.vjp(lambda params: output(params, x), params)
        return jax.tree.leaves(pullback(jnp.ones_like(y))), y

    @jax.jit
    def accumulated(params):
        @jax.checkpoint
        def loss(params, first, x):
            y = output(params, x, batch=(first, SIZE))
            return y.sum(), y

        def add(total, part):
            gradient, y = jax.grad(loss, has_aux=True)(params, *part)
            return jax.tree.map(jnp.add, total, gradient), y

        parts = (4 * jnp.arange(4), x.reshape(4, 4, *x.shape[1:]))
        gradient, y = lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        return jax.tree.leaves(gradient), y.reshape(x.shape)

    jax.tree.map(assert_same, accumulated(params), whole(params))


def test_stacked_layers_keep_the_part():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def layers(rngs):
        return jdropout.nnx.Dropout(0.5, rngs=rngs)

    stack = layers(nnx.Rngs(0))
    x = jnp.ones((SIZE, 6))
    call = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=1)
    set_site_keys(stack, KEY, step=7)
    whole = call(stack, x)
    set_site_keys(stack, KEY, step=7, batch=(4, SIZE))
    assert_same(call(stack, x[4:8]), whole[4:8])


def test_a_model_in_the_carry_of_a_scan_keeps_its_keys_kind():
    model = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    set_site_keys(model, KEY, step=0, batch=(0, SIZE))

    @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
    def parts(model, first, x):
        set_site_keys(model, KEY, step=7, batch=(first, SIZE))
        return model, model(x)

    model, made = parts(model, 4 * jnp.arange(4), jnp.ones((4, 4, 6)))
    set_site_keys(model, KEY, step=7)
    assert_same(made.reshape(SIZE, 6), model(jnp.ones((SIZE, 6))))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.remat(jdropout.linen.Dropout)(0.5, deterministic=False)(x)
        x = jdropout.linen.GaussianNoise(1.0, deterministic=False)(x)
        x = linen.MultiHeadDotProductAttention(
            1, dropout_rate=0.5, deterministic=False, kernel_init=linen.initializers.ones,
            attention_fn=jdropout.linen.dot_product_attention,
        )(jnp.round(x))  # fmt: skip
        time_major = jdropout.linen.Dropout(0.5, deterministic=False, name="time_major")
        return jnp.swapaxes(time_major(jnp.swapaxes(x, 0, 1)), 0, 1)


def test_an_unchanged_linen_model_has_the_masks_of_the_whole_batch():
    model, x = LinenModel(), jnp.round(4 * normal(SIZE, 4, 4))
    params = model.init({"params": KEY, "dropout": KEY}, x[:1])

    @jax.jit
    def outputs(first, x):
        part = dict(batch=(first, SIZE), batch_axis=axis_of)
        return with_site_keys(model.apply, KEY, step=7, **part)(params, x)

    whole = outputs(0, x)
    for first in range(0, SIZE, 4):
        np.testing.assert_allclose(
            outputs(first, x[first : first + 4]), whole[first : first + 4], rtol=1e-5
        )
    dropped = np.asarray(whole) == 0
    assert_same(np.concatenate([outputs(f, x[f : f + 8]) == 0 for f in (0, 8)]), dropped)
    assert 0.3 < dropped.mean() < 0.7
