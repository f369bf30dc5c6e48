"""The linen layers are the functions of this library at the keys of their streams."""

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout._layers import zoneout
from jdropout._learned import concrete_dropout, variational_dense, variational_kl
from jdropout._noise import alpha_dropout, feature_alpha_dropout, gaussian_dropout, gaussian_noise
from jdropout._structured import drop_path, embedding_dropout, locked_dropout, spatial_dropout
from jdropout._tokens import patch_dropout
from jdropout._weights import drop_connect
from jdropout.keys import at_site, site_key

M = jdropout.linen
X = jax.random.normal(jax.random.key(9), (3, 6, 5, 8))
TOKENS = jnp.array([[1, 5, 1], [0, 2, 6]])
RANDOM = linen.initializers.normal()


class Case(NamedTuple):
    make: Callable[..., Any]
    expected: Callable[[Any, Any], Any]
    """From the parameters and a key, None in evaluation, to the output."""
    args: tuple[Any, ...] = (X,)
    nnx: Callable[..., Any] | None = None
    """The same layer there, from an `nnx.Rngs`."""
    parameters: Callable[[Any], Any] = lambda params: {}
    """From linen's parameters to those of the nnx layer."""


def linear_dropped(params, key):
    params = params["module"]
    own = None if key is None else at_site(key, "kernel")
    kernel = drop_connect(own, params["kernel"], 0.5, deterministic=key is None)
    return X @ kernel + params["bias"].reshape(1, 1, 1, -1)


def zoned(params, key):
    carry, x = jnp.ones((3, 8)), X[:, 0, 0]
    new, _ = linen.SimpleCell(8).apply({"params": params["cell"]}, carry, x)
    y = zoneout(key, carry, new, 0.5, deterministic=key is None)
    return y, y


def dense(params, key):
    return variational_dense(
        key, X, params["kernel"], params["log_alpha"], params["bias"], deterministic=key is None
    )


def simple(name, function, rate=0.5, **options):
    return Case(
        lambda **flags: getattr(M, name)(rate, **options, **flags),
        lambda params, key: function(key, X, rate, deterministic=key is None, **options),
        nnx=lambda rngs: getattr(jdropout.nnx, name)(rate, **options, rngs=rngs),
    )


CASES = {
    "SpatialDropout": simple("SpatialDropout", spatial_dropout),
    "SpatialDropout, channels first": simple(
        "SpatialDropout", spatial_dropout, channel_axis=1, batch_axes=()
    ),
    "LockedDropout": simple("LockedDropout", locked_dropout, time_axis=2),
    "DropPath": simple("DropPath", drop_path, rate=0.25, scale_by_keep=False, batch_axis=1),
    "DropBlock": simple("DropBlock", jdropout.drop_block, 0.2, block_size=2, scale="realised"),
    "PatchDropout": Case(
        lambda **flags: M.PatchDropout(0.5, ordered=True, return_indices=True, **flags),
        lambda params, key: patch_dropout(key, X, 0.5, ordered=True, deterministic=key is None),
        nnx=lambda rngs: jdropout.nnx.PatchDropout(
            0.5, ordered=True, return_indices=True, rngs=rngs
        ),
    ),
    "GaussianDropout": simple("GaussianDropout", gaussian_dropout, broadcast_dims=(1,)),
    "GaussianNoise": simple("GaussianNoise", gaussian_noise, rate=1.0),
    "AlphaDropout": simple("AlphaDropout", alpha_dropout, broadcast_dims=(-1,)),
    "FeatureAlphaDropout": simple("FeatureAlphaDropout", feature_alpha_dropout, batch_axes=(0, 1)),
    "EmbeddingDropout": Case(
        lambda **flags: M.EmbeddingDropout(linen.Embed(7, 4), 0.5, **flags),
        lambda params, key: embedding_dropout(
            key, params["embed"]["embedding"], 0.5, deterministic=key is None
        )[TOKENS],
        (TOKENS,),
        lambda rngs: jdropout.nnx.EmbeddingDropout(nnx.Embed(7, 4, rngs=rngs), 0.5, rngs=rngs),
        lambda params: params,
    ),
    "DropConnect": Case(
        lambda **flags: M.DropConnect(linen.Dense(4, bias_init=RANDOM), 0.5, **flags),
        linear_dropped,
        (X,),
        lambda rngs: jdropout.nnx.DropConnect(nnx.Linear(8, 4, rngs=rngs), 0.5, rngs=rngs),
        lambda params: params,
    ),
    "Zoneout": Case(
        lambda **flags: M.Zoneout(linen.SimpleCell(8), 0.5, **flags),
        zoned,
        (jnp.ones((3, 8)), X[:, 0, 0]),
        lambda rngs: jdropout.nnx.Zoneout(nnx.SimpleCell(8, 8, rngs=rngs), 0.5, rngs=rngs),
        lambda params: {"cell": {"dense_i": params["cell"]["i"], "dense_h": params["cell"]["h"]}},
    ),
    "ConcreteDropout": Case(
        lambda **flags: M.ConcreteDropout(0.3, broadcast_dims=(2,), **flags),
        lambda params, key: concrete_dropout(
            key, X, params["logit"], broadcast_dims=(2,), deterministic=key is None
        ),
        (X,),
        lambda rngs: jdropout.nnx.ConcreteDropout(0.3, broadcast_dims=(2,), rngs=rngs),
        lambda params: params,
    ),
    "VariationalDense": Case(
        lambda **flags: M.VariationalDense(4, bias_init=RANDOM, **flags),
        dense,
        (X,),
        lambda rngs: jdropout.nnx.VariationalDense(8, 4, rngs=rngs),
        lambda params: params,
    ),
}

every = pytest.mark.parametrize("name", CASES)


def build(name, **flags):
    """A layer, and its variables."""
    layer = CASES[name].make(**flags)
    flag = {} if layer.deterministic is not None else {"deterministic": True}
    return layer, layer.init(jax.random.key(1), *CASES[name].args, **flag)


def assert_same(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def same(a, b):
    return all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


class Recorder(linen.Module):
    """Gives the key that a module of the same path takes from the stream."""

    @linen.compact
    def __call__(self):
        return self.make_rng("dropout")


# --- what all layers have in common -------------------------------------------------------


@every
def test_output_is_the_function_at_the_key_of_the_stream(name, key):
    case = CASES[name]
    layer, variables = build(name, deterministic=False)
    taken = Recorder().apply({}, rngs={"dropout": key})
    expected = case.expected(variables.get("params"), taken)
    y = layer.apply(variables, *case.args, rngs={"dropout": key})
    assert_same(y, expected)
    assert not same(y, layer.apply(variables, *case.args, rngs={"dropout": jax.random.key(1)}))


@every
def test_evaluation_needs_no_key_wherever_the_flag_is_given(name):
    case = CASES[name]
    layer, variables = build(name)
    expected = case.expected(variables.get("params"), None)
    assert_same(layer.apply(variables, *case.args, deterministic=True), expected)
    assert_same(layer.clone(deterministic=True).apply(variables, *case.args), expected)


@every
def test_missing_flag_and_missing_keys_are_errors(name):
    case = CASES[name]
    layer, variables = build(name)
    with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
        layer.apply(variables, *case.args)
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        layer.clone(deterministic=True).apply(variables, *case.args, deterministic=True)
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "noise"'):
        layer.clone(rng_collection="noise").apply(
            variables, *case.args, deterministic=False, rngs={"dropout": jax.random.key(0)}
        )


@every
def test_rng_argument_is_the_very_key_and_agrees_with_nnx(name, key):
    case = CASES[name]
    layer, variables = build(name, deterministic=False)
    y = layer.apply(variables, *case.args, rng=key)
    assert_same(y, case.expected(variables.get("params"), key))
    twin = case.nnx(nnx.Rngs(0))
    nnx.update(twin, case.parameters(variables.get("params")))
    assert_same(twin(*case.args, rngs=key), y)
    assert_same(
        twin(*case.args, deterministic=True),
        layer.clone(deterministic=True).apply(variables, *case.args),
    )


@every
def test_variables_hold_nothing_but_what_is_learned(name):
    _, variables = build(name)
    learned = {
        "EmbeddingDropout": 1,
        "DropConnect": 2,
        "Zoneout": 3,
        "ConcreteDropout": 1,
        "VariationalDense": 3,
    }
    assert set(variables) == ({"params"} if name in learned else set())
    assert len(jax.tree.leaves(variables)) == learned.get(name, 0)


@every
def test_jit_and_vmap_over_keys_give_what_the_layer_gives(name, key):
    case = CASES[name]
    layer, variables = build(name, deterministic=False)

    def call(key):
        return layer.apply(variables, *case.args, rng=key)

    keys = jax.random.split(key, 2)
    batched = jax.jit(jax.vmap(call))(keys)
    for i in range(2):
        actual = jax.tree.map(lambda y, i=i: y[i], batched)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(call(keys[i])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(a == 0, b == 0)


class Model(linen.Module):
    name_of_case: str

    @linen.compact
    def __call__(self, *args):
        case = CASES[self.name_of_case]
        layers = [case.make(deterministic=False, name=f"layer{i}") for i in range(2)]
        return [layer(*args) for layer in layers]


@every
def test_site_keys_reach_it_by_its_path(name, key):
    case, model = CASES[name], Model(name)
    variables = model.init(jax.random.key(0), *case.args)
    apply = M.with_site_keys(model.apply, key, step=7)
    outputs = apply(variables, *case.args)
    params = variables.get("params", {})
    children = [child for child in params if not child.startswith("layer")]
    wrapped = {"EmbeddingDropout": "embed", "DropConnect": "module", "Zoneout": "cell"}
    for i, y in enumerate(outputs):
        # What is wrapped was made in the model, and is a child of it.
        own = {wrapped[name]: params[children[i]]} if children else params.get(f"layer{i}")
        taken = at_site(site_key(key, step=7, site=f"layer{i}"), 0)
        assert_same(y, case.expected(own, taken))
    assert not same(*outputs)
    assert_same(apply(variables, *case.args), outputs)


@every
def test_audit_shows_its_path(name, key):
    case, model = CASES[name], Model(name)
    variables = model.init(jax.random.key(0), *case.args)
    report = jdropout.audit(
        lambda key: model.apply(variables, *case.args, rngs={"dropout": key}), key
    )
    assert [site.path for site in report.sites] == ["Model/layer0", "Model/layer1"]
    assert all(site.location.startswith("test_modules_linen.py") for site in report.sites)


@every
def test_copies_and_pickles_are_equal(name):
    layer = CASES[name].make(deterministic=False)
    assert layer == layer.copy()
    if name not in ("Zoneout", "VariationalDense", "DropConnect", "EmbeddingDropout"):
        assert pickle.loads(pickle.dumps(layer)) == layer  # Flax's own initializers are closures


@pytest.mark.parametrize("name", ["SpatialDropout", "GaussianDropout", "DropPath", "DropBlock"])
def test_impossible_rates_are_refused_at_construction(name):
    options = {"block_size": 2} if name == "DropBlock" else {}
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
        getattr(M, name)(1.5, **options)
    with pytest.raises(TypeError, match="rate must be a number"):
        getattr(M, name)("a", **options)


def test_the_other_amounts_are_checked_as_well():
    with pytest.raises(ValueError, match="rate must be in"):
        M.Dropout(1.5)
    with pytest.raises(ValueError, match="rate must be below 1"):
        M.GaussianDropout(1.0)
    with pytest.raises(ValueError, match=r"stddev must be .* at least 0"):
        M.GaussianNoise(-1.0)
    with pytest.raises(ValueError, match="initial_rate must be between 0 and 1"):
        M.ConcreteDropout(1.0)
    with pytest.raises(ValueError, match="rate must be in"):
        M.Zoneout(linen.SimpleCell(4), (0.5, 2.0))


@pytest.mark.parametrize("name", ["SpatialDropout", "GaussianNoise"])
def test_scan_splits_the_stream_for_every_layer(name, key):
    class Step(linen.Module):
        @linen.compact
        def __call__(self, carry, x):
            return carry, CASES[name].make(deterministic=False)(x)

    scan = linen.scan(Step, split_rngs={"dropout": True})()
    _, ys = scan.apply({}, 0, jnp.stack([X, X, X]), rngs={"dropout": key})
    assert len({np.asarray(y).tobytes() for y in ys}) == 3


# --- DropConnect --------------------------------------------------------------------------


class Weights(linen.Module):
    """A dense layer, batch norm and dropout, inside of DropConnect."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8)(x)
        x = linen.BatchNorm(use_running_average=False)(x)
        self.sow("intermediates", "normed", x)
        return M.Dropout(0.5, deterministic=False)(x)


def test_other_collections_of_the_wrapped_module_are_updated(key):
    layer = M.DropConnect(Weights(), 0.5, deterministic=False)
    x = X[:, 0, 0]
    variables = layer.init({"params": key, "dropout": key}, x)
    assert set(variables["params"]["module"]) == {"Dense_0", "BatchNorm_0"}
    y, updates = layer.apply(
        {"params": variables["params"], "batch_stats": variables["batch_stats"]},
        x,
        rng=key,
        rngs={"dropout": key},
        mutable=["batch_stats", "intermediates"],
    )
    kernel = variables["params"]["module"]["Dense_0"]["kernel"]
    dropped = drop_connect(at_site(key, ("Dense_0", "kernel")), kernel, 0.5)
    mean = updates["batch_stats"]["module"]["BatchNorm_0"]["mean"]
    old = variables["batch_stats"]["module"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.99 * old + 0.01 * (x @ dropped).mean(0), rtol=1e-4)
    (normed,) = updates["intermediates"]["module"]["normed"]
    assert 0 < int((y == 0).sum()) < y.size
    np.testing.assert_allclose(y, jnp.where(y == 0, 0, 2 * normed), rtol=1e-5)


def test_initialisation_is_that_of_the_module(key):
    inner = linen.Dense(4)
    ours = M.DropConnect(inner, 0.5, deterministic=False).init(key, X)

    class Holder(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, name="module")(x)

    assert_same(ours, Holder().init(key, X))
    assert jax.tree.structure(ours) == jax.tree.structure(Holder().init(key, X))


def test_around_a_recurrent_network_one_mask_serves_all_time_steps(key):
    select = [f"h{gate}/kernel" for gate in "ifgo"]
    rnn = linen.RNN(linen.OptimizedLSTMCell(8))
    layer = M.DropConnect(rnn, 0.5, select=select)
    x = jnp.moveaxis(X[0], -1, 1)
    variables = layer.init(key, x, deterministic=True)
    params = jax.tree.map(lambda w: w, variables["params"]["module"])
    for gate in "ifgo":
        weights = params["cell"][f"h{gate}"]
        site = ("cell", f"h{gate}", "kernel")
        weights["kernel"] = drop_connect(at_site(key, site), weights["kernel"], 0.5)
    expected = rnn.apply({"params": params}, x)
    assert_same(layer.apply(variables, x, deterministic=False, rng=key), expected)
    whole = rnn.apply({"params": variables["params"]["module"]}, x)
    assert_same(layer.apply(variables, x, deterministic=True), whole)


def test_modules_that_were_made_in_the_parent_have_masks_of_their_own(key):
    class Pair(linen.Module):
        first: linen.Module
        second: linen.Module

        def __call__(self, x):
            return self.first(x), self.second(x)

    class Parent(linen.Module):
        @linen.compact
        def __call__(self, x, rng=None):
            pair = Pair(linen.Dense(8, use_bias=False), linen.Dense(8, use_bias=False))
            return M.DropConnect(pair, 0.5, deterministic=rng is None)(x, rng=rng)

    eye = jnp.eye(8)
    variables = jax.tree.map(jnp.ones_like, Parent().init(key, eye))
    assert set(variables["params"]) == {"Dense_0", "Dense_1"}
    first, second = Parent().apply(variables, eye, key)
    assert {float(w) for w in np.unique(first)} == {0.0, 2.0}
    assert not same(first, second)


def test_nothing_selected_is_an_error_that_lists_the_parameters(key):
    layer, variables = build("DropConnect", deterministic=False)
    for select in (["krnel"], ["kernel", "krnel"]):
        with pytest.raises(ValueError, match="'krnel' selects none of 'bias', 'kernel'"):
            layer.clone(select=select).apply(variables, X, rng=key)
    with pytest.raises(ValueError, match="selects none of"):
        layer.clone(select=lambda path: False).apply(variables, X, rng=key)
    y = layer.clone(select=lambda path: path == "kernel").apply(variables, X, rng=key)
    assert_same(y, linear_dropped(variables["params"], key))


# --- Zoneout, embeddings, learned ---------------------------------------------------------


class Counter(linen.RNNCellBase):
    """Counts steps, so that the output shows which units were kept back."""

    @linen.compact
    def __call__(self, carry, x):
        a, b = (part + 1 for part in carry)
        return (a, b), (a, x)

    @linen.nowrap
    def initialize_carry(self, rng, input_shape):
        return (jnp.zeros(input_shape), jnp.zeros(input_shape))

    @property
    def num_feature_axes(self):
        return 1


def test_zoneout_draws_a_new_mask_at_every_time_step(key):
    rnn = linen.RNN(
        M.Zoneout(Counter(), (0.5, 0.0), deterministic=False),
        return_carry=True,
        split_rngs={"params": False, "dropout": True},
    )
    (a, b), (seen, x) = rnn.apply({}, jnp.ones((2, 4, 16)), rngs={"dropout": key})
    steps = jnp.diff(seen, axis=1, prepend=0)
    assert {float(step) for step in np.unique(steps)} == {0.0, 1.0}
    assert len({np.asarray(steps[:, t]).tobytes() for t in range(4)}) == 4
    assert_same(a, seen[:, -1])
    assert_same(b, jnp.full((2, 16), 4.0))
    assert_same(x, jnp.ones((2, 4, 16)))
    apply = M.with_site_keys(rnn.apply, key, step=1)
    (again, _), _ = apply({}, jnp.ones((2, 4, 16)))
    assert not same(again, a)


def test_zoneout_takes_the_expectation_in_evaluation():
    rnn = linen.RNN(M.Zoneout(Counter(), (0.5, 0.25), deterministic=True), return_carry=True)
    (a, b), _ = rnn.apply({}, jnp.ones((2, 4, 3)))
    assert_same(a, jnp.full((2, 3), 2.0))
    assert_same(b, jnp.full((2, 3), 3.0))


def test_embedding_attends_to_the_dropped_table(key):
    layer, variables = build("EmbeddingDropout")
    query, table = X[0, 0, :, :4], variables["params"]["embed"]["embedding"]
    y = layer.apply(variables, query, deterministic=False, rng=key, method="attend")
    assert_same(y, query @ embedding_dropout(key, table, 0.5).T)
    y = layer.apply(variables, query, deterministic=True, method="attend")
    assert_same(y, query @ table.T)
    apply = M.with_site_keys(layer.apply, key, step=3)
    y = apply(variables, query, deterministic=False, method="attend")
    taken = site_key(key, step=3, site=0)  # of the first call of the outermost module
    assert_same(y, query @ embedding_dropout(taken, table, 0.5).T)


def test_patch_dropout_gives_tokens_alone_unless_asked(key):
    layer = M.PatchDropout(0.5, deterministic=False)
    assert_same(layer.apply({}, X, rng=key), patch_dropout(key, X, 0.5)[0])


def test_regularisers_are_those_of_the_parameters():
    layer, variables = build("ConcreteDropout")
    cost = layer.apply(
        variables, 3.0, 10, weight_regularizer=0.5, dropout_regularizer=0.25, method="regularizer"
    )
    entropy = 0.3 * np.log(0.3) + 0.7 * np.log(0.7)
    np.testing.assert_allclose(cost, 0.5 * 3 / 0.7 + 0.25 * 10 * entropy, rtol=1e-5)
    layer, variables = build("VariationalDense")
    expected = variational_kl(variables["params"]["log_alpha"]).sum()
    assert_same(layer.apply(variables, method="kl"), expected)
