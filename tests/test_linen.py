"""jdropout.linen.Dropout keeps the contract of flax.linen.Dropout: only the bits are its own.

What it shares with the other layers is in test_modules.py.
"""

import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import normal
from flax import errors, linen

import jdropout
import jdropout.linen

Dropout = jdropout.linen.Dropout

both = pytest.mark.parametrize(
    "module", [linen.Dropout, Dropout], ids=["flax.linen.Dropout", "jdropout.linen.Dropout"]
)


def ones(*shape):
    return np.ones(shape, np.float32)


def drop(key, x, rate, **options):
    """What a module that is no submodule gives for the key of its stream."""
    return Dropout(rate, deterministic=False, **options).apply({}, x, rngs={"dropout": key})


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_different(actual, expected):
    assert actual.shape == expected.shape
    assert not np.array_equal(np.asarray(actual), np.asarray(expected))


def distinct(arrays):
    return len({np.asarray(array).tobytes() for array in arrays})


class Recorder(linen.Module):
    """Gives the key that a submodule of the same path takes from the stream."""

    rng_collection: str = "dropout"

    @linen.compact
    def __call__(self):
        return self.make_rng(self.rng_collection)


# --- the interface ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_signatures_are_those_of_flax(method):
    def parameters(module):
        signature = inspect.signature(getattr(module, method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(Dropout) == parameters(linen.Dropout)


def test_it_is_a_flax_dropout_of_the_same_name_and_text():
    layer = Dropout(0.25, broadcast_dims=(1,))
    assert isinstance(layer, linen.Dropout)
    assert repr(layer) == repr(linen.Dropout(0.25, broadcast_dims=(1,)))


def test_equal_configurations_are_equal_and_clone_changes_one():
    layer = Dropout(0.25, (1,), False, "noise")
    assert layer == Dropout(
        rate=0.25, broadcast_dims=(1,), deterministic=False, rng_collection="noise"
    )
    assert hash(layer) == hash(layer.clone())
    changed = layer.clone(rate=0.5)
    assert isinstance(changed, Dropout)
    assert (changed.rate, changed.broadcast_dims, changed.rng_collection) == (0.5, (1,), "noise")


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
def test_rate_outside_the_unit_interval_is_refused(rate, deterministic, key):
    with pytest.raises(ValueError, match=rf"rate must be in \[0, 1\], got {rate}"):
        Dropout(rate).apply({}, ones(2), deterministic=deterministic, rngs={"dropout": key})


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rate", [True, False, "0.5", None])
def test_rate_that_is_not_a_number_is_refused(rate, deterministic, key):
    with pytest.raises(TypeError, match="rate must be a number"):
        Dropout(rate).apply({}, ones(2), deterministic=deterministic, rngs={"dropout": key})


def test_integer_input_is_refused(key):
    with pytest.raises(TypeError, match=r"x must be a floating-point.*int32.*astype"):
        drop(key, jnp.arange(4), 0.5)


# --- where keys come from -----------------------------------------------------------------


@pytest.mark.parametrize(("rate", "broadcast_dims"), [(0.1, [1]), (1e-4, (0, -1))])
def test_result_is_the_function_at_the_key_of_the_stream(rate, broadcast_dims, key):
    x = normal(16, 3, 40)
    taken = Recorder().apply({}, rngs={"dropout": key})
    expected = jdropout.dropout(taken, x, rate, broadcast_dims=broadcast_dims)
    assert_same(drop(key, x, rate, broadcast_dims=broadcast_dims), expected)
    assert_different(x, expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_output_has_the_dtype_of_the_input(dtype, key):
    x = jax.ShapeDtypeStruct((4, 8), dtype)
    y = jax.eval_shape(lambda x: drop(key, x, 0.3), x)
    assert (y.shape, y.dtype) == (x.shape, dtype)


@both
def test_rng_argument_replaces_the_stream(module, key):
    x = ones(8, 16)
    layer = module(0.5, deterministic=False)
    with_argument = layer.apply({}, x, rng=key)
    assert_same(layer.apply({}, x, rng=key, rngs={"dropout": jax.random.key(5)}), with_argument)
    assert_different(layer.apply({}, x, rngs={"dropout": key}), with_argument)


def test_rng_argument_is_the_very_key_of_the_mask(key):
    x = ones(8, 16)
    expected = jdropout.dropout(key, x, 0.5)
    layer = Dropout(0.5, deterministic=False)
    assert_same(layer.apply({}, x, rng=key), expected)
    assert_same(layer.apply({}, x, rng=jax.random.key_data(key)), expected)


def test_one_key_passed_to_two_submodules_gives_them_one_mask(key):
    class Twins(linen.Module):
        @linen.compact
        def __call__(self, x):
            shared = self.make_rng("dropout")
            first = Dropout(0.5, deterministic=False)(x, rng=shared)
            second = Dropout(0.5, deterministic=False)(x, rng=jax.random.clone(shared))
            return first, second

    first, second = Twins().apply({}, ones(20, 20), rngs={"dropout": key})
    assert_same(first, second)
    assert 0 < int((first == 0).sum()) < first.size


class Stack(linen.Module):
    """Two dropout layers on one stream."""

    module: type = Dropout

    @linen.compact
    def __call__(self, x):
        first = self.module(0.5, deterministic=False)(x)
        second = self.module(0.5, deterministic=False)(x)
        return first, second


def test_two_submodules_under_one_key_have_different_masks(key):
    first, second = Stack().apply({}, ones(8, 16), rngs={"dropout": key})
    assert_different(first, second)


def test_two_calls_of_one_submodule_have_different_masks(key):
    class Twice(linen.Module):
        @linen.compact
        def __call__(self, x):
            layer = Dropout(0.5, deterministic=False)
            return layer(x), layer(x)

    first, second = Twice().apply({}, ones(8, 16), rngs={"dropout": key})
    assert_different(first, second)


class Spy(linen.Module):
    """Runs a dropout, then shows the stream's next key: it tells whether a key was taken."""

    module: type
    rate: float
    deterministic: bool

    @linen.compact
    def __call__(self, x):
        linen.share_scope(self, layer := self.module(self.rate))
        layer(x, deterministic=self.deterministic)
        return jax.random.key_data(layer.make_rng("dropout"))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("rate", [0, 0.0, 1e-12, 0.5, 1, 1.0])
def test_a_call_takes_a_key_exactly_where_flax_takes_one(rate, deterministic, key):
    ours, theirs, none = (
        Spy(module, rate, flag).apply({}, ones(2), rngs={"dropout": key})
        for module, flag in [
            (Dropout, deterministic),
            (linen.Dropout, deterministic),
            (linen.Dropout, True),
        ]
    )
    assert_same(ours, theirs)
    taken = not np.array_equal(ours, none)
    assert taken is (not deterministic and rate not in (0, 1))


@pytest.mark.parametrize("stream", ["noise", "params"])
def test_rng_collection_names_the_stream(stream, key):
    x = ones(8, 16)
    layer = Dropout(0.5, deterministic=False, rng_collection=stream)
    y = layer.apply({}, x, rngs={stream: key, "dropout": jax.random.key(1)})
    assert_same(y, jdropout.dropout(Recorder(stream).apply({}, rngs={stream: key}), x, 0.5))


@both
def test_missing_stream_is_an_error_that_names_it(module, key):
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "dropout"'):
        module(0.5, deterministic=False).apply({}, ones(2))
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "noise"'):
        module(0.5, deterministic=False, rng_collection="noise").apply(
            {}, ones(2), rngs={"dropout": key}
        )


@pytest.mark.parametrize("true", [True, np.True_, np.asarray(True), jnp.asarray(True)], ids=repr)
@both
def test_no_key_is_needed_in_evaluation(module, true):
    assert_same(module(0.5).apply({}, ones(3, 4), deterministic=true), ones(3, 4))
    assert_same(module(0.5, deterministic=true).apply({}, ones(3, 4)), ones(3, 4))


@both
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_key_is_needed_at_rate_0_and_1(module, rate):
    assert_same(module(rate, deterministic=False).apply({}, ones(3)), (1 - rate) * ones(3))


def test_batch_of_keys_is_refused(key):
    with pytest.raises(ValueError, match=r"single key.*\(3,\).*vmap"):
        Dropout(0.5, deterministic=False).apply({}, ones(2), rng=jax.random.split(key, 3))


def test_params_stream_serves_where_there_is_no_other(key):
    x = ones(4, 32)
    layer = Dropout(0.5, deterministic=False)
    assert_same(layer.apply({}, x, rngs=key), layer.apply({}, x, rngs={"params": key}))
    assert_different(layer.apply({}, x, rngs=key), x)


# --- deterministic ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("place", ["constructor", "call"])
def test_flag_may_be_given_in_either_place(module, place, flag, key):
    constructor, call = ({"deterministic": flag}, {})[:: 1 if place == "constructor" else -1]
    y = module(0.5, **constructor).apply({}, ones(4, 32), **call, rngs={"dropout": key})
    assert bool((y == 0).any()) is not flag


@both
@pytest.mark.parametrize("constructor", [False, True])
@pytest.mark.parametrize("call", [False, True])
def test_flag_given_in_both_places_is_an_error(module, constructor, call, key):
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        module(0.5, deterministic=constructor).apply(
            {}, ones(2), deterministic=call, rngs={"dropout": key}
        )


@both
def test_flag_given_nowhere_is_an_error(module, key):
    with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
        module(0.5).apply({}, ones(2), rngs={"dropout": key})


def test_traced_flag_works_in_both_values_without_a_retrace(key):
    x = ones(8, 32)
    traces = []

    @jax.jit
    def call(x, deterministic):
        traces.append(x.shape)
        return Dropout(0.5).apply({}, x, deterministic=deterministic, rngs={"dropout": key})

    assert_same(call(x, True), x)
    assert_same(call(x, False), drop(key, x, 0.5))
    assert len(traces) == 1


def test_traced_rate_works_without_a_retrace(key):
    x = ones(8, 32)
    traces = []

    @jax.jit
    def call(x, rate):
        traces.append(x.shape)
        return drop(key, x, rate)

    for rate in (0.0, 0.5, 1.0):
        assert_same(call(x, rate), drop(key, x, rate))
    assert len(traces) == 1


# --- masks --------------------------------------------------------------------------------


def test_rate_0_keeps_all_and_rate_1_drops_all_with_clean_gradients(key):
    x = np.array(normal(20, 20))
    x[0, 0] = np.inf
    assert_same(drop(key, x, 0.0), x)
    assert_same(drop(key, x, 1.0), np.zeros_like(x))
    gradient = jax.jit(jax.grad(lambda x, rate: drop(key, x, rate).sum()), static_argnames="rate")
    for rate, slope in [(0.0, 1.0), (1.0, 0.0)]:
        assert_same(gradient(x, rate=rate), np.full_like(x, slope))


# --- variables ----------------------------------------------------------------------------


def test_init_makes_no_variables_and_needs_no_dropout_key(key):
    assert Dropout(0.5).init({}, ones(2), deterministic=True) == {}
    assert Dropout(0.5, deterministic=False).init(key, ones(2)) == {}
    assert Dropout(0.5, deterministic=False).init({"dropout": key}, ones(2)) == {}


class MLP(linen.Module):
    features: int = 64
    rate: float = 0.2
    module: type = Dropout

    @linen.compact
    def __call__(self, x, *, training):
        kernel_init = linen.initializers.lecun_uniform()
        x = linen.relu(linen.Dense(self.features, kernel_init=kernel_init)(x))
        x = self.module(self.rate, deterministic=not training)(x)
        return linen.Dense(1, kernel_init=kernel_init)(x)


def test_variables_of_a_model_are_those_it_has_with_flax(key):
    @jax.jit
    def init(key):
        return [
            MLP(module=module).init(key, ones(2, 4), training=True)
            for module in (Dropout, linen.Dropout)
        ]

    ours, theirs = init(key)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_same(mine, other)
    assert set(ours) == {"params"}
    assert set(ours["params"]) == {"Dense_0", "Dense_1"}


@both
def test_tabulate_lists_it_under_the_name_of_flax(module, key):
    table = MLP(module=module).tabulate(
        {"params": key, "dropout": key}, ones(2, 4), training=True, console_kwargs={"width": 120}
    )
    (row,) = (line for line in table.splitlines() if "Dropout_0" in line)
    assert row.count("[2,64]") == 2, "its input and its output"


# --- transformations ----------------------------------------------------------------------


class Layer(linen.Module):
    """Drops a one at every step, so that the output shows every mask."""

    @linen.compact
    def __call__(self, carry, x):
        return carry + 1, Dropout(0.5, deterministic=False)(jnp.ones_like(x))


def test_scan_gives_every_layer_its_own_mask_where_the_stream_is_split(key):
    @jax.jit
    def scans(key, xs):
        outputs = {}
        for layer, split in itertools.product((Layer, linen.remat(Layer)), (False, True)):
            scan = linen.scan(layer, split_rngs={"dropout": split})()
            outputs[layer.__name__, split] = scan.apply({}, jnp.int32(0), xs, rngs={"dropout": key})
        return outputs

    outputs = scans(key, ones(5, 4, 16))
    assert len(outputs) == 4
    for (_, split), (steps, masks) in outputs.items():
        assert steps == 5
        assert distinct(masks) == (5 if split else 1)
        assert {float(value) for value in np.unique(masks)} == {0.0, 2.0}


def test_scan_is_differentiated_with_the_masks_of_the_forward_pass(key):
    class Chain(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return Dropout(0.25, deterministic=False)(x), None

    scan = linen.scan(Chain, split_rngs={"dropout": True}, length=3)

    @jax.jit
    def value_and_gradient(x):
        def total(x):
            y = scan().apply({}, x, None, rngs={"dropout": key})[0]
            return y.sum(), y

        (_, y), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return y, gradient

    y, gradient = value_and_gradient(ones(4, 64))
    assert 0 < int((y == 0).sum()) < y.size
    assert_same(gradient, y)


def test_vmap_gives_every_example_its_own_mask_where_the_stream_is_split(key):
    @jax.jit
    def call(key, x):
        return [
            linen.vmap(Dropout, split_rngs={"dropout": split})(0.5, deterministic=False).apply(
                {}, x, rngs={"dropout": key}
            )
            for split in (False, True)
        ]

    for y, number in zip(call(key, ones(5, 4, 16)), (1, 5), strict=True):
        assert distinct(y) == number
        assert {float(value) for value in np.unique(y)} == {0.0, 2.0}


# --- training -----------------------------------------------------------------------------


def trainer():
    """A plain optax loop: parameters, optimizer state and a key of the step number."""
    x = np.asarray(normal(64, 4))
    target = x[:, :1] * x[:, 1:2]
    model = MLP()
    start = jax.jit(lambda key: model.init(key, x, training=False))(jax.random.key(1))
    optimizer = optax.sgd(0.05, momentum=0.9)
    traces = []

    def loss(params, key):
        y = model.apply(params, x, training=True, rngs={"dropout": key})
        return jnp.mean((y - target) ** 2)

    @jax.jit
    def step(params, state, key, i):
        traces.append(i)
        value, gradients = jax.value_and_grad(loss)(params, jax.random.fold_in(key, i))
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    def train(seed, steps):
        params, state, losses = start, optimizer.init(start), []
        for i in range(steps):
            params, state, value = step(params, state, jax.random.key(seed), i)
            losses.append(float(value))
        assert len(traces) == 1
        return losses

    return train


def test_optax_loop_learns_and_is_reproduced_by_its_key():
    train = trainer()
    losses = train(seed=7, steps=150)
    assert losses[-1] < 0.5 * losses[0]
    assert train(seed=7, steps=5) == losses[:5]
    assert train(seed=8, steps=5) != losses[:5]
