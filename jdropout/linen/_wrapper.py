"""Base of linen modules that compute a subset of what another module computes."""

from typing import Any, ClassVar

import jax
from flax import linen

from jdropout._checks import check_static_flag
from jdropout._typing import Key
from jdropout._values import check_function
from jdropout.linen._dropout import RateLayer


class SubsetWrapper(RateLayer, linen.Module):
    """A layer around a module; in initialisation, it computes everything."""

    rng_position: ClassVar[int | None] = None

    layer: linen.Module
    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @linen.nowrap
    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_function("layer", self.layer)

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        # At 1 it draws which one stays; a traced rate is an error of the function's.
        return not check_static_flag(flag) and (isinstance(self.rate, jax.Array) or self.rate != 0)

    @linen.nowrap
    def _static(self, deterministic: bool | None, rng: Key | None) -> tuple[bool, Any]:
        """Returns the flag, True in initialisation, and the key for this call."""
        if self.is_initializing():
            return True, None
        flag, key = self._resolve(deterministic, rng)
        return check_static_flag(flag), key
