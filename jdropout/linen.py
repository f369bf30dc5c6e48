"""Dropout as Flax linen modules."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.typing

try:
    from flax import linen
    from flax.linen.dtypes import promote_dtype
except ImportError as error:
    raise ImportError(
        "jdropout.linen needs Flax. Install it with: pip install 'jdropout[flax]'"
    ) from error

from jdropout._dropout import dropout
from jdropout._flax import attention, check_module_flag, draws_mask
from jdropout._typing import Flag, Index, Key, Rate
from jdropout.keys import at_site, step_key

__all__ = ["Dropout", "MultiHeadDotProductAttention", "dot_product_attention", "with_site_keys"]


class Dropout(linen.Dropout):
    """`flax.linen.Dropout` with the mask law of this library.

    Attributes, call and random streams are Flax's own (it is a subclass): to migrate, change
    the import. Every call that draws a mask takes one key from the stream.

    Attributes:
      rate: probability of dropping, a number in [0, 1].
      broadcast_dims: axes along which all elements share their fate.
      deterministic: whether to return the input as it is; given here or in the call.
      rng_collection: name of the stream that keys are taken from, ``'dropout'`` by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.Dropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[2., 0., 0., 0., 0., 2., 2., 2.]], dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Drops and scales; the identity if deterministic.

        Args:
          inputs: array of any shape, of a floating-point or complex dtype.
          deterministic: whether to return the input as it is; may be traced.
          rng: a key to use instead of one from the stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the flag was given neither or both here and in the constructor, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number, or the input's dtype an integer.
        """
        flag = check_module_flag(
            linen.merge_param("deterministic", self.deterministic, deterministic)
        )
        key = rng
        if key is None and draws_mask(self.rate, flag):
            key = self.make_rng(self.rng_collection)
        return dropout(
            key, inputs, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Key | None = None,
    dropout_rate: Rate = 0.0,
    deterministic: Flag = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: linen.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.linen.dot_product_attention`.

    To be used as ``attention_fn`` of `flax.linen.MultiHeadDotProductAttention`. Beware of
    Flax's default ``broadcast_dropout=True``: all heads and all examples of a batch then share
    one T x S mask. ``broadcast_dropout=False`` gives each its own, at the same cost here; it is
    the default of `MultiHeadDotProductAttention` in this module.

    Args:
      query: array of shape (batch..., T, N, H).
      key: array of shape (batch..., S, K, H).
      value: array of shape (batch..., S, K, V).
      bias: added to the logits; broadcastable to (batch..., N, T, S).
      mask: True, or not zero, where a query may attend to a key; broadcastable likewise. A
        query that may attend to no key has an output of zeros; Flax's is a mean of values.
      broadcast_dropout: whether to share dropout's mask over batch and heads.
      dropout_rng: a PRNG key.
      dropout_rate: probability of dropping.
      deterministic: whether to leave dropout out; may be traced.
      dtype: of the computation; inferred by default.
      precision: of the products.
      module: must be None, since there are no weights to sow.
      force_fp32_for_softmax: has no effect: the softmax always is in float32 at least.
      einsum_dot_general: must be None, as must be the two other replacements of einsum.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: as for `jdropout.dot_product_attention`.
      ValueError: as for `jdropout.dot_product_attention`, or if an argument that must be None
        is not.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> layer = linen.MultiHeadDotProductAttention(
      ...     num_heads=4, dropout_rate=0.1, broadcast_dropout=False, deterministic=False,
      ...     attention_fn=jdropout.linen.dot_product_attention,
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8, 16)))[0].shape
      (2, 8, 16)

    References:
      As for `jdropout.dot_product_attention`.
    """
    replacements = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, function in replacements.items():
        if function is not None:
            raise ValueError(
                f"{name} must be None: attention in blocks computes its own products. To replace "
                "them use the attention_fn of Flax itself."
            )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    return attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        precision=precision,
        module=module,
    )


class MultiHeadDotProductAttention(linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` in blocks, a mask for every example and head.

    Attributes and call are Flax's own, with two other defaults.

    Attributes:
      broadcast_dropout: whether to share dropout's mask over batch and heads; False by default.
      attention_fn: `dot_product_attention` of this module by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.MultiHeadDotProductAttention(
      ...     num_heads=4, dropout_rate=0.1, deterministic=False
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8, 16)))[0].shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """

    broadcast_dropout: bool = False
    attention_fn: Callable[..., Any] = dot_product_attention


def with_site_keys(
    apply: Callable[..., Any],
    root: Key,
    *,
    step: Index,
    microbatch: Index = 0,
    rng_collection: str = "dropout",
) -> Callable[..., Any]:
    """Lets every dropout of a model take its key from its path and the training step.

    The masks are then a function of (root, step, microbatch, path): no random state has to be
    saved, and training resumes exactly. The n-th call in the step, from 0, of a
    `flax.linen.Dropout` or an attention layer, Flax's or ours, gets the key
    ``at_site(site_key(root, step=step, site=path, microbatch=microbatch), n)``, where the path is a
    tuple of names such as ``("Block_0", "Dropout_0")``. The path is hashed to 64 bits a name,
    where Flax hashes all of it to 32. Lifted transforms such as ``linen.scan`` split the stream as
    told by ``split_rngs``, and the path is below that; ``linen.jit`` folds the path of its module
    into the stream, and the path begins there. The count is Flax's own: ``linen.scan`` traces its
    body twice, so that what is called once in it has n = 1, and ``linen.jit`` takes one number of
    its module. Other modules that draw from the stream find the key of the step in it.

    Args:
      apply: a function with the argument ``rngs``, such as the ``apply`` of a model.
      root: a PRNG key, the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar.
      microbatch: number of the microbatch within the step.
      rng_collection: name of the stream.

    Returns:
      A function with the arguments of ``apply``; ``rngs`` may hold further streams.

    Raises:
      TypeError: as for `jdropout.keys.site_key`.
      ValueError: if ``rngs`` has a key for the stream, or as for `jdropout.keys.site_key`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> model = jdropout.linen.Dropout(0.5, deterministic=False)
      >>> apply = jdropout.linen.with_site_keys(model.apply, jax.random.key(0), step=1000)
      >>> apply({}, jnp.ones((1, 8)))
      Array([[0., 2., 2., 0., 0., 0., 2., 0.]], dtype=float32)

    References:
      The key law, in the documentation.
    """
    key = step_key(root, step=step, microbatch=microbatch)

    def apply_with_site_keys(*args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        streams = {} if rngs is None else rngs if isinstance(rngs, Mapping) else {"params": rngs}
        if rng_collection in streams:
            raise ValueError(
                f"rngs has a key for {rng_collection!r}, which with_site_keys provides: leave it "
                "out, or pass another rng_collection."
            )
        with linen.intercept_methods(_KeysByPath(rng_collection)):
            return apply(*args, rngs={**streams, rng_collection: key}, **kwargs)

    return apply_with_site_keys


class _KeysByPath:
    """Gives the modules that draw masks a key made from the stream and their path."""

    def __init__(self, rng_collection: str) -> None:
        self.rng_collection = rng_collection

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        argument = self.argument(context.module) if context.method_name == "__call__" else None
        positional = argument == "rng" and len(args) > 2
        if argument and not positional and kwargs.get(argument) is None:
            kwargs = kwargs | {argument: self.key(context.module)}
        return method(*args, **kwargs)

    def argument(self, module: linen.Module) -> str | None:
        """Name of the argument, if any, that takes a key instead of one from the stream."""
        if isinstance(module, linen.Dropout) and module.rng_collection == self.rng_collection:
            return "rng"
        attention = isinstance(module, linen.MultiHeadDotProductAttention)
        return "dropout_rng" if attention and self.rng_collection == "dropout" else None

    def key(self, module: linen.Module) -> jax.Array | None:
        scope = module.scope
        assert scope is not None  # a module that is called has one
        stream = scope.rngs.get(self.rng_collection)
        if stream is None:
            return None  # a lifted transform left the stream out: Flax says so if it is needed
        # Flax's own count, which all modules at a path share: those that a shared parent makes
        # anew in each of its calls too, and those inside of linen.remat.
        calls = scope.rng_counters[self.rng_collection]
        scope.rng_counters[self.rng_collection] = calls + 1
        # The suffix is the path; below linen.jit, whose trace serves several paths, the rest of it.
        return at_site(stream.rng, (*stream.suffix, calls))
