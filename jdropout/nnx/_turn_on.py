"""Makes dropout layers of an nnx model draw in every call."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from jdropout._flax import draws_mask
from jdropout._values import type_name
from jdropout.nnx._attention import FlaxAttention
from jdropout.nnx._dropout import FlaxDropout, Layer


def turn_on(model: nnx.Module, only: Any = None) -> bool:
    """Makes layers of a model draw in every call, and the others in none.

    Args:
      model: nnx module; changed in place.
      only: filter of the layers that draw; None for all.

    Returns:
      Whether any ever drops.
    """
    chosen = nnx.filterlib.to_predicate(... if only is None else only)
    drops = [
        _turn_on(node) if chosen(path, node) else _turn_off(node)
        for path, node in nnx.iter_graph(model)
        if is_layer(node)
    ]
    return any(drops)


def check_filter(only: Any, name: str = "only") -> None:
    try:
        nnx.filterlib.to_predicate(... if only is None else only)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a filter of Flax nnx, got one of type {type_name(only)}. Pass a type, "
            "or a function of path and layer."
        ) from None


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
    ever = drops(node)
    if node.rngs is None:
        collection = getattr(node, "rng_collection", "dropout")  # attention has none
        source = FlaxDropout(0.0, rng_collection=collection, rngs=nnx.Rngs(0))
        node.rngs = nnx.data(source.rngs)
    _set_class(node, deterministic=False)
    return ever


def _turn_off(node: Any) -> bool:
    _set_class(node, deterministic=True)
    return False


def _set_class(node: Any, deterministic: bool) -> None:
    # Mutates in place: the layer may be shared, or in any container.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", _with_flag(kind, deterministic))


@functools.cache
def _with_flag(kind: type, fixed: bool) -> type:
    """Subclasses a layer so that every call has one flag, whatever flag and rngs it is given.

    Setting the attribute `deterministic` would not do: a flag in the call overrides it, and nnx has
    no interceptors.
    """

    def drawing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def draw(
            self: Any, *args: Any, deterministic: Any = None, rngs: Any = None, **more: Any
        ) -> Any:
            return method(self, *args, deterministic=fixed, **more)

        return draw

    names = [name for name in ("__call__", "attend") if hasattr(kind, name)]
    methods = {name: drawing(getattr(kind, name)) for name in names}
    return type(kind)(kind.__name__, (kind,), methods)
