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
    """Mean and variance of a model's prediction over the masks of its dropout.

    Every layer that drops draws its masks: `flax.nnx.Dropout`, the layers of this library and
    attention of either, whatever flag, stream or key the model passes to it. All else is in
    evaluation mode, as after ``model.eval()``, so that a `BatchNorm` uses its running averages
    unless the model's call says otherwise. The model itself is not changed, whatever mode it is in,
    nor are its random streams used: the masks are a function of the key and of the paths of the
    layers, as of `set_site_keys`.

    It is compiled once for each structure of model, whatever the values of its parameters and the
    number of samples are.

    Args:
      model: an nnx module. Its dropouts need no ``rngs``, unless they are in a stack of layers, as
        for ``nnx.scan``.
      x: its input, an array or a tree of arrays with the examples on the leading axis.
      key: a PRNG key, as for `jdropout.dropout`. Sample i takes its masks from
        ``jdropout.keys.at_site(key, i)``.
      num_samples: as for `jdropout.mc_predict`.
      batch_size: as for `jdropout.mc_predict`.
      consistent: as for `jdropout.mc_predict`; whether all examples share a sample's masks.
      return_samples: as for `jdropout.mc_predict`.
      progress: as for `jdropout.mc_predict`.
      apply: a function of a model and of `x` that calls the model, ``model(x)`` by default. It may
        also go on with the result, as by `jax.nn.softmax`. Pass the same function every time.

    Returns:
      As for `jdropout.mc_predict`.

    Raises:
      TypeError: if the model is no nnx module, or as for `jdropout.mc_predict`.
      ValueError: if no layer of the model drops, or as for `jdropout.mc_predict`.

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
      As for `jdropout.mc_predict`.
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
    """Calls a model whose streams start from a key; equal ones are compiled once."""

    structure: Any
    apply: Callable[[Any, Any], Any] | None

    def __call__(self, key: jax.Array, state: Any, x: Any) -> Any:
        # New variables, of this trace: those of an outer one cannot be set.
        model = nnx.merge(self.structure, jax.tree.map(lambda leaf: leaf, state))
        set_site_keys(model, key, step=0)
        return model(x) if self.apply is None else self.apply(model, x)


def _turn_on(node: Any) -> bool:
    """Lets a layer draw in all its calls, from its own stream; returns whether it drops."""
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
    # Not a new object, for it may be shared, or in any container.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", _always_on(kind))
    return drops


@functools.cache
def _always_on(kind: type) -> type:
    """A layer whose calls draw, whatever the flag and the source of keys that are passed."""

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
