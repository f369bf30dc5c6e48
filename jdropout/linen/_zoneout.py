"""Zoneout around a linen cell."""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
from flax import linen

from jdropout import _checks
from jdropout._flax import carry_and_output, draws_any_mask, same_part
from jdropout._typing import Flag, Key
from jdropout._values import check_function
from jdropout._zoneout import zoneout
from jdropout.linen._dropout import Layer


class Zoneout(Layer, linen.RNNCellBase):
    """Wraps a recurrent cell so that random units of its state keep their old values.

    After every step of the cell the new carry is ``jdropout.zoneout(key, carry, new, rate)``,
    in evaluation its expectation. The wrapper is itself a cell: in a `linen.RNN` every time
    step gets its own key if the stream is split,
    ``split_rngs={"params": False, "dropout": True}``. The output is the cell's, except that any
    part of it that is also part of the carry (the hidden units, in all of Flax's cells) is
    zoned out as well.

    Attributes:
      cell: the cell to wrap, a `linen.RNNCellBase`.
      rate: probability of keeping the old value, a number in [0, 1]; or one for each part of
        the carry, such as ``(0.5, 0.05)`` for the cells and hidden units of an LSTM.
      deterministic: if True, return the expectation. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

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
      Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations"
      (ICLR 2017), section 3.2 and equations 5 to 7.
    """

    rng_position: ClassVar[int | None] = 3

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
        """Runs one step of the cell and zones out its new carry.

        Args:
          carry: state before the step, an array or a tree of them.
          inputs: array of shape (batch, features), or whatever the cell takes.
          deterministic: if True, return the expectation; a bool or a (traced) boolean scalar.
            Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          The new carry, and the output.

        Raises:
          ValueError: if rates and carry do not match, or the flag was set both here and in the
            constructor, or in neither.
          TypeError: if a rate is not a number, or a state is not floating-point or complex.
        """
        flag, key = self._resolve(deterministic, rng)
        new, output = carry_and_output(self.cell(carry, inputs))
        zoned = zoneout(key, carry, new, self.rate, deterministic=flag)
        return zoned, same_part(output, new, zoned)

    @linen.nowrap
    def initialize_carry(self, rng: Key, input_shape: tuple[int, ...]) -> Any:
        """Returns the initial carry of the cell.

        Args:
          rng: PRNG key, typed or raw, for the cell's initializers.
          input_shape: shape of the inputs of one step, as the cell's own method takes it.

        Returns:
          An initial state, as the cell makes it.
        """
        return self.cell.initialize_carry(rng, input_shape)  # type: ignore[arg-type]  # raw too

    @property
    def num_feature_axes(self) -> int:
        """Number of feature axes of the cell."""
        return self.cell.num_feature_axes

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_any_mask(self.rate, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        for rate in jax.tree.leaves(self.rate):
            _checks.check_rate(rate)
        check_function("cell", self.cell)
