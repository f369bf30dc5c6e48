"""Keys for several samples with coupled masks."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _values
from jdropout._key_kinds import Sample, apart, part_of, sample_of, separate, together, typed_key
from jdropout._strata import LARGEST_SIZE
from jdropout._typing import Index, Key


def stratified_key(
    key: Key, sample: Index, size: int, *, axis_name: str | None = None
) -> jax.Array:
    """Returns the key of one of several samples, in which every unit is dropped in its share.

    A mask of a single sample has the distribution that it would have with any other key. Together,
    the masks of all `size` samples are coupled: at rate r, every unit is dropped in ``r * size``
    of them, rounded up or down, at random and independently of all other units. The mean of a
    function over these samples is an unbiased estimate of its expectation. Its error is smaller
    than with independent masks if the units act mostly one by one.

    The result is an ordinary typed key: `jax.random.split` and `fold_in`, `at_site` and Flax's
    streams derive keys of the same sample from it. It couples the noise and the subsets of this
    library too. `jax.random.bits` and what is made from it, such as Flax's own dropout, are
    independent in every sample.

    `jdropout.mc_predict` does all this with ``sampling="stratified"``.

    Args:
      key: PRNG key, typed or raw, the same one for all samples. If it is for a part of a batch, so
        is the result. If it is itself for one of several samples, these are no longer coupled.
      sample: number of the sample, an integer or a (traced) integer scalar, at least 0 and below
        `size`.
      size: number of samples that are coupled, at least 1 and at most 250.
      axis_name: name of the axis of a `jax.vmap` over all samples, in which the key is used. Random
        numbers that the samples share are then computed once, except in a `jax.shard_map` and under
        explicit sharding. All samples have to derive their keys in the same way, which they do not
        if a `jax.lax.while_loop` ends earlier in one.

    Returns:
      A typed key.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a number is too small or too large, or the key is missing or a batch of keys.

    Example:
      >>> import jax, jdropout
      >>> from jdropout.keys import stratified_key
      >>> keys = [stratified_key(jax.random.key(0), sample, 10) for sample in range(10)]
      >>> sum(jdropout.keep_mask(key, 0.3, (2, 3)).astype(int) for key in keys)
      Array([[7, 7, 7],
             [7, 7, 7]], dtype=int32)

    References:
      The strata law, in the documentation; McKay, Beckman and Conover, "A comparison of three
      methods for selecting values of input variables in the analysis of output from a computer
      code" (Technometrics 1979), for Latin hypercube sampling.
    """
    key = _checks.check_parent_key(key, "key")
    size = _values.check_positive("size", size)
    if size > LARGEST_SIZE:
        raise ValueError(
            f"size must be at most {LARGEST_SIZE}, got {size}. Couple the samples in several "
            "groups, with keys of their own: nearly all of the gain is there with 10."
        )
    number = _check_sample(sample, size)
    if axis_name is not None and not isinstance(axis_name, str):
        raise TypeError(
            f"axis_name must be a string, got {axis_name!r}. Pass the axis_name of the jax.vmap "
            "over the samples."
        )
    part = part_of(key)
    if part:
        original, first = apart(cast("jax.Array", key))
        coupled = _coupled(original, number, size, axis_name)
        return together(coupled, first, part._replace(impl=jax.random.key_impl(coupled)))
    return _coupled(key, number, size, axis_name)


def _coupled(key: Key, sample: Any, size: int, axis_name: str | None) -> jax.Array:
    key = typed_key(separate(key))
    return together(key, sample, Sample(jax.random.key_impl(key), size, axis_name))


def uncoupled(key: Key) -> tuple[Key, jax.Array | None, int | None]:
    """The key that all samples share, the number of the sample, and how many there are.

    The last two are None for a key that is not for a sample.
    """
    facts = sample_of(key)
    if facts is None:
        return key, None, None
    shared, sample = apart(cast("jax.Array", key), spent=True)
    mesh = jax.sharding.get_abstract_mesh()
    # JAX cannot reduce over the axis of a vmap in a shard_map or under explicit sharding.
    if facts.axis_name is not None and not (mesh.manual_axes or mesh.explicit_axes):
        # The smallest of equal keys is that key, and does not vary along the axis.
        words = lax.pmin(jax.random.key_data(shared), facts.axis_name)
        shared = jax.random.wrap_key_data(words, impl=facts.impl)
    return shared, sample, facts.size


def _check_sample(sample: Any, size: int) -> jax.Array | np.uint32:
    number = _values.check_index("sample", sample)
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32)
    if not 0 <= number < size:
        raise ValueError(
            f"sample must be at least 0 and below the number of samples, {size}, got {number}. "
            "Count samples from 0."
        )
    return np.uint32(number)
