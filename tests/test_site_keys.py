"""Flax models whose dropouts take their keys from (root, step, microbatch, path)."""

import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap import UNIFORM, normal
from flax import linen, nnx
from jax import lax

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout.keys import at_site, site_key, step_key
from jdropout.linen import with_site_keys
from jdropout.nnx import set_site_keys

ROOT = jax.random.key(20140614)

both_linen = pytest.mark.parametrize("module", [linen.Dropout, jdropout.linen.Dropout])


def ones(*shape):
    return np.ones(shape, np.float32)


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


def distinct(arrays):
    return len({np.asarray(array).tobytes() for array in arrays})


def flax_dropout(key, x):
    return nnx.Dropout(0.5)(x, rngs=key)


def drop(module, key, x):
    ours = module in (jdropout.nnx.Dropout, jdropout.linen.Dropout)
    return jdropout.dropout(key, x, 0.5) if ours else flax_dropout(key, x)


# --- nnx ----------------------------------------------------------------------------------


def nnx_key(path, call=0, *, root=ROOT, **place):
    """The documented key of the n-th call of the layer whose stream is at a path."""
    return jax.random.fold_in(site_key(root, site=path, **place), call)


class Blocks(nnx.Module):
    """A layer of its own, a list of two, and one that is called twice."""

    def __init__(self, module, *, rngs):
        self.first = module(0.5, rngs=rngs)
        self.blocks = nnx.List([nnx.Sequential(module(0.5, rngs=rngs)) for _ in range(2)])
        self.shared = module(0.5, rngs=rngs)

    def __call__(self, x):
        layers = [self.first, *self.blocks, self.shared, self.shared]
        return [layer(x) for layer in layers]


NNX_CALLS = [
    (("first", "rngs"), 0),
    (("blocks", 0, "layers", 0, "rngs"), 0),
    (("blocks", 1, "layers", 0, "rngs"), 0),
    (("shared", "rngs"), 0),
    (("shared", "rngs"), 1),
]


@pytest.mark.parametrize(
    ("module", "impl"), [(nnx.Dropout, "threefry2x32"), (jdropout.nnx.Dropout, "rbg")]
)
def test_nnx_masks_are_those_of_the_documented_keys(module, impl):
    root, x = jax.random.key(3, impl=impl), ones(4, 64)
    model = Blocks(module, rngs=nnx.Rngs(0))
    for place in (dict(step=1000), dict(step=1000, microbatch=2), dict(step=2**40)):
        set_site_keys(model, root, **place)
        expected = [drop(module, nnx_key(*call, root=root, **place), x) for call in NNX_CALLS]
        masks = model(x)
        for mask, one in zip(masks, expected, strict=True):
            assert_same(mask, one)
        assert distinct(masks) == len(NNX_CALLS)


def test_nnx_takes_a_raw_root_for_the_key_that_it_is():
    model, x = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ones(4, 64)
    for step in range(3):  # the stream's own key stays a single typed one
        set_site_keys(model, jax.random.key_data(ROOT), step=step)
        raw = model(x)
        set_site_keys(model, ROOT, step=step)
        assert_same(raw, model(x))


@pytest.mark.parametrize("module", [nnx.MultiHeadAttention, jdropout.nnx.MultiHeadAttention])
def test_nnx_attention_takes_the_key_of_its_path(module):
    options = dict(num_heads=2, in_features=8, dropout_rate=0.5, broadcast_dropout=False)
    layer = module(
        **options, decode=False, deterministic=False, kernel_init=UNIFORM, rngs=nnx.Rngs(0)
    )
    model = nnx.Dict(attention=layer)
    x = normal(2, 8, 8)
    graph = nnx.graphdef(layer)

    @jax.jit
    def call(state, key, x):
        layer = nnx.merge(graph, state)
        return layer(x), layer(x, rngs=nnx.Rngs(dropout=key))

    set_site_keys(model, ROOT, step=5)
    key = site_key(ROOT, step=5, site=("attention", "rngs"))
    by_path, by_stream = call(nnx.state(layer), key, x)
    assert_same(by_path, by_stream)
    set_site_keys(model, ROOT, step=6)
    assert distinct([by_path, call(nnx.state(layer), key, x)[0]]) == 2


def test_every_layer_of_a_stack_has_its_index_in_its_site():
    depth, x = 4, ones(3, 16)

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(axis_size=depth)
    def create(rngs):
        return jdropout.nnx.Dropout(0.5, rngs=rngs)

    layers = create(nnx.Rngs(0))
    set_site_keys(layers, ROOT, step=7)
    keys = [nnx_key(("rngs", index), step=7) for index in range(depth)]
    unrolled = np.stack([jdropout.dropout(key, x, 0.5) for key in keys])
    graph = nnx.graphdef(layers)

    @jax.jit
    def both(state):
        layers, copies = (nnx.merge(graph, state, copy=True) for _ in range(2))
        scan = nnx.scan(lambda layer, carry: (carry, layer(x)), in_axes=(0, nnx.Carry))
        vmap = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return scan(layers, 0)[1], vmap(copies, x)

    for masks in both(nnx.state(layers)):
        assert_same(masks, unrolled)
    assert distinct(unrolled) == depth


def test_a_stack_of_stacks_has_both_indices_in_its_site():
    model = nnx.Dict(rngs=nnx.RngStream(jax.random.split(jax.random.key(0), (2, 3)), tag="dropout"))
    set_site_keys(model, ROOT, step=7)
    keys = model.rngs.key[...]
    assert keys.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        assert bool(keys[i, j] == site_key(ROOT, step=7, site=("rngs", i, j)))


def mlp(seed=0):
    return nnx.Sequential(
        nnx.Linear(4, 32, kernel_init=UNIFORM, rngs=nnx.Rngs(seed)),
        jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(seed)),
        nnx.Linear(32, 1, kernel_init=UNIFORM, rngs=nnx.Rngs(seed + 1)),
    )


def test_nnx_steps_are_traced_and_compile_once():
    layers = [jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)) for _ in range(2)]
    graph, state = nnx.split(nnx.List(layers))
    x = ones(2, 32)
    traces = []

    @jax.jit
    def masks(step):
        def of_microbatch(microbatch):
            traces.append(step)
            model = nnx.merge(graph, state, copy=True)
            set_site_keys(model, ROOT, step=step, microbatch=microbatch)
            return jnp.stack([layer(x) for layer in model])

        return lax.map(of_microbatch, np.arange(2))

    for step in range(3):
        for microbatch, pair in enumerate(masks(step)):
            for i, mask in enumerate(pair):
                key = nnx_key((i, "rngs"), step=step, microbatch=microbatch)
                assert_same(mask, jdropout.dropout(key, x, 0.5))
    assert len(traces) == 1


def test_nnx_jit_sets_the_keys_of_a_model_in_place():
    model, x = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)), ones(4, 64)

    @nnx.jit
    def mask(model, step):
        set_site_keys(model, ROOT, step=step)
        return model(x)

    for step in (0, 5, 0):
        expected = jdropout.dropout(nnx_key(("rngs",), step=step), x, 0.5)
        assert_same(mask(model, jnp.int32(step)), expected)


SGD = optax.sgd(0.1)  # a new one would compile again


@functools.partial(jax.jit, static_argnums=0)
def update(graph, state, x, step):
    model, optimizer = nnx.merge(graph, state)

    set_site_keys(model, ROOT, step=step)
    gradients = nnx.grad(lambda model: jnp.mean((model(x) - x[:, :1]) ** 2))(model)
    optimizer.update(model, gradients)
    return nnx.state((model, optimizer))


def train_nnx(model, steps):
    optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
    x = normal(16, 4)
    graph, state = nnx.split((model, optimizer))
    for step in steps:
        state = update(graph, state, x, jnp.int32(step))
    model, _ = nnx.merge(graph, state)
    return nnx.split(model, nnx.RngState, ...)[2]


def test_nnx_training_resumes_exactly_without_a_random_state():
    whole = train_nnx(mlp(), range(4))
    saved = train_nnx(mlp(), range(2))
    assert not any("rngs" in path for path, _ in nnx.to_flat_state(saved))
    resumed = mlp(seed=5)  # other parameters and another random state
    nnx.update(resumed, saved)
    jax.tree.map(assert_same, train_nnx(resumed, range(2, 4)), whole)
    # Control: at other steps the masks, and so the parameters, are others.
    other = mlp(seed=5)
    nnx.update(other, saved)
    assert distinct(jax.tree.leaves((whole, train_nnx(other, range(3, 5))))) == 8


def test_nnx_evaluation_is_untouched():
    model = mlp()
    model.eval()
    x = normal(16, 4)
    expected = model(x)
    set_site_keys(model, ROOT, step=3)
    assert_same(model(x), expected)
    assert int(model.layers[1].rngs.count[...]) == 0


def test_nnx_sets_streams_of_every_name_and_says_if_there_is_none():
    model = nnx.Dict(noise=nnx.Rngs(noise=1))
    model.noise.noise()
    set_site_keys(model, ROOT, step=3)
    key = jax.random.fold_in(site_key(ROOT, step=3, site=("noise", "noise")), 0)
    assert bool(model.noise.noise() == key)
    with pytest.raises(ValueError, match=r"model has no random stream .* with rngs=jdropout.keys"):
        set_site_keys(jdropout.nnx.Dropout(0.5), ROOT, step=3)
    with pytest.raises(ValueError, match="step must be a whole number"):
        set_site_keys(model, ROOT, step=-1)
    with pytest.raises(ValueError, match="root is None"):
        set_site_keys(model, None, step=0)


# --- linen --------------------------------------------------------------------------------


def linen_key(path, call=0, *, root=ROOT, **place):
    """The documented key of the n-th call of the module at a path."""
    return at_site(step_key(root, **place), (*path, call))


def apply_at(model, *arguments, root=ROOT, **place):
    return with_site_keys(model.apply, root, **place)({}, *arguments)


class Block(linen.Module):
    module: type = jdropout.linen.Dropout

    @linen.compact
    def __call__(self, x, _=None):
        return self.module(0.5, deterministic=False)(x)


class Network(linen.Module):
    """Layers of a setup, a layer called twice, and a block called twice that makes its own."""

    module: type

    def setup(self):
        self.layers = [self.module(0.5, deterministic=False) for _ in range(2)]
        self.shared = self.module(0.5, deterministic=False)
        self.block = Block(self.module)

    def __call__(self, x):
        calls = [*self.layers, self.shared, self.shared, self.block, self.block]
        return [layer(x) for layer in calls]


LINEN_CALLS = [
    (("layers_0",), 0),
    (("layers_1",), 0),
    (("shared",), 0),
    (("shared",), 1),
    (("block", "Dropout_0"), 0),
    (("block", "Dropout_0"), 1),
]


@pytest.mark.parametrize(
    ("module", "impl"), [(linen.Dropout, "threefry2x32"), (jdropout.linen.Dropout, "rbg")]
)
def test_linen_masks_are_those_of_the_documented_keys(module, impl):
    root, x = jax.random.key(3, impl=impl), ones(4, 64)
    for place in (dict(step=1000), dict(step=1000, microbatch=2), dict(step=2**40)):
        masks = apply_at(Network(module), x, root=root, **place)
        for mask, call in zip(masks, LINEN_CALLS, strict=True):
            assert_same(mask, drop(module, linen_key(*call, root=root, **place), x))
        assert distinct(masks) == len(LINEN_CALLS)


@both_linen
def test_a_linen_module_without_a_parent_has_the_empty_path(module):
    x = ones(4, 64)
    mask = apply_at(module(0.5, deterministic=False), x, step=5)
    assert_same(mask, drop(module, linen_key((), step=5), x))


@pytest.mark.parametrize(
    "module", [linen.MultiHeadDotProductAttention, jdropout.linen.MultiHeadDotProductAttention]
)
def test_linen_attention_takes_the_key_of_its_path(module):
    layer = module(
        num_heads=2,
        dropout_rate=0.5,
        broadcast_dropout=False,
        deterministic=False,
        kernel_init=UNIFORM,
    )
    model = linen.Sequential([layer])
    x = normal(2, 8, 8)
    variables = jax.jit(model.init)({"params": jax.random.key(0), "dropout": jax.random.key(0)}, x)

    @jax.jit
    def both(variables, key):
        alone = {"params": variables["params"]["layers_0"]}
        by_path = with_site_keys(model.apply, ROOT, step=5)(variables, x)
        return by_path, layer.apply(alone, x, dropout_rng=key)

    assert_same(*both(variables, linen_key(("layers_0",), step=5)))


class Pair(linen.Module):
    names: tuple[str, str]

    @linen.compact
    def __call__(self, x):
        return [jdropout.linen.Dropout(0.5, deterministic=False, name=n)(x) for n in self.names]


def names_of_one_flax_hash():
    """Two names of which Flax makes the same 32 bits: it hashes the path and the call's number."""
    seen = {}
    for name in (f"dropout_{number}" for number in range(1 << 20)):  # 2^17 is enough on average
        digest = hashlib.sha1(name.encode() + b"\x01").digest()[:4]
        if digest in seen:
            return seen[digest], name
        seen[digest] = name
    raise AssertionError("no pair of names")


def test_names_that_flax_gives_the_same_mask_have_masks_of_their_own():
    model, x = Pair(names_of_one_flax_hash()), ones(4, 64)
    assert distinct(apply_at(model, x, step=0)) == 2
    # Control: under a plain stream of Flax they share one.
    assert distinct(model.apply({}, x, rngs={"dropout": ROOT})) == 1


def test_linen_scan_over_layers_gives_each_the_key_below_its_share_of_the_stream():
    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x):
            def body(block, carry, _):
                return carry, block(x)

            scan = linen.scan(body, split_rngs={"dropout": True}, length=4)
            return scan(Block(name="layers"), 0, None)[1]

    x = ones(3, 16)
    masks = apply_at(Scanned(), x, step=7)
    # Flax traces the body of a scan twice, and counts both.
    path = ("layers", "Dropout_0", 1)
    keys = [at_site(key, path) for key in jax.random.split(step_key(ROOT, step=7), 4)]
    assert_same(masks, np.stack([jdropout.dropout(key, x, 0.5) for key in keys]))
    assert distinct(masks) == 4


def test_linen_vmap_gives_every_example_the_key_below_its_share_of_the_stream():
    x = ones(4, 3, 16)
    model = linen.vmap(Block, variable_axes={}, split_rngs={"dropout": True})()
    masks = apply_at(model, x, step=7)
    split = jax.random.split(step_key(ROOT, step=7), 4)
    keys = [at_site(key, ("Dropout_0", 0)) for key in split]
    assert_same(masks, np.stack([jdropout.dropout(key, x[0], 0.5) for key in keys]))
    assert distinct(masks) == 4


class Twice(linen.Module):
    """One lifted block called twice, and another one of the same class."""

    lift: object

    @linen.compact
    def __call__(self, x):
        block, other = self.lift(Block)(name="a"), self.lift(Block)(name="b")
        return [block(x), block(x), other(x)]


def test_linen_remat_changes_no_mask_and_repeats_it_in_the_backward_pass():
    x = ones(3, 32)

    @jax.jit
    def values_and_gradient(x):
        masks, pullback = jax.vjp(functools.partial(apply_at, Twice(linen.remat), step=7), x)
        return masks, pullback([jnp.ones_like(x)] * 3)[0]

    masks, gradient = values_and_gradient(x)
    for mask, (name, call) in zip(masks, [("a", 0), ("a", 1), ("b", 0)], strict=True):
        key = linen_key((name, "Dropout_0"), call, step=7)
        assert_same(mask, jdropout.dropout(key, x, 0.5))
    assert_same(gradient, sum(masks))
    assert distinct(masks) == 3


def test_linen_jit_gives_calls_and_instances_masks_of_their_own():
    @jax.jit
    def masks_of_steps(x):
        return [apply_at(Twice(linen.jit), x, step=step) for step in (7, 7, 8)]

    masks = masks_of_steps(ones(3, 32))
    for first, again in zip(*masks[:2], strict=True):
        assert_same(first, again)
    assert distinct([*masks[0], *masks[2]]) == 6


def test_linen_steps_are_traced_and_compile_once():
    model, x = Pair(("a", "b")), ones(2, 32)
    traces = []

    @jax.jit
    def masks(step, microbatch):
        traces.append(step)
        return jnp.stack(apply_at(model, x, step=step, microbatch=microbatch))

    expected = np.stack([masks(step, 2) for step in range(3)])
    assert len(traces) == 1
    for step in range(3):
        assert_same(np.stack(apply_at(model, x, step=step, microbatch=2)), expected[step])
    assert distinct(expected.reshape(6, -1)) == 6


def test_linen_gradients_accumulate_over_microbatches_with_masks_of_their_own():
    x = ones(2, 64)

    def gradient(x, microbatch):
        return jax.grad(lambda x: apply_at(Block(), x, step=5, microbatch=microbatch).sum())(x)

    @jax.jit
    def accumulated(x):
        return lax.scan(lambda g, m: (g + gradient(x, m), m), jnp.zeros_like(x), jnp.arange(4))[0]

    scanned = accumulated(x)
    keys = [linen_key(("Dropout_0",), step=5, microbatch=number) for number in range(4)]
    masks = [jdropout.dropout(key, x, 0.5) for key in keys]
    assert_same(scanned, sum(masks))
    assert distinct(masks) == 4


class Streams(linen.Module):
    @linen.compact
    def __call__(self, x):
        noise = self.make_rng("noise")
        other = linen.Dropout(0.5, deterministic=False, rng_collection="noise")(x)
        return noise, other, jdropout.linen.Dropout(0.5, deterministic=False)(x)


@pytest.mark.parametrize("single", [False, True], ids=["noise", "single key"])
def test_other_streams_of_linen_pass_through(single):
    x, key = ones(4, 64), jax.random.key(5)
    rngs = key if single else {"params": jax.random.key(6), "noise": key}
    plain = {"params": key} if single else rngs
    expected = Streams().apply({}, x, rngs={**plain, "dropout": ROOT})
    noise, other, mask = with_site_keys(Streams().apply, ROOT, step=5)({}, x, rngs=rngs)
    assert bool(noise == expected[0])
    assert_same(other, expected[1])
    assert_same(mask, jdropout.dropout(linen_key(("Dropout_1",), step=5), x, 0.5))


def test_linen_keys_can_be_those_of_another_stream():
    x = ones(4, 64)
    apply = with_site_keys(Streams().apply, ROOT, step=5, rng_collection="noise")
    _, other, mask = apply({}, x, rngs={"dropout": ROOT})
    assert_same(other, flax_dropout(linen_key(("Dropout_0",), step=5), x))
    assert_same(mask, Streams().apply({}, x, rngs={"dropout": ROOT, "noise": ROOT})[2])


@both_linen
def test_a_key_that_a_linen_call_brings_is_used(module):
    class Brings(linen.Module):
        @linen.compact
        def __call__(self, x, key):
            layer = module(0.5, deterministic=False)
            return layer(x, rng=key), layer(x, None, key)

    x, key = ones(4, 64), jax.random.key(5)
    for mask in apply_at(Brings(), x, key, step=5):
        assert_same(mask, drop(module, key, x))


@both_linen
def test_linen_evaluation_is_untouched(module):
    layer, x = module(0.5), ones(4, 64)
    apply = with_site_keys(layer.apply, ROOT, step=5)
    assert_same(apply({}, x, deterministic=True), x)
    with pytest.raises(ValueError, match="deterministic"):
        apply({}, x)


def test_linen_says_so_if_rngs_have_the_stream_or_an_argument_is_bad():
    apply = with_site_keys(Block().apply, ROOT, step=5)
    with pytest.raises(ValueError, match=r"rngs has a key for 'dropout'.*leave it out"):
        apply({}, ones(4), rngs={"dropout": ROOT})
    with pytest.raises(TypeError, match=r"step must be an integer .* got 0.5"):
        with_site_keys(Block().apply, ROOT, step=0.5)
    with pytest.raises(ValueError, match="root is None"):
        with_site_keys(Block().apply, None, step=0)
