"""The layers of jdropout.nnx and jdropout.linen, each beside the function that it applies."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from cheap import normal
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout.keys import at_site

X = normal(3, 6, 5, 8)
TOKENS = jnp.array([[1, 5, 1], [0, 2, 6]])
CARRY = jnp.ones((3, 8))
ZEROS = nnx.initializers.zeros  # compiles in no time; the table has parameters of its own


class Layer(NamedTuple):
    """A layer in both frameworks, with the same options and parameters."""

    nnx: Callable[..., Any]
    """Makes the nnx layer; takes the amount, if there is one, and the flags."""
    linen: Callable[..., Any]
    expected: Callable[[Any, Any], Any]
    """From parameters by linen's names and a key, None in evaluation, to the output."""
    args: tuple[Any, ...] = (X,)
    params: Mapping[str, Any] = {}
    """By linen's names."""
    arguments: str = "rate"
    """The constructor's arguments without a default, as error messages of nnx write them."""
    linear: bool = True
    """Whether the output is the input with some of its elements set to zero and the rest scaled."""
    rate: float = 0.5
    options: Mapping[str, Any] = {}
    function: Callable[..., Any] | None = None


def applies(name, function, rate=0.5, linear=True, arguments="rate", **options):
    """A layer that is a function of the input, with the function's options."""
    return Layer(
        lambda rate=rate, **flags: getattr(jdropout.nnx, name)(rate, **options, **flags),
        lambda rate=rate, **flags: getattr(jdropout.linen, name)(rate, **options, **flags),
        lambda params, key: function(key, X, rate, deterministic=key is None, **options),
        arguments=arguments,
        linear=linear,
        rate=rate,
        options=options,
        function=function,
    )


def patches(params, key):
    return jdropout.patch_dropout(
        key, X, 0.5, axis=2, num_prefix_tokens=2, ordered=True, deterministic=key is None
    )


def patch_layer(module):
    return lambda rate=0.5, **flags: module.PatchDropout(
        rate, axis=2, num_prefix_tokens=2, ordered=True, return_indices=True, **flags
    )


def embedded(params, key):
    table = params["embed"]["embedding"]
    return jdropout.embedding_dropout(key, table, 0.5, deterministic=key is None)[TOKENS]


def connected(params, key):
    params = params["module"]
    own = None if key is None else at_site(key, "kernel")
    kernel = jdropout.drop_connect(own, params["kernel"], 0.5, deterministic=key is None)
    return X @ kernel + params["bias"].reshape(1, 1, 1, -1)


def zoned(params, key):
    new, _ = linen.SimpleCell(8).apply({"params": params["cell"]}, CARRY, X[:, 0, 0])
    y = jdropout.zoneout(key, CARRY, new, 0.5, deterministic=key is None)
    return y, y


CONCRETE = dict(temperature=0.5, broadcast_dims=(2,))


def concrete(params, key):
    return jdropout.concrete_dropout(key, X, params["logit"], deterministic=key is None, **CONCRETE)


def variational(params, key):
    operands = X, params["kernel"], params["log_alpha"], params["bias"]
    return jdropout.variational_dense(key, *operands, threshold=0.5, deterministic=key is None)


LAYERS = {
    "Dropout": applies("Dropout", jdropout.dropout, broadcast_dims=(1, -1)),
    "SpatialDropout": applies("SpatialDropout", jdropout.spatial_dropout),
    "SpatialDropout, channels first": applies(
        "SpatialDropout", jdropout.spatial_dropout, channel_axis=1, batch_axes=()
    ),
    "LockedDropout": applies("LockedDropout", jdropout.locked_dropout, time_axis=2),
    "DropPath": applies("DropPath", jdropout.drop_path, 0.25, scale_by_keep=False, batch_axis=1),
    "DropPath, batch": applies("DropPath", jdropout.drop_path, mode="batch"),
    "DropBlock": applies(
        "DropBlock",
        jdropout.drop_block,
        0.2,
        block_size=(2, 3),
        spatial_axes=(2, 3),
        channel_axis=1,
        shared_channels=False,
        scale="realised",
    ),
    "PatchDropout": Layer(
        patch_layer(jdropout.nnx), patch_layer(jdropout.linen), patches, linear=False
    ),
    "GaussianDropout": applies(
        "GaussianDropout", jdropout.gaussian_dropout, linear=False, broadcast_dims=(1,)
    ),
    "GaussianNoise": applies(
        "GaussianNoise",
        jdropout.gaussian_noise,
        1.0,
        linear=False,
        arguments="stddev",
        broadcast_dims=(2,),
    ),
    "AlphaDropout": applies(
        "AlphaDropout", jdropout.alpha_dropout, linear=False, broadcast_dims=(-1,)
    ),
    "FeatureAlphaDropout": applies(
        "FeatureAlphaDropout",
        jdropout.feature_alpha_dropout,
        linear=False,
        channel_axis=2,
        batch_axes=(0, 1),
    ),
    "EmbeddingDropout": Layer(
        lambda rate=0.5, **flags: jdropout.nnx.EmbeddingDropout(
            nnx.Embed(7, 4, embedding_init=ZEROS, rngs=nnx.Rngs(3)), rate, **flags
        ),
        lambda rate=0.5, **flags: jdropout.linen.EmbeddingDropout(linen.Embed(7, 4), rate, **flags),
        embedded,
        (TOKENS,),
        {"embed": {"embedding": normal(7, 4)}},
        "embed, rate",
        linear=False,
    ),
    "DropConnect": Layer(
        lambda rate=0.5, **flags: jdropout.nnx.DropConnect(
            nnx.Linear(8, 4, kernel_init=ZEROS, rngs=nnx.Rngs(3)), rate, **flags
        ),
        lambda rate=0.5, **flags: jdropout.linen.DropConnect(linen.Dense(4), rate, **flags),
        connected,
        params={"module": {"kernel": normal(8, 4), "bias": normal(4)}},
        arguments="module, rate",
        linear=False,
    ),
    "Zoneout": Layer(
        lambda rate=0.5, **flags: jdropout.nnx.Zoneout(
            nnx.SimpleCell(8, 8, kernel_init=ZEROS, recurrent_kernel_init=ZEROS, rngs=nnx.Rngs(3)),
            rate,
            **flags,
        ),
        lambda rate=0.5, **flags: jdropout.linen.Zoneout(linen.SimpleCell(8), rate, **flags),
        zoned,
        (CARRY, X[:, 0, 0]),
        {
            "cell": {
                "i": {"kernel": normal(8, 8), "bias": normal(8)},
                "h": {"kernel": normal(8, 8) / 4},
            }
        },
        "cell, rate",
        linear=False,
    ),
    "ConcreteDropout": Layer(
        lambda **flags: jdropout.nnx.ConcreteDropout(0.3, **CONCRETE, **flags),
        lambda **flags: jdropout.linen.ConcreteDropout(0.3, **CONCRETE, **flags),
        concrete,
        params={"logit": jnp.float32(-0.5)},
        arguments="initial_rate",
        linear=False,
    ),
    "VariationalDense": Layer(
        lambda **flags: jdropout.nnx.VariationalDense(
            8, 4, threshold=0.5, kernel_init=ZEROS, **flags
        ),
        lambda **flags: jdropout.linen.VariationalDense(4, threshold=0.5, **flags),
        variational,
        params={"kernel": normal(8, 4), "log_alpha": normal(8, 4), "bias": normal(4)},
        arguments="in_features, out_features",
        linear=False,
    ),
}
"""Several under one class are told apart after a comma."""

WITHOUT_RATE = ("ConcreteDropout", "VariationalDense")
WITH_RATE = [name for name in LAYERS if name not in WITHOUT_RATE]
DROPPING = [name for name, layer in LAYERS.items() if layer.linear] + [
    "EmbeddingDropout",
    "DropConnect",
]
"""Those that at rate 1 drop everything, and so need no mask."""


def class_name(name):
    return name.split(",")[0]


def nnx_layer(name, *rate, **flags):
    """The nnx layer with the table's parameters, and a stream unless told otherwise."""
    layer = LAYERS[name].nnx(*rate, **{"rngs": nnx.Rngs(0)} | flags)
    nnx.update(layer, _by_names_of_nnx(LAYERS[name].params))
    return layer


def linen_layer(name, *rate, **flags):
    """The linen layer, and its variables."""
    params = LAYERS[name].params
    return LAYERS[name].linen(*rate, **flags), {"params": params} if params else {}


def by_names_of_linen(params):
    """Parameters, or gradients, of an nnx layer as a tree with the names of linen's."""
    return _renamed(nnx.to_pure_dict(params), {"dense_i": "i", "dense_h": "h"})


def _by_names_of_nnx(params):
    return _renamed(params, {"i": "dense_i", "h": "dense_h"})


def _renamed(tree, names):
    if not isinstance(tree, Mapping):
        return tree
    return {names.get(name, name): _renamed(part, names) for name, part in tree.items()}


class Recorder(linen.Module):
    """Returns the key that a module of the same path takes from the stream."""

    rng_collection: str = "dropout"

    @linen.compact
    def __call__(self):
        return self.make_rng(self.rng_collection)


def next_key(layer):
    """The key that the next call of an nnx layer takes from its own stream."""
    return jax.random.fold_in(layer.rngs.key[...], layer.rngs.count[...])


def count_of(layer):
    return int(layer.rngs.count[...])


def same(a, b):
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(*leaves, strict=True))


def assert_same(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
