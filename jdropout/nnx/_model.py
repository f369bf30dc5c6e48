"""Changes a whole nnx model: its keys and its rates."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jdropout._batch import at_axis, check_batch_axis, in_part
from jdropout._flax import check_module_rate
from jdropout._key_kinds import typed_key
from jdropout._typing import Batch, Index, Key, Site
from jdropout._values import type_name
from jdropout.keys import at_site, step_key
from jdropout.nnx._dropout import Dropout, FlaxDropout
from jdropout.nnx._turn_on import check_filter, drops
from jdropout.nnx._wrapper import Wrapper


def set_site_keys(
    model: nnx.Module,
    root: Key,
    *,
    step: Index,
    microbatch: Index = 0,
    batch: Batch | None = None,
    batch_axis: int | Callable[[Site], int] = 0,
) -> None:
    """Restarts every random stream of a model from the key of its path at this step.

    Call it at the start of a training step. All masks of the model are then a function of
    (root, step, microbatch, path), so the model's random state need not be saved and training
    resumes exactly.

    The stream at a path starts from
    ``site_key(root, step=step, site=path, microbatch=microbatch)``, where the path is a tuple
    of names and indices as given by `flax.nnx.iter_graph`, such as
    ``("blocks", 0, "dropout", "rngs")``. The n-th call in the step, counted from 0, draws
    ``fold_in`` of that key and n, as always in Flax. In a stack of layers, made for
    ``nnx.scan`` or ``nnx.vmap``, each layer has its index as the last part of its site.

    Args:
      model: module whose dropouts were built with `rngs`; changed in place. Under `jax.jit`, it
        must have been merged or made inside the compiled function.
      root: PRNG key, typed or raw; the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar, at least 0.
      microbatch: number of the microbatch within the step, an integer or a (traced) integer
        scalar below 2**32.
      batch: which part of the step's whole batch the model sees, as ``(first, size)`` or
        ``(first, size, count)``: the arguments of `jdropout.keys.in_batch`. Masks then do not
        depend on how a batch is cut; use it in place of `microbatch`.
      batch_axis: with `batch`, the axis of the examples in the layers that do not know it, such as
        1 in time-major arrays; or a function of a stream's path that returns it.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the model has no random stream, a number is negative or too large, or the
        root is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(1))
      ... )
      >>> def outputs(step):
      ...     jdropout.nnx.set_site_keys(model, jax.random.key(0), step=step)
      ...     return model(jnp.ones((1, 4)))
      >>> bool((outputs(1000) == outputs(1000)).all()), bool((outputs(1000) == outputs(1001)).all())
      (True, False)

    References:
      The key law, in the documentation.
    """
    key = typed_key(step_key(root, step=step, microbatch=microbatch))
    key = in_part(key, batch, microbatch)
    check_batch_axis(batch_axis)
    streams = [
        (cast("tuple[str | int, ...]", path), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.RngStream)
    ]
    if not streams:
        raise ValueError(
            f"model has no random stream to set, got {type_name(model)}: build its dropouts with "
            "rngs, as in Dropout(rate, rngs=rngs), or call them with "
            "rngs=jdropout.keys.site_key(...)."
        )
    without = [path for path, node in nnx.iter_graph(model) if drops(node) and node.rngs is None]
    if without:
        raise ValueError(
            "model has dropout layers without a random stream, whose keys would not be set: "
            f"{', '.join('/'.join(map(str, path)) for path in without)}. Build them with rngs too, "
            "or give set_site_keys the part of the model that has streams."
        )
    for path, stream in streams:
        # Not `stream.key[...] = key`, which would keep the stream's old key implementation.
        own = at_site(at_axis(key, batch_axis, path), path)
        stream.key.set_value(_keys_of_stack(own, stream.key.shape))
        stream.count.set_value(jnp.zeros_like(stream.count[...]))


def _keys_of_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The key itself, or for stacked streams (nnx.vmap) an array with one key per index."""
    if not shape:
        return key
    stack = jax.vmap(lambda index: _keys_of_stack(at_site(key, index), shape[1:]))
    return stack(jnp.arange(shape[0], dtype=jnp.uint32))


def set_rate(model: nnx.Module, rate: float, *filters: Any) -> int:
    """Sets the rate of a model's dropout layers, in place.

    It affects every `flax.nnx.Dropout`, and every layer of this library that has a rate. The
    rate is static: a compiled function that takes the model is recompiled for a new rate. To
    change the rate at every step, pass a traced rate to `jdropout.dropout` instead. Attention
    keeps its rate, which is the attribute ``dropout_rate`` of its layer.

    Args:
      model: nnx module; changed in place.
      rate: new rate, a Python number in [0, 1].
      *filters: layers to set, in the form that ``model.set_attributes`` takes: types such as
        ``jdropout.nnx.DropPath``, or functions of path and layer. A layer is set if any filter
        matches; all by default.

    Returns:
      The number of layers whose rate was set.

    Raises:
      TypeError: if the rate is not a Python number. No layer is changed then.
      ValueError: if the rate is not valid for one of the layers, or no layer matches.

    Example:
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> model = nnx.Sequential(jdropout.nnx.DropPath(0.1), jdropout.nnx.Dropout(0.5))
      >>> jdropout.nnx.set_rate(model, 0.2, jdropout.nnx.DropPath)
      1
      >>> [layer.rate for layer in model.layers]
      [0.2, 0.5]

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """
    for each in filters:
        check_filter(each, "filters")
    predicates = [nnx.filterlib.to_predicate(each) for each in filters]
    layers = [
        node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, FlaxDropout | Wrapper)
        and (not predicates or any(predicate(path, node) for predicate in predicates))
    ]
    if not layers:
        raise ValueError(
            "model has no dropout layer"
            + (f" that {' or '.join(map(repr, filters))} finds." if filters else ".")
            + " A filter is a type such as jdropout.nnx.Dropout, or a function of path and layer."
        )
    rates = [
        layer._checked_rate(rate) if isinstance(layer, Dropout) else check_module_rate(rate)
        for layer in layers
    ]
    for layer, checked in zip(layers, rates, strict=True):
        layer.rate = checked
    return len(layers)
