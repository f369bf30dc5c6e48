"""Makes dropout layers of an nnx model draw in every call."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from jdropout._flax import draws_mask
from jdropout.nnx._attention import FlaxAttention
from jdropout.nnx._dropout import FlaxDropout, Layer


def turn_on(model: nnx.Module) -> bool:
    """Makes all layers of a model draw in every call; returns whether any ever drops."""
    drops = [_turn_on(node) for _, node in nnx.iter_graph(model)]
    return any(drops)


def is_layer(node: Any) -> bool:
    return isinstance(node, FlaxDropout | FlaxAttention | Layer)


def drops(node: Any) -> bool:
    """Whether a node is a dropout or attention layer, Flax's or ours, that drops if it is on."""
    if isinstance(node, Layer):
        return node._draws(False)
    if isinstance(node, FlaxAttention):
        return draws_mask(node.dropout_rate, False)
    return isinstance(node, FlaxDropout) and draws_mask(node.rate, False)


def _turn_on(node: Any) -> bool:
    """Makes a layer draw in every call, from its own stream; returns whether it ever drops."""
    if not is_layer(node):
        return False
    ever = drops(node)
    if node.rngs is None:
        collection = getattr(node, "rng_collection", "dropout")  # attention has none
        source = FlaxDropout(0.0, rng_collection=collection, rngs=nnx.Rngs(0))
        node.rngs = nnx.data(source.rngs)
    # Mutates in place: the layer may be shared, or in any container.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", _always_on(kind))
    return ever


@functools.cache
def _always_on(kind: type) -> type:
    """Subclasses a layer so that every call draws, whatever flag and rngs it is given.

    Setting the attribute `deterministic` would not do: a flag in the call overrides it, and nnx has
    no interceptors.
    """

    def drawing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def draw(
            self: Any, *args: Any, deterministic: Any = None, rngs: Any = None, **more: Any
        ) -> Any:
            return method(self, *args, deterministic=False, **more)

        return draw

    names = [name for name in ("__call__", "attend") if hasattr(kind, name)]
    methods = {name: drawing(getattr(kind, name)) for name in names}
    return type(kind)(kind.__name__, (kind,), methods)
