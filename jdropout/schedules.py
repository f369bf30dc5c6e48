"""Schedules: functions from the number of the step to the rate of dropping, in Optax's style."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _checks
from jdropout._typing import ArrayLike, Rate

__all__ = [
    "Schedule",
    "constant",
    "cosine",
    "curriculum",
    "early",
    "join",
    "late",
    "linear",
    "piecewise",
    "warmup",
]

Schedule: TypeAlias = Callable[[ArrayLike], jax.Array]
"""From a step to a rate: a float32 scalar in [0, 1], for `jdropout.dropout` and its like.

A step is a number, or a (traced) scalar array, of an integer or floating-point type. Integers
are compared as integers, never rounded to float32. A step below 0 counts as 0.
"""


def constant(rate: Rate) -> Schedule:
    """The same rate at every step.

    For code that takes any schedule, and for `join`. Where the rate never changes, a plain
    number in its place says so to the compiler, and a rate of 0 then costs nothing.

    Args:
      rate: probability of dropping, in [0, 1]: a number, or a (traced) floating-point scalar.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate is not a number or floating-point scalar.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> from jdropout import schedules
      >>> schedules.constant(0.25)(1000)
      Array(0.25, dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """
    value = _as_float32("rate", rate)

    def schedule(step: ArrayLike) -> jax.Array:
        _checks.check_step(step)
        return jnp.asarray(value)

    return schedule


def linear(start_rate: Rate, end_rate: Rate, num_steps: int, start_step: int = 0) -> Schedule:
    """From one rate to another along a straight line.

    ``start_rate + (end_rate - start_rate) * p``, where ``p = (step - start_step) / num_steps``
    is clipped to [0, 1]. Both ends are exact.

    Args:
      start_rate: rate up to step ``start_step``.
      end_rate: rate from step ``start_step + num_steps`` on.
      num_steps: number of steps from the one rate to the other, at least 1.
      start_step: step that the change begins after, at least 0.

    Returns:
      A schedule.

    Raises:
      TypeError: if a rate is not a number, or a number of steps not an integer.
      ValueError: if a rate is outside [0, 1], or a number of steps too small or too large.

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
    """From one rate to another along half a period of a cosine: slow at both ends.

    ``start_rate + (end_rate - start_rate) * (1 - cos(pi * p)) / 2`` with the ``p`` of `linear`.
    Both ends are exact.

    Args:
      start_rate: rate up to step ``start_step``.
      end_rate: rate from step ``start_step + num_steps`` on.
      num_steps: as for `linear`.
      start_step: as for `linear`.

    Returns:
      A schedule.

    Raises:
      TypeError: as for `linear`.
      ValueError: as for `linear`.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.cosine(0.5, 0.0, 4)
      >>> [round(float(schedule(step)), 3) for step in range(5)]
      [0.5, 0.427, 0.25, 0.073, 0.0]

    References:
      Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017,
      equation 5, for learning rates.
    """

    # (1 - cos(2 a)) / 2 = sin(a)^2, which loses no digits near 0.
    def curve(progress: jax.Array) -> jax.Array:
        return jnp.square(jnp.sin(progress * (math.pi / 2)))

    return _transition(start_rate, end_rate, num_steps, start_step, curve)


def warmup(rate: Rate, num_steps: int) -> Schedule:
    """From no dropout up to a rate, along a straight line; then that rate.

    Args:
      rate: rate from step ``num_steps`` on.
      num_steps: number of steps up to there, at least 1.

    Returns:
      A schedule.

    Raises:
      TypeError: as for `linear`.
      ValueError: as for `linear`.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.warmup(0.5, 4)
      >>> [float(schedule(step)) for step in (0, 1, 2, 3, 4, 99)]
      [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]

    References:
      `linear` with a ``start_rate`` of 0.
    """
    return linear(0.0, _as_float32("rate", rate), num_steps)


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
    values = [_as_float32(f"rates[{i}]", rate) for i, rate in enumerate(rates)]
    boundaries = _checks.check_boundaries(boundaries, "rates", len(values))
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
    value = _as_float32("rate", rate)
    cutoff_step = _checks.check_num_steps(cutoff_step, "cutoff_step")
    _checks.check_decay(decay)
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
    value = _as_float32("rate", rate)
    return piecewise([0.0, value], [_checks.check_num_steps(cutoff_step, "cutoff_step")])


def curriculum(rate: Rate, gamma: float) -> Schedule:
    """Curriculum dropout: from none towards a rate, fast at first, then ever more slowly.

    The probability of keeping is ``(1 - k) * exp(-gamma * step) + k`` with ``k = 1 - rate``,
    which is a rate of ``rate * (1 - exp(-gamma * step))``. Half of the rate is reached at step
    ``0.69 / gamma``, 90 % at ``2.3 / gamma`` and 99 % at ``4.6 / gamma``.

    Args:
      rate: the limit of the rate.
      gamma: speed of the rise per step, above 0. The paper takes ``10 / num_steps`` for a
        training of ``num_steps``: at the end less than 1e-4 is missing.

    Returns:
      A schedule.

    Raises:
      TypeError: if the rate or gamma is not a number.
      ValueError: if the rate is outside [0, 1], or gamma not a finite number above 0.

    Example:
      >>> from jdropout import schedules
      >>> schedule = schedules.curriculum(0.5, gamma=10 / 1000)
      >>> [round(float(schedule(step)), 4) for step in (0, 69, 230, 460, 1000)]
      [0.0, 0.2492, 0.4499, 0.495, 0.5]

    References:
      Morerio, Cavazza, Volpi, Vidal and Murino, "Curriculum dropout", ICCV 2017.
    """
    value = _as_float32("rate", rate)
    speed = np.float32(_checks.check_gamma(gamma))

    def schedule(step: ArrayLike) -> jax.Array:
        return _mix(np.float32(0), value, -jnp.expm1(-speed * _since(step, 0).astype(jnp.float32)))

    return schedule


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
    _checks.check_schedules(schedules)
    boundaries = _checks.check_boundaries(boundaries, "schedules", len(schedules))

    def schedule(step: ArrayLike) -> jax.Array:
        joined = None
        for begin, part in zip((0, *boundaries), schedules, strict=True):
            since = _since(step, begin)
            rate = jnp.asarray(part(jnp.maximum(since, 0)), jnp.float32)
            joined = rate if joined is None else jnp.where(since >= 0, rate, joined)
        return jnp.asarray(_checks.check_rate(joined, "the rate of a joined schedule"))

    return schedule


def _transition(
    start_rate: Rate,
    end_rate: Rate,
    num_steps: int,
    start_step: int,
    curve: Callable[[jax.Array], jax.Array],
) -> Schedule:
    start, end = _as_float32("start_rate", start_rate), _as_float32("end_rate", end_rate)
    start_step = _checks.check_num_steps(start_step, "start_step", least=0)
    num_steps = _checks.check_num_steps(num_steps, "num_steps", before=start_step)

    def schedule(step: ArrayLike) -> jax.Array:
        # Not progress == 1: XLA divides by multiplying with a reciprocal, which may miss it.
        done = _since(step, start_step + num_steps) >= 0
        progress = _since(step, start_step).astype(jnp.float32) / np.float32(num_steps)
        return jnp.where(done, end, _mix(start, end, curve(jnp.clip(progress, 0, 1))))

    return schedule


def _mix(start: np.float32 | jax.Array, end: np.float32 | jax.Array, share: jax.Array) -> jax.Array:
    """From start at share 0 to end at share 1; never beyond either, whatever the rounding."""
    low, high = jnp.minimum(start, end), jnp.maximum(start, end)
    return jnp.clip(start + (end - start) * share, low, high)


def _since(step: ArrayLike, begin: int) -> jax.Array:
    """The number of steps since `begin`: int32, or float32 for a fractional step.

    The step is clipped to [0, MAX_STEP] first. Whole parts are subtracted as integers: the sign
    is exact, though float32 does not hold all integers above 2**24.
    """
    step = _checks.check_step(step)
    fractional = jnp.issubdtype(step.dtype, jnp.floating)
    if step.dtype.itemsize < 4:  # too narrow for the bounds
        step = step.astype(jnp.float32 if fractional else jnp.int32)
    step = step.clip(0, _checks.MAX_STEP)
    whole = step.astype(jnp.int32)
    since = jnp.asarray(whole - np.int32(begin))
    if not fractional:
        return since
    return since.astype(jnp.float32) + (step - whole.astype(step.dtype)).astype(jnp.float32)


def _as_float32(name: str, rate: Rate) -> np.float32 | jax.Array:
    checked = _checks.check_rate(rate, name)
    return checked.astype(jnp.float32) if isinstance(checked, jax.Array) else np.float32(checked)
