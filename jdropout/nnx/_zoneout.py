"""Zoneout around an nnx cell."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._flax import check_module_rates, draws_any_mask, same_part
from jdropout._typing import Flag
from jdropout._zoneout import zoneout
from jdropout.nnx._dropout import Dropout


class Zoneout(Dropout, nnx.RNNCellBase):
    """A recurrent cell whose units keep their state at random.

    After every step of the cell the new carry is ``jdropout.zoneout(key, carry, new, rate)``, in
    evaluation its expectation. It is a cell itself: in an `nnx.RNN` every time step has a key of
    its own. The output is that of the cell, but where it is part of the carry (the hidden units,
    in all of Flax's cells) it is zoned out as well.

    Args:
      cell: an `nnx.RNNCellBase`.
      rate: probability of keeping the old value, a number in [0, 1]; or one for each part of the
        carry, such as ``(0.5, 0.05)`` for the cells and hidden units of an LSTM.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> cell = nnx.OptimizedLSTMCell(4, 8, rngs=rngs)
      >>> lstm = nnx.RNN(jdropout.nnx.Zoneout(cell, (0.5, 0.05), rngs=rngs))
      >>> lstm(jnp.ones((2, 10, 4))).shape
      (2, 10, 8)

    References:
      As for `jdropout.zoneout`.
    """

    _arguments = "cell, rate"

    def __init__(
        self,
        cell: Any,
        rate: float | Sequence[float],
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate,  # type: ignore[arg-type]  # or several, see _checked_rate
            deterministic=deterministic,
            rng_collection=rng_collection,
            rngs=rngs,
        )
        self.cell = cell

    def __call__(  # type: ignore[override]
        self,
        carry: Any,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        """A step of the cell.

        Args:
          carry: the state: an array, or a tree of them.
          inputs: array of shape (batch, features), or what the cell takes.
          deterministic: as for `Dropout`.
          rngs: as for `Dropout`.

        Returns:
          The new carry, and the output.

        Raises:
          ValueError: if rates and carry do not fit, or as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rngs)
        new, output = self.cell(carry, inputs)
        zoned = zoneout(key, carry, new, self.rate, deterministic=flag)
        return zoned, same_part(output, new, zoned)

    def initialize_carry(self, *args: Any, **kwargs: Any) -> Any:
        """That of the cell."""
        return self.cell.initialize_carry(*args, **kwargs)

    @property
    def num_feature_axes(self) -> int:
        """That of the cell."""
        return self.cell.num_feature_axes

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_any_mask(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        return check_module_rates(rate)
