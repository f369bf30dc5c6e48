"""Monte Carlo prediction of Flax models: the dropout is on, all else is in evaluation mode."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout.keys import at_site, site_key

X = normal(6, 4)


@pytest.mark.examples
def test_the_guides_code_runs():
    guide = pathlib.Path(__file__).parent.parent / "docs" / "uncertainty.md"
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL):
        exec(block, names)
    assert names["prediction"].mean.shape == (*names["information"].shape, 3)
    assert (names["lacking"] >= 0).all()


# --- nnx ----------------------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, dropout, rngs):
        self.hidden = nnx.Linear(4, 16, kernel_init=UNIFORM, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = dropout
        self.output = nnx.Linear(16, 3, kernel_init=UNIFORM, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(nnx.relu(self.norm(self.hidden(x)))))


def make_net(dropout=jdropout.nnx.Dropout, streams=True):
    rngs = nnx.Rngs(0)
    net = Net(dropout(0.5, rngs=rngs if streams else None), rngs)
    net.norm.mean.set_value(jnp.full(16, 0.25))
    return net


def snapshot(model):
    graphdef, state = nnx.split(model)
    leaves = jax.tree.leaves(state)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    arrays = [
        jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, is_key, strict=True)
    ]
    return graphdef, [np.asarray(array) for array in arrays]


def nnx_samples(model, x, key, **options):
    predict = functools.partial(
        jdropout.nnx.mc_predict, model, num_samples=6, return_samples=True, **options
    )
    return jax.jit(predict)(x, key).samples


def test_samples_of_nnx_are_those_of_the_mask_law_at_the_paths_of_the_streams(key):
    net = make_net()
    samples = nnx_samples(net, X, key)

    @jax.jit
    def reference(key):
        hidden = nnx.relu(net.norm(net.hidden(X), use_running_average=True))

        def sample(i):
            stream = site_key(at_site(key, i), step=0, site=("dropout", "rngs"))
            return net.output(jdropout.dropout(jax.random.fold_in(stream, 0), hidden, 0.5))

        return jax.vmap(sample)(np.arange(6))

    np.testing.assert_allclose(samples, reference(key), rtol=1e-5, atol=1e-5)


def test_the_nnx_model_is_not_changed_and_its_mode_does_not_matter(key):
    net = make_net()
    expected = jdropout.nnx.mc_predict(net, X, key, num_samples=6).mean
    for mode in ("train", "eval"):
        getattr(net, mode)()
        graphdef, arrays = snapshot(net)
        mean = jdropout.nnx.mc_predict(net, X, key, num_samples=6).mean
        np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
        graphdef_after, arrays_after = snapshot(net)
        assert graphdef == graphdef_after
        jax.tree.map(np.testing.assert_array_equal, arrays, arrays_after)
    # Control: in training mode the normalisation sees the batch, and changes.
    net.train()
    nnx.jit(lambda net: net(X))(net)
    assert not np.array_equal(net.norm.mean[...], np.full(16, 0.25))


KINDS_OF_NNX = [
    nnx.Dropout,
    jdropout.nnx.Dropout,
    lambda rate, rngs: jdropout.nnx.ConcreteDropout(rngs=rngs),
    lambda rate, rngs: jdropout.nnx.DropConnect(
        nnx.Linear(16, 16, kernel_init=UNIFORM, rngs=nnx.Rngs(2)), rate, rngs=rngs
    ),
    lambda rate, rngs: nnx.MultiHeadAttention(
        num_heads=2, in_features=16, dropout_rate=rate, decode=False, rngs=nnx.Rngs(3),
        keep_rngs=False, broadcast_dropout=False, kernel_init=UNIFORM,
    ),
]  # fmt: skip


def test_all_kinds_of_nnx_layers_draw_without_streams(key):
    class Parallel(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([make(0.5, rngs=None) for make in KINDS_OF_NNX])

        def __call__(self, x):
            return jnp.stack([layer(x) for layer in self.layers], axis=1)

    samples = nnx_samples(Parallel(), normal(6, 16), key)
    assert samples.shape == (6, 6, len(KINDS_OF_NNX), 16)
    assert (samples.var(axis=(0)).mean((0, 2)) > 1e-6).all()


def test_flags_and_keys_in_the_calls_of_nnx_layers_do_not_turn_them_off(key):
    class Calls(nnx.Module):
        def __init__(self):
            kinds, rngs = (nnx.Dropout, jdropout.nnx.Dropout), nnx.Rngs(0)
            self.layers = nnx.List([kind(0.5, rngs=rngs) for kind in kinds])

        def __call__(self, x):
            outputs = []
            for layer in self.layers:
                outputs.append(layer(x, deterministic=True))
                outputs.append(layer(x, rngs=jax.random.key(0)))
                outputs.append(layer(x, deterministic=True, rngs=nnx.Rngs(0)))
            return jnp.stack(outputs, axis=1)

    model = Calls()
    samples = np.asarray(nnx_samples(model, np.ones((6, 50), np.float32), key))
    assert (samples[0] != samples[1]).any((0, 2)).all()
    assert (samples[:, :, :-1] != samples[:, :, 1:]).any((0, 1, 3)).all()  # every call is a draw
    assert [type(layer) for layer in model.layers] == [nnx.Dropout, jdropout.nnx.Dropout]


def test_embeddings_of_nnx_drop_words_in_both_directions(key):
    class Tied(nnx.Module):
        def __init__(self):
            embed = nnx.Embed(20, 8, embedding_init=UNIFORM, rngs=nnx.Rngs(0))
            self.embed = jdropout.nnx.EmbeddingDropout(embed, 0.5)

        def __call__(self, tokens):
            vectors = self.embed(tokens, deterministic=True)
            return self.embed.attend(jnp.ones_like(vectors), deterministic=True)

    predict = functools.partial(jdropout.nnx.mc_predict, Tied(), num_samples=40)
    prediction = jax.jit(predict)(np.arange(20), key)
    assert (prediction.variance.mean(0) > 0).all()


def test_a_stack_of_nnx_layers_has_masks_for_each(key):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return jdropout.nnx.Dropout(0.5, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self):
            self.layers = make(nnx.Rngs(0))

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None), out_axes=1)(
                self.layers, x
            )

    samples = nnx_samples(Stack(), np.ones((6, 50), np.float32), key)
    a, b, c = (np.asarray(samples[:, :, i]) for i in range(3))
    assert (a != b).any()
    assert (b != c).any()


def test_nnx_compiles_once_while_parameters_change(key):
    shapes = []

    def apply(model, x):
        shapes.append(x.shape)
        return jax.nn.softmax(model(x))

    net = make_net()
    first = jdropout.nnx.mc_predict(net, X, key, num_samples=4, apply=apply)
    np.testing.assert_allclose(first.mean.sum(-1), 1, rtol=1e-5)
    net.output.bias.set_value(jnp.array([100.0, 0.0, 0.0]))
    second = jdropout.nnx.mc_predict(net, X, key, num_samples=30, apply=apply)
    np.testing.assert_allclose(second.mean[:, 0], 1, rtol=1e-5)
    assert shapes == [(6, 4)]


def test_consistent_nnx_samples_are_functions(key):
    same = np.ones((6, 4), np.float32)
    samples = np.asarray(nnx_samples(make_net(), same, key, consistent=True))
    np.testing.assert_allclose(samples, np.broadcast_to(samples[:, :1], samples.shape), rtol=1e-5)
    assert (samples[0] != samples[1]).any()


@pytest.mark.parametrize(
    "model",
    [
        nnx.Linear(4, 3, kernel_init=UNIFORM, rngs=nnx.Rngs(0)),
        nnx.Sequential(jdropout.nnx.Dropout(0.0)),
        nnx.Sequential(nnx.Dropout(1.0)),
        nnx.Sequential(jdropout.nnx.GaussianNoise(0.0)),
        jdropout.nnx.Zoneout(
            nnx.SimpleCell(
                4, 4, kernel_init=UNIFORM, recurrent_kernel_init=UNIFORM, rngs=nnx.Rngs(0)
            ),
            (0.0,),
        ),
    ],
)
def test_an_nnx_model_without_dropout_is_an_error(model, key):
    with pytest.raises(ValueError, match="model must have a dropout layer with a rate above 0"):
        jdropout.nnx.mc_predict(model, X, key, num_samples=4)


# --- linen --------------------------------------------------------------------------------


class LinenNet(linen.Module):
    """Three layers, with their flags in the constructor and in the call by position and name."""

    layer: type = jdropout.linen.Dropout

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(16, kernel_init=UNIFORM)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
        x = self.layer(0.5, deterministic=not train)(x)
        x = self.layer(0.5)(x, not train)
        x = self.layer(0.5)(x, deterministic=not train)
        return linen.Dense(3, kernel_init=UNIFORM)(x)


VARIABLES = jax.jit(LinenNet().init)(jax.random.key(0), X)


def linen_samples(model, variables, x, key, **options):
    predict = functools.partial(
        jdropout.linen.mc_predict, model, num_samples=6, return_samples=True, **options
    )
    return jax.jit(predict)(variables, x, key).samples


@pytest.mark.parametrize("layer", [linen.Dropout, jdropout.linen.Dropout])
def test_samples_of_linen_are_those_of_the_model_with_its_dropout_on(layer, key):
    """The batch's statistics are not: the model is called in evaluation mode."""

    class Reference(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(16)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
            for number in range(3):  # the name is a part of Flax's own key
                x = layer(0.5, deterministic=False, name=f"{layer.__name__}_{number}")(x)
            return linen.Dense(3)(x)

    def sample(i):
        return Reference().apply(VARIABLES, X, rngs={"dropout": at_site(key, i)})

    samples = linen_samples(LinenNet(layer), VARIABLES, X, key)
    expected = jax.jit(jax.vmap(sample))(np.arange(6))
    np.testing.assert_allclose(samples, expected, rtol=1e-5, atol=1e-5)


def test_layers_of_linen_are_as_before_afterwards(key):
    flags = []

    class Reads(linen.Module):
        def setup(self):
            self.layer = jdropout.linen.Dropout(0.5, deterministic=True)

        def __call__(self, x):
            y = self.layer(x)
            flags.append(self.layer.deterministic)
            return y

    assert (linen_samples(Reads(), {}, X, key) != X[None]).any()
    assert flags
    assert all(flag is True for flag in flags)
    np.testing.assert_array_equal(Reads().apply({}, X), X)


def test_all_kinds_of_linen_layers_draw(key):
    class Parallel(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = [
                jdropout.linen.Dropout(0.5, deterministic=True),
                jdropout.linen.ConcreteDropout(deterministic=True),
                jdropout.linen.DropConnect(
                    linen.Dense(16, kernel_init=UNIFORM), 0.5, deterministic=True
                ),
                *(
                    attention(2, dropout_rate=0.5, deterministic=True, kernel_init=UNIFORM)
                    for attention in (
                        linen.MultiHeadDotProductAttention,
                        jdropout.linen.MultiHeadDotProductAttention,
                    )
                ),
            ]
            return jnp.stack([layer(x) for layer in layers], axis=1)

    x = normal(6, 16)
    variables = jax.jit(Parallel().init)(jax.random.key(0), x)
    samples = linen_samples(Parallel(), variables, x, key)
    assert samples.shape == (6, 6, 5, 16)
    assert (samples.var(axis=(0)).mean((0, 2)) > 1e-6).all()


def test_linen_compiles_once_while_parameters_change(key):
    shapes = []

    def apply(model, x):
        shapes.append(x.shape)
        return model(x, train=False)

    first = jdropout.linen.mc_predict(LinenNet(), VARIABLES, X, key, num_samples=4, apply=apply)
    doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), VARIABLES)
    second = jdropout.linen.mc_predict(LinenNet(), doubled, X, key, num_samples=30, apply=apply)
    assert shapes == 2 * [(6, 4)]  # one of them in training mode, to see what drops there
    assert not np.allclose(first.mean, second.mean)


@pytest.mark.parametrize("layer", [linen.Dropout(0.5), jdropout.linen.Dropout(0.5)])
def test_keys_in_the_calls_of_linen_layers_are_not_used(layer, key):
    fixed = jax.random.key(0)

    def apply(model, x):
        by_position = model(x, True, fixed)
        return jnp.stack([by_position, model(x, deterministic=False, rng=fixed)], axis=1)

    samples = linen_samples(layer, {}, np.ones((6, 50), np.float32), key, apply=apply)
    assert (samples[0] != samples[1]).any((0, 2)).all()


def test_a_users_own_linen_layer_may_have_no_flag(key):
    class Own(linen.Dropout):
        @linen.compact
        def __call__(self, x):
            return super().__call__(x)

    samples = linen_samples(linen.Sequential([Own(0.5)]), {}, X, key)
    assert (samples[0] != samples[1]).any()


def test_wrapped_linen_modules_may_take_several_inputs(key):
    class Sum(linen.Module):
        @linen.compact
        def __call__(self, x, y):
            return linen.Dense(4, kernel_init=UNIFORM)(x) + y

    model = jdropout.linen.DropConnect(Sum(), 0.5, deterministic=True)
    variables = jax.jit(model.init)(jax.random.key(0), X, X)
    samples = linen_samples(model, variables, X, key, apply=lambda model, x: model(x, x))
    assert (samples[0] != samples[1]).any()


def test_linen_models_with_arrays_as_attributes_are_told_apart(key):
    class Scaled(linen.Module):
        scale: np.ndarray

        @linen.compact
        def __call__(self, x):
            return linen.Dropout(0.5, deterministic=True)(x) * self.scale

    a, b = (Scaled(np.full((1, 4), number, np.float32)) for number in (1, 2))
    np.testing.assert_array_equal(2 * linen_samples(a, {}, X, key), linen_samples(b, {}, X, key))


def test_an_argument_that_is_not_a_model_is_named(key):
    with pytest.raises(TypeError, match="model must be a nnx module, got function"):
        jdropout.nnx.mc_predict(lambda x: x, X, key, num_samples=4)
    with pytest.raises(TypeError, match="model must be a linen module, got Linear"):
        jdropout.linen.mc_predict(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), {}, X, key, num_samples=4)


def test_the_stream_of_linen_may_have_another_name(key):
    model = linen.Sequential([jdropout.linen.Dropout(0.5, rng_collection="noise")])
    a = linen_samples(model, {}, X, key, rng_collection="noise")
    b = linen_samples(linen.Sequential([jdropout.linen.Dropout(0.5)]), {}, X, key)
    np.testing.assert_array_equal(a, b)


def test_a_linen_model_that_updates_its_variables_is_an_error(key):
    with pytest.raises(Exception, match="immutable"):
        linen_samples(LinenNet(), VARIABLES, X, key, apply=lambda model, x: model(x, train=True))


@pytest.mark.parametrize("layer", [linen.relu, jdropout.linen.Dropout(0.0)])
def test_a_linen_model_without_dropout_is_an_error(layer, key):
    with pytest.raises(ValueError, match="model must have a dropout layer with a rate above 0"):
        jdropout.linen.mc_predict(linen.Sequential([layer]), {}, X, key, num_samples=4)
