"""Changes a whole linen model: its keys."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen

from jdropout import _values
from jdropout._batch import at_axis, check_batch_axis, in_part
from jdropout._key_kinds import typed_key
from jdropout._typing import Batch, Index, Key, Site
from jdropout._values import type_name
from jdropout.keys import at_site, step_key
from jdropout.linen._attention import FlaxAttention
from jdropout.linen._dropout import FlaxDropout, Layer


def with_site_keys(
    apply: Callable[..., Any],
    root: Key,
    *,
    step: Index,
    microbatch: Index = 0,
    batch: Batch | None = None,
    batch_axis: int | Callable[[Site], int] = 0,
    rng_collection: str = "dropout",
) -> Callable[..., Any]:
    """Makes every dropout of a model take its key from its path and the training step.

    The masks are then a function of (root, step, microbatch, path), so no random state has to
    be saved and training resumes exactly. The n-th call in the step, counted from 0, of a
    `flax.linen.Dropout` or an attention layer, Flax's or this library's, gets the key
    ``at_site(site_key(root, step=step, site=path, microbatch=microbatch), n)``, where the path
    is a tuple of names such as ``("Block_0", "Dropout_0")``. Each name of the path is hashed to
    64 bits, where Flax hashes the whole path to 32.

    Lifted transforms such as ``linen.scan`` split the stream as `split_rngs` tells them to, and
    the path is below that; ``linen.jit`` folds the path of its module into the stream, and the
    path starts there. The count is Flax's own: ``linen.scan`` traces its body twice, so
    anything called once in it has n = 1, and ``linen.jit`` uses up one number of its module.
    Other modules that draw from the stream find the key of the step in it.

    Args:
      apply: function with the argument ``rngs``, such as a model's ``apply``.
      root: PRNG key, typed or raw; the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar, at least 0.
      microbatch: number of the microbatch within the step, an integer or a (traced) integer
        scalar below 2**32.
      batch: which part of the step's whole batch the model sees, as ``(first, size)`` or
        ``(first, size, count)``: the arguments of `jdropout.keys.in_batch`. Masks then do not
        depend on how a batch is cut; use it in place of `microbatch`.
      batch_axis: with `batch`, the axis of the examples in the layers that do not know it, such as
        1 in time-major arrays; or a function of a module's path that returns it.
      rng_collection: name of the random stream.

    Returns:
      A function with the arguments of ``apply``; its ``rngs`` may hold further streams.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if ``rngs`` has a key for the stream, a number is negative or too large, or
        the root is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> model = jdropout.linen.Dropout(0.5, deterministic=False)
      >>> apply = jdropout.linen.with_site_keys(model.apply, jax.random.key(0), step=1000)
      >>> apply({}, jnp.ones((1, 8)))
      Array([[0., 2., 2., 0., 0., 0., 2., 0.]], dtype=float32)

    References:
      The key law, in the documentation.
    """
    key = typed_key(step_key(root, step=step, microbatch=microbatch))
    key = in_part(key, batch, microbatch)
    check_batch_axis(batch_axis)
    _values.check_name("rng_collection", rng_collection)
    _check_takes_rngs(apply)

    def apply_with_site_keys(*args: Any, rngs: Any = None, **kwargs: Any) -> Any:
        streams = {} if rngs is None else rngs if isinstance(rngs, Mapping) else {"params": rngs}
        if rng_collection in streams:
            raise ValueError(
                f"rngs has a key for {rng_collection!r}, which with_site_keys provides: leave it "
                "out, or pass another rng_collection."
            )
        with linen.intercept_methods(_KeysByPath(rng_collection, batch_axis)):
            return apply(*args, rngs={**streams, rng_collection: key}, **kwargs)

    return apply_with_site_keys


def _check_takes_rngs(apply: Any) -> None:
    _values.check_function("apply", apply)
    try:
        parameters = inspect.signature(apply).parameters
    except ValueError:  # a built-in function has no signature
        return
    variadic = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "rngs" not in parameters and not variadic:
        raise TypeError(
            "apply must take rngs, as the apply of a linen module does, got "
            f"{type_name(apply)} with {', '.join(parameters)}. Pass the module's own apply: for a "
            "model that hides it, such as one of Hugging Face, model.module.apply."
        )


class _KeysByPath:
    """Intercepts modules that draw masks, and passes a key made from the stream and their path."""

    def __init__(self, rng_collection: str, batch_axis: int | Callable[[Site], int]) -> None:
        self.rng_collection = rng_collection
        self.batch_axis = batch_axis

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        argument, position = self.argument(context.module, context.method_name)
        by_position = position is not None and len(args) > position
        if argument and not by_position and kwargs.get(argument) is None:
            kwargs = kwargs | {argument: self.key(context.module)}
        return method(*args, **kwargs)

    def argument(self, module: linen.Module, method: str) -> tuple[str | None, int | None]:
        """The name, if any, of the argument that overrides the stream's key, and its position."""
        ours = isinstance(module, Layer)
        if ours or isinstance(module, FlaxDropout):
            draws = method in (module.drawing_methods if ours else ("__call__",))
            if draws and module.rng_collection == self.rng_collection:
                return "rng", module.rng_position if ours else 2
            return None, None
        attention = isinstance(module, FlaxAttention)
        draws = attention and method == "__call__" and self.rng_collection == "dropout"
        return ("dropout_rng" if draws else None), None

    def key(self, module: linen.Module) -> jax.Array | None:
        scope = module.scope
        assert scope is not None  # a called module is bound
        stream = scope.rngs.get(self.rng_collection)
        if stream is None:
            return None  # removed by a lifted transform; Flax raises if it is needed
        # Flax's own count, because all modules at a path share it: also those inside linen.remat,
        # and those that a parent creates again in each of its calls.
        calls = scope.rng_counters[self.rng_collection]
        scope.rng_counters[self.rng_collection] = calls + 1
        # The suffix is the path, or below linen.jit, whose trace serves several paths, its end.
        key = at_axis(stream.rng, self.batch_axis, module.path)
        return at_site(key, (*stream.suffix, calls))
