"""Schedules of a few static rates, for functions whose shapes depend on the rate."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdropout import _values
from jdropout._checks import check_rate
from jdropout._typing import ArrayLike
from jdropout.schedules._steps import check_step


def buckets(
    schedule: Callable[..., ArrayLike], rates: Sequence[float]
) -> Callable[[ArrayLike], float]:
    """Returns a schedule that rounds to the nearest of a few rates, as a Python number.

    For functions whose shapes depend on the rate, such as `jdropout.stochastic_depth`: pass the
    rate to the compiled step as a static argument, and each of the rates compiles once. The step
    must be a number, not traced, so call this schedule outside of the compiled step.

    Args:
      schedule: function from a step to a rate: from this module, from Optax, or any other.
      rates: the static rates, in [0, 1], at least one.

    Returns:
      A function from a step to the nearest rate, the lower one of two.

    Raises:
      TypeError: if the schedule is not a function, or a rate is not a number; in a call, if the
        step is traced.
      ValueError: if a rate is outside [0, 1], also one of the schedule's, or there is none.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.buckets(schedules.linear(0.0, 0.5, 100), [0.0, 0.25, 0.5])
      >>> [schedule(step) for step in (0, 25, 26, 80, 100)]
      [0.0, 0.0, 0.25, 0.5, 0.5]

    References:
      `join`, for rates that change at given steps.
    """
    _values.check_function("schedule", schedule)
    _values.check_nonempty("rates", rates, "rates")
    checked = [check_rate(rate, f"rates[{i}]") for i, rate in enumerate(rates)]
    if any(isinstance(rate, jax.core.Tracer) for rate in checked):
        raise TypeError(
            f"rates must be Python numbers, got {rates!r}: each rate compiles a program. Make them "
            "outside of the compiled step."
        )
    static = np.array(sorted(float(rate) for rate in checked))

    def nearest(step: Any) -> float:
        rate = step if isinstance(step, jax.core.Tracer) else schedule(check_step(step))
        if isinstance(rate, jax.core.Tracer):  # all arrays are, while JAX traces
            raise TypeError(
                f"step must be a number here, got {rate!r}: each rate compiles a program. Call the "
                "schedule outside of the compiled step, and pass the rate as a static argument."
            )
        rate = check_rate(np.asarray(rate), "the rate of the schedule")
        return float(static[np.abs(static - rate).argmin()])

    return nearest
