"""Monte Carlo dropout for linen models."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen

from jdropout import _monte_carlo
from jdropout._flax import check_any_dropout, check_model
from jdropout._key_kinds import typed_key
from jdropout._monte_carlo import MCPrediction, Sampling
from jdropout._typing import Key
from jdropout._values import check_function, check_name, type_name
from jdropout.linen._dropout_on import DropoutOn, Path, Training
from jdropout.nnx._turn_on import check_filter


def mc_predict(
    model: linen.Module,
    variables: Any,
    x: Any,
    key: Key,
    *,
    num_samples: int | jax.Array,
    batch_size: int | None = None,
    sampling: Sampling = "independent",
    consistent: bool = False,
    return_samples: bool = False,
    progress: Callable[[int, int], object] | None = None,
    apply: Callable[[Any, Any], Any] | None = None,
    only: Any = None,
    rng_collection: str = "dropout",
) -> MCPrediction:
    """Computes mean and variance of a model's prediction over the masks of its dropout.

    Every layer that drops draws its masks, `flax.linen.Dropout`, this library's layers and
    attention of either, whatever flag or key the model passes to it. So does hand-written dropout
    in a module with a flag named ``deterministic``, ``train``, ``training`` or ``is_training``.
    Everything else follows the model's arguments: to evaluate, pass `apply`, as in
    ``apply=lambda model, x: model(x, train=False)``, and a `BatchNorm` uses its running
    averages. No variable can change: a model that updates one raises an error.

    It is compiled once for each model, whatever the variables and the number of samples.

    Args:
      model: linen module.
      variables: variables of the model, as for ``model.apply``.
      x: input of the model, an array or a tree of arrays with the examples on the leading axis.
      key: PRNG key, typed or raw; use a new one for every call. Sample i gets the stream
        ``jdropout.keys.at_site(key, i)`` if the samples are independent; see
        `jdropout.mc_predict` for stratified ones.
      num_samples: number of masks, at least 2 and below 2**30. May be a traced integer, which
        is not checked, unless the samples are returned.
      batch_size: number of samples to compute together. None for 8 independent ones; for all
        stratified ones up to 20, for 10 up to 79, else for 20. With 1 there is no
        `jax.vmap`, so layers that `layer_drop` skips are not computed.
      sampling: "independent" masks, or "stratified" ones: the samples of a batch are coupled, so
        that each unit is dropped in its share of them, as in `jdropout.keys.stratified_key`. The
        mean then has a smaller error. Dropout that is not this library's stays independent.
      consistent: if True, all examples share a sample's masks: the model sees one example at a
        time, on a leading axis of size 1. If False, it sees the whole batch, and each example
        has its own masks.
      return_samples: if True, also return all samples. Memory then grows with their number, and
        changing it recompiles.
      progress: function of the number of finished samples and the total, called after each
        batch; each batch is then a call of its own.
      apply: function of the bound model and `x` that calls the model, ``model(x)`` by default.
        It may also process the result, for example by `jax.nn.softmax`. Pass the same function
        every time.
      only: which layers draw, a filter in the form that `jdropout.nnx.set_rate` takes, or a tuple
        of several: types, or functions of path and module, such as
        ``lambda path, _: "head" in path``. The others are off; None for all. The layers before the
        first of them are computed once for all samples of a batch.
      rng_collection: name of the random stream that the layers take their keys from.

    Returns:
      An `MCPrediction`: mean and variance over the samples, their number, and the samples if
      requested.

    Raises:
      TypeError: if the model is not a linen module or returns integers, or a number is not an
        integer.
      ValueError: if hand-written dropout cannot be switched on, nothing drops when the model is
        called, a number is too small, the key is missing or a batch of keys, `return_samples` is
        combined with a traced `num_samples` or with `progress`, `progress` is used under
        `jax.jit`, or ``consistent=True`` and there is no axis of examples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> dropout = jdropout.linen.Dropout(0.1, deterministic=True)
      >>> model = linen.Sequential([linen.Dense(64), linen.relu, dropout, linen.Dense(2)])
      >>> x = jnp.ones((3, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> prediction = jdropout.linen.mc_predict(
      ...     model, variables, x, jax.random.key(1), num_samples=100
      ... )
      >>> prediction.mean.shape, prediction.variance.shape
      ((3, 2), (3, 2))

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), section 4; Chan, Golub and LeVeque, "Algorithms for
      computing the sample variance" (The American Statistician, 1983), for the update of the
      moments.
    """
    check_model(model, linen.Module)
    check_filter(only)
    check_name("rng_collection", rng_collection)
    if apply is not None:
        check_function("apply", apply)
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"variables must be a mapping of collections, got {type_name(variables)}. Pass what "
            "model.init returns."
        )
    return _monte_carlo.mc_predict(
        _Sample(model, apply, rng_collection, only),
        key,
        variables,
        x,
        num_samples=num_samples,
        batch_size=batch_size,
        sampling=sampling,
        consistent=consistent,
        return_samples=return_samples,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Calls a model with a key for its masks. Hashable: equal models compile once."""

    model: linen.Module
    apply: Callable[[Any, Any], Any] | None
    rng_collection: str
    only: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Sample):
            return NotImplemented
        if self._others != other._others:
            return False
        try:
            return self.model is other.model or bool(self.model == other.model)
        except ValueError:  # an attribute is an array
            return False

    def __hash__(self) -> int:
        return hash((type(self.model), *self._others))

    @property
    def _others(self) -> tuple[Any, ...]:
        return self.apply, self.rng_collection, self.only

    def __call__(self, key: jax.Array, variables: Any, x: Any) -> Any:
        rngs = {self.rng_collection: typed_key(key)}
        dropout_on = DropoutOn(
            self.rng_collection, self._written_by_hand(rngs, variables, x), only=self.only
        )
        with linen.intercept_methods(dropout_on):
            y = linen.apply(self.apply or _call, self.model)(variables, x, rngs=rngs)
        dropout_on.check_all_drawn()
        check_any_dropout(dropout_on.drops, self.only)
        return y

    def _written_by_hand(self, rngs: Any, variables: Any, x: Any) -> frozenset[Path]:
        """Paths of modules that are not dropout layers, but draw when every flag says training."""
        training = Training(self.rng_collection, only=self.only)
        call = linen.apply(self.apply or _call, self.model, mutable=True)
        with linen.intercept_methods(training):
            try:
                jax.eval_shape(
                    call, variables, x, rngs={"params": rngs[self.rng_collection], **rngs}
                )
            except Exception as error:
                warnings.warn(
                    f"mc_predict could not look for dropout outside of layers: in training mode "
                    f"the model raised {type(error).__name__}: {error}",
                    stacklevel=2,
                )
        return frozenset(training.drawn)


def _call(model: Any, x: Any) -> Any:
    return model(x)
