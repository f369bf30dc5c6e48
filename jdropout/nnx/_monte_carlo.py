"""Monte Carlo dropout for nnx models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx

from jdropout import _monte_carlo
from jdropout._audit import audit
from jdropout._flax import check_any_dropout, check_model
from jdropout._monte_carlo import MCPrediction, Sampling
from jdropout._typing import Key
from jdropout._values import check_function
from jdropout.nnx._model import set_site_keys
from jdropout.nnx._turn_on import check_filter, is_layer, turn_on


def mc_predict(
    model: nnx.Module,
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
) -> MCPrediction:
    """Computes mean and variance of a model's prediction over the masks of its dropout.

    Every layer that drops draws its masks, `flax.nnx.Dropout`, this library's layers and
    attention of either, whatever flag, stream or key the model passes to it. Everything else is
    in evaluation mode, as after ``model.eval()``, so a `BatchNorm` uses its running averages
    unless the model's call says otherwise. The model itself is not changed, whatever mode it is
    in, and its random streams are not used: the masks are a function of the key and of the
    paths of the layers, as in `set_site_keys`.

    It is compiled once for each structure of model, whatever the values of the parameters and
    the number of samples.

    Args:
      model: nnx module. Its dropouts need no `rngs`, unless they are in a stack of layers, as
        for ``nnx.scan``.
      x: input of the model, an array or a tree of arrays with the examples on the leading axis.
      key: PRNG key, typed or raw; use a new one for every call. Sample i takes its masks from
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
      apply: function of a model and `x` that calls the model, ``model(x)`` by default. It may
        also process the result, for example by `jax.nn.softmax`. Pass the same function every
        time.
      only: which layers draw, a filter in the form that `set_rate` takes, or a tuple of
        several: types, or functions of path and layer, such as ``lambda path, _: "head" in path``.
        The others are off; None for all. The layers before the first of them are computed once
        for all samples of a batch.

    Returns:
      An `MCPrediction`: mean and variance over the samples, their number, and the samples if
      requested.

    Raises:
      TypeError: if the model is not an nnx module or returns integers, or a number is not an
        integer.
      ValueError: if no layer of the model drops, or none that `only` finds, it has hand-written
        dropout (which cannot be switched on), a number is too small or too large, the key is
        missing or a batch of keys, `return_samples` is combined with a traced `num_samples` or with
        `progress`, `progress` is used under `jax.jit`, or ``consistent=True`` and there is no axis
        of examples.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 64, rngs=rngs), nnx.relu, jdropout.nnx.Dropout(0.1, rngs=rngs),
      ...     nnx.Linear(64, 2, rngs=rngs),
      ... )
      >>> prediction = jdropout.nnx.mc_predict(
      ...     model, jnp.ones((3, 4)), jax.random.key(0), num_samples=100
      ... )
      >>> prediction.mean.shape, prediction.variance.shape
      ((3, 2), (3, 2))

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), section 4; Chan, Golub and LeVeque, "Algorithms for
      computing the sample variance" (The American Statistician, 1983), for the update of the
      moments.
    """
    check_model(model, nnx.Module)
    check_filter(only)
    if apply is not None:
        check_function("apply", apply)
    model = nnx.clone(model)
    model.eval()
    drops = turn_on(model, only)
    bridges = any(isinstance(node, nnx.bridge.ToNNX) for _, node in nnx.iter_graph(model))
    if not bridges:
        check_any_dropout(drops, only)
    structure, state = nnx.split(model)
    trained = nnx.clone(model)
    for _, node in nnx.iter_graph(trained):
        if not is_layer(node) and isinstance(getattr(node, "deterministic", None), bool):
            node.deterministic = False
    return _monte_carlo.mc_predict(
        _Sample(structure, nnx.graphdef(trained), apply, drops, bridges, only),
        key,
        state,
        x,
        num_samples=num_samples,
        batch_size=batch_size,
        sampling=sampling,
        consistent=consistent,
        return_samples=return_samples,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Calls a model with a key for its streams. Hashable: equal models compile once."""

    structure: Any
    trained: Any
    """The same with the flags of all other modules set to training."""
    apply: Callable[[Any, Any], Any] | None
    drops: bool
    bridges: bool
    """Whether linen modules are inside."""
    only: Any

    def __call__(self, key: jax.Array, state: Any, x: Any) -> Any:
        self._check_all_on(state, x)
        model = _merged(self.structure, state)
        set_site_keys(model, key, step=0)
        return self._call(model, x)

    def _call(self, model: nnx.Module, x: Any) -> Any:
        apply = self.apply or _call
        if not self.bridges:
            return apply(model, x)
        from jdropout.linen._dropout_on import DropoutOn  # jdropout.linen imports this package

        dropout_on = DropoutOn(only=self.only)
        with linen.intercept_methods(dropout_on):
            y = apply(model, x)
        check_any_dropout(self.drops or dropout_on.drops, self.only)
        return y

    def _check_all_on(self, state: Any, x: Any) -> None:
        """Checks that what drops in training also drops here, according to an audit."""
        if self.trained == self.structure:
            return

        def places(structure: Any) -> set[str]:
            sites = audit(lambda state, x: self._call(_merged(structure, state), x), state, x).sites
            return {f"{site.path} ({site.location})" for site in sites if site.key}

        off = places(self.trained) - places(self.structure)
        if off:
            raise ValueError(
                f"model drops in training at {', '.join(sorted(off))}, which could not be switched "
                "on here: it is not a dropout layer of Flax or of this library. Replace it by one, "
                "or sample the model in training mode with jdropout.mc_predict."
            )


def _call(model: Any, x: Any) -> Any:
    return model(x)


def _merged(structure: Any, state: Any) -> Any:
    # tree.map makes new variables: nnx refuses to set those of an outer trace.
    return nnx.merge(structure, jax.tree.map(lambda leaf: leaf, state))
