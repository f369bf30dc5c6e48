"""Token routing: layers that see a part of the tokens, which come back to their places."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jdropout import _arrays, _values
from jdropout._subset import _rows
from jdropout._subset._indices import Order, Subset
from jdropout._typing import ArrayLike, Index, Key


def route_tokens(
    key: Key | None,
    layers: Callable[[jax.Array, Any], jax.Array],
    x: ArrayLike,
    rate: float,
    *,
    num_prefix_tokens: int = 0,
    axis: int = 1,
    positions: Any = None,
    deterministic: bool = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Sends a random part of the tokens through layers, and the others around them.

    Of the n tokens after the prefix, every example keeps k of its own: ``n * (1 - rate)`` to the
    nearest integer, at least 1. They go through the layers in their order, with their positions,
    and come back to their places; the others stay as they are. Layers that treat tokens
    independently take k / n of the time and memory, and attention among k tokens less. Nothing is
    scaled: `layers` include their residual connections, and a token that goes around them is the
    residual stream. In contrast to `patch_dropout`, later layers see all tokens.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if all tokens are
        kept.
      layers: function of the kept tokens and of their positions, which returns an array of the
        tokens' shape and dtype; for example ``lambda x, positions: block(x, rope(positions))``.
        A causal mask stays right: among the kept tokens, which are in order, it is causal too.
      x: array such as (batch, tokens, features), of any dtype.
      rate: fraction of tokens that go around, a number in [0, 1]. Shapes depend on it, so it must
        not be traced.
      num_prefix_tokens: number of leading tokens that always go through the layers, such as a
        class token.
      axis: axis of the tokens. The axes before it count examples.
      positions: what belongs to the tokens: an array, or a tree of arrays, of the shape
        ``x.shape[:axis + 1]`` followed by any axes, such as rotary angles or segment ids. Axes of
        examples may have size 1. The layers get the kept tokens' part of it. None stands for the
        tokens' indices, int32 of shape ``x.shape[:axis + 1]``.
      deterministic: if True, all tokens go through the layers. It must not be traced.
      start: index of the first example, and of the first token after the prefix, within an array
        of `global_shape`, for code that sees one part of the batch, as in `shard_map`: one
        integer or (traced) integer scalar for each axis up to the tokens'.
      global_shape: sizes of the whole array on these axes, without prefix; required with `start`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if `layers` is not a function, the rate or flag is traced, or another argument
        has the wrong type.
      ValueError: if the layers return another shape or dtype, the prefix leaves no tokens, the
        positions do not fit x, the axis does not exist, the rate is outside [0, 1], or the key is
        missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def layers(x, positions):
      ...     print("computes", positions)
      ...     return x + 1
      >>> jdropout.route_tokens(jax.random.key(0), layers, jnp.zeros((2, 6, 1)), 0.5)[..., 0]
      computes [[2 4 5]
       [1 2 4]]
      Array([[0., 0., 1., 0., 1., 1.],
             [0., 1., 1., 0., 1., 0.]], dtype=float32)

    References:
      Yao, Wu, Li, Holmes, Zhang, Li and He, "Random-LTD: random and layerwise token dropping
      brings efficient training for large-scale transformers" (2022), section 3; Krause, Phan, Gui,
      Baumann, Hu and Ommer, "TREAD: token routing for efficient architecture-agnostic diffusion
      training" (ICCV 2025), section 3.
    """
    _values.check_function("layers", layers)
    x = _arrays.as_array("x", x)
    axis = _values.check_axis("axis", axis, x.ndim)
    lead, length = x.shape[:axis], x.shape[axis]
    prefix = check_prefix(num_prefix_tokens, length)
    where = _positions(positions, x, axis)
    subset = Subset(
        "route_tokens",
        key,
        rate,
        (*lead, length - prefix),
        deterministic=deterministic,
        start=start,
        global_shape=global_shape,
        batch_axis=0 if lead else None,
    )
    if subset.whole:
        y = layers(x, where)
        _check_layers(x, y)
        return subset.draw.result(y)
    order = with_prefix(subset.order(x, axis, jax.typeof(x).sharding.spec[:axis]), prefix)
    count = subset.count + prefix
    kept = _rows.take(x, order, count, axis)
    y = layers(kept, jax.tree.map(lambda p: _rows.take(p, order, count, axis), where))
    _check_layers(kept, y)
    return subset.draw.result(_rows.put(x, order, y, axis))


def with_prefix(order: Order, prefix: int) -> Order:
    """An order of one group with a prefix, which is kept, in front."""

    def prefixed(numbers: jax.Array) -> jax.Array:
        lead = numbers.ndim - 1
        padded = lax.pad(numbers, np.int32(0), [(0, 0, 0)] * lead + [(prefix, 0, 0)])
        shift = jnp.minimum(jnp.arange(padded.shape[-1], dtype=jnp.int32), np.int32(prefix))
        return padded + shift.reshape(*[1] * lead, -1)

    return Order(prefixed(order.rows), prefixed(order.places))


def check_prefix(count: Any, length: int) -> int:
    number = _values.as_integer(count)
    if number is None:
        raise TypeError(
            f"num_prefix_tokens must be an integer, got {count!r}."
            " Pass 1 for a class token, 0 for none."
        )
    if not 0 <= number < length:
        raise ValueError(
            f"num_prefix_tokens must be at least 0 and below the {length} tokens, got {number}."
            " Leave at least one token to choose from."
        )
    return number


def _positions(positions: Any, x: jax.Array, axis: int) -> Any:
    """What belongs to the tokens, for every example and where it is."""
    shape = x.shape[: axis + 1]
    sharding = jax.typeof(x).sharding
    if positions is None:
        positions = jnp.arange(shape[-1], dtype=jnp.int32).reshape(*[1] * axis, -1)

    def whole(leaf: jax.Array) -> jax.Array:
        given = leaf.shape[: len(shape)]
        fits = len(given) == len(shape) and given[-1] == shape[-1]
        if not fits or any(a not in (1, b) for a, b in zip(given, shape, strict=True)):
            raise ValueError(
                f"positions must have the leading axes {shape} of x's examples and tokens, got "
                f"shape {leaf.shape}. Insert axes of size 1 for examples that share them."
            )
        trail = jax.typeof(leaf).sharding.spec[len(shape) :]
        leaf = jnp.broadcast_to(leaf, (*shape, *leaf.shape[len(shape) :]))
        if not sharding.mesh.explicit_axes:
            return leaf
        return jax.sharding.reshard(leaf, PartitionSpec(*sharding.spec[:axis], None, *trail))

    return jax.tree.map(whole, _arrays.as_arrays("positions", positions))


def _check_layers(x: jax.Array, y: Any) -> None:
    want = _arrays.describe_array(x)
    got = _arrays.describe_array(y) if isinstance(y, jax.Array) else _values.type_name(y)
    if want != got:
        raise ValueError(
            f"layers must return the shape and dtype of the tokens they get, {want}, got {got}. "
            "The tokens go back to the places they came from: convert with .astype."
        )
