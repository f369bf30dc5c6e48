"""Schedules that stay constant, or move from one rate to another."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout._typing import ArrayLike, Rate
from jdropout._values import type_name
from jdropout.schedules._steps import Schedule, as_float32, check_num_steps, check_step, since


def constant(rate: Rate) -> Schedule:
    """Returns a schedule with the same rate at every step.

    For code that takes any schedule, and for `join`. If the rate never changes, pass a plain
    number instead: the compiler then knows it, and a rate of 0 costs nothing.

    Args:
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number or a floating-point scalar.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> from jdropout import schedules
      >>> schedules.constant(0.25)(1000)
      Array(0.25, dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """
    value = as_float32("rate", rate)

    def schedule(step: ArrayLike) -> jax.Array:
        check_step(step)
        return jnp.asarray(value)

    return schedule


def linear(start_rate: Rate, end_rate: Rate, num_steps: int, start_step: int = 0) -> Schedule:
    """Returns a schedule that follows a straight line between two rates.

    ``start_rate + (end_rate - start_rate) * p``, where ``p = (step - start_step) / num_steps``
    is clipped to [0, 1]. Both ends are exact.

    Args:
      start_rate: rate up to step ``start_step``, in [0, 1]; a number or a (traced)
        floating-point scalar.
      end_rate: rate from step ``start_step + num_steps`` on, in [0, 1]; a number or a (traced)
        floating-point scalar.
      num_steps: number of steps between the two rates, at least 1.
      start_step: last step at `start_rate`, after which the change begins; at least 0.

    Returns:
      A schedule.

    Raises:
      TypeError: if a rate is not a number, or a number of steps is not an integer.
      ValueError: if a rate is outside [0, 1], or a number of steps is too small or too large.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.linear(0.5, 0.0, 4, start_step=10)
      >>> [float(schedule(step)) for step in (0, 10, 11, 12, 13, 14, 99)]
      [0.5, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0]

    References:
      ``optax.linear_schedule``, which it equals up to rounding.
    """
    return _transition(start_rate, end_rate, num_steps, start_step, lambda progress: progress)


def cosine(start_rate: Rate, end_rate: Rate, num_steps: int, start_step: int = 0) -> Schedule:
    """Returns a schedule that follows half a cosine between two rates, slow at both ends.

    ``start_rate + (end_rate - start_rate) * (1 - cos(pi * p)) / 2``, where
    ``p = (step - start_step) / num_steps`` is clipped to [0, 1]. Both ends are exact.

    Args:
      start_rate: rate up to step ``start_step``, in [0, 1]; a number or a (traced)
        floating-point scalar.
      end_rate: rate from step ``start_step + num_steps`` on, in [0, 1]; a number or a (traced)
        floating-point scalar.
      num_steps: number of steps between the two rates, at least 1.
      start_step: last step at `start_rate`, after which the change begins; at least 0.

    Returns:
      A schedule.

    Raises:
      TypeError: if a rate is not a number, or a number of steps is not an integer.
      ValueError: if a rate is outside [0, 1], or a number of steps is too small or too large.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.cosine(0.5, 0.0, 4)
      >>> [round(float(schedule(step)), 3) for step in range(5)]
      [0.5, 0.427, 0.25, 0.073, 0.0]

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts" (ICLR 2017),
      equation 5, for learning rates.
    """

    # sin(a)^2 instead of (1 - cos(2 a)) / 2, which loses digits near 0.
    def curve(progress: jax.Array) -> jax.Array:
        return jnp.square(jnp.sin(progress * (math.pi / 2)))

    return _transition(start_rate, end_rate, num_steps, start_step, curve)


def warmup(rate: Rate, num_steps: int) -> Schedule:
    """Returns a schedule that rises linearly from no dropout to a rate, and stays there.

    ``rate * p``, where ``p = step / num_steps`` is clipped to [0, 1]. Both ends are exact.

    Args:
      rate: rate from step ``num_steps`` on, in [0, 1]; a number or a (traced) floating-point
        scalar.
      num_steps: number of steps until then, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number, or the number of steps is not an integer.
      ValueError: if the rate is outside [0, 1], or the number of steps is too small or too
        large.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.warmup(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 1, 2, 3, 4, 99)]
      [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]

    References:
      `linear` with a ``start_rate`` of 0.
    """
    return linear(0.0, as_float32("rate", rate), num_steps)


def curriculum(rate: Rate, gamma: float) -> Schedule:
    """Returns a schedule for curriculum dropout, which rises from 0 towards a rate.

    It rises quickly at first, then ever more slowly. The keep probability is
    ``(1 - k) * exp(-gamma * step) + k`` with ``k = 1 - rate``, which gives the rate
    ``rate * (1 - exp(-gamma * step))``. It reaches half of `rate` at step ``0.69 / gamma``,
    90 % at ``2.3 / gamma`` and 99 % at ``4.6 / gamma``.

    Args:
      rate: limit of the rate, in [0, 1]; a number or a (traced) floating-point scalar.
      gamma: speed of the rise per step, above 0. The paper uses ``10 / num_steps`` for a
        training of ``num_steps``, which ends less than 1e-4 below the limit.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate or gamma is not a number.
      ValueError: if the rate is outside [0, 1], or gamma is not a finite number above 0.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.curriculum(0.5, gamma=10 / 1000)
      >>> [round(float(schedule(step)), 4) for step in (0, 69, 230, 460, 1000)]
      [0.0, 0.2492, 0.4499, 0.495, 0.5]

    References:
      Morerio, Cavazza, Volpi, Vidal and Murino, "Curriculum dropout" (ICCV 2017).
    """
    value = as_float32("rate", rate)
    speed = np.float32(_check_gamma(gamma))

    def schedule(step: ArrayLike) -> jax.Array:
        return _mix(np.float32(0), value, -jnp.expm1(-speed * since(step, 0).astype(jnp.float32)))

    return schedule


def _transition(
    start_rate: Rate,
    end_rate: Rate,
    num_steps: int,
    start_step: int,
    curve: Callable[[jax.Array], jax.Array],
) -> Schedule:
    start, end = as_float32("start_rate", start_rate), as_float32("end_rate", end_rate)
    start_step = check_num_steps(start_step, "start_step", least=0)
    num_steps = check_num_steps(num_steps, "num_steps", before=start_step)

    def schedule(step: ArrayLike) -> jax.Array:
        # Not `progress == 1`: XLA may divide by multiplying with a reciprocal, and miss 1.
        done = since(step, start_step + num_steps) >= 0
        progress = since(step, start_step).astype(jnp.float32) / np.float32(num_steps)
        return jnp.where(done, end, _mix(start, end, curve(jnp.clip(progress, 0, 1))))

    return schedule


def _mix(start: np.float32 | jax.Array, end: np.float32 | jax.Array, share: jax.Array) -> jax.Array:
    """Interpolates from start (share 0) to end (share 1), never beyond either by rounding."""
    low, high = jnp.minimum(start, end), jnp.maximum(start, end)
    return jnp.clip(start + (end - start) * share, low, high)


def _check_gamma(gamma: Any) -> float:
    if isinstance(gamma, bool) or not isinstance(gamma, float | int | np.floating | np.integer):
        raise TypeError(
            f"gamma must be a number, got {gamma!r} of type {type_name(gamma)}."
            " Take 10 / num_steps."
        )
    if not 0 < gamma <= float(np.finfo(np.float32).max):
        raise ValueError(
            f"gamma must be a finite number above 0, got {gamma}. Take 10 / num_steps, where "
            "num_steps is the length of the training."
        )
    return float(gamma)
