"""Code shared by the nnx and linen modules."""

import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jdropout import _arrays, _checks, _values
from jdropout._typing import Key, Rate
from jdropout._values import type_name


class Applied(NamedTuple):
    """A function of this library, and the layer attributes that hold its arguments."""

    function: Callable[..., Any]
    options: tuple[str, ...] = ()
    """Names of keyword arguments, and of the attributes that hold them."""
    amount: str = "rate"
    """Name of the attribute that holds the rate, or the strength of noise."""


class FunctionLayer:
    """Base of a layer that applies one function of this library."""

    _applies: ClassVar[Applied]

    def _drop(self, key: Key | None, x: Any, flag: bool | jax.Array) -> Any:
        function, names, amount = self._applies
        options = {name: getattr(self, name) for name in names}
        return function(key, x, getattr(self, amount), deterministic=flag, **options)


def check_module_rate(rate: Any, name: str = "rate") -> float:
    """Returns a module's rate, which must be static: an array would be a leaf of the state."""
    if isinstance(rate, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, got an array of shape {rate.shape} and dtype "
            f"{rate.dtype}: as a module attribute it would become a leaf that an optimizer can "
            "train. For a scheduled rate call jdropout.dropout(key, x, rate) in the model."
        )
    checked = _checks.check_rate(rate, name)
    assert isinstance(checked, float)  # arrays were rejected above
    return checked


def check_module_rates(rate: Any) -> Any:
    """Returns one rate, or a rate for each part of a recurrent state."""
    if isinstance(rate, list | tuple):
        return tuple(map(check_module_rates, rate))
    return check_module_rate(rate)


def check_module_amount(name: str, amount: Any) -> float:
    """Returns a static amount of noise."""
    if isinstance(amount, jax.Array):
        raise TypeError(
            f"{name} must be a Python number, got an array of shape {amount.shape} and dtype "
            f"{amount.dtype}: as a module attribute it would become a leaf that an optimizer can "
            f"train. Convert it with float({name})."
        )
    checked = _values.check_amount(name, amount)
    assert isinstance(checked, float)
    return checked


def initial_logit(rate: Any, dtype: Any) -> jax.Array:
    """The logit that a learned rate starts from."""
    _values.check_fraction("initial_rate", rate)
    _values.check_dtype("param_dtype", dtype)
    return jnp.asarray(math.log(rate / (1 - rate)), dtype)


def check_module_flag(deterministic: Any) -> bool | jax.Array:
    """Returns the flag, as a bool if it is concrete, like Flax's own modules."""
    if isinstance(deterministic, int) and deterministic in (0, 1):  # which Flax accepts too
        deterministic = bool(deterministic)
    flag = _checks.check_deterministic(deterministic)
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def check_stream(deterministic: Any, rng_collection: Any) -> None:
    """Checks what the constructors of all layers take; the flag may be left to the call."""
    if deterministic is not None:
        check_module_flag(deterministic)
    _values.check_name("rng_collection", rng_collection)


def check_dense(use_bias: Any, **initializers: Any) -> None:
    _values.check_flag("use_bias", use_bias)
    for name, initializer in initializers.items():
        _values.check_function(name, initializer)


def check_dense_inputs(inputs: Any, dtype: Any, kernel_dtype: Any) -> jax.Array:
    """Returns the inputs as an array, for Flax to promote."""
    inputs = _arrays.as_array("inputs", inputs)
    if dtype is None:
        check_promotes("inputs", inputs, kernel_dtype)
    if not inputs.ndim:
        raise ValueError("inputs must have an axis of features, got shape (). Pass inputs[None].")
    return inputs


def check_promotes(name: str, x: jax.Array, dtype: Any) -> None:
    try:
        jnp.promote_types(x.dtype, dtype)
    except (TypeError, ValueError):  # of float8, for example
        raise TypeError(
            f"{name} must have a dtype that promotes with {jnp.dtype(dtype)}, got {x.dtype}. "
            f"Convert it with {name}.astype(jnp.float32)."
        ) from None


def draws_mask(rate: Rate, deterministic: bool | jax.Array) -> bool:
    """Whether a call draws a mask and takes a key from its stream: exactly when Flax does."""
    if deterministic is True:
        return False
    static_rate = None if isinstance(rate, jax.Array) else rate
    return static_rate != 0 and not (static_rate == 1 and deterministic is False)


def draws_any_mask(rates: Any, deterministic: bool | jax.Array) -> bool:
    """Whether zoneout draws a mask for any of the rates; it draws none at 0 and at 1."""
    return deterministic is not True and any(
        isinstance(rate, jax.Array) or rate not in (0, 1) for rate in jax.tree.leaves(rates)
    )


def draws_noise(amount: float, deterministic: bool | jax.Array) -> bool:
    """Whether a call draws noise; an amount of 1 draws, unlike a rate of 1."""
    return deterministic is not True and (isinstance(amount, jax.Array) or amount != 0)


def carry_and_output(result: Any) -> tuple[Any, Any]:
    """What a cell returned, which must be a pair."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            f"cell must return a pair, its carry and its output, got {type_name(result)}. Pass a "
            "cell such as Flax's LSTMCell."
        )
    return result[0], result[1]


def same_part(output: Any, new: Any, zoned: Any) -> Any:
    """Replaces outputs that alias the new carry by the zoned-out carry."""
    pairs = list(zip(jax.tree.leaves(new), jax.tree.leaves(zoned), strict=True))
    return jax.tree.map(lambda y: next((b for a, b in pairs if a is y), y), output)


def install(framework: Any, classes: dict[str, tuple[Any, Any]]) -> None:
    """Binds names of a framework to our classes; warns of other names of Flax's.

    Args:
      framework: `flax.nnx` or `flax.linen`.
      classes: Flax's class and ours, by name.
    """
    elsewhere = sorted(
        f"{module.__name__}.{name}"
        for module in list(sys.modules.values())
        if module.__name__.partition(".")[0] not in ("flax", "jdropout")
        for name, value in list(vars(module).items())
        if any(value is flax for flax, _ in classes.values())
    )
    # All of them or none, whenever Ctrl-C comes.
    vars(framework).update({name: ours for name, (_, ours) in classes.items()})
    if elsewhere:
        warnings.warn(
            f"install() cannot reach names that are bound already: {', '.join(elsewhere)}. Import "
            "these modules after it.",
            stacklevel=3,
        )


def uninstall(framework: Any, classes: dict[str, tuple[Any, Any]]) -> None:
    vars(framework).update({name: flax for name, (flax, _) in classes.items()})


def check_model(model: Any, kind: type) -> None:
    check_module("model", model, kind, "Sample a function with jdropout.mc_predict.")


def check_module(name: str, module: Any, kind: Any, fix: str = "Build it first.") -> None:
    if not isinstance(module, kind):
        raise TypeError(
            f"{name} must be a {kind.__module__.split('.')[1]} module, got {type_name(module)}. "
            f"{fix}"
        )


def check_any_dropout(drops: bool, only: Any = None) -> None:
    if not drops:
        found = "" if only is None else f" that only={only!r} finds"
        raise ValueError(
            "model must have a dropout layer with a rate above 0, or all samples would be equal; "
            f"it has none{found}. Sample a model that calls jdropout.dropout with "
            "jdropout.mc_predict."
        )


def check_paths(incoming: Any, outgoing: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the paths of the modules around some units."""
    for name, paths in (("incoming", incoming), ("outgoing", outgoing)):
        if (
            not isinstance(paths, Sequence | set | frozenset)
            or isinstance(paths, str)
            or not all(isinstance(path, str) for path in paths)
        ):
            raise TypeError(
                f"{name} must be a sequence of paths, got {paths!r}. Write ('up',) for one."
            )
        if not paths:
            raise ValueError(
                f"{name} must name at least one module, got {paths!r}. Pass paths such as ('up',)."
            )
    both = sorted(set(incoming) & set(outgoing))
    if both:
        raise ValueError(
            f"outgoing must not have a module of incoming, got {both}. A module cannot make and "
            "take the same units: put a layer around each pair."
        )
    return tuple(incoming), tuple(outgoing)


def check_positions(positions: Any, argument: Any) -> None:
    if argument is not None:
        _values.check_name("positions_argument", argument)
    if positions is not None and argument is None:
        raise ValueError(
            "positions were given, but positions_argument is None, so the layer would not get "
            "them. Pass the name of its argument, such as positions_argument='positions'."
        )
