"""Schedules put together from pieces."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jdropout import _checks, _values
from jdropout._typing import ArrayLike, Rate
from jdropout.schedules._steps import Schedule, as_float32, check_boundaries, check_num_steps, since
from jdropout.schedules._transitions import constant, linear


def piecewise(rates: Sequence[Rate], boundaries: Sequence[int]) -> Schedule:
    """Returns a schedule of constant rates, one after another.

    ``rates[i]`` holds for ``boundaries[i - 1] <= step < boundaries[i]``.

    Args:
      rates: drop probabilities in [0, 1], at least one; numbers or (traced) floating-point
        scalars.
      boundaries: steps at which the next rate begins, increasing; one fewer than rates.

    Returns:
      A schedule.

    Raises:
      TypeError: if a rate is not a number, or a boundary is not an integer.
      ValueError: if a rate is outside [0, 1], the boundaries do not increase from at least 1,
        or there is not one fewer of them than rates.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.piecewise([0.5, 0.25, 0.0], [10, 20])
      >>> [float(schedule(step)) for step in (0, 9, 10, 19, 20)]
      [0.5, 0.5, 0.25, 0.25, 0.0]

    References:
      `join` of `constant`.
    """
    _values.check_nonempty("rates", rates, "rates")
    values = [as_float32(f"rates[{i}]", rate) for i, rate in enumerate(rates)]
    boundaries = check_boundaries(boundaries, "rates", len(values))
    return join([constant(value) for value in values], boundaries)


def early(
    rate: Rate, cutoff_step: int, *, decay: Literal["linear", "constant"] = "linear"
) -> Schedule:
    """Returns a schedule for early dropout, for networks that underfit: none from a step on.

    ``rate * (1 - step / cutoff_step)``, or ``rate`` with ``decay="constant"``, before the
    cutoff; exactly 0 from there on. With the constant decay the authors' ``drop_scheduler``
    gives the same rates; with the linear decay it reaches 0 one step earlier: its linear
    schedule of n steps is ``early(rate, n - 1)``.

    Args:
      rate: drop probability at step 0, in [0, 1]; a number or a (traced) floating-point scalar.
      cutoff_step: first step without dropout, at least 1. In the paper, the first 50 of 300
        epochs have dropout.
      decay: ``"linear"`` to fall to 0, or ``"constant"`` to stay at `rate` until the cutoff.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number, or the cutoff is not an integer.
      ValueError: if the rate is outside [0, 1], the cutoff is below 1, or the decay is unknown.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.early(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 1, 2, 3, 4, 99)]
      [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]

    References:
      Liu, Xu, Jin, Shen and Darrell, "Dropout reduces underfitting" (ICML 2023).
    """
    value = as_float32("rate", rate)
    cutoff_step = check_num_steps(cutoff_step, "cutoff_step")
    _values.check_option("decay", decay, ("linear", "constant"))
    if decay == "linear":
        return linear(value, 0.0, cutoff_step)
    return piecewise([value, 0.0], [cutoff_step])


def late(rate: Rate, cutoff_step: int) -> Schedule:
    """Returns a schedule for late dropout, for networks that overfit: none before a step.

    Exactly 0 before the cutoff and `rate` from there on, as in the authors' ``drop_scheduler``.
    For a gradual rise use `linear` with a ``start_step``.

    Args:
      rate: drop probability from the cutoff on, in [0, 1]; a number or a (traced)
        floating-point scalar.
      cutoff_step: first step with dropout, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number, or the cutoff is not an integer.
      ValueError: if the rate is outside [0, 1], or the cutoff is below 1.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.late(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 3, 4, 99)]
      [0.0, 0.0, 0.5, 0.5]

    References:
      Liu, Xu, Jin, Shen and Darrell, "Dropout reduces underfitting" (ICML 2023).
    """
    value = as_float32("rate", rate)
    return piecewise([0.0, value], [check_num_steps(cutoff_step, "cutoff_step")])


def join(schedules: Sequence[Callable[..., ArrayLike]], boundaries: Sequence[int]) -> Schedule:
    """Returns a schedule of schedules, one after another, each counting steps from its own start.

    Args:
      schedules: functions from a step to a rate: from this module, from Optax, or any that JAX
        can trace. They receive an int32 scalar (float32 for a fractional step), never below 0,
        even while another schedule is active.
      boundaries: steps at which the next schedule begins, increasing; one fewer than schedules.

    Returns:
      A schedule. A rate outside [0, 1] raises an error where its value is known, and under
      ``checkify``.

    Raises:
      TypeError: if a schedule is not callable, or a boundary is not an integer.
      ValueError: if the boundaries do not increase from at least 1, or there is not one fewer
        of them than schedules.

    Example:
      >>> from jdropout import schedules
      >>> up, hold = schedules.warmup(0.5, 2), schedules.constant(0.5)
      >>> schedule = schedules.join([up, hold, schedules.early(0.5, 4)], [2, 100])
      >>> [float(schedule(step)) for step in (0, 1, 2, 99, 100, 101, 104)]
      [0.0, 0.25, 0.5, 0.5, 0.5, 0.375, 0.0]

    References:
      ``optax.join_schedules``.
    """
    _check_schedules(schedules)
    boundaries = check_boundaries(boundaries, "schedules", len(schedules))

    def schedule(step: ArrayLike) -> jax.Array:
        joined: Any = None
        for begin, part in zip((0, *boundaries), schedules, strict=True):
            steps = since(step, begin)
            rate = jnp.asarray(part(jnp.maximum(steps, 0)), jnp.float32)
            joined = rate if joined is None else jnp.where(steps >= 0, rate, joined)
        if jnp.issubdtype(steps.dtype, jnp.floating):  # no piece is that of a step of NaN
            joined = jnp.where(jnp.isnan(steps), jnp.nan, joined)
        return jnp.asarray(_checks.check_rate(joined, "the rate of a joined schedule"))

    return schedule


def _check_schedules(schedules: Any) -> None:
    _values.check_nonempty("schedules", schedules, "schedules")
    for index, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(
                f"schedules[{index}] must be a function from a step to a rate, got {schedule!r}. "
                "For a fixed rate use jdropout.schedules.constant(rate)."
            )
