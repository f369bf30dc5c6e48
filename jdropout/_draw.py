"""One draw from the mask law: a static description and traced operands in one pytree.

`Draw.apply` is the only place that knows what happens around a formula: returning the input itself,
dropping everything, an audit's marks, compilation, rematerialisation, a traced flag, and a traced
rate outside [0, 1]. The other methods make masks and uniform numbers inside of formulas.
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jdropout import _law, _record, _threshold
from jdropout._typing import Index, Key


class Outcome(enum.Enum):
    """What is known of a draw before it is made."""

    KEPT = enum.auto()
    """Nothing is dropped: deterministic, or a static rate of 0."""
    DROPPED = enum.auto()
    """Everything is dropped: a static rate of 1."""
    DRAWN = enum.auto()


class Description(NamedTuple):
    """All that is static about a draw."""

    outcome: Outcome
    shape: tuple[int, ...]
    """Shape of the array that the mask is for."""
    block: tuple[int, ...] = ()
    """Shape of the mask; axes along which it is shared have size 1."""
    whole: tuple[int, ...] = ()
    """Shape of the larger mask that the block is a part of, with the same axes of size 1."""
    layout: _law.Layout | None = None
    """None if nothing is drawn."""
    threshold: _threshold.Threshold | None = None
    """None for a traced rate, and for uniform numbers, which have none."""
    precision: int | None = None


# A formula maps a draw, arrays and static options to an array, or to a tree of arrays. It has to be
# a function of a module: compiled programs are cached by it.
Formula = Callable[..., Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "rate", "deterministic", "origin"],
    meta_fields=["description"],
    drop_fields=["call"],
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """A pytree: its leaves are all that may be traced. Fields that are None leave no residual."""

    key: Key | None
    """A key; its words inside of `apply` (see `with_words`)."""
    rate: jax.Array | None
    """A traced rate."""
    deterministic: jax.Array | None
    """A traced flag."""
    origin: _law.Origin | None
    description: Description
    call: int | None = None
    """Number of the call in an audit. It is no part of what is compiled."""

    @property
    def outcome(self) -> Outcome:
        return self.description.outcome

    # --- use ------------------------------------------------------------------------------

    def apply(
        self,
        formula: Formula,
        *operands: Any,
        kept: Formula | None = None,
        dropped: Formula | None = None,
        remake: bool = False,
        **static: Any,
    ) -> Any:
        """Returns ``formula(draw, *operands, **static)``, compiled and rematerialised.

        The backward pass makes the formula's masks again; the only residuals are the draw's leaves
        and those operands that the derivative needs.

        Args:
          formula: a function of a module; its draw has the words of the key, and no flag.
          *operands: pytrees of arrays.
          kept: the formula where nothing is dropped. None returns the first operand: the very
            object, whatever array type it has.
          dropped: the formula where everything is dropped. None returns zeros like the first
            operand.
          remake: whether the backward pass has to make everything again. If False, XLA may share a
            packed mask between the passes where it sees both, at 1 bit per element; uniform numbers
            are too large to be kept.
          **static: hashable options of the formulas.
        """
        options = tuple(static.items())
        if self.outcome is Outcome.DRAWN:
            y = _applied(self.marked(), operands, formula, kept, remake, options)
        elif self.outcome is Outcome.KEPT:
            y = _applied(self, operands, kept, None, remake, options) if kept else operands[0]
        elif dropped:
            y = _applied(self, operands, dropped, None, remake, options)
        else:
            y = jnp.zeros_like(operands[0])
        return self.result(y)

    def marked(self) -> "Draw":
        """The draw as an audit sees it: with marks on its key and its position."""
        if self.call is None:
            return self
        assert self.key is not None
        words = _record.mark(_law.key_words(self.key), self.call, "key")
        starts = [_record.mark(x, self.call, "start") for x in jax.tree.leaves(self.origin)]
        # The words need the starts, so that no transformation drops the marks of these.
        words, *_ = lax.optimization_barrier((words, *starts))
        return dataclasses.replace(self, key=words)

    def result(self, y: Any) -> Any:
        """Marks the first array of a result for an audit: one mark stands for the call."""
        if self.call is None:
            return y
        leaves, structure = jax.tree.flatten(y)
        if not leaves:
            return y
        kind = "result" if self.outcome is Outcome.DRAWN else "without"
        first = _record.mark(leaves[0], self.call, kind)
        return jax.tree.unflatten(structure, [first, *leaves[1:]])

    def with_words(self) -> "Draw":
        """The draw with its key's words, for use inside of compiled functions.

        A key would do, but before JAX 0.10 a residual key of one branch breaks `jax.lax.cond`.
        """
        if self.key is None:
            return self
        return dataclasses.replace(self, key=_law.spent_key_words(self.key))

    # --- inside of formulas ---------------------------------------------------------------

    def keep(self) -> jax.Array:
        """The mask, True where an element is kept, of the array's shape."""
        return keep(self)

    def uniform(self) -> jax.Array:
        """The uniform numbers that masks are made of: uint32, in units of 2^-32."""
        return uniform(self)

    def keep_like(self, x: jax.Array) -> jax.Array:
        """The mask with the explicit sharding of x."""
        return self.placed_like(x, Draw.keep)

    def placed_like(
        self,
        x: jax.Array,
        make: Callable[["Draw"], jax.Array],
        spec: PartitionSpec | None = None,
    ) -> jax.Array:
        """``make(draw)`` with an explicit sharding: x's, or `spec`; no device gathers it."""
        sharding = jax.typeof(x).sharding
        explicit = sharding.mesh.explicit_axes
        if not explicit:
            return make(self)
        out = sharding if spec is None else spec
        return jax.sharding.auto_axes(make, axes=explicit, out_sharding=out)(self)

    def scale(self, dtype: np.dtype) -> jax.Array:
        """1 / keep, rounded once to float32 or float64; 1 where nothing is kept."""
        threshold = self.threshold()
        if self.rate is None:
            kept = _threshold.keep_probability(threshold)
            factor = jnp.asarray(float(1 / kept) if kept else 1.0, dtype)
        else:
            traced_kept = _threshold.traced_keep_probability(threshold, dtype)
            factor = 1 / jnp.where(traced_kept > 0, traced_kept, 1)
        if self.deterministic is not None:
            factor = jnp.where(self.deterministic, jnp.ones_like(factor), factor)
        return factor

    def drop_probability(self, dtype: np.dtype) -> jax.Array:
        """The effective rate."""
        threshold = self.threshold()
        if self.rate is None:
            return jnp.asarray(float(1 - _threshold.keep_probability(threshold)), dtype)
        return _threshold.traced_drop_probability(threshold).astype(dtype)

    def valid(self) -> jax.Array | None:
        """Whether a traced rate is in [0, 1], or does not matter; None for a static one."""
        if self.rate is None:
            return None
        valid = (self.rate >= 0) & (self.rate <= 1)
        return valid if self.deterministic is None else valid | self.deterministic

    def poisoned(self, y: jax.Array) -> jax.Array:
        """y, or NaN for a traced rate outside [0, 1]; its gradient is NaN as well."""
        valid = self.valid()
        if valid is None or not jnp.issubdtype(y.dtype, jnp.inexact):
            return y
        if jnp.iscomplexobj(y):
            return lax.complex(self.poisoned(lax.real(y)), self.poisoned(lax.imag(y)))
        return y * jnp.where(valid, 1, jnp.nan).astype(y.dtype)

    def tile(
        self, shape: tuple[int, ...], start: tuple[Index, ...] | None, index: tuple[Index, ...]
    ) -> "Draw":
        """The draw of the tile of ``shape`` at ``start + index * shape`` in the same whole mask."""
        whole = self.description.whole
        block = tuple(1 if n == 1 else size for n, size in zip(whole, shape, strict=True))
        layout, origin = _law.locate(whole, block, start, index)
        description = self.description._replace(shape=shape, block=block, layout=layout)
        return dataclasses.replace(self, origin=origin, description=description)

    def of_shape(self, shape: tuple[int, ...]) -> "Draw":
        """The draw with its mask broadcast to another shape."""
        return dataclasses.replace(self, description=self.description._replace(shape=shape))

    def threshold(self) -> _threshold.Threshold:
        """The threshold of the rate, static or traced."""
        if self.rate is not None:
            return _threshold.traced_threshold(self.rate, self.description.precision)
        assert self.description.threshold is not None  # uniform numbers have none
        return self.description.threshold


@functools.partial(jax.jit, static_argnames=("formula", "kept", "remake", "options"))
def _applied(
    draw: Draw,
    operands: tuple[Any, ...],
    formula: Formula,
    kept: Formula | None,
    remake: bool,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    # jax.checkpoint makes the backward pass recompute the mask; unlike a custom_vjp it keeps
    # forward mode, batching and higher orders.
    @functools.partial(jax.checkpoint, prevent_cse=remake)
    def applied(draw: Draw, operands: tuple[Any, ...]) -> Any:
        flag = draw.deterministic
        draw = dataclasses.replace(draw, deterministic=None)
        y = jax.tree.map(draw.poisoned, formula(draw, *operands, **dict(options)))
        if flag is None:
            return y
        if kept:
            evaluated = jax.tree.map(draw.poisoned, kept(draw, *operands, **dict(options)))
        else:
            evaluated = operands[0]
        return jax.tree.map(functools.partial(lax.select, flag), evaluated, y)

    return applied(draw.with_words(), operands)


@jax.jit
def keep(draw: Draw) -> jax.Array:
    description = draw.description
    if description.outcome is not Outcome.DRAWN:
        return jnp.full(description.shape, description.outcome is Outcome.KEPT)
    if 0 in description.shape:
        return jnp.zeros(description.shape, bool)
    threshold = draw.threshold()
    if draw.deterministic is not None:
        threshold = _threshold.keep_all_if(draw.deterministic, threshold)
    assert isinstance(draw.key, jax.Array)  # its words, see with_words()
    assert description.layout is not None
    kept = _law.keep(draw.key, threshold, description.layout, draw.origin)
    return jnp.broadcast_to(lax.reshape(kept, description.block), description.shape)


@jax.jit
def uniform(draw: Draw) -> jax.Array:
    description = draw.description
    if 0 in description.shape:
        return jnp.zeros(description.shape, jnp.uint32)
    assert isinstance(draw.key, jax.Array)
    assert description.layout is not None
    bits = _law.uniform(draw.key, description.layout, draw.origin)
    return jnp.broadcast_to(lax.reshape(bits, description.block), description.shape)
