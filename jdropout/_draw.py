"""One draw from the mask law: a static description and traced operands in one pytree.

A formula computes a result from the mask or the uniforms of a draw, such as ``x * mask / keep``.
`Draw.apply` is the only place that handles what happens around it: returning the input itself,
dropping everything, an audit's marks, compilation, rematerialisation, a traced flag, and a traced
rate outside [0, 1].
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

from jdropout import _law, _record, _strata, _threshold
from jdropout._typing import Index, Key


class Outcome(enum.Enum):
    """What the static arguments already decide."""

    KEPT = enum.auto()
    """Nothing is dropped: deterministic, or a static rate of 0."""
    DROPPED = enum.auto()
    """Everything is dropped: a static rate of 1."""
    DRAWN = enum.auto()
    """Something is drawn: any other rate, a traced rate or flag, or uniforms."""


class Description(NamedTuple):
    """The static part of a draw, which is in the key of JAX's compilation cache."""

    outcome: Outcome
    shape: tuple[int, ...]
    """Shape of the array that the mask is for."""
    block: tuple[int, ...] = ()
    """Shape of the mask; axes along which it is shared have size 1."""
    whole: tuple[int, ...] = ()
    """Shape of the larger mask that contains the block, with the same axes of size 1."""
    layout: _law.Layout | None = None
    """None if nothing is drawn."""
    threshold: _threshold.Threshold | None = None
    """None for a traced rate, `Draw.numbers`, and uniforms, which have no rate."""
    precision: int | None = None
    num_samples: int | None = None
    """Number of samples with coupled masks, of which this is one; None if there is only this."""


# Maps a draw, arrays and static options to an array or a tree of arrays. It has to be a function of
# a module: compiled programs are cached by its identity, so every new closure would recompile.
Formula = Callable[..., Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "rate", "deterministic", "origin", "numbers", "sample"],
    meta_fields=["description"],
)
@dataclasses.dataclass(frozen=True)
class Draw:
    """A pytree whose leaves are all that may be traced. Fields that are None leave no residual."""

    key: Key | None
    """The PRNG key; inside a formula, the words of its mask keys (see `with_mask_keys`)."""
    rate: jax.Array | None
    """A traced rate, also where nothing is drawn: the formula of an evaluation may need it."""
    deterministic: jax.Array | None
    """A traced flag."""
    origin: _law.Origin | None
    description: Description
    numbers: jax.Array | None = None
    """A static rate as an operand (see `_threshold.static_numbers`), set by `eager`."""
    sample: jax.Array | None = None
    """The number of the sample, if there are several with coupled masks."""
    # Set by new_draw. Without init JAX ignores it; drop_fields would do but is broken in JAX 0.8.1.
    call: int | None = dataclasses.field(default=None, init=False)
    """Number of the call in an audit. Not part of the pytree: another number does not recompile."""

    @property
    def outcome(self) -> Outcome:
        return self.description.outcome

    @property
    def static_rate(self) -> float | None:
        """The effective rate; None if it is traced, or if there is none."""
        threshold = self.description.threshold
        return None if threshold is None else float(1 - _threshold.keep_probability(threshold))

    # --- around a formula -----------------------------------------------------------------

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

        The backward pass recomputes the formula's masks; the only residuals are the draw's leaves
        and the operands that the derivative needs.

        Args:
          formula: a module-level function; its draw has the words of its mask keys, and no flag.
          *operands: pytrees of arrays.
          kept: the formula if nothing is dropped. None returns the first operand itself, without
            converting it to a JAX array.
          dropped: the formula if everything is dropped. None returns zeros like the first operand.
          remake: if True, the backward pass always recomputes. If False, XLA may share a packed
            mask between the passes if it sees both, at 1 bit per element; pass True for uniforms,
            which take 32.
          **static: hashable options of the formulas.
        """
        options = tuple(static.items())
        if self.outcome is Outcome.DRAWN:
            y = _applied(self.marked().eager(operands), operands, formula, kept, remake, options)
        elif self.outcome is Outcome.KEPT and kept is None:
            y = operands[0]
        elif self.outcome is Outcome.KEPT:
            y = _applied(self.eager(operands), operands, kept, None, remake, options)
        elif dropped:
            y = _applied(self, operands, dropped, None, remake, options)
        else:
            y = jnp.zeros_like(operands[0])
        return self.result(y)

    def marked(self) -> "Draw":
        """The draw with an audit's marks on its key and its position."""
        if self.call is None:
            return self
        assert self.key is not None
        words = _record.mark(_law.key_words(self.key), self.call, "key")
        starts = [_record.mark(x, self.call, "start") for x in jax.tree.leaves(self.origin)]
        # The words depend on the starts, or a transformation could drop the starts' unused marks.
        words, *_ = lax.optimization_barrier((words, *starts))
        return dataclasses.replace(self, key=words)

    def eager(self, operands: Any) -> "Draw":
        """In an eager call, the draw with its static rate as an operand.

        Else every new rate would compile a program, and JAX would keep it.
        """
        if self.description.threshold is None:
            return self
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((self, operands))):
            return self
        description, numbers = _without_threshold(self.description)
        # Not dataclasses.replace, which takes a tenth of an eager call.
        return Draw(
            self.key, self.rate, self.deterministic, self.origin, description, numbers, self.sample
        )

    def result(self, y: Any, *, masked: bool = True) -> Any:
        """Marks the result for an audit, on its first array: one mark per call is enough."""
        if self.call is None:
            return y
        leaves, structure = jax.tree.flatten(y)
        if not leaves:
            return y
        kind = "result" if masked and self.outcome is Outcome.DRAWN else "without"
        first = _record.mark(leaves[0], self.call, kind)
        return jax.tree.unflatten(structure, [first, *leaves[1:]])

    def with_mask_keys(self) -> "Draw":
        """The draw with its key replaced by the words of its mask keys, for use in formulas.

        The backward pass evaluates the cipher of the mask, but not again the one of its keys, a
        fifth of the operations that XLA has to compile. The key itself as a residual of one branch
        also breaks `jax.lax.cond` before JAX 0.10.
        """
        if self.key is None:
            return self
        words = _mask_key_words(self.key, self.digits, self.sample is not None)
        return dataclasses.replace(self, key=words)

    @property
    def digits(self) -> int:
        """How many digits of its numbers the draw needs."""
        description = self.description
        if description.threshold is not None:
            return description.threshold.digits
        rated = self.rate is not None or self.numbers is not None
        return 1 if rated and description.precision != 32 else 2

    # --- inside a formula -----------------------------------------------------------------

    @jax.jit
    def keep(self) -> jax.Array:
        """The mask, True where an element is kept, broadcast to the array's shape."""
        description = self.description
        if description.outcome is not Outcome.DRAWN:
            return jnp.full(description.shape, description.outcome is Outcome.KEPT)
        threshold = self.threshold()
        if self.deterministic is not None:
            threshold = _threshold.keep_all_if(self.deterministic, threshold)
        return self._evaluate(_law.keep, _strata.keep, jnp.bool_, threshold=threshold)

    @jax.jit
    def uniform(self) -> jax.Array:
        """The uniforms that masks are compared with: uint32, in units of 2^-32."""
        return self._evaluate(_law.uniform, _strata.uniform, jnp.uint32)

    def _evaluate(
        self,
        law: Callable[..., jax.Array],
        of_sample: Callable[..., jax.Array],
        dtype: Any,
        **operands: Any,
    ) -> jax.Array:
        description = self.description
        if 0 in description.shape:
            return jnp.zeros(description.shape, dtype)
        assert isinstance(self.key, jax.Array)  # see with_mask_keys()
        if self.sample is not None:
            law = functools.partial(of_sample, sample=self.sample, size=description.num_samples)
        block = law(self.key, layout=description.layout, origin=self.origin, **operands)
        return jnp.broadcast_to(lax.reshape(block, description.block), description.shape)

    def keep_like(self, x: jax.Array) -> jax.Array:
        """The mask with the explicit sharding of x."""
        return self.placed_like(x, Draw.keep)

    def placed_like(
        self,
        x: jax.Array,
        make: Callable[["Draw"], jax.Array],
        spec: PartitionSpec | None = None,
    ) -> jax.Array:
        """Runs `make` with its output explicitly sharded like x, or by `spec`, without a gather."""
        sharding = jax.typeof(x).sharding
        explicit = sharding.mesh.explicit_axes
        if not explicit:
            return make(self)
        out = sharding if spec is None else spec
        return jax.sharding.auto_axes(make, axes=explicit, out_sharding=out)(self)

    def scale(self, dtype: np.dtype) -> jax.Array:
        """1 / keep, rounded once to float32 or float64; 1 if nothing is kept."""
        threshold = self.threshold()
        if self.description.threshold:
            kept = _threshold.keep_probability(threshold)
            factor = jnp.asarray(float(1 / kept) if kept else 1.0, dtype)
        elif self.numbers is not None and dtype == jnp.float32:
            factor = lax.bitcast_convert_type(self.numbers[2], dtype)
        else:
            traced_kept = _threshold.traced_keep_probability(threshold, dtype)
            factor = 1 / jnp.where(traced_kept > 0, traced_kept, 1)
        if self.deterministic is not None:
            factor = jnp.where(self.deterministic, jnp.ones_like(factor), factor)
        return factor

    def drop_probability(self, dtype: np.dtype) -> jax.Array:
        """The effective rate."""
        if self.description.threshold:
            return jnp.asarray(self.static_rate, dtype)
        if self.numbers is not None:
            if dtype == jnp.float32:
                return lax.bitcast_convert_type(self.numbers[3], dtype)
            return 1 - _threshold.traced_keep_probability(self.threshold(), dtype)
        return _threshold.traced_drop_probability(self.threshold()).astype(dtype)

    def valid(self) -> jax.Array | None:
        """Whether a traced rate is in [0, 1], or the flag overrules it; None for a static rate."""
        if self.rate is None:
            return None
        valid = (self.rate >= 0) & (self.rate <= 1)
        return valid if self.deterministic is None else valid | self.deterministic

    def nan_if_invalid(self, y: jax.Array) -> jax.Array:
        """y, or NaN (and a gradient of NaN) if a traced rate is outside [0, 1]."""
        valid = self.valid()
        if valid is None or not jnp.issubdtype(y.dtype, jnp.inexact):
            return y
        if jnp.iscomplexobj(y):
            return lax.complex(self.nan_if_invalid(lax.real(y)), self.nan_if_invalid(lax.imag(y)))
        return y * jnp.where(valid, 1, jnp.nan).astype(y.dtype)

    def tile(
        self, shape: tuple[int, ...], start: tuple[Index, ...] | None, index: tuple[Index, ...]
    ) -> "Draw":
        """The draw of a tile of ``shape`` at ``start + index * shape`` in the same whole mask."""
        whole = self.description.whole
        block = tuple(1 if n == 1 else size for n, size in zip(whole, shape, strict=True))
        layout, origin = _law.locate(whole, block, start, index)
        description = self.description._replace(shape=shape, block=block, layout=layout)
        return dataclasses.replace(self, origin=origin, description=description)

    def of_shape(self, shape: tuple[int, ...]) -> "Draw":
        """The same draw with its mask broadcast to another shape."""
        return dataclasses.replace(self, description=self.description._replace(shape=shape))

    def threshold(self) -> _threshold.Threshold:
        """The threshold of the rate, static or traced."""
        if self.numbers is not None:
            low = self.numbers[1] if self.description.precision == 32 else None
            return _threshold.Threshold(self.numbers[0], low)
        if self.rate is not None:
            return _threshold.traced_threshold(self.rate, self.description.precision)
        assert self.description.threshold is not None  # uniforms have none
        return self.description.threshold


@functools.lru_cache(maxsize=1024)
def _without_threshold(description: Description) -> tuple[Description, jax.Array]:
    """A description whose rate is an operand, and the operand."""
    threshold = description.threshold
    assert threshold is not None
    precision = 16 * threshold.digits
    described = description._replace(threshold=None, precision=precision)
    return described, _threshold.static_numbers(threshold)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mask_key_words(key: Key, digits: int, ordered: bool) -> jax.Array:
    return _law.mask_key_words(_law.spent_key_words(key), digits, ordered)


@functools.partial(jax.jit, static_argnames=("formula", "kept", "remake", "options"))
def _applied(
    draw: Draw,
    operands: tuple[Any, ...],
    formula: Formula,
    kept: Formula | None,
    remake: bool,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    # jax.checkpoint makes the backward pass recompute the mask. Unlike a custom_vjp it keeps
    # forward mode, batching and higher derivatives.
    @functools.partial(jax.checkpoint, prevent_cse=remake)
    def applied(draw: Draw, operands: tuple[Any, ...]) -> Any:
        flag = draw.deterministic
        draw = dataclasses.replace(draw, deterministic=None)
        y = jax.tree.map(draw.nan_if_invalid, formula(draw, *operands, **dict(options)))
        if flag is None:
            return y
        if kept:
            evaluated = jax.tree.map(draw.nan_if_invalid, kept(draw, *operands, **dict(options)))
        else:
            evaluated = operands[0]
        return jax.tree.map(functools.partial(lax.select, flag), evaluated, y)

    return applied(draw.with_mask_keys(), operands)
