"""Dropout as Flax nnx modules."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import jax.typing

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import promote_dtype
except ImportError as error:
    raise ImportError(
        "jdropout.nnx needs Flax. Install it with: pip install 'jdropout[flax]'"
    ) from error

from jdropout._dropout import dropout
from jdropout._flax import attention, check_module_flag, check_module_rate, draws_mask
from jdropout._typing import Flag, Index, Key, Rate
from jdropout.keys import at_site, step_key

__all__ = ["Dropout", "MultiHeadAttention", "dot_product_attention", "set_site_keys"]


class Dropout(nnx.Dropout):
    """`flax.nnx.Dropout` with the mask law of this library.

    Constructor, call, attributes and random streams are Flax's own (it is a subclass, so
    filters by type still find it): to migrate, change the import. Every call that draws a mask
    takes one key from the stream. The rate is static, never a leaf of the module's state.

    Args:
      rate: probability of dropping, a number in [0, 1].
      broadcast_dims: axes along which all elements share their fate.
      deterministic: whether to return the input as it is; may be left to the call, or to
        ``nnx.view(model, deterministic=...)``.
      rng_collection: name of the stream that keys are taken from.
      rngs: an `nnx.Rngs` or `nnx.RngStream`, forked here; may be left to the call.

    Raises:
      TypeError: if the rate is not a number, or ``rngs`` has another type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 8)))
      Array([[2., 2., 2., 2., 0., 0., 2., 2.]], dtype=float32)
      >>> layer(jnp.ones((1, 8)), deterministic=True)
      Array([[1., 1., 1., 1., 1., 1., 1., 1.]], dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            check_module_rate(rate),
            broadcast_dims=broadcast_dims,
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Drops and scales; the identity if deterministic.

        Args:
          inputs: array of any shape, of a floating-point or complex dtype.
          deterministic: takes precedence over the constructor's flag; may be traced, and then
            takes a key whatever its value.
          rngs: takes precedence over the constructor's; may also be a key.

        Returns:
          An array of the same shape, dtype and sharding.

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if ``rngs`` has another type.
        """
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            raise ValueError(
                "No `deterministic` argument was provided to Dropout. Choose one:\n"
                "1. in the constructor: Dropout(rate, deterministic=False, rngs=rngs)\n"
                "2. in the call: self.dropout(x, deterministic=not training)\n"
                "3. for a whole model: nnx.view(model, deterministic=True)"
            )
        flag = check_module_flag(deterministic)
        key = self._key(rngs) if draws_mask(self.rate, flag) else None
        return dropout(
            key, inputs, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
        source = self.rngs if rngs is None else rngs
        if isinstance(source, nnx.Rngs):
            return source[self.rng_collection]()
        if isinstance(source, nnx.RngStream):
            return source()
        if isinstance(source, jax.Array):
            return source
        if source is None:
            raise ValueError(
                "`deterministic` is False, but no `rngs` argument was provided to Dropout. Choose "
                "one:\n"
                "1. in the constructor: Dropout(rate, rngs=rngs)\n"
                "2. in the call: self.dropout(x, rngs=rngs), an Rngs, an RngStream or a key\n"
                "3. in evaluation: self.dropout(x, deterministic=True)"
            )
        raise TypeError(
            f"rngs must be an nnx.Rngs, an nnx.RngStream or a key, got {type(source).__name__}."
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
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.nnx.dot_product_attention`.

    To be used as ``attention_fn`` of `flax.nnx.MultiHeadAttention`. Beware of Flax's default
    ``broadcast_dropout=True``: all heads and all examples of a batch then share one T x S mask.
    ``broadcast_dropout=False`` gives each its own, at the same cost here; it is the default of
    `MultiHeadAttention` in this module.

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
      dtype: of the computation; inferred by default. The softmax is in float32 at least.
      precision: of the products.
      module: must be None, since there are no weights to sow.
      promote_dtype: makes query, key and value of one dtype.
      is_causal: whether queries attend to no later key.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: as for `jdropout.dot_product_attention`.
      ValueError: as for `jdropout.dot_product_attention`, or if ``module`` is given.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, dropout_rate=0.1, broadcast_dropout=False,
      ...     deterministic=False, decode=False, rngs=nnx.Rngs(0),
      ...     attention_fn=jdropout.nnx.dot_product_attention,
      ... )
      >>> layer(jnp.ones((2, 8, 16))).shape
      (2, 8, 16)

    References:
      As for `jdropout.dot_product_attention`.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
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
        is_causal=is_causal,
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` in blocks, with a mask for every example and head.

    Constructor, call and attributes are Flax's own, with two other defaults:
    ``attention_fn=jdropout.nnx.dot_product_attention`` and ``broadcast_dropout=False``.

    Args:
      *args: positional arguments of Flax's constructor.
      dropout_rate: probability of dropping an attention weight, a number in [0, 1].
      broadcast_dropout: whether to share dropout's mask over batch and heads.
      attention_fn: a function with the signature of `dot_product_attention`.
      **options: further keyword arguments of Flax's constructor.

    Raises:
      TypeError: if the rate is not a number.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jnp.ones((2, 8, 16)), deterministic=False).shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """

    def __init__(
        self,
        *args: Any,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = False,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        **options: Any,
    ) -> None:
        super().__init__(
            *args,
            dropout_rate=check_module_rate(dropout_rate, "dropout_rate"),
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **options,
        )


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
