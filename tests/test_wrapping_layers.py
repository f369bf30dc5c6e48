"""Flax layers that wrap another module or learn their rate: what is special about each."""

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import optax
import pytest
from cheap import UNIFORM, normal
from flax import errors, linen, nnx
from flax_layers import (
    LAYERS,
    X,
    assert_same,
    connected,
    count_of,
    linen_layer,
    next_key,
    nnx_layer,
    same,
)

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout import drop_connect
from jdropout.keys import at_site, site_key

ROWS = X[:, 0, 0]
SEQUENCES = jnp.moveaxis(X[0], -1, 1)  # 6 of 8 steps with 5 features


# --- DropConnect around modules with a state ----------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        self.made = nnx.BatchStat(x.sum())
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "nnx.jit"])
def test_other_state_of_the_wrapped_nnx_module_survives(jit):
    block = Block(nnx.Rngs(0))
    layer = jdropout.nnx.DropConnect(block, 0.5, rngs=nnx.Rngs(1))
    kernel = block.linear.kernel[...]
    call = nnx.jit(lambda layer, x: layer(x)) if jit else (lambda layer, x: layer(x))
    dropped = drop_connect(at_site(next_key(layer), ("linear", "kernel")), kernel, 0.5)
    call(layer, ROWS)
    np.testing.assert_allclose(block.norm.mean[...], 0.01 * (ROWS @ dropped).mean(0), rtol=1e-5)
    assert int(block.dropout.rngs.count[...]) == 1
    if not jit:  # nnx.jit has rules of its own for a new variable
        np.testing.assert_allclose(block.made[...], ROWS.sum())
    assert_same(block.linear.kernel[...], kernel)
    call(layer, ROWS)
    assert int(block.dropout.rngs.count[...]) == 2
    assert isinstance(layer.module, Block)


class Weights(linen.Module):
    """A dense layer, batch norm and dropout, inside of DropConnect."""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(8, kernel_init=UNIFORM)(x)
        x = linen.BatchNorm(use_running_average=False)(x)
        self.sow("intermediates", "normed", x)
        return jdropout.linen.Dropout(0.5, deterministic=False)(x)


def test_other_collections_of_the_wrapped_linen_module_are_updated(key):
    layer = jdropout.linen.DropConnect(Weights(), 0.5, deterministic=False)
    variables = jax.jit(layer.init)({"params": key, "dropout": key}, ROWS)
    assert set(variables["params"]["module"]) == {"Dense_0", "BatchNorm_0"}
    y, updates = jax.jit(layer.apply, static_argnames="mutable")(
        {"params": variables["params"], "batch_stats": variables["batch_stats"]},
        ROWS,
        rng=key,
        rngs={"dropout": key},
        mutable=("batch_stats", "intermediates"),
    )
    kernel = variables["params"]["module"]["Dense_0"]["kernel"]
    dropped = drop_connect(at_site(key, ("Dense_0", "kernel")), kernel, 0.5)
    mean = updates["batch_stats"]["module"]["BatchNorm_0"]["mean"]
    old = variables["batch_stats"]["module"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, 0.99 * old + 0.01 * (ROWS @ dropped).mean(0), rtol=1e-4)
    (normed,) = updates["intermediates"]["module"]["normed"]
    assert 0 < int((y == 0).sum()) < y.size
    np.testing.assert_allclose(y, jnp.where(y == 0, 0, 2 * normed), rtol=1e-5)


def test_drop_connect_of_linen_initialises_as_the_module_does(key):
    class Holder(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, kernel_init=UNIFORM, name="module")(x)

    layer = jdropout.linen.DropConnect(
        linen.Dense(4, kernel_init=UNIFORM), 0.5, deterministic=False
    )
    ours, theirs = layer.init(key, X), Holder().init(key, X)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Conv(8, 4, (3,), kernel_init=UNIFORM, rngs=rngs),
        lambda rngs: nnx.LinearGeneral(8, 4, kernel_init=UNIFORM, rngs=rngs),
    ],
    ids=["Conv", "LinearGeneral"],
)
def test_drop_connect_of_other_layers_is_the_layer_with_dropped_weights(make, key):
    inner = make(nnx.Rngs(0))
    other = nnx.clone(inner)
    other.kernel[...] = drop_connect(at_site(key, "kernel"), inner.kernel[...], 0.3)

    @jax.jit
    def outputs(key):
        return jdropout.nnx.DropConnect(inner, 0.3)(X, rngs=key), other(X), inner(X)

    y, expected, whole = outputs(key)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(y, whole)


def test_around_an_nnx_rnn_one_mask_serves_all_time_steps(key):
    inits = dict(kernel_init=UNIFORM, recurrent_kernel_init=UNIFORM)
    rnn = nnx.RNN(nnx.OptimizedLSTMCell(5, 8, **inits, rngs=nnx.Rngs(0)))
    layer = jdropout.nnx.DropConnect(rnn, 0.5, select=["dense_h/kernel"], deterministic=None)
    dropped = nnx.clone(rnn)
    kernel = dropped.cell.dense_h.kernel
    kernel[...] = drop_connect(at_site(key, ("cell", "dense_h", "kernel")), kernel[...], 0.5)

    @nnx.jit
    def outputs(layer, rnn, dropped, key, x):
        training = layer(x, deterministic=False, rngs=key)
        return (training, dropped(x)), (layer(x, deterministic=True), rnn(x))

    equal = outputs(layer, rnn, dropped, key, SEQUENCES)
    for actual, expected in equal:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(equal[0][0], equal[1][0])


def test_around_a_linen_rnn_one_mask_serves_all_time_steps(key):
    select = [f"h{gate}/kernel" for gate in "ifgo"]
    rnn = linen.RNN(linen.OptimizedLSTMCell(8))
    layer = jdropout.linen.DropConnect(rnn, 0.5, select=select)
    shapes = jax.eval_shape(lambda: layer.init(key, SEQUENCES, deterministic=True))
    variables = jax.tree.map(lambda leaf: normal(*leaf.shape), shapes)

    @jax.jit
    def outputs(variables, key):
        whole = variables["params"]["module"]
        params = jax.tree.map(lambda w: w, whole)
        for gate in "ifgo":
            weights = params["cell"][f"h{gate}"]
            site = ("cell", f"h{gate}", "kernel")
            weights["kernel"] = drop_connect(at_site(key, site), weights["kernel"], 0.5)
        training = layer.apply(variables, SEQUENCES, deterministic=False, rng=key)
        evaluated = layer.apply(variables, SEQUENCES, deterministic=True)
        return [
            (training, rnn.apply({"params": params}, SEQUENCES)),
            (evaluated, rnn.apply({"params": whole}, SEQUENCES)),
        ]

    equal = outputs(variables, key)
    for actual, expected in equal:
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(equal[0][0], equal[1][0])


def test_drop_connect_works_where_the_nnx_layer_is_closed_over():
    layer = nnx_layer("DropConnect")
    keys = jax.random.split(jax.random.key(0), 3)
    y = jax.jit(jax.vmap(lambda key, x: layer(x, rngs=key)))(keys, X)
    for i, key in enumerate(keys):
        expected = connected(LAYERS["DropConnect"].params, key)[i]
        np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-6)


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
            return jdropout.linen.DropConnect(pair, 0.5, deterministic=rng is None)(x, rng=rng)

    eye, kernel = jnp.eye(8), {"kernel": jnp.ones((8, 8))}
    assert set(jax.eval_shape(Parent().init, key, eye)["params"]) == {"Dense_0", "Dense_1"}
    variables = {"params": {"Dense_0": kernel, "Dense_1": kernel}}
    first, second = Parent().apply(variables, eye, key)
    assert set(np.unique(first).tolist()) == {0.0, 2.0}
    assert not same(first, second)


# --- DropConnect's selection --------------------------------------------------------------


def test_nothing_selected_is_an_error_that_lists_the_parameters(key):
    layer, variables = linen_layer("DropConnect", deterministic=False)

    def in_linen(select):
        return layer.clone(select=select).apply(variables, X, rng=key)

    def in_nnx(select):
        inner = nnx_layer("DropConnect").module
        return jdropout.nnx.DropConnect(inner, 0.5, select=select)(X, rngs=key)

    for call in (in_linen, in_nnx):
        for select in (["krnel"], ["kernel", "krnel"]):
            with pytest.raises(ValueError, match="'krnel' selects none of 'bias', 'kernel'"):
                call(select)
        with pytest.raises(ValueError, match="selects none of"):
            call(lambda path: False)
        y = call(lambda path: path == "kernel")
        assert_same(y, connected(LAYERS["DropConnect"].params, key))
    with pytest.raises(TypeError, match="select must be"):
        jdropout.nnx.DropConnect(None, 0.5, select="kernel")


# --- stacks -------------------------------------------------------------------------------


def test_vmap_and_scan_over_nnx_layers_give_each_its_own_key():
    case = LAYERS["DropConnect"]

    @nnx.split_rngs(splits=3)
    @nnx.vmap(axis_size=3)
    def create(rngs):
        return case.nnx(rngs=rngs)

    layers = create(nnx.Rngs(0))
    assert layers.rngs.key.shape == (3,)
    keys = [jax.random.fold_in(layers.rngs.key[...][i], 0) for i in range(3)]
    # Each has weights of its own.
    kernels = np.stack([(1 + i) * case.params["module"]["kernel"] for i in range(3)])
    layers.module.kernel[...] = kernels
    bias = layers.module.bias[...][0]
    params = [{"module": {"kernel": kernel, "bias": bias}} for kernel in kernels]
    expected = [case.expected(*pair) for pair in zip(params, keys, strict=True)]
    copies = nnx.clone(layers)

    @nnx.jit
    def both(layers, copies):
        y = nnx.vmap(lambda layer: layer(X))(layers)
        scan = nnx.scan(lambda layer, carry: (carry, layer(X)), in_axes=(0, nnx.Carry))
        return y, scan(copies, 0)[1]

    for y, stack in zip(both(layers, copies), (layers, copies), strict=True):
        np.testing.assert_allclose(y, np.stack(expected), rtol=1e-5, atol=1e-5)
        assert stack.rngs.count[...].tolist() == [1, 1, 1]


# --- Zoneout ------------------------------------------------------------------------------


class NNXCounter(nnx.RNNCellBase):
    """Counts steps in two carries, so that the output shows which units were kept back."""

    def __call__(self, carry, x):
        a, b = (part + 1 for part in carry)
        return (a, b), (a, x)

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return (jnp.zeros(input_shape), jnp.zeros(input_shape))

    @property
    def num_feature_axes(self):
        return 1


class LinenCounter(linen.RNNCellBase):
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


def test_zoneout_of_nnx_draws_a_new_mask_at_every_time_step():
    layer = jdropout.nnx.Zoneout(NNXCounter(), (0.5, 0.0), rngs=nnx.Rngs(0))
    rnn = nnx.RNN(layer, return_carry=True)
    keys = [at_site(jax.random.fold_in(layer.rngs.key[...], i), 0) for i in range(4)]
    masks = [law_twin.keep_mask(np.asarray(jax.random.key_data(key)), 0.5, (2, 16)) for key in keys]
    ones = np.ones((2, 4, 16), np.float32)
    (a, b), (seen, x) = nnx.jit(lambda rnn, x: rnn(x))(rnn, ones)
    steps = np.stack(masks, axis=1)
    assert_same(seen, np.cumsum(steps, axis=1, dtype=np.float32))
    assert_same(a, seen[:, -1])
    assert_same(b, np.full((2, 16), 4.0))
    assert_same(x, ones)
    assert len({np.asarray(steps[:, t]).tobytes() for t in range(4)}) == 4


def test_zoneout_of_linen_draws_a_new_mask_at_every_time_step(key):
    rnn = linen.RNN(
        jdropout.linen.Zoneout(LinenCounter(), (0.5, 0.0), deterministic=False),
        return_carry=True,
        split_rngs={"params": False, "dropout": True},
    )

    @jax.jit
    def both(key, x):
        by_site = jdropout.linen.with_site_keys(rnn.apply, key, step=1)
        return rnn.apply({}, x, rngs={"dropout": key}), by_site({}, x)

    ((a, b), (seen, x)), ((again, _), _) = both(key, np.ones((2, 4, 16), np.float32))
    steps = np.diff(seen, axis=1, prepend=0)
    assert {float(step) for step in np.unique(steps)} == {0.0, 1.0}
    assert len({np.asarray(steps[:, t]).tobytes() for t in range(4)}) == 4
    assert_same(a, seen[:, -1])
    assert_same(b, np.full((2, 16), 4.0))
    assert_same(x, np.ones((2, 4, 16)))
    assert not same(again, a)


def test_zoneout_takes_the_expectation_in_evaluation():
    x = np.ones((2, 4, 3), np.float32)
    in_nnx = nnx.RNN(jdropout.nnx.Zoneout(NNXCounter(), (0.5, 0.25)), return_carry=True)
    in_nnx.eval()
    layer = jdropout.linen.Zoneout(LinenCounter(), (0.5, 0.25), deterministic=True)
    in_linen = linen.RNN(layer, return_carry=True)
    for (a, b), _ in (in_nnx(x), in_linen.apply({}, x)):
        assert_same(a, np.full((2, 3), 2.0))
        assert_same(b, np.full((2, 3), 3.0))


def test_zoneout_rates_are_set_together():
    layer = jdropout.nnx.Zoneout(NNXCounter(), [0.5, 0.25])
    assert layer.rate == (0.5, 0.25)
    jdropout.nnx.set_rate(layer, (0.1, 0.2))
    assert layer.rate == (0.1, 0.2)


@pytest.mark.parametrize("rate", [(0.5, 0.0), (1.0, 0.5)], ids=str)
def test_zoneout_of_one_rate_alone_takes_a_key(rate, key):
    x = np.ones((2, 3), np.float32)
    carry = (x, x)
    layer = jdropout.nnx.Zoneout(NNXCounter(), rate, rngs=nnx.Rngs(0))
    layer(carry, x)
    assert count_of(layer) == 1
    layer = jdropout.linen.Zoneout(LinenCounter(), rate, deterministic=False)
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "dropout"'):
        layer.apply({}, carry, x)


# --- embeddings and tokens ----------------------------------------------------------------


def test_embedding_attends_to_the_dropped_table(key):
    table = LAYERS["EmbeddingDropout"].params["embed"]["embedding"]
    query = X[0, 0, :, :4]
    dropped = jdropout.embedding_dropout(key, table, 0.5)

    layer = nnx_layer("EmbeddingDropout")
    assert_same(layer.attend(query, rngs=key), query @ dropped.T)
    assert_same(layer.attend(query, deterministic=True), layer.embed.attend(query))
    assert count_of(layer) == 0
    layer.attend(query)
    assert count_of(layer) == 1

    layer, variables = linen_layer("EmbeddingDropout")
    y = layer.apply(variables, query, deterministic=False, rng=key, method="attend")
    assert_same(y, query @ dropped.T)
    y = layer.apply(variables, query, deterministic=True, method="attend")
    assert_same(y, query @ table.T)
    apply = jdropout.linen.with_site_keys(layer.apply, key, step=3)
    y = apply(variables, query, deterministic=False, method="attend")
    taken = site_key(key, step=3, site=0)  # of the first call of the outermost module
    assert_same(y, query @ jdropout.embedding_dropout(taken, table, 0.5).T)


def test_patch_dropout_returns_tokens_alone_unless_asked(key):
    expected, _ = jdropout.patch_dropout(key, X, 0.5)
    layer = jdropout.nnx.PatchDropout(0.5)
    assert_same(layer(X, rngs=key), expected)
    module = jdropout.linen.PatchDropout(0.5, deterministic=False)
    assert_same(module.apply({}, X, rng=key), expected)
    for call in (
        lambda flag: layer(X, deterministic=flag, rngs=key),
        lambda flag: module.clone(deterministic=None).apply({}, X, deterministic=flag, rng=key),
    ):
        with pytest.raises(TypeError, match="deterministic must be True or False"):
            jax.jit(call)(True)


# --- learned ------------------------------------------------------------------------------


def test_concrete_dropout_lowers_a_harmful_rate():
    layer = jdropout.nnx.ConcreteDropout(0.5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.sgd(2.0), wrt=nnx.Param)
    ones = np.ones((16, 16), np.float32)

    @nnx.jit
    def step(layer, optimizer):
        gradients = nnx.grad(lambda layer: ((layer(ones) - ones) ** 2).mean())(layer)
        optimizer.update(layer, gradients)

    for _ in range(20):
        step(layer, optimizer)
    assert float(layer.rate) < 0.2


def test_concrete_rate_and_regularizer_are_those_of_the_logit():
    np.testing.assert_allclose(float(jdropout.nnx.ConcreteDropout(0.2).rate), 0.2, rtol=1e-6)
    layer = jdropout.linen.ConcreteDropout(0.2)
    variables = layer.init(jax.random.key(0), X, deterministic=True)
    np.testing.assert_allclose(jax.nn.sigmoid(variables["params"]["logit"]), 0.2, rtol=1e-6)
    options = dict(weight_regularizer=0.5, dropout_regularizer=0.25)
    entropy = 0.2 * np.log(0.2) + 0.8 * np.log(0.8)
    for cost in (
        jdropout.nnx.ConcreteDropout(0.2).regularizer(3.0, 10, **options),
        layer.apply(variables, 3.0, 10, **options, method="regularizer"),
    ):
        np.testing.assert_allclose(cost, 0.5 * 3 / 0.8 + 0.25 * 10 * entropy, rtol=1e-5)


def test_variational_kl_is_that_of_the_log_alphas():
    expected = jdropout.variational_kl(LAYERS["VariationalDense"].params["log_alpha"]).sum()
    assert_same(nnx_layer("VariationalDense").kl(), expected)
    layer, variables = linen_layer("VariationalDense")
    assert_same(layer.apply(variables, method="kl"), expected)


def test_variational_dense_takes_the_parameters_of_a_linear_layer():
    linear = nnx.Linear(8, 4, kernel_init=UNIFORM, rngs=nnx.Rngs(5))
    layer = nnx_layer("VariationalDense")
    layer.log_alpha[...] = jnp.full((8, 4), -8.0)
    nnx.update(layer, nnx.state(linear, nnx.Param))
    np.testing.assert_allclose(layer(X, deterministic=True), linear(X), rtol=1e-5, atol=1e-6)
    layer.log_alpha[...] = jnp.full((8, 4), 5.0)
    assert_same(layer(X, deterministic=True), jnp.zeros((*X.shape[:-1], 4)))


def test_variational_dense_computes_in_the_dtype_asked_for():
    options = dict(use_bias=False, dtype=jnp.bfloat16)
    layer = jdropout.nnx.VariationalDense(8, 4, **options, rngs=nnx.Rngs(0))
    assert jax.eval_shape(lambda: layer(X, rngs=jax.random.key(0))).dtype == jnp.bfloat16
    module = jdropout.linen.VariationalDense(4, **options, deterministic=False)
    key = jax.random.key(0)
    y = jax.eval_shape(lambda: module.init_with_output(key, X)[0])
    assert y.dtype == jnp.bfloat16
