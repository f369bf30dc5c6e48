"""Zoneout around a linen cell."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen

from jdropout import _checks
from jdropout._flax import draws_any_mask, same_part
from jdropout._typing import Flag, Key
from jdropout._zoneout import zoneout
from jdropout.linen._dropout import Layer


class Zoneout(Layer, linen.RNNCellBase):
    """A recurrent cell whose units keep their state at random.

    After every step of the cell the new carry is ``jdropout.zoneout(key, carry, new, rate)``, in
    evaluation its expectation. It is a cell itself: in a `linen.RNN` every time step has a key of
    its own if it splits the stream, ``split_rngs={"params": False, "dropout": True}``. The output
    is that of the cell, but where it is part of the carry (the hidden units, in all of Flax's
    cells) it is zoned out as well.

    Attributes:
      cell: a `linen.RNNCellBase`.
      rate: probability of keeping the old value, a number in [0, 1]; or one for each part of the
        carry, such as ``(0.5, 0.05)`` for the cells and hidden units of an LSTM.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> cell = linen.OptimizedLSTMCell(8)
      >>> lstm = linen.RNN(
      ...     jdropout.linen.Zoneout(cell, (0.5, 0.05), deterministic=False),
      ...     split_rngs={"params": False, "dropout": True},
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> lstm.init_with_output(keys, jnp.ones((2, 10, 4)))[0].shape
      (2, 10, 8)

    References:
      As for `jdropout.zoneout`.
    """

    rng_position = 3

    cell: linen.RNNCellBase
    rate: float | Sequence[float]
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __call__(
        self,
        carry: Any,
        inputs: jax.Array,
        deterministic: Flag | None = None,
        rng: Key | None = None,
    ) -> tuple[Any, jax.Array]:
        """A step of the cell.

        Args:
          carry: the state: an array, or a tree of them.
          inputs: array of shape (batch, features), or what the cell takes.
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          The new carry, and the output.

        Raises:
          ValueError: if rates and carry do not fit, or as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rng)
        new, output = self.cell(carry, inputs)
        zoned = zoneout(key, carry, new, self.rate, deterministic=flag)
        return zoned, same_part(output, new, zoned)

    @linen.nowrap
    def initialize_carry(self, rng: Key, input_shape: tuple[int, ...]) -> Any:
        """That of the cell."""
        return self.cell.initialize_carry(rng, input_shape)  # type: ignore[arg-type]  # raw too

    @property
    def num_feature_axes(self) -> int:
        """That of the cell."""
        return self.cell.num_feature_axes

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_any_mask(self.rate, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        for rate in jax.tree.leaves(self.rate):
            _checks.check_rate(rate)
