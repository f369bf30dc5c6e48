"""Kinds of PRNG keys that say which part of a batch, or which of several samples, they are for.

Their words are those of the original key and one number: the index of the part's first example, or
that of the sample. What has to be static, such as the size of the batch, is in their dtype: JAX
gets a description of a kind of keys for each `Part` and `Sample`. Their children are for the same
part and sample, so these go wherever the key goes: through jit, grad, scan, split, fold_in, Flax's
streams, and code that knows nothing of them.
(A context manager would not: JAX's cache of traced functions does not see it change.)
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout._typing import Key


class Part(NamedTuple):
    """The static facts about a part of a batch, which are in the dtype of its keys.

    The original key may be that of a `Sample`, but not the other way round.
    """

    impl: Any
    """Implementation of the original key."""
    size: int
    """Number of examples in the whole batch."""
    examples: int | None
    """Number of examples in the part; None if it is the size of every batch axis."""
    axis: int
    """Axis of the examples in arrays whose function does not know it."""

    @property
    def tag(self) -> str:
        return f"batch{self.size}"


class Sample(NamedTuple):
    """The static facts about one of several samples with coupled masks."""

    impl: Any
    """Implementation of the original key, which the samples share."""
    size: int
    """Number of samples."""
    axis_name: str | None
    """Name of the axis of a `jax.vmap` over the samples; None if there is none."""

    @property
    def tag(self) -> str:
        return f"sample{self.size}"


_kinds: dict[Any, Part | Sample] = {}
_defining = threading.Lock()


def part_of(key: Any) -> Part | None:
    """The part that a key is for; None if it is for no part."""
    kind = _kind_of(key)
    return kind if isinstance(kind, Part) else None


def sample_of(key: Any) -> Sample | None:
    """The sample that a key without a part is for; None if it is for no sample."""
    kind = _kind_of(key)
    return kind if isinstance(kind, Sample) else None


def derived(key: Key, derive: Callable[[Key], Key]) -> Key:
    """Maps the original key, and keeps the part and the sample."""
    kind = _kind_of(key)
    if kind is None:
        return derive(key)
    original, number = apart(cast("jax.Array", key))
    child = derived(original, derive)
    return together(typed_key(child), number, kind._replace(impl=jax.random.key_impl(child)))


def _kind_of(key: Any) -> Part | Sample | None:
    return _kinds.get(key.dtype) if isinstance(key, jax.Array) else None


@functools.partial(jax.jit, static_argnames="spent")
def apart(key: jax.Array, spent: bool = False) -> tuple[jax.Array, jax.Array]:
    """The original key, and the number of the part's first example or of the sample.

    With ``spent``, JAX's key-reuse checker counts the key as used.
    """
    impl = _kinds[key.dtype].impl
    return _original(jax.random.key_data(lax.optimization_barrier(key) if spent else key), impl)


def typed_key(key: Key) -> jax.Array:
    """A raw key as a typed one of its width."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return jnp.asarray(key)
    words = jnp.asarray(key)
    return jax.random.wrap_key_data(words, impl="rbg" if key.shape[-1] == 4 else "threefry2x32")


@functools.partial(jax.jit, static_argnames="kind")
def together(key: jax.Array, number: Any, kind: Part | Sample) -> jax.Array:
    """The key of a part or a sample, from a typed key; undoes `apart`."""
    words = jax.random.key_data(key)
    data = jnp.concatenate([words.reshape(-1), jnp.asarray(number, jnp.uint32).reshape(1)])
    return jax.random.wrap_key_data(data, impl=_implementation(kind))


def replaced(key: Key, part: Part, **facts: Any) -> jax.Array:
    """The key with other facts about its part."""
    original, first = apart(cast("jax.Array", key))
    return together(original, first, part._replace(**facts))


def separate(key: Key) -> Key:
    """An original key for each sample, which no longer couples it to the others."""
    if sample_of(key) is None:
        return key
    shared, sample = apart(cast("jax.Array", key))
    return jax.random.fold_in(shared, sample)


def _original(data: jax.Array, impl: Any) -> tuple[jax.Array, jax.Array]:
    return jax.random.wrap_key_data(data[:-1].reshape(_key_shape(impl)), impl=impl), data[-1]


def _key_shape(impl: Any) -> tuple[int, ...]:
    words = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=impl)))
    return words.shape


def _implementation(kind: Part | Sample) -> Any:
    """JAX's description of keys: the original words, and the number."""
    with _defining:  # two threads would define two, whose keys could not be used together
        return _definition(kind)


@functools.cache  # the dtypes of all keys that exist must stay known
def _definition(kind: Part | Sample) -> Any:

    def words(keys: jax.Array, number: Any) -> jax.Array:
        data = jax.random.key_data(keys)
        data = data.reshape(*keys.shape, -1)
        return jnp.concatenate([data, jnp.broadcast_to(number, (*keys.shape, 1))], axis=-1)

    def seed(seeds: jax.Array) -> jax.Array:
        return words(jax.random.key(seeds, impl=kind.impl), jnp.uint32(0))

    def split(data: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        key, number = _original(data, kind.impl)
        return words(jax.random.split(key, shape), number)

    def fold_in(data: jax.Array, index: Any) -> jax.Array:
        key, number = _original(data, kind.impl)
        return words(jax.random.fold_in(key, index), number)

    def random_bits(data: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
        key, number = _original(data, kind.impl)
        return jax.random.bits(jax.random.fold_in(key, number), shape, f"uint{width}")

    count = int(np.prod(_key_shape(kind.impl))) + 1
    made = jax.extend.random.define_prng_impl(
        key_shape=(count,),
        seed=seed,
        split=split,
        random_bits=random_bits,
        fold_in=fold_in,
        name=f"jdropout.{kind}",
        tag=kind.tag,
    )
    data = jax.ShapeDtypeStruct((count,), jnp.uint32)
    example = jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=made), data)
    _kinds[example.dtype] = kind
    return made
