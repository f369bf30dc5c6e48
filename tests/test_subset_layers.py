"""The nnx and linen layers of the subset functions, around blocks with state of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx

KEY = jax.random.key(0)
X = normal(6, 8)
TOKENS = normal(2, 8, 16)
HEADS = dict(incoming=("query", "key", "value"), outgoing=("out",), incoming_axis=-2)


class NNXBlock(nnx.Module):
    """An MLP with dropout and batch statistics, and a mask of the examples."""

    def __init__(self, rngs):
        self.up = nnx.Linear(8, 12, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(12, 8, kernel_init=UNIFORM, rngs=rngs)

    def __call__(self, x, mask=1.0, scale=1.0):
        return self.dropout(self.norm(self.down(jnp.tanh(self.up(x))))) * mask * scale


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, mask=1.0, scale=1.0):
        x = linen.Dense(12, kernel_init=UNIFORM, name="up")(x)
        x = linen.Dense(8, kernel_init=UNIFORM, name="down")(jnp.tanh(x))
        x = linen.BatchNorm(use_running_average=False)(x)
        return jdropout.linen.Dropout(0.5, deterministic=False)(x) * mask * scale


def plain_mlp(rngs):
    return nnx.Sequential(
        nnx.Linear(8, 12, kernel_init=UNIFORM, rngs=rngs),
        jnp.tanh,
        nnx.Linear(12, 8, kernel_init=UNIFORM, rngs=rngs),
    )


class PlainMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = jnp.tanh(linen.Dense(12, kernel_init=UNIFORM)(x))
        return linen.Dense(8, kernel_init=UNIFORM)(x)


def linen_variables(layer, *args):
    return jax.jit(layer.init)({"params": KEY, "dropout": KEY}, *args)


def dropped_key(layer):
    """The key that a linen layer takes from its stream."""
    return layer.apply({}, "dropout", rngs={"dropout": KEY}, method=linen.Module.make_rng)


# --- examples -------------------------------------------------------------------------------


def test_nnx_stochastic_depth_is_the_function_around_its_layer():
    layer = jdropout.nnx.StochasticDepth(NNXBlock(nnx.Rngs(0)), 0.5, groups=2, rngs=nnx.Rngs(1))
    other = nnx.clone(layer)
    mask = normal(6, 1)

    @nnx.jit
    def run(layer, mask):
        return layer(X, mask, scale=2.0)

    key = other.rngs()
    expected = jdropout.stochastic_depth(
        key, lambda x, mask: other.layer(x, mask, 2.0), X, 0.5, args=(mask,), groups=2
    )
    np.testing.assert_allclose(run(layer, mask), expected, rtol=1e-6)
    assert layer.layer.dropout.rngs.count[...] == 1
    np.testing.assert_allclose(layer.layer.norm.mean[...], other.layer.norm.mean[...], rtol=1e-6)
    layer.eval()
    layer.layer.eval()
    np.testing.assert_array_equal(layer(X), X + layer.layer(X))


def test_linen_stochastic_depth_is_the_function_around_its_layer():
    layer = jdropout.linen.StochasticDepth(LinenBlock(), 0.5, groups=2)
    mask = normal(6, 1)
    variables = linen_variables(layer, X, mask)
    y, state = layer.apply(
        variables, X, mask, deterministic=False, scale=2.0, rngs={"dropout": KEY}, mutable=True
    )
    indices = jdropout.keep_indices(dropped_key(layer), 0.5, 6, groups=2)
    skipped = np.setdiff1d(np.arange(6), indices)
    np.testing.assert_array_equal(y[skipped], X[skipped])
    assert (y[indices] != X[indices]).any(-1).all()
    mean = state["batch_stats"]["layer"]["BatchNorm_0"]["mean"]
    assert (mean != variables["batch_stats"]["layer"]["BatchNorm_0"]["mean"]).all()


# --- layers ---------------------------------------------------------------------------------


class NNXLayer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, scale):
        return x + self.dropout(self.norm(self.linear(x))) * scale


@nnx.split_rngs(splits=6)
@nnx.vmap(axis_size=6)
def nnx_stack(rngs):
    return NNXLayer(rngs)


def test_nnx_layer_subset_runs_the_kept_layers_and_advances_only_their_state():
    layer = jdropout.nnx.LayerSubset(nnx_stack(nnx.Rngs(0)), 0.5, groups=3, rngs=nnx.Rngs(1))
    indices = jdropout.keep_indices(nnx.clone(layer).rngs(), 0.5, 6, groups=3)
    before = jax.tree.map(jnp.copy, nnx.state(layer.layer))
    expected = X
    for i in np.asarray(indices):
        structure, state = nnx.split(layer.layer)
        one = nnx.merge(structure, jax.tree.map(lambda leaf, i=i: leaf[i], state))
        expected = one(expected, 2.0)

    @nnx.jit
    def step(layer, x):
        def loss(layer):
            y = layer(x, jnp.float32(2.0))
            return y.sum(), y

        return nnx.value_and_grad(loss, has_aux=True)(layer)

    (_, y), gradient = step(layer, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    kept = np.isin(np.arange(6), indices)
    advanced = layer.layer.dropout.rngs.count[...] - before["dropout"]["rngs"]["count"][...]
    np.testing.assert_array_equal(advanced, kept)
    changed = (layer.layer.norm.mean[...] != before["norm"]["mean"][...]).any(-1)
    np.testing.assert_array_equal(changed, kept)
    trained = (gradient["layer"]["linear"]["kernel"][...] != 0).any((1, 2))
    np.testing.assert_array_equal(trained, kept)


class LinenLayer(linen.Module):
    @linen.compact
    def __call__(self, x, scale=1.0):
        y = linen.Dense(8, kernel_init=UNIFORM)(x)
        y = linen.BatchNorm(use_running_average=False)(y)
        return x + jdropout.linen.Dropout(0.5, deterministic=False)(y) * scale


def test_linen_layer_subset_runs_the_kept_layers_and_advances_only_their_state():
    layer = jdropout.linen.LayerSubset(LinenLayer(), 0.5, num_layers=6, groups=3)
    variables = linen_variables(layer, X)
    assert variables["params"]["layer"]["Dense_0"]["kernel"].shape == (6, 8, 8)

    @jax.jit
    def step(params, key):
        def loss(params):
            y, state = layer.apply(
                {**variables, "params": params},
                X,
                scale=2.0,
                deterministic=False,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return y.sum(), (y, state["batch_stats"])

        return jax.grad(loss, has_aux=True)(params)

    gradient, (y, state) = step(variables["params"], KEY)
    kept = np.isin(np.arange(6), jdropout.keep_indices(dropped_key(layer), 0.5, 6, groups=3))
    old, new = variables["batch_stats"]["layer"], state["layer"]
    np.testing.assert_array_equal(
        (new["BatchNorm_0"]["mean"] != old["BatchNorm_0"]["mean"]).any(-1), kept
    )
    trained = (gradient["layer"]["Dense_0"]["kernel"] != 0).any((1, 2))
    np.testing.assert_array_equal(trained, kept)
    whole, _ = layer.apply(
        variables, X, deterministic=True, rngs={"dropout": KEY}, mutable=["batch_stats"]
    )
    assert y.shape == whole.shape
    assert (y != whole).any()


# --- tokens ---------------------------------------------------------------------------------


def test_route_tokens_passes_positions_under_the_name_of_the_argument():
    def shifted(x, scale, positions):
        return x + scale * positions[..., None].astype(x.dtype)

    class Shifted(linen.Module):
        def __call__(self, x, scale, positions):
            return shifted(x, scale, positions)

    options = dict(num_prefix_tokens=1, positions_argument="positions")
    layer = jdropout.nnx.RouteTokens(shifted, 0.5, **options, rngs=nnx.Rngs(0))
    key = nnx.clone(layer).rngs()
    expected = jdropout.route_tokens(
        key, lambda x, p: shifted(x, 2.0, p), TOKENS, 0.5, num_prefix_tokens=1
    )
    np.testing.assert_array_equal(layer(TOKENS, 2.0), expected)
    routed = jdropout.linen.RouteTokens(Shifted(), 0.5, **options, deterministic=False)
    np.testing.assert_array_equal(routed.apply({}, TOKENS, 2.0, rng=key), expected)
    angles = normal(1, 8)
    y = layer(TOKENS, 2.0, positions=angles, deterministic=True)
    np.testing.assert_allclose(y, TOKENS + 2 * angles[..., None], rtol=1e-6)
    without = jdropout.nnx.RouteTokens(jnp.tanh, 0.5, rngs=nnx.Rngs(0))
    assert ((without(TOKENS) == TOKENS).all(-1).sum(-1) == 4).all()
    with pytest.raises(ValueError, match="positions_argument is None"):
        without(TOKENS, positions=angles)


# --- units ----------------------------------------------------------------------------------


def masked_units(key, kernels, biases, x, rate):
    """The MLP with a mask of its hidden units."""
    kept = np.isin(np.arange(12), jdropout.keep_indices(key, rate, 12))
    (x, *kernels), biases = map(np.asarray, [x, *kernels]), list(map(np.asarray, biases))
    hidden = np.tanh(x @ kernels[0] + biases[0]) * kept * (12 / kept.sum())
    return hidden @ kernels[1] + biases[1]


def test_unit_subset_is_a_mask_of_hidden_units():
    layer = jdropout.nnx.UnitSubset(
        plain_mlp(nnx.Rngs(0)),
        0.5,
        incoming=("layers/0",),
        outgoing=("layers/2",),
        rngs=nnx.Rngs(1),
    )
    up, _, down = layer.layer.layers
    up.bias[...] = jnp.linspace(-1, 1, 12)
    arrays = [up.kernel[...], down.kernel[...]], [up.bias[...], down.bias[...]]
    expected = masked_units(nnx.clone(layer).rngs(), *arrays, X, 0.5)
    y = nnx.jit(lambda layer: layer(X))(layer)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert up.kernel.shape == (8, 12)
    np.testing.assert_array_equal(layer(X, deterministic=True), layer.layer(X))

    model = jdropout.linen.UnitSubset(
        PlainMLP(), 0.5, incoming=("Dense_0",), outgoing=("Dense_1",), deterministic=False
    )
    variables = linen_variables(model, X)
    params = variables["params"]["layer"]
    arrays = [[params[f"Dense_{i}"][name] for i in range(2)] for name in ("kernel", "bias")]
    expected = masked_units(KEY, *arrays, X, 0.5)
    np.testing.assert_allclose(model.apply(variables, X, rng=KEY), expected, rtol=1e-5, atol=1e-6)


def attention_of_heads(params, x, kept):
    """Flax's attention, with a mask of its heads."""
    params = jax.tree.map(np.asarray, params)
    q, k, v = (
        np.einsum("btd,dhf->bthf", x, params[name]["kernel"]) + params[name]["bias"]
        for name in ("query", "key", "value")
    )
    y = np.asarray(jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v))))
    y = y * (kept * 4 / kept.sum())[:, None]
    return np.einsum("bthf,hfd->btd", y, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("framework", [nnx, jdropout.nnx])
def test_nnx_attention_computes_the_kept_heads(framework):
    attention = framework.MultiHeadAttention(
        4, 16, decode=False, kernel_init=UNIFORM, rngs=nnx.Rngs(0)
    )
    layer = jdropout.nnx.UnitSubset(attention, 0.5, **HEADS, rngs=nnx.Rngs(1))
    kept = np.isin(np.arange(4), jdropout.keep_indices(nnx.clone(layer).rngs(), 0.5, 4))
    params = nnx.to_pure_dict(nnx.state(attention, nnx.Param))
    expected = attention_of_heads(params, TOKENS, kept)
    np.testing.assert_allclose(layer(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert attention.query.out_features == (4, 4)


@pytest.mark.parametrize("framework", [linen, jdropout.linen])
def test_linen_attention_computes_the_kept_heads(framework):
    attention = framework.MultiHeadDotProductAttention(4, kernel_init=UNIFORM)
    layer = jdropout.linen.UnitSubset(attention, 0.5, **HEADS, deterministic=False)
    variables = linen_variables(layer, TOKENS)
    kept = np.isin(np.arange(4), jdropout.keep_indices(KEY, 0.5, 4))
    expected = attention_of_heads(variables["params"]["layer"], TOKENS, kept)
    y = layer.apply(variables, TOKENS, rng=KEY)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


# --- all of them ----------------------------------------------------------------------------


@nnx.split_rngs(splits=4)
@nnx.vmap(axis_size=4)
def linear_stack(rngs):
    return nnx.Linear(8, 8, rngs=rngs)


NNX = {
    "StochasticDepth": lambda rngs: jdropout.nnx.StochasticDepth(plain_mlp(rngs), 0.5, rngs=rngs),
    "LayerSubset": lambda rngs: jdropout.nnx.LayerSubset(linear_stack(rngs), 0.5, rngs=rngs),
    "RouteTokens": lambda rngs: jdropout.nnx.RouteTokens(plain_mlp(rngs), 0.5, rngs=rngs),
    "UnitSubset": lambda rngs: jdropout.nnx.UnitSubset(
        plain_mlp(rngs), 0.5, incoming=("layers/0",), outgoing=("layers/2",), rngs=rngs
    ),
}
LINEN = {
    "StochasticDepth": functools.partial(jdropout.linen.StochasticDepth, PlainMLP()),
    "LayerSubset": functools.partial(jdropout.linen.LayerSubset, linen.Dense(8), num_layers=4),
    "RouteTokens": functools.partial(jdropout.linen.RouteTokens, PlainMLP()),
    "UnitSubset": functools.partial(
        jdropout.linen.UnitSubset, PlainMLP(), incoming=("Dense_0",), outgoing=("Dense_1",)
    ),
}
INPUT = normal(4, 6, 8)

one_on_other_versions = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "LayerSubset" else pytest.mark.one_version)
        for name in NNX
    ],
)


@one_on_other_versions
def test_an_nnx_layer_has_rates_site_keys_audit_and_monte_carlo(name):
    layer = NNX[name](nnx.Rngs(0))

    @nnx.jit
    def run(layer, step):
        jdropout.nnx.set_site_keys(layer, KEY, step=step)
        return layer(INPUT)

    first, again, next_step = (run(layer, step) for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != next_step).any()
    report = jdropout.audit(run, layer, jnp.int32(1))
    report.assert_clean(allow=["shared-over-batch"])
    (site,) = report.sites
    assert site.path == name
    assert site.effective_rate == site.saved_work == 0.5
    assert jdropout.nnx.set_rate(layer, 0.25) == 1
    assert layer.rate == 0.25
    prediction = jdropout.nnx.mc_predict(layer, INPUT, KEY, num_samples=4)
    assert (prediction.variance > 0).any()
    with pytest.raises(TypeError, match="deterministic must be True or False here"):
        nnx.jit(lambda layer, flag: layer(INPUT, deterministic=flag))(layer, jnp.array(True))


@one_on_other_versions
def test_a_linen_layer_has_rates_site_keys_audit_and_monte_carlo(name):
    layer = LINEN[name](rate=0.5)
    variables = linen_variables(layer, INPUT)

    @jax.jit
    def run(step):
        apply = jdropout.linen.with_site_keys(layer.apply, KEY, step=step)
        return apply(variables, INPUT, deterministic=False)

    first, again, next_step = (run(step) for step in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != next_step).any()
    report = jdropout.audit(run, jnp.int32(1))
    report.assert_clean(allow=["shared-over-batch"])
    (site,) = report.sites
    assert site.path == name
    assert site.effective_rate == site.saved_work == 0.5
    prediction = jdropout.linen.mc_predict(layer, variables, INPUT, KEY, num_samples=4)
    assert (prediction.variance > 0).any()
    with pytest.raises(ValueError, match="rate must be in"):
        LINEN[name](rate=1.5)


def test_paths_that_lead_nowhere_are_errors():
    with pytest.raises(ValueError, match="at 'nothing'"):
        jdropout.nnx.UnitSubset(
            plain_mlp(nnx.Rngs(0)), 0.5, incoming=("nothing",), outgoing=("layers/2",)
        )
    with pytest.raises(ValueError, match=r"outgoing must not have .* got \['layers/0'\]"):
        jdropout.nnx.UnitSubset(
            plain_mlp(nnx.Rngs(0)), 0.5, incoming=("layers/0",), outgoing=("layers/0",)
        )
    with pytest.raises(TypeError, match="incoming must be a sequence of paths, got 'Dense_0'"):
        jdropout.linen.UnitSubset(PlainMLP(), 0.5, incoming="Dense_0", outgoing=("Dense_1",))
    layer = jdropout.linen.UnitSubset(
        PlainMLP(), 0.5, incoming=("nothing",), outgoing=("Dense_1",), deterministic=False
    )
    variables = linen_variables(layer, X)
    with pytest.raises(ValueError, match="at 'nothing', got \\['Dense_0', 'Dense_1'\\]"):
        layer.apply(variables, X, rng=KEY)
