"""Checks the arguments that all dropout functions share, and turns them into a `Draw`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from jdropout import _batch, _checks, _key_kinds, _law, _record, _samples, _threshold
from jdropout._draw import Description, Draw, Outcome
from jdropout._typing import Flag, Index, Key, Rate
from jdropout.keys import at_site

UNIFORM: Any = object()
"""Passed as the rate to draw uniforms, which have no rate."""


def new_draw(
    kind: str,
    key: Key | None,
    rate: Rate,
    deterministic: Flag,
    shape: tuple[int, ...],
    *,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
    site: tuple[str | int, ...] = (),
    off: bool = False,
    batch_axis: int | None = _batch.KEYS_AXIS,
    reported_rate: Rate | None = None,
    kept_fraction: float | None = None,
    saves_work: bool = False,
    stored_bytes: int | None = None,
    reported_shape: tuple[int, ...] | None = None,
    prefix: str = "",
) -> Draw:
    """Makes the draw of one call, and records the call if an audit is running.

    Args:
      kind: name of the function, for an audit.
      key: a PRNG key; ignored if nothing is drawn.
      rate: the rate of a mask, or UNIFORM.
      deterministic: a bool or a (traced) boolean scalar.
      shape: shape of the array that the mask is for.
      broadcast_dims: axes along which the mask is shared.
      start: index of the array's first element within the whole mask; None if it is the whole.
      global_shape: shape of the whole mask.
      precision: bits of the rate: 16, 32, or None to choose.
      site: path of a leaf in a tree; its key is ``at_site(key, site)``.
      off: if True, nothing is dropped whatever the rate is.
      batch_axis: the axis of the examples; None if there is none, KEYS_AXIS if it is not known.
      reported_rate: the rate that an audit reports; None for ``rate``.
      kept_fraction: the exact fraction that a subset keeps, for an audit; None for a mask.
      saves_work: whether dropped elements are not computed, for an audit.
      stored_bytes: what differentiation stores, for an audit; None for what the draw stores.
      reported_shape: the shape that an audit reports; None for ``shape``.
      prefix: prefix of the names of ``rate`` and ``key`` in errors.
    """
    flag = _checks.check_deterministic(deterministic)
    checked = None if rate is UNIFORM else _checks.check_rate(rate, f"{prefix}rate")
    precision = _checks.check_precision(precision)
    static_rate = None if isinstance(checked, jax.Array) else checked
    threshold = None if static_rate is None else _threshold.static_threshold(static_rate, precision)
    shared = _checks.check_broadcast_dims(broadcast_dims, len(shape), f"{prefix}broadcast_dims")
    first, whole = _checks.check_block(start, global_shape, shape)

    outcome = _outcome(threshold, flag, off)
    drawn = outcome is Outcome.DRAWN
    if outcome is not Outcome.KEPT:
        _checks.check_static_shape(shape)
    origin, part, sample = None, None, None
    if drawn:
        key = _checks.check_key(key, f"{prefix}key")
        part = _key_kinds.part_of(key)
        if part:
            key, first, whole = _batch.located(key, part, shape, first, whole, batch_axis, shared)
        key, sample, num_samples = _samples.uncoupled(key)
        key = at_site(key, site) if site else key
        block = tuple(1 if axis in shared else size for axis, size in enumerate(shape))
        whole = tuple(1 if axis in shared else size for axis, size in enumerate(whole))
        layout, origin = _layout(whole) if first is None else _law.locate(whole, block, first)
        description = Description(
            outcome, shape, block, whole, layout, threshold, precision, num_samples
        )
    else:
        description = Description(outcome, shape, threshold=threshold, precision=precision)
    draw = Draw(
        key=key if drawn else None,
        rate=checked if isinstance(checked, jax.Array) else None,
        deterministic=flag if drawn and isinstance(flag, jax.Array) else None,
        origin=origin,
        description=description,
        sample=sample,
    )
    if not _record.recording():
        return draw
    examples_axis = batch_axis
    if batch_axis is _batch.KEYS_AXIS:
        examples_axis = part.axis if part else 0
    reported = checked if reported_rate is None else reported_rate
    if kept_fraction is None or not drawn:
        effective = _effective_rate(draw, reported, derived=reported_rate is not None)
    else:
        effective = 1 - kept_fraction
    if stored_bytes is None:
        stored_bytes = _stored_bytes(draw) if drawn else 0
    call = _record.record(
        kind=kind,
        shape=shape if reported_shape is None else reported_shape,
        rate=None if reported is None or isinstance(reported, jax.Array) else float(reported),
        effective_rate=effective,
        deterministic=None if isinstance(flag, jax.Array) else flag,
        shared_axes=()
        if outcome is Outcome.KEPT
        else tuple(axis for axis in sorted(shared) if shape[axis] > 1),
        batch_axis=examples_axis,
        located=origin is not None,
        stored_bytes=stored_bytes,
        saved_work=effective if saves_work else 0.0,
    )
    object.__setattr__(draw, "call", call)  # the draw is frozen, and new
    return draw


def _outcome(threshold: _threshold.Threshold | None, flag: bool | jax.Array, off: bool) -> Outcome:
    kept = None if threshold is None else _threshold.keep_probability(threshold)
    if flag is True or kept == 1 or off:
        return Outcome.KEPT
    return Outcome.DROPPED if kept == 0 and flag is False else Outcome.DRAWN


@functools.lru_cache(maxsize=1024)  # else the slowest Python step of an eager call
def _layout(whole: tuple[int, ...]) -> tuple[_law.Layout, _law.Origin | None]:
    return _law.locate(whole, whole, None)


def _effective_rate(draw: Draw, reported: Rate | None, derived: bool) -> float | None:
    """The effective rate for an audit; ``derived`` if ``reported`` is not the mask's own rate."""
    if reported is None or isinstance(reported, jax.Array):
        return None
    if draw.outcome is Outcome.KEPT:
        return 0.0
    return float(reported) if derived or draw.static_rate is None else draw.static_rate


def _stored_bytes(draw: Draw) -> int:
    """Size of the residuals that the draw leaves."""
    stored = jax.tree.leaves(jax.eval_shape(Draw.with_mask_keys, draw))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in stored)
    layout = draw.description.layout
    # Block indices of 32 bits leave the high word of the origin unused.
    unused = draw.origin is not None and layout is not None and not layout.wide
    return total - 4 if unused else total
