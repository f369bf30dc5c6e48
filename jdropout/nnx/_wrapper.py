"""Base of nnx modules with a rate around another module."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout._checks import check_static_flag
from jdropout._flax import check_module_rate, draws_mask
from jdropout._typing import Flag
from jdropout._values import check_function
from jdropout.nnx._dropout import Layer, attach


class Wrapper(Layer):
    """A layer around a module or function, with the attributes ``layer`` and ``rate``."""

    _arguments = "layer, rate"

    def __init__(
        self,
        layer: Callable[..., Any],
        rate: float,
        *,
        deterministic: bool | None,
        rng_collection: str,
        rngs: nnx.Rngs | nnx.RngStream | None,
    ) -> None:
        check_function("layer", layer)
        self.layer = layer
        self.rate: float = check_module_rate(rate)
        attach(self, deterministic, rng_collection, rngs)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_mask(self.rate, flag)


class SubsetWrapper(Wrapper):
    """A wrapper whose function computes a subset: at a rate of 1 it still draws which."""

    def _draws(self, flag: bool | jax.Array) -> bool:
        return not check_static_flag(flag) and self.rate != 0

    def _static(
        self, deterministic: Flag | None, rngs: nnx.Rngs | nnx.RngStream | jax.Array | None
    ) -> tuple[bool, jax.Array | None]:
        """`_resolve` with a flag that is not traced."""
        flag, key = self._resolve(deterministic, rngs)
        return bool(flag), key
