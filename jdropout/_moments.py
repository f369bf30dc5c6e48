"""The mean and variance of samples, updated group by group."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _arrays
from jdropout._dtypes import sum_dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "mean", "squares", "between"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Moments:
    """Number, mean, and sum of squared deviations of the samples so far.

    A part of that sum is between the means of the groups: ``sum over groups of
    group_count * (group_mean - mean)**2``.
    """

    count: Any
    mean: Any
    squares: Any
    between: Any

    def with_samples(self, samples: Any, counted: Any) -> "Moments":
        """Adds the samples of a group where ``counted`` is True; it has to be for at least one."""
        more = counted.sum(dtype=np.int32)
        total = self.count + more

        def add(
            mean: jax.Array, squares: jax.Array, between: jax.Array, y: jax.Array
        ) -> tuple[jax.Array, ...]:
            y = y.astype(mean.dtype)
            mask = counted.reshape(-1, *(1,) * (y.ndim - 1))
            # Relative to the first sample: a constant then has variance 0, however large it is.
            offset = jnp.where(mask, y - y[:1], 0)
            mean_offset = offset.sum(0) / like(more, mean)
            within = jnp.where(mask, _square(offset - mean_offset[None]), 0).sum(0)
            difference = y[0] + mean_offset - mean
            part = like(more, squares) / like(total, squares)
            # In this order: difference**2 may overflow while the count is 0, and 0 * inf is NaN.
            weight = part * like(self.count, squares)
            moved = (difference * weight.astype(mean.dtype) * difference.conj()).real
            return (
                mean + difference * part.astype(mean.dtype),
                squares + within + moved,
                between + moved,
            )

        sums = jax.tree.map(add, self.mean, self.squares, self.between, samples)
        structure = jax.tree.structure(samples)
        return Moments(total, *jax.tree.transpose(structure, jax.tree.structure((0, 0, 0)), sums))


def no_moments(sample: Any) -> Moments:
    _check_any_output(sample)
    _arrays.check_averaged(sample)
    mean = jax.tree.map(lambda y: jnp.zeros_like(y, dtype=sum_dtype(y)), sample)
    squares = jax.tree.map(lambda y: jnp.zeros_like(y.real), mean)
    return Moments(jnp.int32(0), mean, squares, squares)


def like(number: Any, array: jax.Array) -> jax.Array:
    """Converts a number to an array's dtype."""
    return jnp.asarray(number, array.dtype)


def _square(y: jax.Array) -> jax.Array:
    return (y * y.conj()).real if jnp.iscomplexobj(y) else y * y


def _check_any_output(y: Any) -> None:
    if not jax.tree.leaves(y):
        raise TypeError(f"fn must return arrays, got {y!r}. Return the arrays to average.")
