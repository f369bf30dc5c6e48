"""Dropout as an nnx module, and how all nnx modules here get their flag and key."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._dropout import dropout
from jdropout._flax import (
    Applied,
    FunctionLayer,
    check_module_flag,
    check_module_rate,
    check_stream,
    draws_mask,
)
from jdropout._typing import Flag

# Taken now: users may put our class in its place.
FlaxDropout = nnx.Dropout


class Layer(nnx.Module):
    """Base of modules that draw random numbers: resolves flag and key as Flax's dropout does.

    Its attributes are ``deterministic``, ``rng_collection`` and ``rngs``.
    """

    deterministic: bool | None
    rng_collection: str
    rngs: Any
    _arguments = "rate"
    """Positional arguments of the constructor, for error messages."""

    def _resolve(
        self,
        deterministic: Flag | None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None,
    ) -> tuple[bool | jax.Array, jax.Array | None]:
        """Returns the flag, and the key for this call; None if it draws nothing."""
        if deterministic is None:
            deterministic = self.deterministic
        if deterministic is None:
            name = type(self).__name__
            raise ValueError(
                f"No `deterministic` argument was provided to {name}. Choose one:\n"
                f"1. in the constructor: {name}({self._arguments}, deterministic=False, "
                "rngs=rngs)\n"
                "2. in the call: self.dropout(x, deterministic=not training)\n"
                "3. for a whole model: nnx.view(model, deterministic=True)"
            )
        flag = check_module_flag(deterministic)
        return flag, self._key(rngs) if self._draws(flag) else None

    def _draws(self, flag: bool | jax.Array) -> bool:
        """Whether a call takes a key; for subclasses to override."""
        return flag is not True

    def _key(self, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None) -> jax.Array:
        source = self.rngs if rngs is None else rngs
        if isinstance(source, nnx.Rngs):
            return source[self.rng_collection]()
        if isinstance(source, nnx.RngStream):
            return source()
        if isinstance(source, jax.Array):
            return source
        if source is None:
            name = type(self).__name__
            raise ValueError(
                f"`deterministic` is False, but no `rngs` argument was provided to {name}. Choose "
                "one:\n"
                f"1. in the constructor: {name}({self._arguments}, rngs=rngs)\n"
                "2. in the call: self.dropout(x, rngs=rngs), an Rngs, an RngStream or a key\n"
                "3. in evaluation: self.dropout(x, deterministic=True)"
            )
        raise TypeError(
            f"rngs must be an nnx.Rngs, an nnx.RngStream or a key, got {type(source).__name__}."
            " Write rngs=nnx.Rngs(0), or rngs=jax.random.key(0) in the call."
        )

    # Borrowed from Flax, because its contract with nnx.view changed between versions.
    set_view: Callable[..., None] = FlaxDropout.set_view


def attach(
    layer: Layer,
    deterministic: bool | None,
    rng_collection: str,
    rngs: nnx.Rngs | nnx.RngStream | None,
) -> None:
    """Sets the attributes that `flax.nnx.Dropout` would set, on a layer that is not one."""
    check_stream(deterministic, rng_collection)
    source = FlaxDropout(0.0, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs)
    layer.deterministic = deterministic
    layer.rng_collection = rng_collection
    layer.rngs = nnx.data(source.rngs)


class Dropout(Layer, FunctionLayer, FlaxDropout):
    """Drop-in replacement for `flax.nnx.Dropout` that uses this library's mask law.

    Constructor, call, attributes and random streams are Flax's own (it is a subclass, so
    filters by type still find it): to migrate, change the import. Every call that draws a mask
    takes one key from the stream. The rate is static, never a leaf of the module's state.

    Args:
      rate: probability of dropping, a Python number in [0, 1].
      broadcast_dims: axes along which the mask is shared.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
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

    _applies = Applied(dropout, ("broadcast_dims",))

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        check_stream(deterministic, rng_collection)
        FlaxDropout.__init__(
            self,
            self._checked_rate(rate),
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
        """Drops and scales `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array of any shape, with a floating-point or complex dtype.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.

        Returns:
          An array of the same shape, dtype and sharding.

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)
        return self._drop(key, inputs, flag)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_mask(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        """Returns the rate as a static number; for subclasses to override."""
        return check_module_rate(rate)
