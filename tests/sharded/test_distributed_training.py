"""A network trained on eight devices has the masks of one device, and its losses to rounding."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout

STEPS = 20
RATE = 0.3
SAMPLES = 24  # 3 rows a device
FEATURES, WIDTH = 16, 32
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
COLLECTIVE = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("

# Where the samples and the weights lie. In the tensor-parallel network the first matrix is split
# by columns and the second by rows: between them a device has some of the units of every sample.
TENSOR_PARALLEL = {"w1": P(None, "t"), "b1": P("t"), "w2": P("t", None)}
PLACES = {
    "data": ({"d": 8}, P("d"), {}),
    "data and tensor": ({"d": 2, "t": 4}, P("d"), TENSOR_PARALLEL),
}


def start():
    """The data, and the parameters before the first step."""
    generator = np.random.default_rng(0)
    x = generator.standard_normal((SAMPLES, FEATURES), np.float32)
    target = np.sin(x @ generator.standard_normal((FEATURES, 1), np.float32))
    params = {
        "w1": generator.standard_normal((FEATURES, WIDTH), np.float32) / 4,
        "b1": np.zeros(WIDTH, np.float32),
        "w2": generator.standard_normal((WIDTH, WIDTH), np.float32) / 4,
        "b2": np.zeros(WIDTH, np.float32),
        "w3": generator.standard_normal((WIDTH, 1), np.float32) / 4,
    }
    return (x, target), params


def no_dropout(key, x):
    return x


def dropout(key, x):
    return jdropout.dropout(key, x, RATE)


@functools.cache
def training_step(drop):
    """One step; returns parameters, optimizer state, loss and the masks of both layers."""

    def loss(params, key, x, target):
        # A sigmoid is never 0: what is 0 after dropout was dropped. So the masks are seen exactly.
        keys = jax.random.split(key)
        hidden1 = drop(keys[0], jax.nn.sigmoid(x @ params["w1"] + params["b1"][None]))
        hidden2 = drop(keys[1], jax.nn.sigmoid(hidden1 @ params["w2"] + params["b2"][None]))
        error = hidden2 @ params["w3"] - target
        return jnp.mean(error**2), (hidden1 != 0, hidden2 != 0)

    def step(params, state, key, x, target):
        (value, masks), gradient = jax.value_and_grad(loss, has_aux=True)(params, key, x, target)
        updates, state = OPTIMIZER.update(gradient, state)
        return optax.apply_updates(params, updates), state, value, masks

    return jax.jit(step)


def train(key, params, data):
    step, state = training_step(dropout), OPTIMIZER.init(params)
    losses, masks = [], []
    for number in range(STEPS):
        params, state, value, mask = step(params, state, jax.random.fold_in(key, number), *data)
        losses.append(value)
        masks.append(mask)
    return np.stack(losses), jax.device_get(masks)


def placed(place):
    """The data and the parameters on eight devices."""
    axes, data_spec, param_specs = PLACES[place]
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    data, params = start()
    param_specs = dict.fromkeys(params, P()) | param_specs
    put = functools.partial(jax.tree.map, lambda x, s: jax.device_put(x, NamedSharding(mesh, s)))
    return put(data, (data_spec, data_spec)), put(params, param_specs)


@pytest.fixture(scope="module")
def single():
    """Losses and masks of one device."""
    data, params = start()
    return train(jax.random.key(0), params, data)


@pytest.mark.parametrize("place", PLACES)
def test_training_has_the_masks_of_one_device_and_its_losses_to_rounding(place, single):
    losses, masks = single
    data, params = placed(place)
    own_losses, own_masks = train(jax.random.key(0), params, data)
    assert jax.tree.map(np.shape, own_masks) == [((SAMPLES, WIDTH),) * 2] * STEPS
    jax.tree.map(np.testing.assert_array_equal, own_masks, masks)
    # Sums of products are taken in another order: an error of 2^-24 = 6e-8 for each addition, that
    # later steps carry on. 4e-7 was seen.
    np.testing.assert_allclose(own_losses, losses, rtol=3e-6)


def test_the_masks_are_those_of_the_keys_and_other_masks_give_other_losses(single):
    """The controls: the masks are no constants, and the tolerance sees a difference in them."""
    losses, masks = single
    for number, mask in enumerate(masks):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        for key, own in zip(keys, mask, strict=True):
            np.testing.assert_array_equal(own, jdropout.keep_mask(key, RATE, own.shape))
    data, params = start()
    other_losses, _ = train(jax.random.key(1), params, data)
    assert (abs(other_losses / losses - 1) > 1e-3).all()
    assert losses[-5:].mean() < 0.8 * losses[:5].mean()  # it does learn


@functools.cache
def collectives(place, drop):
    """How often every collective brings together arrays of every shape; XLA merges some of them."""
    data, params = placed(place)
    arguments = (params, OPTIMIZER.init(params), jax.random.key(0), *data)
    compiled = training_step(drop).lower(*arguments).compile()
    found = collections.Counter()
    for line in compiled.as_text().splitlines():
        if match := re.search(COLLECTIVE, line):
            shapes = re.findall(r"\w+\[[0-9,]*\]", line[: match.start()])
            found.update((match[1], shape) for shape in shapes)
    return found


@pytest.mark.parametrize("place", PLACES)
def test_dropout_adds_no_collective_to_a_training_step(place):
    without = collectives(place, no_dropout)
    assert without  # gradients are summed over samples, or products over units
    assert collectives(place, dropout) == without


def test_a_mask_that_depends_on_its_whole_array_adds_collectives():
    """The control: JAX's own random bits, as they were made before they could be partitioned."""

    def flax_style(key, x):
        with jax.threefry_partitionable(False):
            return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0)

    assert collectives("data", flax_style).total() > collectives("data", no_dropout).total()
