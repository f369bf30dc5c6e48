"""The nnx layers are the functions of this library at the keys of their streams."""

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdropout
import jdropout.nnx
from jdropout._layers import zoneout
from jdropout._learned import concrete_dropout, variational_dense, variational_kl
from jdropout._noise import (
    alpha_dropout,
    feature_alpha_dropout,
    gaussian_dropout,
    gaussian_noise,
)
from jdropout._structured import drop_path, embedding_dropout, locked_dropout, spatial_dropout
from jdropout._tokens import patch_dropout
from jdropout._weights import drop_connect
from jdropout.keys import at_site, site_key

M = jdropout.nnx
X = jax.random.normal(jax.random.key(9), (3, 6, 5, 8))
TOKENS = jnp.array([[1, 5, 1], [0, 2, 6]])


class Case(NamedTuple):
    make: Callable[..., Any]
    expected: Callable[[Any, Any], Any]
    """From the layer and a key, None in evaluation, to its output."""
    args: tuple[Any, ...] = (X,)
    learned: tuple[str, ...] = ()
    """Last names of its parameters."""
    arguments: str = "rate"


def linear_dropped(layer, key):
    kernel = drop_connect(
        None if key is None else at_site(key, "kernel"),
        layer.module.kernel[...],
        0.5,
        deterministic=key is None,
    )
    return X @ kernel + layer.module.bias[...].reshape(1, 1, 1, -1)


def zoned(layer, key):
    carry, x = jnp.ones((3, 8)), X[:, 0, 0]
    new, _ = layer.cell(carry, x)
    y = zoneout(key, carry, new, 0.5, deterministic=key is None)
    return y, y


def dense(layer, key):
    return variational_dense(
        key,
        X,
        layer.kernel[...],
        layer.log_alpha[...],
        layer.bias[...],
        deterministic=key is None,
    )


def simple(module, function, rate=0.5, **options):
    return Case(
        lambda **flags: module(rate, **options, **flags),
        lambda layer, key: function(key, X, rate, deterministic=key is None, **options),
    )


CASES = {
    "SpatialDropout": simple(M.SpatialDropout, spatial_dropout),
    "SpatialDropout, channels first": simple(
        M.SpatialDropout, spatial_dropout, channel_axis=1, batch_axes=()
    ),
    "LockedDropout": simple(M.LockedDropout, locked_dropout, time_axis=2),
    "DropPath": simple(M.DropPath, drop_path, rate=0.25, scale_by_keep=False, batch_axis=1),
    "DropBlock": simple(M.DropBlock, jdropout.drop_block, 0.2, block_size=(2, 3), scale="realised"),
    "PatchDropout": Case(
        lambda **flags: M.PatchDropout(0.5, ordered=True, return_indices=True, **flags),
        lambda layer, key: patch_dropout(key, X, 0.5, ordered=True, deterministic=key is None),
    ),
    "GaussianDropout": simple(M.GaussianDropout, gaussian_dropout, broadcast_dims=(1,)),
    "GaussianNoise": simple(M.GaussianNoise, gaussian_noise, rate=1.0)._replace(arguments="stddev"),
    "AlphaDropout": simple(M.AlphaDropout, alpha_dropout, broadcast_dims=(-1,)),
    "FeatureAlphaDropout": simple(M.FeatureAlphaDropout, feature_alpha_dropout, batch_axes=(0, 1)),
    "EmbeddingDropout": Case(
        lambda **flags: M.EmbeddingDropout(nnx.Embed(7, 4, rngs=nnx.Rngs(3)), 0.5, **flags),
        lambda layer, key: embedding_dropout(
            key, layer.embed.embedding[...], 0.5, deterministic=key is None
        )[TOKENS],
        (TOKENS,),
        ("embedding",),
        "embed, rate",
    ),
    "DropConnect": Case(
        lambda **flags: M.DropConnect(nnx.Linear(8, 4, rngs=nnx.Rngs(3)), 0.5, **flags),
        linear_dropped,
        (X,),
        ("bias", "kernel"),
        "module, rate",
    ),
    "Zoneout": Case(
        lambda **flags: M.Zoneout(nnx.GRUCell(8, 8, rngs=nnx.Rngs(3)), 0.5, **flags),
        zoned,
        (jnp.ones((3, 8)), X[:, 0, 0]),
        ("bias", "kernel", "kernel"),
        "cell, rate",
    ),
    "ConcreteDropout": Case(
        lambda **flags: M.ConcreteDropout(0.3, broadcast_dims=(2,), **flags),
        lambda layer, key: concrete_dropout(
            key, X, layer.logit[...], broadcast_dims=(2,), deterministic=key is None
        ),
        (X,),
        ("logit",),
        "initial_rate",
    ),
    "VariationalDense": Case(
        lambda rngs, **flags: M.VariationalDense(8, 4, rngs=rngs, **flags),
        dense,
        (X,),
        ("bias", "kernel", "log_alpha"),
        "in_features, out_features",
    ),
}
WITH_RATE = [
    name for name in CASES if name not in ("GaussianNoise", "ConcreteDropout", "VariationalDense")
]
NEEDS_RNGS = ("VariationalDense",)

every = pytest.mark.parametrize("name", CASES)


def build(name, **flags):
    return CASES[name].make(rngs=nnx.Rngs(0), **flags)


def next_key(layer):
    return jax.random.fold_in(layer.rngs.key[...], layer.rngs.count[...])


def count_of(layer):
    return int(layer.rngs.count[...])


def assert_same(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def same(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# --- what all layers have in common -------------------------------------------------------


@every
def test_output_is_the_function_at_the_key_of_the_stream(name):
    case, layer = CASES[name], build(name)
    outputs = []
    for calls in (1, 2):
        expected = case.expected(layer, next_key(layer))
        outputs.append(layer(*case.args))
        assert_same(outputs[-1], expected)
        assert count_of(layer) == calls
    assert not same(*outputs)


@every
def test_evaluation_takes_no_key_in_whatever_way_it_is_asked_for(name):
    case, layer = CASES[name], build(name)
    expected = case.expected(layer, None)
    assert not same(layer(*case.args), expected)
    assert_same(layer(*case.args, deterministic=True), expected)
    layer.eval()
    assert_same(layer(*case.args), expected)
    layer.train()
    view = nnx.view(layer, deterministic=True)
    assert_same(view(*case.args), expected)
    assert_same(build(name, deterministic=True)(*case.args), expected)
    assert layer.deterministic is False
    assert count_of(layer) == 1
    if isinstance(layer, nnx.Dropout):
        layer.set_attributes(nnx.Dropout, deterministic=True)
        assert layer.deterministic is True


@every
def test_missing_flag_and_missing_keys_are_errors_that_name_the_layer(name):
    case, kind = CASES[name], name.split(",")[0]
    layer = build(name, deterministic=None)
    with pytest.raises(
        ValueError, match=rf"(?s)No `deterministic`.*to {kind}\. .*{kind}\({case.arguments}, det"
    ):
        layer(*case.args)
    layer = case.make() if name not in NEEDS_RNGS else build(name)
    layer.rngs = nnx.data(None)
    with pytest.raises(
        ValueError, match=rf"(?s)no `rngs` argument.*to {kind}\. .*{kind}\({case.arguments}, rngs"
    ):
        layer(*case.args)
    with pytest.raises(TypeError, match=r"rngs must be .*got int"):
        layer(*case.args, rngs=0)


@every
def test_call_takes_rngs_or_a_key_instead_of_the_own_stream(name, key):
    case, layer = CASES[name], build(name, rng_collection="noise")
    expected = case.expected(layer, key)
    assert_same(layer(*case.args, rngs=key), expected)
    rngs = nnx.Rngs(noise=5)
    taken = jax.random.fold_in(jax.random.key(5), 0)
    assert_same(layer(*case.args, rngs=rngs), case.expected(layer, taken))
    assert count_of(layer) == 0


@every
def test_state_has_no_floating_point_leaves_but_the_learned_ones(name):
    layer = build(name)
    floating = sorted(
        path[-1]
        for path, variable in nnx.to_flat_state(nnx.state(layer))
        if jnp.issubdtype(variable.get_value().dtype, jnp.floating)
    )
    assert floating == list(CASES[name].learned)
    others = jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    assert len(others) == 2, "the key and the count of a stream"


@every
def test_split_merge_and_jit_give_what_the_layer_gives(name):
    case, layer = CASES[name], build(name)
    twin = nnx.merge(*nnx.split(nnx.clone(layer)))
    expected = [layer(*case.args) for _ in range(2)]
    traces = []

    @nnx.jit
    def call(layer, *args):
        traces.append(args)
        return layer(*args)

    for calls, y in enumerate(expected, start=1):
        actual = call(twin, *case.args)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(y), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(a == 0, b == 0)
        assert count_of(twin) == calls
    assert len(traces) == 1


@every
def test_copies_and_pickles_draw_the_same(name):
    case, layer = CASES[name], build(name)
    twins = [copy.deepcopy(layer), nnx.clone(layer)]
    if name != "Zoneout":  # Flax's cells hold a function that cannot be pickled
        graph = pickle.loads(pickle.dumps(nnx.graphdef(layer)))
        twins.append(nnx.merge(graph, nnx.clone(nnx.state(layer))))
    expected = layer(*case.args)
    for twin in twins:
        assert type(twin) is type(layer)
        assert_same(twin(*case.args), expected)


class Model(nnx.Module):
    def __init__(self, name):
        self.layers = nnx.List([build(name), build(name)])

    def __call__(self, *args):
        return [layer(*args) for layer in self.layers]


@every
def test_site_keys_reach_it_by_its_path(name, key):
    case, model = CASES[name], Model(name)
    M.set_site_keys(model, key, step=7)
    expected = [
        case.expected(
            layer, jax.random.fold_in(site_key(key, step=7, site=("layers", i, "rngs")), 0)
        )
        for i, layer in enumerate(model.layers)
    ]
    outputs = model(*case.args)
    assert_same(outputs, expected)
    assert not same(*outputs)


@every
def test_audit_shows_its_path(name):
    report = jdropout.audit(lambda model: model(*CASES[name].args), Model(name))
    assert [site.path for site in report.sites] == ["Model/layers/0", "Model/layers/1"]
    assert all(site.location.startswith("test_modules_nnx.py") for site in report.sites)
    assert report.sites[0].key != report.sites[1].key


@every
def test_gradient_flows_to_inputs_and_learned_parameters(name):
    case, layer = CASES[name], build(name)

    def total(layer):
        return sum(
            (y**2).sum()
            for y in jax.tree.leaves(layer(*case.args))
            if jnp.issubdtype(y.dtype, jnp.floating)
        )

    gradients = nnx.grad(total)(layer)
    assert count_of(layer) == 1
    for _, gradient in nnx.to_flat_state(gradients):
        assert bool(jnp.isfinite(gradient[...]).all())
    assert len(jax.tree.leaves(gradients)) == len(jax.tree.leaves(nnx.state(layer, nnx.Param)))
    assert all((jnp.abs(g) > 0).any() for g in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", WITH_RATE)
def test_impossible_rates_are_refused_at_construction_and_later(name):
    layer = build(name)
    assert layer.rate in (0.2, 0.25, 0.5)
    for rate, error in [(1.5, ValueError), (jnp.float32(0.5), TypeError), ("a", TypeError)]:
        with pytest.raises(error, match="rate must be"):
            M.set_rate(layer, rate)
    wrapped = [None] * CASES[name].arguments.count(",")
    options = {"block_size": 2} if name == "DropBlock" else {}
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got -0.1"):
        type(layer)(*wrapped, -0.1, **options)
    assert M.set_rate(layer, 0) == 1
    layer(*CASES[name].args)
    assert count_of(layer) == 0


def test_the_other_amounts_are_checked_as_well():
    with pytest.raises(ValueError, match="rate must be below 1"):
        M.GaussianDropout(1.0)
    with pytest.raises(ValueError, match=r"stddev must be .* at least 0"):
        M.GaussianNoise(-1.0)
    with pytest.raises(TypeError, match="stddev must be a Python number"):
        M.GaussianNoise(jnp.float32(1))
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match="initial_rate must be between 0 and 1"):
            M.ConcreteDropout(rate)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\]"):
        M.Zoneout(None, (0.5, 2.0))
    with pytest.raises(TypeError, match="select must be"):
        M.DropConnect(None, 0.5, select="kernel")


@pytest.mark.parametrize("name", ["GaussianNoise", "DropConnect"])
def test_vmap_and_scan_over_layers_give_each_its_own_key(name):
    case = CASES[name]

    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def create(rngs):
        return case.make(rngs=rngs)

    layers = create(nnx.Rngs(0))
    assert layers.rngs.key.shape == (3,)
    keys = [jax.random.fold_in(layers.rngs.key[...][i], 0) for i in range(3)]
    single = build(name)
    expected = jnp.stack([case.expected(single, key) for key in keys])
    copies = nnx.clone(layers)
    y = nnx.vmap(lambda layer: layer(*case.args))(layers)
    _, z = nnx.scan(lambda layer, carry: (carry, layer(*case.args)), in_axes=(0, nnx.Carry))(
        copies, 0
    )
    for actual, stack in ((y, layers), (z, copies)):
        close = {"rtol": 1e-5, "atol": 1e-6}
        if name == "DropConnect":  # each has weights of its own
            kernels = stack.module.kernel[...]
            masked = [
                drop_connect(at_site(k, "kernel"), w, 0.5)
                for k, w in zip(keys, kernels, strict=True)
            ]
            biases = stack.module.bias[...]
            expected = jnp.stack(
                [X @ w + b.reshape(1, 1, 1, -1) for w, b in zip(masked, biases, strict=True)]
            )
        np.testing.assert_allclose(actual, expected, **close)
        assert stack.rngs.count[...].tolist() == [1, 1, 1]


# --- DropConnect --------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.made = nnx.BatchStat(x.sum())
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_other_state_of_the_wrapped_module_survives(jit):
    block = Block(nnx.Rngs(0))
    layer = M.DropConnect(block, 0.5, rngs=nnx.Rngs(1))
    kernel, x = block.linear.kernel[...], X[:, 0, 0]
    call = nnx.jit(lambda layer, x: layer(x)) if jit else (lambda layer, x: layer(x))
    dropped = drop_connect(at_site(next_key(layer), ("linear", "kernel")), kernel, 0.5)
    call(layer, x)
    np.testing.assert_allclose(block.norm.mean[...], 0.01 * (x @ dropped).mean(0), rtol=1e-5)
    assert int(block.dropout.rngs.count[...]) == 1
    if not jit:  # what nnx.jit makes of a new variable is its own affair
        np.testing.assert_allclose(block.made[...], x.sum())
    assert_same(block.linear.kernel[...], kernel)
    call(layer, x)
    assert int(block.dropout.rngs.count[...]) == 2
    assert isinstance(layer.module, Block)


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Conv(8, 4, (3, 3), rngs=rngs),
        lambda rngs: nnx.LinearGeneral(8, 4, rngs=rngs),
    ],
    ids=["Conv", "LinearGeneral"],
)
def test_drop_connect_of_other_layers_is_the_layer_with_dropped_weights(make, key):
    inner = make(nnx.Rngs(0))
    y = M.DropConnect(inner, 0.3)(X, rngs=key)
    other = nnx.clone(inner)
    other.kernel[...] = drop_connect(at_site(key, "kernel"), inner.kernel[...], 0.3)
    assert_same(y, other(X))
    assert not same(y, inner(X))


def test_around_a_recurrent_network_one_mask_serves_all_time_steps(key):
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(5, 8, rngs=nnx.Rngs(0)))
    layer = M.DropConnect(rnn, 0.5, select=["dense_h/kernel"], rngs=nnx.Rngs(1))
    x = jnp.moveaxis(X[0], -1, 1)
    other = nnx.clone(rnn)
    kernel = other.cell.dense_h.kernel
    kernel[...] = drop_connect(at_site(key, ("cell", "dense_h", "kernel")), kernel[...], 0.5)
    expected = other(x)
    assert_same(layer(x, rngs=key), expected)
    assert_same(layer(x, deterministic=True), rnn(x))
    assert not same(layer(x), layer(x))


def test_drop_connect_works_where_the_layer_is_closed_over():
    layer = M.DropConnect(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), 0.5)
    keys = jax.random.split(jax.random.key(0), 3)
    y = jax.jit(jax.vmap(lambda key, x: layer(x, rngs=key)))(keys, X)
    for i in range(3):
        np.testing.assert_allclose(y[i], layer(X[i], rngs=keys[i]), rtol=1e-5, atol=1e-6)


def test_nothing_selected_is_an_error_that_lists_the_parameters():
    layer = M.DropConnect(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), 0.5, select=["krnel"])
    with pytest.raises(ValueError, match="'krnel' selects none of 'bias', 'kernel'"):
        layer(X, rngs=jax.random.key(0))


# --- Zoneout and embeddings ---------------------------------------------------------------


class Counter(nnx.RNNCellBase):
    """Counts steps in two carries, so that the output shows which units were kept back."""

    def __call__(self, carry, x):
        a, b = (part + 1 for part in carry)
        return (a, b), (a, x)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return (jnp.zeros(input_shape), jnp.zeros(input_shape))

    @property
    def num_feature_axes(self):
        return 1


def test_zoneout_draws_a_new_mask_at_every_time_step():
    layer = M.Zoneout(Counter(), (0.5, 0.0), rngs=nnx.Rngs(0))
    rnn = nnx.RNN(layer, return_carry=True)
    keys = [jax.random.fold_in(layer.rngs.key[...], i) for i in range(4)]
    (a, b), (seen, x) = rnn(jnp.ones((2, 4, 16)))
    steps = jnp.stack([jdropout.keep_mask(at_site(key, 0), 0.5, (2, 16)) for key in keys], axis=1)
    assert_same(seen, jnp.cumsum(steps, axis=1, dtype=jnp.float32))
    assert_same(a, seen[:, -1])
    assert_same(b, jnp.full((2, 16), 4.0))
    assert_same(x, jnp.ones((2, 4, 16)))
    assert len({np.asarray(steps[:, t]).tobytes() for t in range(4)}) == 4


def test_zoneout_takes_the_expectation_in_evaluation():
    rnn = nnx.RNN(M.Zoneout(Counter(), (0.5, 0.25)), return_carry=True)
    rnn.eval()
    (a, b), _ = rnn(jnp.ones((2, 4, 3)))
    assert_same(a, jnp.full((2, 3), 2.0))
    assert_same(b, jnp.full((2, 3), 3.0))


def test_zoneout_rates_are_set_together():
    layer = M.Zoneout(Counter(), [0.5, 0.25])
    assert layer.rate == (0.5, 0.25)
    M.set_rate(layer, (0.1, 0.2))
    assert layer.rate == (0.1, 0.2)


def test_embedding_attends_to_the_dropped_table(key):
    layer = build("EmbeddingDropout")
    query = X[0, 0, :, :4]
    table = embedding_dropout(key, layer.embed.embedding[...], 0.5)
    assert_same(layer.attend(query, rngs=key), query @ table.T)
    assert_same(layer.attend(query, deterministic=True), layer.embed.attend(query))
    assert count_of(layer) == 0
    layer.attend(query)
    assert count_of(layer) == 1


def test_patch_dropout_gives_tokens_alone_unless_asked():
    layer = M.PatchDropout(0.5, rngs=nnx.Rngs(0))
    key = next_key(layer)
    assert_same(layer(X), patch_dropout(key, X, 0.5)[0])
    with pytest.raises(TypeError, match="deterministic must be True or False"):
        nnx.jit(lambda layer, flag: layer(X, deterministic=flag))(layer, True)


# --- learned ------------------------------------------------------------------------------


def test_concrete_dropout_lowers_a_rate_that_does_harm():
    layer = M.ConcreteDropout(0.5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(2.0), wrt=nnx.Param)
    ones = jnp.ones((16, 16))

    @nnx.jit
    def step(layer, optimizer):
        gradients = nnx.grad(lambda layer: ((layer(ones) - ones) ** 2).mean())(layer)
        optimizer.update(layer, gradients)

    for _ in range(20):
        step(layer, optimizer)
    assert float(layer.rate) < 0.2


def test_concrete_regularizer_is_that_of_its_logit():
    layer = M.ConcreteDropout(0.2)
    np.testing.assert_allclose(float(layer.rate), 0.2, rtol=1e-6)
    cost = layer.regularizer(3.0, 10, weight_regularizer=0.5, dropout_regularizer=0.25)
    entropy = 0.2 * np.log(0.2) + 0.8 * np.log(0.8)
    np.testing.assert_allclose(cost, 0.5 * 3 / 0.8 + 0.25 * 10 * entropy, rtol=1e-5)


def test_variational_dense_takes_the_parameters_of_a_linear_layer():
    linear, layer = nnx.Linear(8, 4, rngs=nnx.Rngs(5)), build("VariationalDense")
    nnx.update(layer, nnx.state(linear, nnx.Param))
    np.testing.assert_allclose(layer(X, deterministic=True), linear(X), rtol=1e-5, atol=1e-6)
    assert_same(layer.kl(), variational_kl(layer.log_alpha[...]).sum())
    layer.log_alpha[...] = jnp.full((8, 4), 5.0)
    assert_same(layer(X, deterministic=True), jnp.zeros((*X.shape[:-1], 4)))
    half = M.VariationalDense(8, 4, use_bias=False, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(X).dtype == jnp.bfloat16


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
        self.linear = nnx.Linear(2, 2, rngs=rngs)


def test_replace_dropout_keeps_all_but_the_bits():
    model = Plain(nnx.Rngs(0, noise=1))
    model.blocks[1](jnp.ones((2, 2)))
    first, state = model.first, nnx.state(model)
    assert M.replace_dropout(model) == 3
    assert model.first is first is model.blocks[0]
    for layer in (model.first, model.blocks[1], model.named["a"]):
        assert type(layer) is M.Dropout
    assert type(model.special) is Special
    assert (model.first.rate, model.first.broadcast_dims) == (0.5, (1,))
    assert (model.first.deterministic, model.blocks[1].rng_collection) == (True, "noise")
    assert jax.tree.structure(nnx.state(model)) == jax.tree.structure(state)
    second = model.blocks[1]
    assert count_of(second) == 1
    expected = jdropout.dropout(next_key(second), X, 0.25)
    assert_same(second(X), expected)
    merged = nnx.merge(*nnx.split(model))
    assert type(merged.first) is M.Dropout
    assert merged.first is merged.blocks[0]
    assert_same(nnx.jit(lambda model: model.first(X))(model), X)
    assert M.replace_dropout(model) == 0


def test_replace_dropout_of_a_bare_layer_and_of_none():
    layer = nnx.Dropout(1)
    assert M.replace_dropout(layer) == 1
    assert (type(layer), layer.rate) == (M.Dropout, 1.0)
    assert M.replace_dropout(nnx.Linear(2, 2, rngs=nnx.Rngs(0))) == 0


def test_replace_dropout_changes_nothing_if_a_rate_is_impossible():
    model = nnx.List([nnx.Dropout(0.5), nnx.Dropout(-1.0)])
    with pytest.raises(ValueError, match="rate must be in"):
        M.replace_dropout(model)
    assert type(model[0]) is nnx.Dropout


def test_set_rate_sets_all_or_what_a_filter_finds():
    model = Plain(nnx.Rngs(0))
    model.path = M.DropPath(0.3)
    assert M.set_rate(model, np.float32(0.5)) == 5
    assert type(model.path.rate) is float
    assert M.set_rate(model, 0.1, M.DropPath) == 1
    in_blocks = M.set_rate(model, 0.2, lambda path, layer: "blocks" in path, Special)
    assert in_blocks == 3, "the shared layer is found where it is first"
    assert (model.path.rate, model.special.rate, model.blocks[1].rate) == (0.1, 0.2, 0.2)
    assert model.named["a"].rate == 0.5


def test_set_rate_refuses_before_it_changes_anything():
    model = nnx.List([M.Dropout(0.5), M.GaussianDropout(0.5)])
    with pytest.raises(ValueError, match="rate must be below 1"):
        M.set_rate(model, 1.0)
    assert [layer.rate for layer in model] == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"model has no dropout layer that .*DropPath.* finds"):
        M.set_rate(model, 0.5, M.DropPath)
    with pytest.raises(ValueError, match="model has no dropout layer"):
        M.set_rate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 0.5)


def test_a_new_rate_retraces_and_takes_effect():
    layer = M.Dropout(0.5, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda layer, x: layer(x))
    call(layer, X)
    M.set_rate(layer, 0.1)
    expected = jdropout.dropout(next_key(layer), X, 0.1)
    assert_same(call(layer, X), expected)
