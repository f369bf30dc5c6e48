"""Makes dropout draw in every call of a linen model, whatever flags the model passes."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from flax import linen, nnx

from jdropout._flax import draws_mask
from jdropout.linen._attention import FlaxAttention
from jdropout.linen._dropout import FlaxDropout, Layer, with_attributes
from jdropout.nnx._model import set_site_keys
from jdropout.nnx._turn_on import turn_on

Path: TypeAlias = tuple[str, ...]

_TRAINING = {"deterministic": False, "train": True, "training": True, "is_training": True}
"""Flags that models have, and their values in training."""


class DropoutOn:
    """Intercepts dropout layers, and makes every call draw its mask.

    Calling the model with a flag would not do: models name it `train` or `deterministic`, or none,
    and may pass a layer its own.
    """

    def __init__(
        self,
        rng_collection: str = "dropout",
        by_hand: frozenset[Path] = frozenset(),
        only: Any = None,
    ) -> None:
        self.rng_collection = rng_collection
        self.chosen = nnx.filterlib.to_predicate(... if only is None else only)
        """Whether the module at a path draws; other layers are off."""
        self.by_hand = by_hand
        """Paths of modules with hand-written dropout, whose flags are set too."""
        self.drawn: set[Path] = set()
        """Paths of modules with hand-written dropout that drew."""
        self.drops = False

    def __call__(
        self,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        module: Any = context.module
        function = getattr(type(module), context.method_name, None)
        # A function that linen.apply or a lifted transform was given, or a module being made.
        if function is None or module.scope is None:
            return method(*args, **kwargs)
        parameters = inspect.signature(function).parameters
        if isinstance(module, nnx.bridge.ToLinen):
            if context.method_name == "__call__":
                kwargs = kwargs | {"nnx_method": self._of_nnx(module, kwargs.get("nnx_method"))}
            return method(*args, **kwargs)
        if self._is_layer(module, context.method_name):
            off = not self.chosen(module.path, module)
            values: dict[str, Any] = {"deterministic": off, "rng": None, "dropout_rng": None}
            # Unset the constructor's flag: Flax raises if both it and the call's are given.
            flag = {"deterministic": None if "deterministic" in parameters else off}
        elif self._may_draw(module):
            values = _TRAINING
            flag = {
                name: value
                for name, value in values.items()
                if isinstance(getattr(module, name, None), bool) and name not in parameters
            }
        else:
            return method(*args, **kwargs)
        args, kwargs = _with_arguments(parameters, args, kwargs, values)
        with with_attributes(module, **flag):
            return self._watched(module, context.method_name, method, args, kwargs)

    def check_all_drawn(self) -> None:
        off = self.by_hand - self.drawn
        if off:
            raise ValueError(
                f"model drops in training at {', '.join(sorted(map('/'.join, off)))}, which could "
                "not be switched on here: it is not a dropout layer and has no flag named "
                f"{' or '.join(_TRAINING)}. Use a layer, or sample the model in training mode with "
                "jdropout.mc_predict."
            )

    def _is_layer(self, module: Any, method: str) -> bool:
        methods = module.drawing_methods if isinstance(module, Layer) else ("__call__",)
        return isinstance(module, Layer | FlaxDropout | FlaxAttention) and method in methods

    def _may_draw(self, module: Any) -> bool:
        return module.path in self.by_hand  # which has only chosen ones

    def _watched(
        self,
        module: Any,
        name: str,
        method: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self._is_layer(module, name):
            if isinstance(module, Layer):
                ever = module._draws(False)
            else:
                attention = isinstance(module, FlaxAttention)
                ever = draws_mask(module.dropout_rate if attention else module.rate, False)
            self.drops |= ever and self.chosen(module.path, module)
            return method(*args, **kwargs)
        counts = module.scope.rng_counters
        before = counts.get(self.rng_collection, 0)
        result = method(*args, **kwargs)
        drew = counts.get(self.rng_collection, 0) > before
        if drew and self.chosen(module.path, module):
            self.drawn.add(module.path)
            self.drops = True
        return result

    def _of_nnx(self, module: Any, method: Any) -> Callable[..., Any]:
        """Wraps a method of the nnx model in a `flax.nnx.bridge.ToLinen`."""

        def switched_on(model: Any, *args: Any, **kwargs: Any) -> Any:
            model.eval()
            if turn_on(model, lambda path, node: self.chosen((*module.path, *path), node)):
                self.drops = True
                set_site_keys(model, module.make_rng(self.rng_collection), step=0)
            call = method if callable(method) else getattr(type(model), method or "__call__")
            return call(model, *args, **kwargs)

        return switched_on


class Training(DropoutOn):
    """Intercepts all modules, sets their flags to training, and records which of them draw."""

    def _may_draw(self, module: Any) -> bool:
        return True


def _with_arguments(
    parameters: Any, args: tuple[Any, ...], kwargs: dict[str, Any], values: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Sets those arguments that a method has."""
    for name, value in values.items():
        if name not in parameters:
            continue
        position = list(parameters).index(name) - 1  # not counting self
        keyword_only = parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        if keyword_only or position >= len(args):
            kwargs = kwargs | {name: value}
        else:
            args = (*args[:position], value, *args[position + 1 :])
    return args, kwargs
