"""`audit` of Flax models, ours and Flax's layers alike, and of the examples."""

import argparse
import functools
import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import UNIFORM
from example_runs import EXAMPLES
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx

RATE = 0.25
NNX = [jdropout.nnx.Dropout, nnx.Dropout]
LINEN = [jdropout.linen.Dropout, linen.Dropout]
STALE = "key-independent-of-step"


@pytest.fixture(autouse=True)
def promotion():
    """Optax and the examples rely on JAX's usual promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def x():
    return jnp.ones((8, 16))


def assert_found(expected, number_of_sites, function, *args, **kwargs):
    report = jdropout.audit(function, *args, **kwargs)
    assert [(finding.code, finding.sites) for finding in report.findings] == expected
    assert len(report.sites) == number_of_sites
    return report


class Block(nnx.Module):
    def __init__(self, layer, rngs, own=True):
        streams = {"rngs": rngs} if own else {}
        self.linear = nnx.Linear(16, 16, kernel_init=UNIFORM, rngs=rngs)
        self.dropouts = nnx.List([layer(RATE, **streams) for _ in range(2)])

    def __call__(self, x, **options):
        x = self.dropouts[0](self.linear(x), **options)
        return self.dropouts[1](x, **options)


class Model(nnx.Module):
    def __init__(self, layer, rngs):
        self.first, self.second = Block(layer, rngs), Block(layer, rngs)

    def __call__(self, x):
        return self.second(self.first(x))


def mean(model, x):
    return model(x).mean()


# --- nnx ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", NNX)
def test_a_model_that_keeps_its_random_state_is_clean(layer, x):
    model = Model(layer, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x):
        loss, gradient = nnx.value_and_grad(mean)(model, x)
        optimizer.update(model, gradient)
        return loss

    assert_found([], 4, model, x)
    assert_found([], 4, model.__call__, x)
    assert_found([], 4, nnx.jit(mean), model, x)
    assert_found([], 4, nnx.value_and_grad(nnx.remat(mean)), model, x)
    report = assert_found([], 4, train_step, model, optimizer, x)
    sources = set(report.sites[0].key_sources)
    assert sources == {f"model.first.dropouts.0.rngs.{leaf}" for leaf in ("count", "key")}


@pytest.mark.parametrize("layer", NNX)
def test_random_state_that_is_lost_after_the_step_is_found(layer, x):
    """Merged again from the same state, the streams give the same keys in every step."""
    graph, state = nnx.split(Block(layer, nnx.Rngs(0)))

    def outputs(state, x):
        model = nnx.merge(graph, state, copy=True)
        return model(x), nnx.state(model)

    def forgets(state, x):
        return outputs(state, x)[0]

    for wrap in (lambda f: f, lambda f: jax.jit(jax.grad(lambda s, x: f(s, x).sum(), 1))):
        findings = jdropout.audit(wrap(forgets), state, x).findings
        assert {finding.code for finding in findings} == {STALE}
        assert sorted(finding.sites for finding in findings) == [(0,), (1,)]
    assert_found([], 2, jax.jit(outputs), state, x)


@pytest.mark.parametrize("layer", NNX)
def test_a_module_whose_jit_loses_its_state_is_found(layer, x):
    """`jax.jit` takes a copy of the module, whose count then stays where it was."""
    model = layer(RATE, rngs=nnx.Rngs(0))
    assert_found([(STALE, (0,))], 1, jax.jit(lambda model, x: model(x)), model, x)
    assert_found([], 1, nnx.jit(lambda model, x: model(x)), model, x)


@pytest.mark.parametrize("layer", NNX)
def test_a_layer_called_twice_takes_two_keys(layer, key, x):
    shared = layer(RATE, rngs=nnx.Rngs(0))
    report = assert_found([], 2, nnx.jit(lambda layer, x: layer(layer(x))), shared, x)
    assert report.sites[0].key != report.sites[1].key
    by_key = layer(RATE)

    def twice(key, x):
        return by_key(by_key(x, rngs=key), rngs=key)

    assert_found([("key-reused", (0, 1))], 2, twice, key, x)

    def by_stream(rngs, x):
        return by_key(by_key(x, rngs=rngs), rngs=rngs)

    assert_found([], 2, by_stream, nnx.Rngs(dropout=0), x)


@pytest.mark.parametrize("layer", NNX)
def test_layers_with_streams_of_one_seed_are_found(layer, x):
    def step(first, second, x):
        return second(first(x))

    alike = [layer(RATE, rngs=nnx.Rngs(3)) for _ in range(2)]
    assert_found([("same-mask", (0, 1))], 2, step, *alike, x)
    rngs = nnx.Rngs(3)
    assert_found([], 2, step, layer(RATE, rngs=rngs), layer(RATE, rngs=rngs), x)


@pytest.mark.parametrize("layer", NNX)
def test_site_keys_make_a_merged_model_clean(layer, key, x):
    model = Block(layer, nnx.Rngs(0))
    graph, state = nnx.split(model)

    def step(state, root, step, x):
        model = nnx.merge(graph, state, copy=True)
        jdropout.nnx.set_site_keys(model, root, step=step)
        return model(x).sum()

    report = assert_found([], 2, jax.jit(jax.grad(step, 3)), state, key, jnp.int32(3), x)
    assert set(report.sites[0].key_sources) == {"root", "step"}

    def left_out(state, root, number, x):
        jdropout.nnx.set_site_keys(model := nnx.merge(graph, state), root, step=0)
        return model(x) + number

    def renamed(state, root, step, x):
        return left_out(state, root, step.astype(x.dtype), x)

    report = assert_found([(STALE, (0, 1))], 2, renamed, state, key, jnp.int32(0), x)
    assert "depends on root, but not on step" in report.findings[0].message


@pytest.mark.parametrize("layer", NNX)
def test_the_step_of_an_optimizer_is_not_asked_of_keys(layer, key, x):
    model = Block(layer, nnx.Rngs(0), own=False)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, key, x):
        def loss(model):
            return model(x, rngs=nnx.Rngs(dropout=key)).sum()

        optimizer.update(model, nnx.grad(loss)(model))

    assert_found([], 2, train_step, model, optimizer, key, x)


@pytest.mark.parametrize("layer", NNX)
def test_layers_in_a_scan(layer, x):
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def apart(rngs):
        return Block(layer, rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, block):
        return block(x)

    step = nnx.jit(nnx.grad(lambda blocks, x: forward(x, blocks).sum()))
    report = assert_found([], 2, step, apart(nnx.Rngs(0)), x)
    assert report.sites[0].loops == ("scan of 3",)


@pytest.mark.parametrize("layer", NNX)
def test_evaluation_of_a_model(layer, x):
    def evaluate(model, x):
        return model(x)

    model = Block(layer, nnx.Rngs(0))
    assert_found([("on-in-evaluation", (0, 1))], 2, evaluate, model, x)
    off = nnx.view(model, deterministic=True)
    count = 2 if layer is jdropout.nnx.Dropout else 0  # Flax's, when off, leave no trace
    assert_found([], count, evaluate, off, x)


# --- linen --------------------------------------------------------------------------------


class LinenBlock(linen.Module):
    layer: type

    @linen.compact
    def __call__(self, x, _=None):
        x = self.layer(RATE, deterministic=False)(linen.Dense(16)(x))
        return self.layer(RATE, deterministic=False, name="last")(x), None


class LinenModel(linen.Module):
    layer: type
    split: bool | None = None
    """How layers are scanned over, if they are."""

    @linen.compact
    def __call__(self, x):
        if self.split is None:
            return linen.remat(LinenBlock)(self.layer)(x)[0]
        scanned = linen.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": self.split},
            length=3,
        )
        return scanned(self.layer)(x, None)[0]


def shapes_of_params(model, key, x):
    """An audit needs no more of them, and to make them would compile for seconds."""
    return jax.eval_shape(model.init, {"params": key, "dropout": key}, x)


def linen_loss(model, params, key, x):
    return model.apply(params, x, rngs={"dropout": key}).sum()


@pytest.mark.parametrize("layer", LINEN)
def test_a_linen_model_is_clean(layer, key, x):
    model = LinenModel(layer)
    params = shapes_of_params(model, key, x)

    def loss(params, key, x):
        return linen_loss(model, params, key, x)

    for wrap in (lambda f: f, lambda f: jax.jit(jax.value_and_grad(jax.jit(f)))):
        report = assert_found([], 2, wrap(loss), params, key, x)
        names = [site.path.split("/")[-1] for site in report.sites]
        assert names == ["Dropout_0", "last"]
        assert report.sites[0].path.startswith("LinenModel/CheckpointLinenBlock_0")


@pytest.mark.parametrize("layer", LINEN)
def test_a_linen_model_with_a_constant_key_is_found(layer, key, x):
    model = LinenModel(layer)
    params = shapes_of_params(model, key, x)
    fixed = jax.random.key(3)

    def loss(params, x):
        return linen_loss(model, params, fixed, x)

    assert_found([(STALE, (0, 1))], 2, jax.jit(jax.grad(loss)), params, x)


@pytest.mark.parametrize("layer", LINEN)
@pytest.mark.parametrize("wrap", [jax.jit, jax.grad])
def test_linen_scan_without_split_rngs_is_found(layer, wrap, key, x):
    for split, expected in ((False, [("key-independent-of-iteration", (0, 1))]), (True, [])):
        model = LinenModel(layer, split)
        params = shapes_of_params(model, key, x)

        def loss(params, key, x, model=model):
            return linen_loss(model, params, key, x)

        assert_found(expected, 2, wrap(loss), params, key, x)


@pytest.mark.parametrize("layer", LINEN)
def test_linen_models_with_site_keys_are_clean(layer, key, x):
    model = LinenModel(layer)
    params = shapes_of_params(model, key, x)

    def loss(params, root, step, x):
        return jdropout.linen.with_site_keys(model.apply, root, step=step)(params, x).sum()

    report = assert_found([], 2, jax.jit(jax.grad(loss)), params, key, 0, x)
    assert set(report.sites[0].key_sources) == {"root", "step"}


def test_make_rng_used_twice_is_found(key, x):
    class ByHand(linen.Module):
        @linen.compact
        def __call__(self, x, twice):
            key = self.make_rng("dropout")
            x = jdropout.dropout(key, x, RATE)
            return jdropout.dropout(key if twice else self.make_rng("dropout"), x, RATE)

    def apply(key, x, twice):
        return ByHand().apply({}, x, twice, rngs={"dropout": key})

    report = assert_found([("key-reused", (0, 1))], 2, apply, key, x, True)
    assert report.sites[0].path == "ByHand"
    assert_found([], 2, apply, key, x, False)


def test_a_module_that_is_not_bound_may_be_an_argument(key, x):
    """A frame's module is that of a method, not whatever comes first."""

    def step(model, key, x):
        return jdropout.dropout(key, x, RATE)

    report = assert_found([], 1, step, LinenBlock(linen.Dropout), key, x)
    assert report.sites[0].path == "step"


# --- attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize(
    "layer", [jdropout.nnx.MultiHeadAttention, nnx.MultiHeadAttention], ids=["ours", "flax"]
)
def test_attention_of_nnx(broadcast, layer, key):
    make = functools.partial(layer, 4, 16, dropout_rate=RATE, broadcast_dropout=broadcast)
    attention = nnx.eval_shape(lambda: make(decode=False, rngs=nnx.Rngs(0)))

    def attend(attention, key, x):
        return attention(x, deterministic=False, rngs=nnx.Rngs(dropout=key)).sum()

    _check_attention(broadcast, attend, nnx.jit(nnx.grad(attend)), attention, key)


@pytest.mark.parametrize("broadcast", [True, False])
@pytest.mark.parametrize(
    "layer",
    [jdropout.linen.MultiHeadDotProductAttention, linen.MultiHeadDotProductAttention],
    ids=["ours", "flax"],
)
def test_attention_of_linen(broadcast, layer, key):
    model = layer(4, dropout_rate=RATE, broadcast_dropout=broadcast, deterministic=False)
    params = shapes_of_params(model, key, jnp.ones((2, 6, 16)))

    def attend(params, key, x):
        return linen_loss(model, params, key, x)

    _check_attention(broadcast, attend, jax.jit(jax.grad(attend)), params, key)


def _check_attention(broadcast, attend, gradient, parameters, key):
    shared = [("shared-over-batch", (0,)), ("shared-over-heads", (0,))]
    x = jnp.ones((2, 6, 16))
    report = assert_found(shared if broadcast else [], 1, gradient, parameters, key, x)
    assert report.sites[0].shape == (2, 4, 6, 6)
    assert report.sites[0].rate == RATE
    # A batch of one shares its mask with nobody, but its heads do.
    assert_found(shared[1:] if broadcast else [], 1, attend, parameters, key, x[:1])


# --- the examples -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def examples():
    """Imports an example by its name, as scripts in its directory do."""
    before = list(sys.path)
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path[:] = before


def options_of(**changes):
    settings = dict(
        api="nnx", rate=0.5, width=8, steps=20, batch_size=16, microbatches=2, learning_rate=1e-3,
        seed=0, seeds=2, train_size=50, label_noise=0.3, cutoff_step=10,
        heads=2, layers=2, context=16, train_chars=4000, attention="jdropout",
    )  # fmt: skip
    return argparse.Namespace(**(settings | changes))


def one_of(runs):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), runs)


@pytest.mark.examples
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_train_mlp_is_clean(examples, api):
    mlp, options = examples("train_mlp"), options_of(api=api)
    training = mlp.make_training(options, options.rate)
    runs = jax.eval_shape(lambda: mlp.start(options, training))
    run = one_of(runs)

    def step(step, run):
        return mlp.train_step(training, step, run)

    report = assert_found([], 2, step, 0, run)
    assert set(report.sites[0].key_sources) == {"step", "run.key"}
    # All of it: steps in a loop, all runs side by side, and two evaluations in the end.
    train = jax.jit(
        jax.vmap(
            lambda run, first, last: mlp.train_steps(training, run, first, last), (0, None, None)
        )
    )
    report = assert_found([], 6, train, runs, 0, 20)
    assert [site.deterministic for site in report.sites] == [False] * 2 + [True] * 4
    plain = mlp.make_training(options, 0.0)
    report = jdropout.audit(lambda run: mlp.train_step(plain, 0, run), run)
    assert {finding.code for finding in report.findings} == {"rate-zero"}


@pytest.mark.examples
def test_rate_schedules_is_clean(examples):
    mlp, schedules, options = examples("train_mlp"), examples("rate_schedules"), options_of()
    by_name = schedules.make_schedules(options)
    trainings = [schedules.make_training(options, schedule) for schedule in by_name.values()]
    run = one_of(jax.eval_shape(lambda: mlp.start(options, trainings[0])))
    for training in trainings:

        def step(step, run, training=training):
            return mlp.train_step(training, step, run)

        report = assert_found([], 2, step, jnp.int32(0), run)
        assert report.sites[0].rate is None


@pytest.mark.examples
def test_train_resume_is_clean(examples):
    resume, options = examples("train_resume"), options_of()
    training = resume.make_training(options)
    data, state = jax.eval_shape(lambda: resume.make_data_and_start(options, training))

    def step(samples, state):
        return resume.train_step(training, samples, state)

    report = assert_found([], 2, step, data.train, state)
    assert report.sites[0].key_sources == ("state.step",)
    assert report.sites[0].loops == ("scan of 2",)

    def steps(samples, state, last):
        return resume.train_steps(training, samples, state, last)

    assert_found([], 2, jax.jit(steps), data.train, state, 20)


@pytest.mark.examples
@pytest.mark.parametrize("attention", ["jdropout", "flax"])
def test_train_transformer_is_clean(examples, attention):
    transformer, options = examples("train_transformer"), options_of(width=16, attention=attention)
    text = transformer.load_text(options.train_chars)
    optimizer = transformer.make_optimizer(options)
    training = transformer.Training(
        transformer.structure(options, options.rate), optimizer, 4, options.context
    )
    params = jax.eval_shape(lambda: nnx.state(transformer.Transformer(options, 0.0, nnx.Rngs(0))))
    state = transformer.State(params, jax.eval_shape(optimizer.init, params))

    def step(state, text, key, step):
        return transformer.train_step(training, state, text, key, step)

    arguments = (state, jnp.asarray(text.train), jax.random.key(0), np.int32(0))
    report = assert_found([], 1 + 4 * options.layers, step, *arguments)
    assert set(report.sites[0].key_sources) == {"key", "step"}
    assert len({site.key for site in report.sites}) == len(report.sites)
    # Both texts are evaluated, and Flax's attention, when it drops nothing, leaves no trace.
    count = 1 + (3 if attention == "flax" else 4) * options.layers
    report = assert_found([], 2 * count, transformer.evaluation(options, text), params)
    assert all(site.deterministic for site in report.sites)


@pytest.mark.examples
def test_test_reproducible_is_clean(examples):
    example = examples("test_reproducible")
    x, labels = example.batch(0)
    state = example.OPTIMIZER.init(example.PARAMS)
    step = example.train_step
    report = assert_found([], 1, step, example.PARAMS, state, x, labels, 0)
    assert report.sites[0].key_sources == ("step",)
