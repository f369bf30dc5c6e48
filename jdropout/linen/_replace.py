"""Puts this library's dropout and attention in the place of Flax's, in calls and in Flax."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from flax import linen
from flax.linen import MultiHeadAttention as FlaxMultiHeadAttention
from flax.linen import dot_product_attention as flax_attention_fn

from jdropout import _flax
from jdropout.linen._attention import (
    FlaxAttention,
    FlaxSelfAttention,
    MultiHeadAttention,
    MultiHeadDotProductAttention,
    SelfAttention,
    dot_product_attention,
)
from jdropout.linen._dropout import Dropout, FlaxDropout, with_attributes

_CLASSES = {
    "Dropout": (FlaxDropout, Dropout),
    "MultiHeadDotProductAttention": (FlaxAttention, MultiHeadDotProductAttention),
    "MultiHeadAttention": (FlaxMultiHeadAttention, MultiHeadAttention),
    "SelfAttention": (FlaxSelfAttention, SelfAttention),
}


@contextlib.contextmanager
def replacing() -> Iterator[None]:
    """Makes models that are called inside use this library's dropout and attention.

    A context manager, and a decorator: ``replacing()(model.apply)``. The model remains as it is,
    with its parameters and their paths, and every `flax.linen.Dropout` gives, bit for bit, what
    `Dropout` gives for the same key. Attention of Flax that drops is computed as by
    `MultiHeadDotProductAttention`, with a mask for each example and head.

    Left alone are subclasses with a call of their own, attention with another ``attention_fn`` or
    with einsums of its own, dropout that a model writes by hand, such as with ``make_rng`` and
    `flax.linen.dot_product_attention_weights`, and functions that `jax.jit` compiled before.

    Yields:
      None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> model = linen.Dropout(0.5, deterministic=False)
      >>> with jdropout.linen.replacing():
      ...     model.apply({}, jnp.ones((1, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[2., 0., 0., 0., 0., 2., 2., 2.]], dtype=float32)

    References:
      The page "Migrating" of the documentation.
    """
    with linen.intercept_methods(_replaced):
        yield


def _replaced(
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
) -> Any:
    module: Any = context.module
    if context.method_name == "__call__":
        if isinstance(module, FlaxDropout) and type(module).__call__ is FlaxDropout.__call__:
            return _ours(module)(*args, **kwargs)
        if isinstance(module, FlaxAttention) and _may_replace(module):
            with with_attributes(
                module, attention_fn=dot_product_attention, broadcast_dropout=False
            ):
                return method(*args, **kwargs)
    return method(*args, **kwargs)


def _ours(module: Any) -> Dropout:
    """Our layer in the place of a bound one of Flax. It is intercepted like any layer."""
    ours = Dropout(
        rate=module.rate,
        broadcast_dims=module.broadcast_dims,
        deterministic=module.deterministic,
        rng_collection=module.rng_collection,
        parent=None,
    )
    object.__setattr__(ours, "scope", module.scope)  # modules are frozen
    object.__setattr__(ours, "name", module.name)
    return ours


def _may_replace(module: Any) -> bool:
    return (
        module.dropout_rate > 0
        and module.attention_fn is flax_attention_fn
        and module.qk_attn_weights_einsum_cls is None
        and module.attn_weights_value_einsum_cls is None
    )


def install() -> None:
    """Puts this library's classes in the place of `flax.linen.Dropout` and its attention.

    From then on, code that cannot be edited and says ``nn.Dropout(...)``, ``nn.SelfAttention(...)``
    and the like makes this library's layers, under the same names, so that the paths of parameters
    stay. It affects the whole process, until `uninstall`. Names that are already bound elsewhere
    (``from flax.linen import Dropout``) are out of reach, and named in a warning; so are subclasses
    and compiled functions that exist already. Import such packages after `install`, or call their
    models inside `replacing`.

    Example:
      >>> from flax import linen
      >>> import jdropout.linen
      >>> jdropout.linen.install()
      >>> linen.Dropout is jdropout.linen.Dropout
      True
      >>> jdropout.linen.uninstall()

    References:
      The page "Migrating" of the documentation.
    """
    _flax.install(linen, _CLASSES)


def uninstall() -> None:
    """Undoes `install`. Models that were made in between keep their layers.

    Example:
      >>> from flax import linen
      >>> import jdropout.linen
      >>> jdropout.linen.install()
      >>> jdropout.linen.uninstall()
      >>> linen.Dropout is jdropout.linen.Dropout
      False

    References:
      The page "Migrating" of the documentation.
    """
    _flax.uninstall(linen, _CLASSES)
