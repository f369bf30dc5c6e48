"""Dropout of hidden units, or of heads, as an nnx module."""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._flax import check_paths
from jdropout._subset import unit_subset
from jdropout.nnx._wrapper import SubsetWrapper

_exchanging = threading.RLock()
"""While a call has other parameters in the block's modules, no other thread's call reads them."""


class UnitSubset(SubsetWrapper):
    """Layer of `jdropout.unit_subset`: computes k of the n hidden units, or heads, of a block.

    In a call the block's modules have kernels of the kept units only. The block must work with
    any number of units; `nnx.MultiHeadAttention` does. It may contain dropout and state of its
    own, but none that belongs to the units.

    Args:
      layer: block with the named modules.
      rate: fraction of units to drop, a Python number in [0, 1].
      incoming: paths of the modules that make the units, within the block, such as ``("up",)`` or
        ``("layers/0",)``. All their parameters have the units along `incoming_axis`.
      outgoing: paths of the modules that take the units. Their kernels have the units along
        `outgoing_axis`.
      incoming_axis: axis of the units; -2 for the heads of attention.
      outgoing_axis: axis of the units in the outgoing kernels.
      groups: number of groups of neighbouring units, of which each keeps the same number.
      deterministic: if True, compute all units. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them. The flag
        must not be traced.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the layer cannot be called, the rate is not a Python number, or `rngs` has the
        wrong type.
      ValueError: if the rate is outside [0, 1], or a path does not lead to a module with a kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jdropout.nnx.UnitSubset(
      ...     nnx.MultiHeadAttention(8, 64, decode=False, rngs=rngs),
      ...     0.5,
      ...     incoming=("query", "key", "value"),
      ...     outgoing=("out",),
      ...     incoming_axis=-2,
      ...     rngs=rngs,
      ... )
      >>> layer(jnp.ones((2, 10, 64))).shape
      (2, 10, 64)

    References:
      Zhou, Ge, Wei, Zhou and Xu, "Scheduled DropHead: a regularization method for transformer
      models" (Findings of EMNLP 2020), section 3, for heads.
    """

    def __init__(
        self,
        layer: nnx.Module,
        rate: float,
        *,
        incoming: Sequence[str],
        outgoing: Sequence[str],
        incoming_axis: int = -1,
        outgoing_axis: int = 0,
        groups: int = 1,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            layer, rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.incoming: tuple[str, ...]
        self.outgoing: tuple[str, ...]
        self.incoming, self.outgoing = check_paths(incoming, outgoing)
        self.incoming_axis = incoming_axis
        self.outgoing_axis = outgoing_axis
        self.groups = groups
        for path in (*self.incoming, *self.outgoing):
            _module_at(layer, path)

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Computes the block with the kept units.

        Args:
          inputs: input of the block.
          *args: further arguments of the block.
          deterministic: overrides the constructor's flag. It is not passed to the layer.
          rngs: overrides the constructor's source of keys. It is not passed to the layer.
          **options: keyword arguments of the layer.

        Returns:
          The result of the block.

        Raises:
          ValueError: if the kernels differ in their number of units, or neither the call nor the
            constructor gave a flag, or a source of keys.
          TypeError: if the flag is traced, or `rngs` has the wrong type.
        """
        flag, key = self._static(deterministic, rngs)
        with _exchanging:
            sources = {path: _params(_module_at(self.layer, path)) for path in self.incoming}
            sinks = {path: _module_at(self.layer, path).kernel[...] for path in self.outgoing}

            def block(sources: Any, sinks: Any, x: Any) -> Any:
                with contextlib.ExitStack() as stack:
                    for path, params in sources.items():
                        stack.enter_context(_with_params(_module_at(self.layer, path), params))
                    for path, kernel in sinks.items():
                        module = _module_at(self.layer, path)
                        stack.enter_context(_with_params(module, {"kernel": kernel}))
                    return self.layer(x, *args, **options)

            return unit_subset(
                key,
                block,
                sources,
                sinks,
                inputs,
                self.rate,
                incoming_axis=self.incoming_axis,
                outgoing_axis=self.outgoing_axis,
                groups=self.groups,
                deterministic=flag,
            )


def _module_at(module: Any, path: str) -> Any:
    at = module
    for part in path.split("/"):
        try:
            at = at[int(part)] if part.isdigit() else getattr(at, part, None)
        except (IndexError, KeyError, TypeError):  # it has no such element, or none at all
            at = None
    if not isinstance(at, nnx.Module) or not hasattr(at, "kernel"):
        raise ValueError(
            f"layer must have a module with a kernel at {path!r}, got {type(at).__name__}. Write "
            "the attributes that lead to it, such as 'up' or 'layers/0'."
        )
    return at


def _params(module: nnx.Module) -> dict[str, jax.Array]:
    return {
        name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Param)
    }


@contextlib.contextmanager
def _with_params(module: Any, params: dict[str, jax.Array]) -> Iterator[None]:
    """Replaces parameters of a module for a while, and the sizes that it knows of its output."""
    changes: dict[str, Any] = {name: nnx.Param(value) for name, value in params.items()}
    if isinstance(module, nnx.LinearGeneral):  # it reshapes its bias to these
        changes["out_features"] = params["kernel"].shape[-len(module.out_features) :]
    before = {name: vars(module)[name] for name in changes}
    # Not setattr, which nnx refuses for a module from outside a transformation. One call for all:
    # Ctrl-C comes before or after it.
    bind = vars(module).update
    try:
        bind(changes)
        yield
    finally:
        bind(before)
