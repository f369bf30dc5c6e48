"""Monte Carlo dropout: the moments of a function over the masks of its dropout."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from jdropout import _arrays, _checks, _values
from jdropout._moments import Moments, like, no_moments
from jdropout._strata import LARGEST_SIZE
from jdropout._typing import Key
from jdropout.keys import at_site, stratified_key

BATCH_SIZE = 8
"""Samples per vmap. On CPU 32 is no faster and 1 is slower: see the benchmarks."""

_GROUP_SIZES = 10, 20
"""Coupled samples per vmap: usual rates have a whole number of tenths or twentieths of them."""

_ENOUGH_GROUPS = 4
"""The number of groups from which on their means tell the error of the mean."""

_AXIS = "jdropout_samples"

Sampling = Literal["independent", "stratified"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["mean", "variance", "num_samples", "samples", "error_variance", "num_groups"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class MCPrediction:
    """Mean and variance over Monte Carlo samples, as returned by `mc_predict`; a pytree.

    Attributes:
      mean: mean over the samples, with the structure and shapes that the function returns;
        float32 or wider.
      variance: estimate of the variance of one sample, with the structure and shapes of `mean`. It
        is unbiased, except that from a single group of n stratified samples it is up to ``1 / n``
        too small. For a complex function it is computed from the absolute values of the deviations.
      num_samples: number of samples.
      samples: the samples themselves, stacked on a new leading axis, in the dtypes that the
        function returns; None unless requested.
      error_variance: variance of `mean` around the mean of infinitely many samples. For
        independent samples it is ``variance / num_samples``. For stratified ones it is estimated
        from the means of the groups if there are at least 4; for fewer it is what it would be for
        independent samples, which is usually too large.
      num_groups: number of independent groups of samples: `num_samples` for independent samples,
        the number of batches for stratified ones. Confidence intervals take their quantiles from
        Student's t-distribution with ``num_groups - 1`` degrees of freedom.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def fn(key, x):
      ...     return jdropout.dropout(key, x, 0.5)
      >>> prediction = jdropout.mc_predict(fn, jax.random.key(0), jnp.ones(2), num_samples=10_000)
      >>> print(prediction.mean.round(1), prediction.standard_error.round(3))
      [1. 1.] [0.01 0.01]

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), section 4; Chan, Golub and LeVeque, "Algorithms for
      computing the sample variance" (The American Statistician, 1983), for the update of the
      moments.
    """

    mean: Any
    variance: Any
    num_samples: Any
    samples: Any = None
    error_variance: Any = None
    num_groups: Any = None

    @property
    def standard_error(self) -> Any:
        """Standard error of `mean`, the square root of `error_variance`.

        It is the typical distance of `mean` from the mean of infinitely many samples.
        """
        return jax.tree.map(jnp.sqrt, self.error_variance)


def mc_predict(
    fn: Callable[..., Any],
    key: Key,
    *args: Any,
    num_samples: int | jax.Array,
    batch_size: int | None = None,
    sampling: Sampling = "independent",
    consistent: bool = False,
    return_samples: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> MCPrediction:
    """Computes mean and variance of a function over dropout masks: Monte Carlo dropout.

    Sample i is ``fn(key_i, *args)``, for i from 0 to ``num_samples - 1``, with keys that derive
    from `key`. With dropout in `fn`, the mean is the prediction and the variance measures how much
    the masks disagree. All samples are computed in one call of one compiled function,
    ``batch_size`` of them at a time under `jax.vmap`. The moments are updated after each batch, so
    memory stays at one batch for any number of samples. Code before the first dropout is computed
    at most once per batch; XLA usually moves it out of the loop over batches. Changing the number
    of samples does not recompile, unless it changes the batch size.

    The rules of `jax.jit` hold: `fn` must be the same object in every call, so define it once
    and pass that; anything `fn` closes over becomes a constant of the compiled function, so
    pass parameters in `args`. (A module that is a pytree, or a method of one, may be `fn`: its
    arrays are passed as arguments.)

    Args:
      fn: function of a key and `args` that returns an array, or a tree of arrays, with
        floating-point or complex dtypes; without side effects. It decides what is averaged:
        logits, probabilities, their entropy, or several of them in a dictionary.
      key: PRNG key, typed or raw; use a new one for every call. Sample i gets the key
        ``jdropout.keys.at_site(key, i)`` if the samples are independent. Stratified samples of the
        batch ``b = i // batch_size`` share ``at_site(key, b)``, and get
        ``stratified_key(at_site(key, b), i % batch_size, batch_size)``.
      *args: arrays or trees of arrays; the last one holds the inputs.
      num_samples: number of masks, at least 2 and below 2**30. May be a traced integer, which
        is not checked, unless the samples are returned.
      batch_size: number of samples to compute together. None for 8 independent ones; for all
        stratified ones up to 20, for 10 up to 79, else for 20. With 1 there is no `jax.vmap`, so a
        `layer_drop` in `fn` does skip its layer. Surplus samples in the last batch are computed but
        not counted.
      sampling: "independent" masks, or "stratified" ones: the samples of a batch are coupled, so
        that each unit is dropped in its share of them, as with `jdropout.keys.stratified_key`. The
        mean then has a smaller error, the smaller the more the units act one by one. Dropout that
        is not this library's stays independent.
      consistent: if True, all examples share a sample's masks, so that each sample is one
        function applied to all examples, on the leading axis of the last of `args`. `fn` then
        sees one example at a time, on a leading axis of size 1, and must return that axis. If
        False, `fn` sees the whole batch, and each example has its own masks.
      return_samples: if True, also return all samples. Memory then grows with their number, and
        changing it recompiles.
      progress: function of the number of finished samples and the total, called after each
        batch; each batch is then a call of its own.

    Returns:
      An `MCPrediction`. It supports forward-mode differentiation, and with
      ``return_samples=True`` reverse mode too; to train through a mean over masks, use
      `multi_sample`.

    Raises:
      TypeError: if `fn` is not a function or returns integers, or a number is not an integer.
      ValueError: if a number is too small or too large, or the key is missing or a batch of
        keys; if `return_samples` is combined with a traced `num_samples` or with `progress`; if
        `progress` is used under `jax.jit`; if ``consistent=True`` and there is no axis of
        examples.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def model(key, w, x):
      ...     return jdropout.dropout(key, x, 0.5) @ w
      >>> w, x = jnp.ones((4, 1)), jnp.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
      >>> prediction = jdropout.mc_predict(model, jax.random.key(0), w, x, num_samples=10_000)
      >>> print(prediction.mean.round(1).T, prediction.variance.round(1).T)  # exactly 1, 4; 1, 4
      [[1. 4.]] [[1. 4.]]

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), section 4; Chan, Golub and LeVeque, "Algorithms for
      computing the sample variance" (The American Statistician, 1983), for the update of the
      moments; Owen, "Monte Carlo variance of scrambled net quadrature" (SIAM J. Numerical Analysis,
      1997), for the variance of Latin hypercube samples.
    """
    _values.check_function("fn", fn)
    key = _checks.check_parent_key(key, "key")
    count = _check_num_samples(num_samples, _values.check_flag("return_samples", return_samples))
    _values.check_option("sampling", sampling, ("independent", "stratified"))
    stratified = sampling == "stratified"
    size = _check_batch_size(batch_size, count, stratified)
    if _values.check_flag("consistent", consistent):
        _check_examples(args)
    if progress is not None:
        _values.check_function("progress", progress)
    sampler = _Sampler.of(fn, args, consistent)
    if return_samples:
        _check_no_progress(progress)
        return _stack(sampler, key, count=count, size=size, stratified=stratified)
    if progress is None:
        moments = _add(sampler, key, None, 0, count, size=size, stratified=stratified)
    else:
        _check_concrete_for_progress((key, args, count))
        moments = None
        for first in range(0, count, size):
            last = min(first + size, count)
            moments = _add(sampler, key, moments, first, last, size=size, stratified=stratified)
            jax.block_until_ready(moments)
            progress(last, count)
    return _prediction(moments, count, size=size, stratified=stratified)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["others", "structure", "consistent"],
)
@dataclasses.dataclass(frozen=True)
class _Sampler:
    """A function and its arguments as a pytree: arrays are traced, everything else is static."""

    arrays: tuple[Any, ...]
    others: tuple[Any, ...]
    structure: Any
    consistent: bool

    @classmethod
    def of(cls, fn: Callable[..., Any], args: tuple[Any, ...], consistent: bool) -> "_Sampler":
        if inspect.ismethod(fn):
            fn = Partial(fn.__func__, fn.__self__)
        numbers = bool, int, float, complex, np.generic
        number_of_fn = len(jax.tree.leaves(fn))
        leaves, structure = jax.tree.flatten((fn, args))
        leaves = [_arrays.readable("args", x) if isinstance(x, np.ndarray) else x for x in leaves]
        is_array = [
            isinstance(leaf, jax.Array | np.ndarray)
            or (i >= number_of_fn and isinstance(leaf, numbers))  # those of fn may be its options
            for i, leaf in enumerate(leaves)
        ]
        arrays = (leaf if array else None for leaf, array in zip(leaves, is_array, strict=True))
        others = (None if array else leaf for leaf, array in zip(leaves, is_array, strict=True))
        return cls(tuple(arrays), tuple(others), structure, consistent)

    def __call__(self, key: jax.Array) -> Any:
        """Computes one sample."""
        pairs = zip(self.arrays, self.others, strict=True)
        leaves = [other if array is None else array for array, other in pairs]
        fn, args = jax.tree.unflatten(self.structure, leaves)
        if not self.consistent:
            return fn(key, *args)
        *shared, examples = args

        def row(example: Any) -> Any:
            y = fn(key, *shared, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], example))
            _check_one_row(y)
            return jax.tree.map(lambda leaf: leaf[0], y)

        return jax.vmap(row)(examples)


@functools.partial(jax.jit, static_argnames=("size", "stratified"))
def _add(
    sampler: _Sampler,
    key: Key,
    moments: Moments | None,
    first: Any,
    end: Any,
    *,
    size: int,
    stratified: bool,
) -> Moments:
    """Adds the samples ``first, ..., end - 1`` to the moments."""
    batch = _batch_function(sampler, key, size, stratified)
    first, end = (jnp.asarray(number, jnp.int32) for number in (first, end))
    if moments is None:
        moments = _no_moments(batch, first)

    def add_batch(state: tuple[jax.Array, Moments]) -> tuple[jax.Array, Moments]:
        first, moments = state
        counted = first + np.arange(size, dtype=np.int32) < end
        return first + np.int32(size), moments.with_samples(batch(first), counted)

    _, moments = lax.while_loop(lambda state: state[0] < end, add_batch, (first, moments))
    return moments


@functools.partial(jax.jit, static_argnames=("count", "size", "stratified"))
def _stack(sampler: _Sampler, key: Key, *, count: int, size: int, stratified: bool) -> MCPrediction:
    """Computes all samples and their moments."""
    batch = _batch_function(sampler, key, size, stratified)

    def add_batch(moments: Moments, first: jax.Array) -> tuple[Moments, Any]:
        samples = batch(first)
        counted = first + np.arange(size, dtype=np.int32) < count
        return moments.with_samples(samples, counted), samples

    firsts = jnp.asarray(np.arange(0, count, size, dtype=np.int32))
    moments, batches = lax.scan(add_batch, _no_moments(batch, firsts[0]), firsts)
    samples = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], batches)
    prediction = _prediction(moments, count, size=size, stratified=stratified)
    return dataclasses.replace(prediction, samples=samples)


def _batch_function(
    sampler: _Sampler, key: Key, size: int, stratified: bool
) -> Callable[[Any], Any]:
    """The function from the number of a batch's first sample to the samples of the batch."""
    # jit makes all calls share one trace.
    sample = jax.jit(lambda key: sampler(key))  # the sampler is not hashable

    def one(first: jax.Array) -> Any:
        # No vmap for one sample: it would turn lax.cond into a select, which runs both branches.
        return jax.tree.map(lambda y: y[None], sample(at_site(key, first)))

    def independent(first: jax.Array) -> Any:
        index = first + np.arange(size, dtype=np.int32)
        return jax.vmap(lambda index: sample(at_site(key, index)))(index)

    def coupled(first: jax.Array) -> Any:
        group = at_site(key, lax.div(first, lax.full_like(first, size)))
        return jax.vmap(
            lambda index: sample(stratified_key(group, index, size, axis_name=_AXIS)),
            axis_name=_AXIS,
        )(np.arange(size, dtype=np.int32))

    if size == 1:
        return one
    return coupled if stratified else independent


def _no_moments(batch: Callable[[Any], Any], first: Any) -> Moments:
    # Only shape, dtype and sharding of these samples are used; XLA removes the call.
    return no_moments(jax.tree.map(lambda y: y[0], batch(first)))


def _prediction(moments: Moments, count: Any, *, size: int, stratified: bool) -> MCPrediction:
    """The estimates.

    The squared deviations of n samples from their mean add up to ``n (variance - error)`` on
    average, where error is the variance of the mean. For independent samples it is variance / n.
    For groups of coupled samples it is estimated from the deviations of the groups' means. A single
    group tells nothing of it: the variance is then computed as if it were 0, and the error itself
    as for independent samples, which is usually more.
    """

    def over(sums: Any, number: Any) -> Any:
        return jax.tree.map(lambda s: s / like(number, s), sums)

    bound = over(over(moments.squares, count - 1), count)
    if not stratified or size == 1:
        variance = over(moments.squares, count - 1)
        return MCPrediction(moments.mean, variance, count, error_variance=bound, num_groups=count)
    num_groups = -(-count // size)
    error = over(over(moments.between, jnp.maximum(num_groups - 1, 1)), count)
    variance = jax.tree.map(jnp.add, over(moments.squares, count), error)
    enough = num_groups >= _ENOUGH_GROUPS
    error = jax.tree.map(functools.partial(jnp.where, enough), error, bound)
    return MCPrediction(moments.mean, variance, count, error_variance=error, num_groups=num_groups)


def _check_batch_size(batch_size: Any, count: Any, stratified: bool) -> int:
    if batch_size is None and not stratified:
        return BATCH_SIZE
    if batch_size is None:
        small, large = _GROUP_SIZES
        if not isinstance(count, int):
            return small
        if count <= large:
            return count
        return large if count >= _ENOUGH_GROUPS * large else small
    size = _values.check_positive("batch_size", batch_size)
    if size > 2**30:
        raise ValueError(
            f"batch_size must be at most 2**30, got {size}. Pass the number of samples to compute "
            "at once, or leave it out."
        )
    if stratified and isinstance(count, int):
        size = min(size, count)  # or each sample would have one of more strata than samples
    if stratified and size > LARGEST_SIZE:
        raise ValueError(
            f"batch_size must be at most {LARGEST_SIZE} with sampling='stratified', where the "
            f"samples of a batch are coupled, got {size}. Leave it out."
        )
    return size


def _check_num_samples(count: Any, static: bool) -> Any:
    """Returns the number of samples: at least 2, because a variance needs them."""
    if isinstance(count, jax.core.Tracer):
        if static:
            raise ValueError(
                "num_samples must be a Python integer with return_samples=True, since it is the "
                "size of an axis; got a traced one. Make it static, or leave the samples out."
            )
        if count.ndim or not jnp.issubdtype(count.dtype, np.integer):
            raise TypeError(
                f"num_samples must be an integer scalar, got {count.dtype}{list(count.shape)}."
                " Convert it with .astype(jnp.int32)."
            )
        return count
    number = _values.check_positive("num_samples", count)
    if not 2 <= number < 2**30:
        raise ValueError(
            f"num_samples must be at least 2, for there to be a variance, and below 2**30, got "
            f"{number}."
            " Typical numbers are 10 to 100."
        )
    return number


def _check_examples(args: tuple[Any, ...]) -> None:
    """Checks that the last argument holds examples, which share their masks."""
    leaves = jax.tree.leaves(args[-1]) if args else []
    shapes = [np.shape(leaf) for leaf in leaves]
    if not shapes or not all(shapes) or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "consistent=True needs the examples on the leading axis of the last argument after the "
            f"key, got {f'arrays of shapes {shapes}' if args else 'no argument'}. Pass the inputs "
            "last, such as mc_predict(fn, key, params, x, ...)."
        )


def _check_one_row(y: Any) -> None:
    """Checks that `fn` returns one row for one example."""
    for leaf in jax.tree.leaves(y):
        if np.shape(leaf)[:1] != (1,):
            raise ValueError(
                "fn must return a leading axis of examples with consistent=True: one example, on "
                f"an axis of size 1, gave shape {np.shape(leaf)}. Do what is over all examples, "
                "such as a mean, after mc_predict."
            )


def _check_no_progress(progress: Any) -> None:
    if progress is not None:
        raise ValueError(
            "progress cannot be told with return_samples=True, where all samples come from one "
            "call. Leave out one of them."
        )


def _check_concrete_for_progress(values: Any) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values)):
        raise ValueError(
            "progress cannot be told under jax.jit or another transformation, where nothing is "
            "computed yet. Leave it out, or call mc_predict outside."
        )
