"""A kind of PRNG keys that say which part of a batch they are for.

Their words are those of the original key and the index of the part's first example. What has to be
static, such as the size of the batch, is in their dtype: JAX gets a description of a kind of keys
for each `Part`. Their children are for the same part, so the part goes wherever the key goes:
through jit, grad, scan, split, fold_in, Flax's streams, and code that knows nothing of it.
(A context manager would not: JAX's cache of traced functions does not see it change.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout._typing import Key


class Part(NamedTuple):
    """The static facts about a part of a batch, which are in the dtype of its keys."""

    impl: Any
    """Implementation of the original key."""
    size: int
    """Number of examples in the whole batch."""
    examples: int | None
    """Number of examples in the part; None if it is the size of every batch axis."""
    axis: int
    """Axis of the examples in arrays whose function does not know it."""


_parts: dict[Any, Part] = {}


def part_of(key: Any) -> Part | None:
    """The part that a key is for; None for a usual key."""
    return _parts.get(key.dtype) if isinstance(key, jax.Array) else None


@functools.partial(jax.jit, static_argnames="spent")
def apart(key: jax.Array, spent: bool = False) -> tuple[jax.Array, jax.Array]:
    """The original key, and the index of the first example.

    With ``spent``, JAX's key-reuse checker counts the key as used.
    """
    part = _parts[key.dtype]
    return _original(
        jax.random.key_data(lax.optimization_barrier(key) if spent else key), part.impl
    )


def derived(key: jax.Array, derive: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Maps the original key, and keeps the part."""
    original, first = apart(key)
    return together(derive(original), first, _parts[key.dtype])


def typed_key(key: Key) -> jax.Array:
    """A raw key as a typed one of its width."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.asarray(key)
    words = jnp.asarray(key)
    return jax.random.wrap_key_data(words, impl="rbg" if key.shape[-1] == 4 else "threefry2x32")


@functools.partial(jax.jit, static_argnames="part")
def together(key: jax.Array, first: jax.Array | np.uint32, part: Part) -> jax.Array:
    """The key of a part, from a typed key; undoes `apart`."""
    words = jax.random.key_data(key)
    data = jnp.concatenate([words.reshape(-1), jnp.asarray(first, jnp.uint32).reshape(1)])
    return jax.random.wrap_key_data(data, impl=_implementation(part))


def replaced(key: Key, part: Part, **facts: Any) -> jax.Array:
    """The key with other facts about its part."""
    original, first = apart(cast("jax.Array", key))
    return together(original, first, part._replace(**facts))


def _original(data: jax.Array, impl: Any) -> tuple[jax.Array, jax.Array]:
    return jax.random.wrap_key_data(data[:-1].reshape(_key_shape(impl)), impl=impl), data[-1]


def _key_shape(impl: Any) -> tuple[int, ...]:
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return words.shape


@functools.cache  # the dtypes of all keys that exist must stay known
def _implementation(part: Part) -> Any:
    """JAX's description of the keys of a part: the original words, and the first example."""

    def words(keys: jax.Array, first: Any) -> jax.Array:
        data = jax.random.key_data(keys)
        data = data.reshape(*keys.shape, -1)
        return jnp.concatenate([data, jnp.broadcast_to(first, (*keys.shape, 1))], axis=-1)

    def seed(seeds: jax.Array) -> jax.Array:
        return words(jax.random.key(seeds, impl=part.impl), jnp.uint32(0))

    def split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        key, first = _original(data, part.impl)
        return words(jax.random.split(key, shape), first)

    def fold_in(data: jax.Array, number: Any) -> jax.Array:
        key, first = _original(data, part.impl)
        return words(jax.random.fold_in(key, number), first)

    def random_bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        key, first = _original(data, part.impl)
        return jax.random.bits(jax.random.fold_in(key, first), shape, f"uint{width}")

    count = int(np.prod(_key_shape(part.impl))) + 1
    made = jax.extend.random.define_prng_impl(
        key_shape=(count,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"jdropout.{part.impl}.batch{part.size}.{part.examples}.{part.axis}",
        tag=f"batch{part.size}",
    )
    data = jax.ShapeDtypeStruct((count,), jnp.uint32)
    example = jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=made), data)
    _parts[example.dtype] = part
    return made
