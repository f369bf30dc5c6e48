"""Zoneout around an nnx cell."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._flax import carry_and_output, check_module_rates, draws_any_mask, same_part
from jdropout._typing import Flag
from jdropout._values import check_function
from jdropout._zoneout import zoneout
from jdropout.nnx._dropout import Dropout


class Zoneout(Dropout, nnx.RNNCellBase):
    """Wraps a recurrent cell so that random units of its state keep their old values.

    After every step of the cell the new carry is ``jdropout.zoneout(key, carry, new, rate)``,
    in evaluation its expectation. The wrapper is itself a cell: in an `nnx.RNN` every time step
    gets its own key. The output is the cell's, except that any part of it that is also part of
    the carry (the hidden units, in all of Flax's cells) is zoned out as well.

    Args:
      cell: the cell to wrap, an `nnx.RNNCellBase`.
      rate: probability of keeping the old value, a Python number in [0, 1]; or one for each
        part of the carry, such as ``(0.5, 0.05)`` for the cells and hidden units of an LSTM.
      deterministic: if True, return the expectation. A call and
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
      >>> rngs = nnx.Rngs(0)
      >>> cell = nnx.OptimizedLSTMCell(4, 8, rngs=rngs)
      >>> lstm = nnx.RNN(jdropout.nnx.Zoneout(cell, (0.5, 0.05), rngs=rngs))
      >>> lstm(jnp.ones((2, 10, 4))).shape
      (2, 10, 8)

    References:
      Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations"
      (ICLR 2017), section 3.2 and equations 5 to 7.
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
        check_function("cell", cell)
        self.cell = cell

    def __call__(  # type: ignore[override]  # a cell takes a carry, too
        self,
        carry: Any,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> tuple[Any, jax.Array]:
        """Runs one step of the cell and zones out its new carry.

        Args:
          carry: state before the step, an array or a tree of them.
          inputs: array of shape (batch, features), or whatever the cell takes.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.

        Returns:
          The new carry, and the output.

        Raises:
          ValueError: if rates and carry do not match, or neither the call nor the constructor
            gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)
        new, output = carry_and_output(self.cell(carry, inputs))
        zoned = zoneout(key, carry, new, self.rate, deterministic=flag)
        return zoned, same_part(output, new, zoned)

    def initialize_carry(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the initial carry of the cell.

        Args:
          *args: positional arguments of the cell's own method.
          **kwargs: keyword arguments of the cell's own method.

        Returns:
          An initial state, as the cell makes it.
        """
        return self.cell.initialize_carry(*args, **kwargs)

    @property
    def num_feature_axes(self) -> int:
        """Number of feature axes of the cell."""
        return self.cell.num_feature_axes

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_any_mask(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        return check_module_rates(rate)
