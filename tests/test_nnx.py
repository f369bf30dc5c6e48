"""jdropout.nnx.Dropout keeps the contract of flax.nnx.Dropout: only the bits are its own.

What it shares with the other layers is in test_modules.py.
"""

import copy
import functools
import inspect
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import UNIFORM, normal
from flax import nnx

import jdropout
import jdropout.linen
import jdropout.nnx

Dropout = jdropout.nnx.Dropout

both = pytest.mark.parametrize(
    "module", [nnx.Dropout, Dropout], ids=["flax.nnx.Dropout", "jdropout.nnx.Dropout"]
)


def ones(*shape):
    return np.ones(shape, np.float32)


def key_of(layer):
    """The key that the next masked call of a layer takes from its own stream."""
    return jax.random.fold_in(layer.rngs.key[...], layer.rngs.count[...])


def count_of(stream):
    return int(stream.count[...])


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def assert_different(actual, expected):
    assert actual.shape == expected.shape
    assert not np.array_equal(np.asarray(actual), np.asarray(expected))


# --- the interface ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__init__", "__call__", "set_view", "set_attributes"])
def test_signatures_are_those_of_flax(method):
    def parameters(module):
        signature = inspect.signature(getattr(module, method))
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert parameters(Dropout) == parameters(nnx.Dropout)


def test_it_is_a_flax_dropout_of_the_same_name_and_text():
    layer = Dropout(0.25, broadcast_dims=(1,), rngs=nnx.Rngs(0))
    assert isinstance(layer, nnx.Dropout)
    assert repr(layer) == repr(nnx.Dropout(0.25, broadcast_dims=(1,), rngs=nnx.Rngs(0)))


def test_constructor_keeps_its_arguments_as_attributes():
    layer = Dropout(
        0.25, broadcast_dims=(0, 2), deterministic=True, rng_collection="noise", rngs=nnx.Rngs(0)
    )
    assert layer.rate == 0.25
    assert layer.broadcast_dims == (0, 2)
    assert layer.deterministic is True
    assert layer.rng_collection == "noise"
    assert isinstance(layer.rngs, nnx.RngStream)


@pytest.mark.parametrize("rate", [0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.asarray(0.5)])
def test_rate_is_kept_as_a_static_python_float(rate):
    layer = Dropout(rate, rngs=nnx.Rngs(0))
    assert type(layer.rate) is float
    assert layer.rate == rate


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf, np.float32(2)])
def test_rate_outside_the_unit_interval_is_refused_at_construction(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got (-0.1|1.1|nan|inf|2.0)"):
        Dropout(rate)


@pytest.mark.parametrize("rate", [True, False, np.True_, "0.5", None, 0.5j])
def test_rate_that_is_not_a_number_is_refused_at_construction(rate):
    with pytest.raises(TypeError, match="rate must be a number"):
        Dropout(rate)


def test_rate_that_is_an_array_is_refused_at_construction():
    with pytest.raises(TypeError, match=r"Python number.*leaf.*jdropout\.dropout\(key, x, rate\)"):
        Dropout(jnp.float32(0.5))
    with pytest.raises(TypeError, match="Python number"):
        jax.jit(lambda rate: Dropout(rate)(ones(2), deterministic=True))(0.5)
    with pytest.raises(ValueError, match=r"rate must be a scalar.*shape \(2,\)"):
        Dropout(np.array([0.5, 0.5]))


# --- where keys come from -----------------------------------------------------------------


def test_constructor_forks_the_stream_as_flax_does():
    streams = []
    for module in (nnx.Dropout, Dropout):
        rngs = nnx.Rngs(dropout=3, params=4)
        layer = module(0.5, rngs=rngs)
        assert layer.rngs is not rngs["dropout"]
        assert count_of(rngs["dropout"]) == 1
        layer(ones(2, 8))
        layer(ones(2, 8))
        assert count_of(layer.rngs) == 2
        assert count_of(rngs["dropout"]) == 1, "calling a layer must not move its parent stream"
        assert count_of(rngs["params"]) == 0
        streams.append(jax.random.key_data(layer.rngs.key[...]))
    assert_same(*streams)


def test_constructor_takes_a_stream_and_forks_it():
    rngs = nnx.Rngs(noise=3)
    layer = Dropout(0.5, rngs=rngs.noise)
    assert count_of(rngs.noise) == 1
    x = ones(4, 8)
    expected = jdropout.dropout(key_of(layer), x, 0.5)
    assert_same(layer(x), expected)


@pytest.mark.parametrize("fallback", ["dropout", "default"])
def test_rng_collection_names_the_stream_and_default_is_the_fallback(fallback):
    rngs = nnx.Rngs(**{fallback: 1, "noise": 2})
    named = Dropout(0.5, rng_collection="noise", rngs=rngs)
    unnamed = Dropout(0.5, rngs=rngs)
    assert count_of(rngs.noise) == 1
    assert_same(
        jax.random.key_data(unnamed.rngs.key[...]),
        jax.random.key_data(jax.random.fold_in(jax.random.key(1), 0)),
    )
    assert_different(named(ones(4, 8)), unnamed(ones(4, 8)))


@both
def test_missing_stream_is_an_error_that_names_it(module):
    with pytest.raises(KeyError, match="dropout"):
        module(0.5, rngs=nnx.Rngs(params=0))
    with pytest.raises(KeyError, match="dropout"):
        module(0.5)(ones(2), rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize(("rate", "broadcast_dims"), [(0.1, [1]), (1e-4, (0, -1))])
def test_result_is_the_function_at_the_key_of_the_stream(rate, broadcast_dims):
    layer = Dropout(rate, broadcast_dims=broadcast_dims, rngs=nnx.Rngs(5))
    x = normal(16, 3, 40)
    for call in range(3):
        taken = jax.random.fold_in(layer.rngs.key[...], call)
        expected = jdropout.dropout(taken, x, rate, broadcast_dims=broadcast_dims)
        assert_same(layer(x), expected)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_output_has_the_dtype_of_the_input(dtype):
    layer = Dropout(0.3)
    x = jax.ShapeDtypeStruct((4, 8), dtype)
    y = jax.eval_shape(lambda x: layer(x, rngs=jax.random.key(0)), x)
    assert (y.shape, y.dtype) == (x.shape, dtype)


def test_inner_and_outer_streams_of_one_seed_give_one_mask():
    inner = Dropout(0.5, rngs=nnx.Rngs(dropout=0))
    outer = Dropout(0.5)
    rngs = nnx.Rngs(dropout=0).fork()
    for _ in range(3):
        assert_same(inner(ones(2, 16)), outer(ones(2, 16), rngs=rngs))


@pytest.mark.parametrize(
    "rngs", [0, "dropout", np.array([0, 1], np.uint32), {"dropout": jax.random.key(0)}]
)
def test_rngs_of_another_type_are_refused_in_the_call(rngs):
    with pytest.raises(TypeError, match=f"rngs must be .*got {type(rngs).__name__}"):
        Dropout(0.5)(ones(2), rngs=rngs)


@both
@pytest.mark.parametrize("rngs", [0, jax.random.key(0)], ids=["int", "key"])
def test_rngs_of_another_type_are_refused_at_construction(module, rngs):
    with pytest.raises(TypeError, match="rngs must be a Rngs, RngStream or None"):
        module(0.5, rngs=rngs)


def test_batch_of_keys_is_refused():
    with pytest.raises(ValueError, match=r"single key.*\(3,\).*vmap"):
        Dropout(0.5)(ones(2), rngs=jax.random.split(jax.random.key(0), 3))


# --- how many keys are taken --------------------------------------------------------------


def keys_taken(module, rates, calls=3, jit=False, **flag):
    """How far calls move the constructor's stream, and a stream or Rngs given to the call.

    A list of the three for each rate.
    """
    layers = nnx.List([module(rate, rngs=nnx.Rngs(0)) for rate in rates])
    rngs = nnx.List([nnx.Rngs(dropout=0) for _ in rates])
    streams = nnx.List([nnx.Rngs(dropout=0)["dropout"] for _ in rates])

    def call(layers, rngs, streams, x):
        for layer, own, stream in zip(layers, rngs, streams, strict=True):
            layer(x, **flag)
            layer(x, rngs=own, **flag)
            layer(x, rngs=stream, **flag)

    for _ in range(calls):
        (nnx.jit(call) if jit else call)(layers, rngs, streams, ones(2))
    sources = zip((x.rngs for x in layers), (x["dropout"] for x in rngs), streams, strict=True)
    return [list(map(count_of, three)) for three in sources]


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_call_takes_a_key_exactly_where_flax_takes_one(deterministic, jit):
    rates = [0, 0.0, 1e-12, 0.5, 1, 1.0]
    counts = keys_taken(Dropout, rates, jit=jit, deterministic=deterministic)
    assert counts == keys_taken(nnx.Dropout, rates, jit=jit, deterministic=deterministic)
    assert counts == [[0 if deterministic or rate in (0, 1) else 3] * 3 for rate in rates]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("boolean", [np.bool_, np.asarray, jnp.asarray])
def test_a_concrete_boolean_of_any_type_takes_keys_as_in_flax(boolean, deterministic):
    flag, rates = boolean(deterministic), [0.0, 0.5, 1.0]
    counts = keys_taken(Dropout, rates, deterministic=flag)
    assert counts == keys_taken(nnx.Dropout, rates, deterministic=flag)
    assert counts == [[3 if rate == 0.5 and not deterministic else 0] * 3 for rate in rates]


@both
@pytest.mark.parametrize("true", [True, np.True_, np.asarray(True), jnp.asarray(True)], ids=repr)
def test_no_source_of_keys_is_needed_in_evaluation(module, true):
    assert_same(module(0.5)(ones(3, 4), deterministic=true), ones(3, 4))


@both
@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_no_source_of_keys_is_needed_at_rate_0_and_1(module, rate):
    assert_same(module(rate)(ones(3, 4)), (1 - rate) * ones(3, 4))


# --- deterministic ------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("constructor", "call", "drops"),
    [
        (False, None, True),
        (True, None, False),
        (False, True, False),
        (True, False, True),
        (None, True, False),
        (None, False, True),
    ],
)
def test_flag_of_the_call_precedes_that_of_the_constructor(module, constructor, call, drops):
    layer = module(0.5, deterministic=constructor, rngs=nnx.Rngs(0))
    x = ones(4, 32)
    y = layer(x, deterministic=call)
    assert bool((y == 0).any()) is drops
    assert count_of(layer.rngs) == drops


class Block(nnx.Module):
    """Linear, batch norm and dropout: three kinds of module for filters to tell apart."""

    def __init__(self, features_in, features_out, *, rngs, rate=0.5, dropout=Dropout):
        self.linear = nnx.Linear(features_in, features_out, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(features_out, use_running_average=False, rngs=rngs)
        self.dropout = dropout(rate, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.dropout(self.norm(self.linear(x))))


@pytest.mark.parametrize("kind", [nnx.Dropout, Dropout])
def test_set_attributes_finds_it_by_the_type_of_flax_and_by_its_own(kind):
    block = Block(2, 4, rngs=nnx.Rngs(0))
    block.set_attributes(kind, deterministic=True)
    assert block.dropout.deterministic is True
    assert block.norm.use_running_average is False
    block.set_attributes(nnx.BatchNorm, use_running_average=True)
    block.set_attributes(nnx.Linear, deterministic=False, raise_if_not_found=False)
    assert block.dropout.deterministic is True, "a filter for another type must not reach it"


def test_view_switches_a_copy_and_shares_the_stream():
    block = Block(2, 4, rngs=nnx.Rngs(0))
    training = nnx.view(block, deterministic=False, use_running_average=False)
    evaluation = nnx.view(block, deterministic=True, use_running_average=True)
    assert (training.dropout.deterministic, evaluation.dropout.deterministic) == (False, True)
    assert isinstance(evaluation.dropout, Dropout)
    assert evaluation.dropout.rngs.count is block.dropout.rngs.count
    training.dropout(ones(4, 2))
    assert count_of(evaluation.dropout.rngs) == 1
    evaluation.dropout(ones(4, 2))
    assert count_of(block.dropout.rngs) == 1


def test_view_finds_it_by_the_type_of_flax():
    block = Block(2, 4, rngs=nnx.Rngs(0))
    view = nnx.view(block, only=nnx.Dropout, deterministic=True)
    assert view.dropout.deterministic is True
    assert view.norm.use_running_average is False
    assert nnx.view(block, only=nnx.BatchNorm, use_running_average=True).dropout.deterministic is (
        False
    )


def test_set_view_without_a_flag_leaves_it_alone():
    layer = Dropout(0.5, deterministic=True)
    layer.set_view()
    assert layer.deterministic is True
    layer.set_view(deterministic=False)
    assert layer.deterministic is False


def test_traced_flag_works_in_both_values_without_a_retrace():
    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    x = ones(8, 32)
    key = key_of(layer)
    traces = []

    @nnx.jit
    def call(layer, x, deterministic):
        traces.append(x.shape)
        return layer(x, deterministic=deterministic)

    assert_same(call(layer, x, jnp.array(False)), jdropout.dropout(key, x, 0.5))
    assert_same(call(layer, x, jnp.array(True)), x)
    assert len(traces) == 1
    assert count_of(layer.rngs) == 2, "a traced flag has to take a key in either case"


def test_traced_flag_works_at_every_rate():
    x = ones(4, 64)
    layers = nnx.List([Dropout(rate, rngs=nnx.Rngs(0)) for rate in (0.0, 1.0, 0.1)])
    call = nnx.jit(lambda layers, x, flag: [layer(x, deterministic=flag) for layer in layers])
    for y in call(layers, x, True):
        assert_same(y, x)
    kept, dropped, some = call(layers, x, False)
    assert_same(kept, x)
    assert_same(dropped, 0 * x)
    assert 0 < int((some == 0).sum()) < x.size


# --- masks --------------------------------------------------------------------------------


def test_axis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="broadcast_dims has axis 2, but the array has 2 axes"):
        Dropout(0.5, broadcast_dims=(2,), rngs=nnx.Rngs(0))(ones(2, 2))


def test_two_layers_of_one_model_drop_different_units():
    rngs = nnx.Rngs(0)
    first, second = Dropout(0.5, rngs=rngs), Dropout(0.5, rngs=rngs)
    assert_different(first(ones(4, 32)), second(ones(4, 32)))


def test_integer_input_is_refused():
    with pytest.raises(TypeError, match=r"x must be a floating-point.*int32.*astype"):
        Dropout(0.5, rngs=nnx.Rngs(0))(jnp.arange(4))


# --- state --------------------------------------------------------------------------------


def test_state_has_the_structure_of_flax():
    ours, theirs = (
        nnx.state(module(0.5, rngs=nnx.Rngs(dropout=2))) for module in (Dropout, nnx.Dropout)
    )
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == other.dtype
        assert bool(mine == other)


def test_state_of_a_flax_dropout_can_be_loaded():
    x = ones(4, 32)
    trained = nnx.Dropout(0.5, rngs=nnx.Rngs(11))
    trained(x)
    ours = Dropout(0.5, rngs=nnx.Rngs(0))
    nnx.update(ours, nnx.state(trained))
    assert count_of(ours.rngs) == 1
    expected = jdropout.dropout(key_of(trained), x, 0.5)
    assert_same(ours(x), expected)


def test_split_and_merge_keep_rate_and_stream():
    layer = Dropout(0.25, broadcast_dims=(1,), rngs=nnx.Rngs(0))
    layer(ones(4, 32))
    again = nnx.merge(*nnx.split(layer))
    assert isinstance(again, Dropout)
    assert (again.rate, again.broadcast_dims, count_of(again.rngs)) == (0.25, (1,), 1)
    expected = jdropout.dropout(key_of(layer), ones(16, 2), 0.25, broadcast_dims=(1,))
    assert_same(again(ones(16, 2)), expected)


@pytest.mark.parametrize("duplicate", [nnx.clone, copy.deepcopy])
def test_copies_draw_the_same_masks_and_have_their_own_count(duplicate):
    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    other = duplicate(layer)
    assert_same(other(ones(4, 32)), layer(ones(4, 32)))
    other(ones(1))
    assert (count_of(other.rngs), count_of(layer.rngs)) == (2, 1)


def test_pickle_keeps_the_configuration():
    layer = pickle.loads(pickle.dumps(Dropout(0.25, broadcast_dims=(1,), deterministic=None)))
    assert isinstance(layer, Dropout)
    assert (layer.rate, layer.broadcast_dims, layer.deterministic) == (0.25, (1,), None)


def test_reseed_repeats_the_masks():
    layer = Dropout(0.5, rngs=nnx.Rngs(dropout=1))
    nnx.reseed(layer, dropout=42)
    before = [layer(ones(2, 32)) for _ in range(2)]
    nnx.reseed(layer, dropout=42)
    after = [layer(ones(2, 32)) for _ in range(2)]
    assert_same(after, before)
    assert_different(*before)


def test_eval_shape_builds_it_without_arrays():
    layer = nnx.eval_shape(lambda: Dropout(0.5, rngs=nnx.Rngs(0)))
    assert layer.rate == 0.5
    assert layer.rngs.key.get_value() == jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    out = nnx.eval_shape(lambda layer, x: layer(x), Dropout(0.5, rngs=nnx.Rngs(0)), ones(3, 4))
    assert (out.shape, out.dtype) == ((3, 4), jnp.float32)


def test_tabulate_lists_it():
    table = nnx.tabulate(Block(2, 4, rngs=nnx.Rngs(0)), ones(3, 2))
    (row,) = (line for line in table.splitlines() if "dropout" in line)
    assert "Dropout" in row
    assert "float32" in row


# --- transformations ----------------------------------------------------------------------


def test_repeated_jit_calls_with_rngs_trace_once():
    layer = Dropout(0.5)
    rngs = nnx.Rngs(dropout=0)
    traces = []

    @nnx.jit
    def call(layer, x, rngs):
        traces.append(x.shape)
        return layer(x, rngs=rngs)

    masks = {np.asarray(call(layer, ones(4, 33), rngs)).tobytes() for _ in range(4)}
    assert len(masks) == 4
    assert len(traces) == 1
    assert count_of(rngs["dropout"]) == 4


def test_layers_of_equal_configuration_share_one_trace_and_a_new_rate_takes_effect():
    traces = []

    @nnx.jit
    def call(layer, x):
        traces.append(x.shape)
        return layer(x)

    x, layer = ones(4, 32), Dropout(0.5, rngs=nnx.Rngs(0))
    call(layer, x)
    call(Dropout(0.5, rngs=nnx.Rngs(1)), x)
    assert len(traces) == 1
    jdropout.nnx.set_rate(layer, 0.25)
    expected = jdropout.dropout(key_of(layer), x, 0.25)
    assert_same(call(layer, x), expected)
    assert len(traces) == 2


def test_gradients_see_the_mask_of_the_forward_pass_also_under_remat():
    layers = nnx.List([Dropout(0.5, rngs=nnx.Rngs(seed)) for seed in (0, 1)])
    keys = [key_of(layer) for layer in layers]

    @nnx.jit
    def gradient(layers, x):
        plain, repeated = layers
        remat = nnx.remat(lambda layer, x: layer(x))
        return [
            nnx.grad(lambda layer, x: layer(x).sum(), argnums=1)(plain, x),
            nnx.grad(lambda layer, x: remat(layer, x).sum(), argnums=1)(repeated, x),
        ]

    for key, layer, slope in zip(keys, layers, gradient(layers, ones(4, 32)), strict=True):
        assert_same(slope, jdropout.dropout(key, ones(4, 32), 0.5))
        assert count_of(layer.rngs) == 1


def test_grad_reaches_the_parameters_before_it():
    @nnx.jit
    def gradient(block, x):
        return nnx.grad(lambda block: block.dropout(block.linear(x)).sum())(block)

    block = Block(3, 16, rngs=nnx.Rngs(0))
    y = jdropout.dropout(key_of(block.dropout), ones(1, 16), 0.5)
    gradients = gradient(block, ones(1, 3))
    assert {path[0] for path, _ in nnx.to_flat_state(gradients)} == {"linear", "norm"}
    assert_same(gradients["linear"]["kernel"][...], np.broadcast_to(y, (3, 16)))


def test_vmap_gives_every_example_the_mask_of_its_key_or_one_mask_if_the_stream_is_shared():
    split_layer, shared_layer = (Dropout(0.5, rngs=nnx.Rngs(0)) for _ in range(2))
    key = split_layer.rngs.key[...]
    split = jax.random.split(key_of(split_layer), 5)
    keys = [jax.random.fold_in(split[i], 0) for i in range(5)]
    one = jdropout.dropout(key_of(shared_layer), ones(4, 16), 0.5)

    @nnx.split_rngs(splits=5)
    @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}), 0))
    def with_split_rngs(layer, x):
        assert layer.rngs.key.shape == ()
        return layer(x)

    @nnx.jit
    def call(split_layer, shared_layer, x):
        shared = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))
        return with_split_rngs(split_layer, x), shared(shared_layer, x)

    y, z = call(split_layer, shared_layer, ones(5, 4, 16))
    assert_same(y, np.stack([jdropout.dropout(key, ones(4, 16), 0.5) for key in keys]))
    assert len({np.asarray(row).tobytes() for row in y}) == 5
    assert_same(z, np.broadcast_to(one, z.shape))
    assert count_of(split_layer.rngs) == count_of(shared_layer.rngs) == 1
    assert bool(split_layer.rngs.key[...] == key)


def test_scan_over_layers_gives_every_layer_its_own_mask():
    depth, x = 4, ones(3, 16)

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(axis_size=depth)
    def create(rngs):
        return Dropout(0.5, rngs=rngs)

    def body(layer, carry):
        return carry + 1, layer(x)

    @nnx.jit
    def scans(plain, repeated):
        scan = nnx.scan(body, in_axes=(0, nnx.Carry))
        with_remat = nnx.scan(nnx.remat(body), in_axes=(0, nnx.Carry))
        return scan(plain, jnp.int32(0)), with_remat(repeated, jnp.int32(0))

    layers = create(nnx.Rngs(0))
    copies = nnx.clone(layers)
    keys = [jax.random.fold_in(layers.rngs.key[...][i], 0) for i in range(depth)]
    expected = np.stack([jdropout.dropout(key, x, 0.5) for key in keys])
    assert len({np.asarray(mask).tobytes() for mask in expected}) == depth
    for (steps, masks), stack in zip(scans(layers, copies), (layers, copies), strict=True):
        assert steps == depth
        assert_same(masks, expected)
        assert_same(stack.rngs.count[...], [1] * depth)


def test_scan_over_layers_is_differentiated_with_the_masks_of_the_forward_pass():
    depth, x = 3, ones(3, 64)

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(axis_size=depth)
    def create(rngs):
        return Dropout(0.25, rngs=rngs)

    @nnx.jit
    def value_and_gradient(layers, x):
        scan = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)

        def total(layers, x):
            y = scan(layers, x)
            return y.sum(), y

        (_, y), gradient = nnx.value_and_grad(total, argnums=1, has_aux=True)(layers, x)
        return y, gradient

    y, gradient = value_and_gradient(create(nnx.Rngs(0)), x)
    assert 0 < int((y == 0).sum()) < y.size
    assert_same(gradient, y)


class DropoutCell(nnx.RNNCellBase):
    """A cell that drops a one, so that the output over time shows every mask."""

    def __init__(self, rng_collection, *, rngs):
        self.dropout = Dropout(0.5, rng_collection=rng_collection, rngs=rngs)

    def __call__(self, carry, x):
        return carry + 1, self.dropout(jnp.ones_like(x))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.zeros(input_shape[:-1], jnp.int32)

    @property
    def num_feature_axes(self):
        return 1


def test_recurrent_dropout_holds_one_mask_over_time_and_renews_it_per_sequence():
    rngs = nnx.Rngs(0, recurrent_dropout=1)
    rnn = nnx.RNN(DropoutCell("recurrent_dropout", rngs=rngs), broadcast_rngs="recurrent_dropout")
    call = nnx.jit(lambda rnn, x: rnn(x))
    first, second = call(rnn, ones(2, 7, 32)), call(rnn, ones(2, 7, 32))
    for masks in (first, second):
        assert {float(value) for value in np.unique(masks)} == {0.0, 2.0}
        assert_same(masks, np.broadcast_to(masks[:, :1], masks.shape))
    assert_different(first, second)


def test_recurrent_dropout_without_broadcast_renews_its_mask_at_every_step():
    rnn = nnx.RNN(DropoutCell("dropout", rngs=nnx.Rngs(0)))
    masks = nnx.jit(lambda rnn, x: rnn(x))(rnn, ones(2, 7, 32))
    assert len({np.asarray(masks[:, step]).tobytes() for step in range(7)}) == 7


# --- training -----------------------------------------------------------------------------


TRACES = []
SGD = optax.sgd(0.05, momentum=0.9)  # a new one would compile again


@functools.partial(jax.jit, static_argnums=0)
def step(graph, state, x, target):
    TRACES.append(x.shape)
    model, optimizer = nnx.merge(graph, state)
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
    optimizer.update(model, gradients)
    return loss, nnx.state((model, optimizer))


def train(model, x, target, steps):
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))
    TRACES.clear()
    losses = []
    for _ in range(steps):
        loss, state = step(graph, state, x, target)
        losses.append(float(loss))
    nnx.update((model, optimizer), state)
    assert len(TRACES) <= 1  # none if it was compiled for a model of the same configuration
    return losses


def mlp(rngs):
    kernel_init = nnx.initializers.lecun_uniform()
    return nnx.Sequential(
        nnx.Linear(4, 64, kernel_init=kernel_init, rngs=rngs),
        nnx.relu,
        Dropout(0.2, rngs=rngs),
        nnx.Linear(64, 1, kernel_init=kernel_init, rngs=rngs),
    )


def test_sequential_model_learns_reproducibly_and_its_rate_stays():
    x = np.asarray(normal(64, 4))
    target = x[:, :1] * x[:, 1:2]

    def run(seed, steps):
        model = mlp(nnx.Rngs(params=0, dropout=seed))
        graph = nnx.graphdef(model)
        losses = train(model, x, target, steps)
        layer = model.layers[2]
        assert (layer.rate, count_of(layer.rngs)) == (0.2, steps)
        assert nnx.graphdef(model) == graph
        return losses

    losses = run(1, 150)
    assert losses[-1] < 0.5 * losses[0]
    assert run(1, 5) == losses[:5]
    assert run(2, 5) != losses[:5]


def test_optimizer_of_a_dropout_has_nothing_to_train():
    layer = Dropout(0.5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(1.0), wrt=nnx.Param)
    gradients = nnx.grad(lambda layer: layer(ones(4, 4)).sum())(layer)
    assert jax.tree.leaves(gradients) == []
    optimizer.update(layer, gradients)
    assert layer.rate == 0.5


# --- bridge to linen ----------------------------------------------------------------------


def test_to_linen_takes_its_key_from_the_linen_stream():
    module = nnx.bridge.to_linen(Dropout, 0.5)
    key = jax.random.key(1)
    x = ones(4, 32)
    assert module.init({"dropout": key}, x) == {}
    y = module.apply({}, x, rngs={"dropout": key})
    assert_same(y, module.apply({}, x, rngs={"dropout": key}))
    assert_different(y, module.apply({}, x, rngs={"dropout": jax.random.key(2)}))
    assert {float(value) for value in np.unique(y)} == {0.0, 2.0}
    assert_same(module.apply({}, x, deterministic=True), x)


def test_to_nnx_wraps_the_linen_module_of_this_library():
    x = ones(4, 32)
    rngs = nnx.Rngs(dropout=0)
    model = nnx.bridge.ToNNX(jdropout.linen.Dropout(0.5, deterministic=False), rngs=rngs)
    nnx.bridge.lazy_init(model, x)
    first, second = model(x), model(x)
    assert {float(value) for value in np.unique(first)} == {0.0, 2.0}
    assert_different(first, second)
    nnx.reseed(model, dropout=5)
    again = model(x)
    nnx.reseed(model, dropout=5)
    assert_same(model(x), again)


# --- whole models -------------------------------------------------------------------------


class Special(nnx.Dropout):
    pass


class Plain(nnx.Module):
    """Holds one layer twice, and others in containers."""

    def __init__(self, rngs):
        self.first = nnx.Dropout(0.5, broadcast_dims=(1,), deterministic=True, rngs=rngs)
        self.blocks = nnx.List([self.first, nnx.Dropout(0.25, rng_collection="noise", rngs=rngs)])
        self.named = nnx.Dict({"a": nnx.Dropout(0.0)})
        self.special = Special(0.5)
        self.linear = nnx.Linear(2, 2, kernel_init=UNIFORM, rngs=rngs)


def test_replace_dropout_keeps_all_but_the_bits():
    model = Plain(nnx.Rngs(0, noise=1))
    model.blocks[1](jnp.ones((2, 2)))
    first, state = model.first, nnx.state(model)
    assert jdropout.nnx.replace_dropout(model) == 4
    assert model.first is first is model.blocks[0]
    for layer in (model.first, model.blocks[1], model.named["a"]):
        assert type(layer) is Dropout
    assert isinstance(model.special, Special)
    assert isinstance(model.special, Dropout)
    assert (model.first.rate, model.first.broadcast_dims) == (0.5, (1,))
    assert (model.first.deterministic, model.blocks[1].rng_collection) == (True, "noise")
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(state)
    second = model.blocks[1]
    assert count_of(second.rngs) == 1
    expected = jdropout.dropout(key_of(second), ones(4, 32), 0.25)
    assert_same(second(ones(4, 32)), expected)
    merged = nnx.merge(*nnx.split(model))
    assert type(merged.first) is Dropout
    assert merged.first is merged.blocks[0]
    assert_same(nnx.jit(lambda model: model.first(ones(4, 32)))(model), ones(4, 32))
    assert jdropout.nnx.replace_dropout(model) == 0


def test_replace_dropout_of_a_bare_layer_and_of_none():
    layer = nnx.Dropout(1)
    assert jdropout.nnx.replace_dropout(layer) == 1
    assert (type(layer), layer.rate) == (Dropout, 1.0)
    assert jdropout.nnx.replace_dropout(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == 0


def test_replace_dropout_changes_nothing_if_a_rate_is_impossible():
    model = nnx.List([nnx.Dropout(0.5), nnx.Dropout(-1.0)])
    with pytest.raises(ValueError, match="rate must be in"):
        jdropout.nnx.replace_dropout(model)
    assert type(model[0]) is nnx.Dropout


def test_set_rate_sets_all_or_what_a_filter_finds():
    model = Plain(nnx.Rngs(0))
    model.path = jdropout.nnx.DropPath(0.3)
    assert jdropout.nnx.set_rate(model, np.float32(0.5)) == 5
    assert type(model.path.rate) is float
    assert jdropout.nnx.set_rate(model, 0.1, jdropout.nnx.DropPath) == 1
    in_blocks = jdropout.nnx.set_rate(model, 0.2, lambda path, layer: "blocks" in path, Special)
    assert in_blocks == 3, "the shared layer is found where it is first"
    assert (model.path.rate, model.special.rate, model.blocks[1].rate) == (0.1, 0.2, 0.2)
    assert model.named["a"].rate == 0.5


def test_set_rate_refuses_before_it_changes_anything():
    model = nnx.List([Dropout(0.5), jdropout.nnx.GaussianDropout(0.5)])
    with pytest.raises(ValueError, match="rate must be below 1"):
        jdropout.nnx.set_rate(model, 1.0)
    assert [layer.rate for layer in model] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"model has no dropout layer that .*DropPath.* finds"):
        jdropout.nnx.set_rate(model, 0.5, jdropout.nnx.DropPath)
    with pytest.raises(ValueError, match="model has no dropout layer"):
        jdropout.nnx.set_rate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.5)
