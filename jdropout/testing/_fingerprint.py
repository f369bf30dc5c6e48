"""64 bits that stand for the bits of an array."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def fingerprint(x: jax.Array) -> jax.Array:
    """Returns two uint32: sums over the elements of a mix of their bits and their index.

    Sums of integers do not depend on their order, so they are the same for every sharding. The
    mix is a bijection of the bits of an element, so changing one element always changes its term.
    """
    parts = [_sum(part, number) for number, part in enumerate(_words(x))]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def fingerprints(arrays: Sequence[jax.Array]) -> jax.Array:
    """The fingerprints of many arrays, one a row. Arrays of one type are done in one operation."""
    types: dict[Any, list[int]] = {}
    for i, x in enumerate(arrays):
        types.setdefault(jax.typeof(x), []).append(i)
    rows = [
        jax.vmap(fingerprint)(jnp.stack([arrays[i] for i in numbers])) for numbers in types.values()
    ]
    order = [i for numbers in types.values() for i in numbers]
    return jnp.concatenate(rows)[np.argsort(order)]


def has_fingerprint(aval: Any) -> bool:
    """Whether a value of a program has bits: not a reference, a token or a zero tangent."""
    return isinstance(aval, jax.core.ShapedArray) and aval.dtype != jax.dtypes.float0


def plain(x: jax.Array) -> jax.Array:
    """The array itself, or the words of typed keys."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _words(x: jax.Array) -> list[jax.Array]:
    """The bits of x in arrays of uint32: one, or two for complex numbers."""
    x = plain(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return [*_words(lax.real(x)), *_words(lax.imag(x))]
    if jnp.issubdtype(x.dtype, jnp.bool_):
        return [x.astype(jnp.uint32)]
    if jnp.issubdtype(x.dtype, jnp.integer):
        if x.dtype.itemsize == 8:
            return [lax.bitcast_convert_type(x, jnp.uint32)]
        # Converting a narrow integer to a wider one keeps different values different.
        return [x.astype(jnp.int32).astype(jnp.uint32) if x.dtype.itemsize < 4 else _bits(x, 4)]
    bits = jnp.finfo(x.dtype).bits
    if bits < 8:
        return [lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)]
    return [_bits(x, bits // 8).astype(jnp.uint32)]


def _bits(x: jax.Array, size: int) -> jax.Array:
    """The bits of elements of ``size`` bytes; those of 8 become a last axis of two."""
    return lax.bitcast_convert_type(x, f"uint{8 * min(size, 4)}")


def _sum(bits: jax.Array, part: int) -> jax.Array:
    """Sums of two mixes; without a reshape, which a sharded array could not follow."""
    index: Any = jnp.uint32(0x9E3779B9 * (part + 1) & 0xFFFFFFFF)
    stride = 0x9E3779B1
    for axis in reversed(range(bits.ndim)):
        if bits.shape[axis] > 1:
            numbers = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            index = index + numbers * jnp.uint32(stride & 0xFFFFFFFF)
            stride *= bits.shape[axis]
    mixed = mix(bits ^ index)
    again = (mixed ^ (mixed >> np.uint32(13))) * jnp.uint32(0xC2B2AE35)
    sums = [jnp.sum(word, dtype=jnp.uint32) for word in (mixed, again ^ (again >> np.uint32(16)))]
    return jnp.stack(sums)


def mix(x: Any) -> Any:
    """A bijection of 32 bits that flips half of the output for any flipped bit of the input.

    The constants are "lowbias32" of Chris Wellons' hash-prospector.
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
