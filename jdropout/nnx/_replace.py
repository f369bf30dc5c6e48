"""Puts this library's dropout and attention in the place of Flax's, in nnx models and in Flax."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from flax import nnx
from flax.nnx import dot_product_attention as flax_attention_fn

from jdropout import _flax
from jdropout._flax import check_module, check_module_rate
from jdropout.nnx._attention import FlaxAttention, MultiHeadAttention, dot_product_attention
from jdropout.nnx._dropout import Dropout, FlaxDropout

_CLASSES = {
    "Dropout": (FlaxDropout, Dropout),
    "MultiHeadAttention": (FlaxAttention, MultiHeadAttention),
}
_replacing = threading.RLock()


def replace_dropout(model: nnx.Module) -> int:
    """Turns the dropout of a model from Flax's into this library's, in place.

    Every `flax.nnx.Dropout` becomes a `Dropout`, and every `flax.nnx.MultiHeadAttention` that
    drops a `MultiHeadAttention` with a mask for each example and head. The layers remain the same
    objects, with their rates, flags and random streams, so layers that are shared, or held in
    lists and dictionaries, are replaced too. Their next masks follow the mask law, for the keys
    that they would have taken anyway.

    A subclass is replaced if it inherits Flax's call, and remains an instance of its class. A
    layer that is left alone, because its class has a call of its own or its ``attention_fn`` is
    not Flax's, is named in a warning.

    Args:
      model: nnx module; changed in place, outside of transformations such as `nnx.jit`.

    Returns:
      The number of layers that were replaced.

    Raises:
      TypeError: if a layer's rate is not a Python number. No layer is changed then.
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
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """
    check_module("model", model, nnx.Pytree, "Pass the model, not its state.")
    dropouts, attentions, skipped = [], [], []
    for path, node in nnx.iter_graph(model):
        attention = isinstance(node, FlaxAttention)
        if isinstance(node, Dropout | MultiHeadAttention) or not (
            attention or isinstance(node, FlaxDropout)
        ):
            continue
        reason = _why_not(node, attention)
        if reason:
            skipped.append(f"{'/'.join(map(str, path))} ({reason})")
        elif not attention:
            dropouts.append((node, check_module_rate(node.rate)))
        elif node.dropout_rate != 0:
            attentions.append((node, check_module_rate(node.dropout_rate, "dropout_rate")))
    for node, rate in dropouts:
        node.rate = rate
        _change_class(node, FlaxDropout, Dropout)
    for node, rate in attentions:
        node.dropout_rate, node.broadcast_dropout = rate, False
        node.attention_fn = dot_product_attention
        _change_class(node, FlaxAttention, MultiHeadAttention)
    if skipped:
        warnings.warn(f"replace_dropout left alone: {', '.join(skipped)}.", stacklevel=2)
    return len(dropouts) + len(attentions)


def _why_not(node: Any, attention: bool) -> str:
    """Why a layer cannot be replaced; empty if it can."""
    kind = type(node)
    if kind.__call__ is not (FlaxAttention if attention else FlaxDropout).__call__:
        return f"{kind.__name__} has a call of its own"
    known = flax_attention_fn, dot_product_attention  # ours, if Ctrl-C came when it was just set
    if attention and node.dropout_rate != 0 and node.attention_fn not in known:
        return "its attention_fn is not Flax's"
    return ""


def _change_class(node: Any, flax: type, ours: type) -> None:
    # Mutates in place: the layer may be shared, or in any container.
    kind: Any = type(node)
    object.__setattr__(node, "__class__", ours if kind is flax else _subclass(ours, kind))


@functools.cache
def _subclass(ours: type, kind: type) -> type:
    """A class with our call that remains a subclass of a user's."""
    return type(kind)(kind.__name__, (ours, kind), {"__module__": kind.__module__})


def install() -> None:
    """Puts this library's classes in the place of `flax.nnx.Dropout` and its attention.

    From then on, code that cannot be edited and says ``nnx.Dropout(...)`` or
    ``nnx.MultiHeadAttention(...)`` makes this library's layers. It affects the whole process, until
    `uninstall`. Names that are already bound elsewhere (``from flax.nnx import Dropout``) are out
    of reach, and named in a warning; so are subclasses, models and compiled functions that exist
    already. Import such packages after `install`, or use `replace_dropout` on their models.

    Example:
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> jdropout.nnx.install()
      >>> type(nnx.Dropout(0.5)) is jdropout.nnx.Dropout
      True
      >>> jdropout.nnx.uninstall()

    References:
      The page "Migrating" of the documentation.
    """
    _flax.install(nnx, _CLASSES)


def uninstall() -> None:
    """Undoes `install`. Models that were made in between keep their layers.

    Example:
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> jdropout.nnx.install()
      >>> jdropout.nnx.uninstall()
      >>> type(nnx.Dropout(0.5)) is jdropout.nnx.Dropout
      False

    References:
      The page "Migrating" of the documentation.
    """
    _flax.uninstall(nnx, _CLASSES)


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Makes models that are built inside use this library's dropout and attention.

    A context manager, and a decorator of functions that build a model: `install` for a while, in
    the whole process. A second thread that enters it waits until the first has left.

    Yields:
      None.

    Example:
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> with jdropout.nnx.replacing():
      ...     layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> type(layer) is jdropout.nnx.Dropout
      True

    References:
      The page "Migrating" of the documentation.
    """
    with _replacing:
        before = {name: getattr(nnx, name) for name in _CLASSES}
        bind = vars(nnx).update  # one call: Ctrl-C comes before or after it
        try:
            _flax.install(nnx, _CLASSES)
            yield
        finally:
            bind(before)
