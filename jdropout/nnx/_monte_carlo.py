"""Monte Carlo dropout for nnx models."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout import _monte_carlo
from jdropout._flax import check_any_dropout, check_model, draws_mask
from jdropout._monte_carlo import MCPrediction
from jdropout._typing import Key
from jdropout.nnx._dropout import Layer
from jdropout.nnx._model import set_site_keys


def mc_predict(
    model: nnx.Module,
    x: Any,
    key: Key,
    *,
    num_samples: int | jax.Array,
    batch_size: int | None = None,
    consistent: bool = False,
    return_samples: bool = False,
    progress: Callable[[int, int], object] | None = None,
    apply: Callable[[Any, Any], Any] | None = None,
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
        ``jdropout.keys.at_site(key, i)``.
      num_samples: number of masks, at least 2 and below 2**30. May be a traced integer, which
        is not checked, unless the samples are returned.
      batch_size: number of samples to compute together; None for 8. With 1 there is no
        `jax.vmap`, so layers that `layer_drop` skips are not computed.
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

    Returns:
      An `MCPrediction`: mean and variance over the samples, their number, and the samples if
      requested.

    Raises:
      TypeError: if the model is not an nnx module or returns integers, or a number is not an
        integer.
      ValueError: if no layer of the model drops, a number is too small, the key is missing or a
        batch of keys, `return_samples` is combined with a traced `num_samples` or with
        `progress`, `progress` is used under `jax.jit`, or ``consistent=True`` and there is no
        axis of examples.

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
    model = nnx.clone(model)
    model.eval()
    drops = [_turn_on(node) for _, node in nnx.iter_graph(model)]
    check_any_dropout(any(drops))
    structure, state = nnx.split(model)
    return _monte_carlo.mc_predict(
        _Sample(structure, apply),
        key,
        state,
        x,
        num_samples=num_samples,
        batch_size=batch_size,
        consistent=consistent,
        return_samples=return_samples,
        progress=progress,
    )


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Calls a model with a key for its streams. Hashable: equal models compile once."""

    structure: Any
    apply: Callable[[Any, Any], Any] | None

    def __call__(self, key: jax.Array, state: Any, x: Any) -> Any:
        # tree.map makes new variables: nnx refuses to set those of an outer trace.
        model = nnx.merge(self.structure, jax.tree.map(lambda leaf: leaf, state))
        set_site_keys(model, key, step=0)
        return model(x) if self.apply is None else self.apply(model, x)


def _turn_on(node: Any) -> bool:
    """Makes a layer draw in every call, from its own stream; returns whether it ever drops."""
    attention = isinstance(node, nnx.MultiHeadAttention)
    if not attention and not isinstance(node, nnx.Dropout | Layer):
        return False
    if isinstance(node, Layer):
        drops = node._draws(False)
    else:
        drops = draws_mask(node.dropout_rate if attention else node.rate, False)
    if node.rngs is None:
        collection = "dropout" if attention else node.rng_collection
        source = nnx.Dropout(0.0, rng_collection=collection, rngs=nnx.Rngs(0))
        node.rngs = nnx.data(source.rngs)
    # Mutates in place: the layer may be shared, or in any container.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", _always_on(kind))
    return drops


@functools.cache
def _always_on(kind: type) -> type:
    """Subclasses a layer so that every call draws, whatever flag and rngs it is given.

    Setting the attribute `deterministic` would not do: a flag in the call overrides it, and nnx has
    no interceptors.
    """

    def drawing(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def draw(
            self: Any, *args: Any, deterministic: Any = None, rngs: Any = None, **more: Any
        ) -> Any:
            return method(self, *args, deterministic=False, **more)

        return draw

    names = [name for name in ("__call__", "attend") if hasattr(kind, name)]
    methods = {name: drawing(getattr(kind, name)) for name in names}
    return type(kind)(kind.__name__, (kind,), methods)
