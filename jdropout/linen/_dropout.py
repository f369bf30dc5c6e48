"""Dropout as a linen module, and how all linen modules here get their flag and key."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
from flax import linen

from jdropout._checks import check_rate
from jdropout._dropout import dropout
from jdropout._flax import Applied, FunctionLayer, check_module_flag, check_stream, draws_mask
from jdropout._typing import Flag, Key

# Taken now: users may put our class in its place.
FlaxDropout = linen.Dropout


class Layer:
    """Base of modules that draw random numbers: resolves their flag and key."""

    deterministic: Any
    rng_collection: str
    drawing_methods: ClassVar[tuple[str, ...]] = ("__call__",)
    rng_position: ClassVar[int | None] = 2
    """Position of the argument ``rng`` in these methods; None if it is keyword-only."""

    def __post_init__(self) -> None:
        check_stream(self.deterministic, self.rng_collection)
        self._check_attributes()
        super().__post_init__()  # type: ignore[misc]  # linen.Module has it

    def _check_attributes(self) -> None:
        """Raises an error for invalid attributes; for subclasses to override."""

    def _resolve(
        self, deterministic: Flag | None, rng: Key | None
    ) -> tuple[bool | jax.Array, Key | None]:
        """Returns the flag, and the key for this call; None if it draws nothing."""
        flag = check_module_flag(
            linen.merge_param("deterministic", self.deterministic, deterministic)
        )
        if rng is None and self._draws(flag):
            rng = self.make_rng(self.rng_collection)  # type: ignore[attr-defined]  # so too
        return flag, rng

    def _draws(self, flag: bool | jax.Array) -> bool:
        """Whether a call takes a key; for subclasses to override."""
        return flag is not True


class RateLayer(FunctionLayer, Layer):
    """A layer with a rate."""

    rate: Any

    def _check_attributes(self) -> None:
        check_rate(self.rate)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_mask(self.rate, flag)


class Dropout(RateLayer, FlaxDropout):
    """Drop-in replacement for `flax.linen.Dropout` that uses this library's mask law.

    Attributes, call and random streams are Flax's own (it is a subclass): to migrate, change
    the import. Every call that draws a mask takes one key from the stream.

    Attributes:
      rate: probability of dropping, a number in [0, 1] or a (traced) floating-point scalar.
      broadcast_dims: axes along which the mask is shared.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

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

    _applies = Applied(dropout, ("broadcast_dims",))

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Drops and scales `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array of any shape, with a floating-point or complex dtype.
          deterministic: if True, return the input unchanged; a bool or a (traced) boolean
            scalar. Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number, or the input has an integer dtype.
        """
        flag, key = self._resolve(deterministic, rng)
        return self._drop(key, inputs, flag)


class Dropping(RateLayer, linen.Module):
    """Base of a layer that applies one function of this library."""

    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Applies this layer's function to `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array that the function of this layer accepts.
          deterministic: if True, return the input unchanged; a bool or a (traced) boolean
            scalar. Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          The result of the function.

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number, or the input has the wrong dtype.
        """
        flag, key = self._resolve(deterministic, rng)
        return self._drop(key, inputs, flag)


@contextlib.contextmanager
def with_attributes(module: Any, **attributes: Any) -> Iterator[None]:
    """Sets attributes of a frozen module for a while."""
    before = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            object.__setattr__(module, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
