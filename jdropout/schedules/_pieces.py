"""Rates that are put together from pieces."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jdropout import _checks
from jdropout._typing import ArrayLike, Rate
from jdropout.schedules._steps import Schedule, as_float32, check_boundaries, check_num_steps, since
from jdropout.schedules._transitions import constant, linear


def piecewise(rates: Sequence[Rate], boundaries: Sequence[int]) -> Schedule:
    """Constant rates, one after another.

    ``rates[i]`` holds for ``boundaries[i - 1] <= step < boundaries[i]``.

    Args:
      rates: probabilities of dropping, at least one.
      boundaries: the steps at which the next rate begins; one less than rates, increasing.

    Returns:
      A schedule.

    Raises:
      TypeError: if a rate is not a number, or a boundary not an integer.
      ValueError: if a rate is outside [0, 1], or the boundaries do not increase from at least
        1, or are not one less than the rates.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.piecewise([0.5, 0.25, 0.0], [10, 20])
      >>> [float(schedule(step)) for step in (0, 9, 10, 19, 20)]
      [0.5, 0.5, 0.25, 0.25, 0.0]

    References:
      `join` of `constant`.
    """
    values = [as_float32(f"rates[{i}]", rate) for i, rate in enumerate(rates)]
    boundaries = check_boundaries(boundaries, "rates", len(values))
    return join([constant(value) for value in values], boundaries)


def early(
    rate: Rate, cutoff_step: int, *, decay: Literal["linear", "constant"] = "linear"
) -> Schedule:
    """Early dropout: none from a step on. It is meant for networks that underfit.

    ``rate * (1 - step / cutoff_step)``, or ``rate`` with ``decay="constant"``, before the cutoff;
    exactly 0 from there on. The authors' ``drop_scheduler`` comes to 0 one step earlier with
    the linear decay, and to ours with the constant one: its linear schedule of n steps is
    ``early(rate, n - 1)``.

    Args:
      rate: probability of dropping at step 0.
      cutoff_step: the first step without dropout, at least 1. In the paper the first 50 of 300
        epochs have dropout.
      decay: ``"linear"``, or ``"constant"`` up to the cutoff.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number, or the cutoff not an integer.
      ValueError: if the rate is outside [0, 1], the cutoff below 1, or the decay another word.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.early(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 1, 2, 3, 4, 99)]
      [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]

    References:
      Liu, Xu, Jin, Shen and Darrell, "Dropout reduces underfitting", ICML 2023.
    """
    value = as_float32("rate", rate)
    cutoff_step = check_num_steps(cutoff_step, "cutoff_step")
    _checks.check_option("decay", decay, ("linear", "constant"))
    if decay == "linear":
        return linear(value, 0.0, cutoff_step)
    return piecewise([value, 0.0], [cutoff_step])


def late(rate: Rate, cutoff_step: int) -> Schedule:
    """Late dropout: none before a step, then always. It is meant for networks that overfit.

    Exactly 0 before the cutoff, and ``rate`` from there on, as in the authors'
    ``drop_scheduler``. For a gradual rise use `linear` with a ``start_step``.

    Args:
      rate: probability of dropping from the cutoff on.
      cutoff_step: the first step with dropout, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number, or the cutoff not an integer.
      ValueError: if the rate is outside [0, 1], or the cutoff below 1.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.late(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 3, 4, 99)]
      [0.0, 0.0, 0.5, 0.5]

    References:
      Liu, Xu, Jin, Shen and Darrell, "Dropout reduces underfitting", ICML 2023.
    """
    value = as_float32("rate", rate)
    return piecewise([0.0, value], [check_num_steps(cutoff_step, "cutoff_step")])


def join(schedules: Sequence[Callable[..., ArrayLike]], boundaries: Sequence[int]) -> Schedule:
    """Schedules one after another; each counts the steps from its own beginning.

    Args:
      schedules: functions from a step to a rate: those of this module, Optax's, or any that JAX
        can trace. They get an int32 scalar (float32 for a fractional step), never below 0,
        also while another schedule holds.
      boundaries: the steps at which the next schedule begins; one less than schedules,
        increasing.

    Returns:
      A schedule. Its rate is checked as that of `jdropout.dropout`: outside of [0, 1] it raises
      an error where its value is known, and under ``checkify``.

    Raises:
      TypeError: if a schedule is not callable, or a boundary not an integer.
      ValueError: if the boundaries do not increase from at least 1, or are not one less than
        the schedules.

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
        joined = None
        for begin, part in zip((0, *boundaries), schedules, strict=True):
            steps = since(step, begin)
            rate = jnp.asarray(part(jnp.maximum(steps, 0)), jnp.float32)
            joined = rate if joined is None else jnp.where(steps >= 0, rate, joined)
        return jnp.asarray(_checks.check_rate(joined, "the rate of a joined schedule"))

    return schedule


def _check_schedules(schedules: Any) -> None:
    for index, schedule in enumerate(schedules):
        if not callable(schedule):
            raise TypeError(
                f"schedules[{index}] must be a function from a step to a rate, got {schedule!r}. "
                "For a fixed rate use jdropout.schedules.constant(rate)."
            )
