"""What is done to a whole nnx model: its keys, its rates, its dropout layers."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from jdropout._flax import check_module_rate
from jdropout._typing import Index, Key
from jdropout.keys import at_site, step_key
from jdropout.nnx._dropout import Dropout


def set_site_keys(model: nnx.Module, root: Key, *, step: Index, microbatch: Index = 0) -> None:
    """Starts every random stream of a model anew, from the key of its path at this step.

    Called at the beginning of a training step, it makes all masks of the model a function of
    (root, step, microbatch, path): the model's random state then need not be saved, and training
    resumes exactly. The stream at a path starts from ``site_key(root, step=step, site=path,
    microbatch=microbatch)``, where the path is a tuple of names and indices as of
    `flax.nnx.iter_graph`, such as ``("blocks", 0, "dropout", "rngs")``; the n-th call in the step,
    from 0, draws ``fold_in`` of that and n, as always in Flax. In a stack of layers, as for
    ``nnx.scan`` or ``nnx.vmap``, each has its index as a last part of its site.

    Args:
      model: a module whose dropouts were built with ``rngs``; changed in place. Under
        `jax.jit`, one that was merged or made in the compiled function.
      root: a PRNG key, the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar.
      microbatch: number of the microbatch within the step.

    Raises:
      TypeError: as for `jdropout.keys.site_key`.
      ValueError: if the model has no random stream, or as for `jdropout.keys.site_key`.

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
    key = step_key(root, step=step, microbatch=microbatch)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # as a stream does with a raw key
    streams = [
        (cast("tuple[str | int, ...]", path), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.RngStream)
    ]
    if not streams:
        raise ValueError(
            "model has no random stream to set: build its dropouts with rngs, as in "
            "Dropout(rate, rngs=rngs), or call them with rngs=jdropout.keys.site_key(...)."
        )
    for path, stream in streams:
        # Not `stream.key[...] = `, which keeps the implementation that the stream had.
        stream.key.set_value(_keys_of_stack(at_site(key, path), stream.key.shape))
        stream.count.set_value(jnp.zeros_like(stream.count[...]))


def _keys_of_stack(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The key itself, or in a stack of streams one for each index."""
    if not shape:
        return key
    stack = jax.vmap(lambda index: _keys_of_stack(at_site(key, index), shape[1:]))
    return stack(jnp.arange(shape[0], dtype=jnp.uint32))


def replace_dropout(model: nnx.Module) -> int:
    """Turns every `flax.nnx.Dropout` of a model into a `Dropout` of this library, in place.

    The layers stay the objects that they are, with their rates, flags and random streams; so it
    reaches those that are shared, or in lists and dictionaries. Their next masks are those of
    the mask law for the keys that they would have taken. Subclasses and attention layers are left
    alone: for the latter pass ``attention_fn=jdropout.nnx.dot_product_attention`` to Flax's.

    Args:
      model: an nnx module; changed in place, outside of transformations such as `nnx.jit`.

    Returns:
      The number of layers that were replaced.

    Raises:
      TypeError: if a layer's rate is no Python number. No layer is changed then.
      ValueError: if a layer's rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> model = nnx.Sequential(
      ...     nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))
      ... )
      >>> jdropout.nnx.replace_dropout(model)
      1
      >>> type(model.layers[1]) is jdropout.nnx.Dropout
      True

    References:
      As for `Dropout`.
    """
    layers = [node for _, node in nnx.iter_graph(model) if type(node) is nnx.Dropout]
    rates = [check_module_rate(layer.rate) for layer in layers]
    for layer, rate in zip(layers, rates, strict=True):
        layer.rate = rate
        # Not a new object: whoever holds this one, in whatever container, holds the new layer.
        object.__setattr__(layer, "__class__", Dropout)
    return len(layers)


def set_rate(model: nnx.Module, rate: float, *filters: Any) -> int:
    """Sets the rate of the dropout layers of a model, in place.

    That is of every `flax.nnx.Dropout`, and so of every layer of this library with a rate. It is
    static: a compiled function that takes the model is compiled again for a new rate. To change it
    in every step pass a traced rate to `jdropout.dropout` instead. The rate of attention is the
    attribute ``dropout_rate`` of its layer, and stays.

    Args:
      model: an nnx module; changed in place.
      rate: the new rate, a number in [0, 1].
      *filters: which layers to set, as for ``model.set_attributes``: those that any of the filters
        finds, such as ``jdropout.nnx.DropPath``; all by default. A function of path and layer
        does as well.

    Returns:
      The number of layers whose rate was set.

    Raises:
      TypeError: if the rate is not a number. No layer is changed then.
      ValueError: if the rate is not possible for one of the layers, or there are none.

    Example:
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> model = nnx.Sequential(jdropout.nnx.DropPath(0.1), jdropout.nnx.Dropout(0.5))
      >>> jdropout.nnx.set_rate(model, 0.2, jdropout.nnx.DropPath)
      1
      >>> [layer.rate for layer in model.layers]
      [0.2, 0.5]

    References:
      As for `Dropout`.
    """
    predicates = [nnx.filterlib.to_predicate(each) for each in filters]
    layers = [
        node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Dropout)
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
