"""DropConnect around an nnx module."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._drop_connect import check_select, drop_connect_tree
from jdropout._typing import Flag
from jdropout._values import check_function
from jdropout.nnx._dropout import Dropout


class DropConnect(Dropout):
    """Wraps any module so that its weights are dropped in training.

    In training the module is called with the parameters that `jdropout.drop_connect_tree` makes
    from its own, in evaluation as it is. Around an `nnx.RNN` this is WeightDrop: one mask
    serves all time steps. Everything else the module updates, such as batch statistics and
    random streams, is updated as usual.

    Args:
      module: module to call.
      rate: probability of dropping a weight, a Python number in [0, 1].
      select: which parameters to drop, by their paths in the module: a function of the path, or
        the trailing names of paths. For only the recurrent weights of most of Flax's cells use
        ``["dense_h/kernel"]``.
      deterministic: if True, call the module as it is. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, `select` is neither a function nor a
        sequence of names, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1]; in the call if nothing is selected.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jdropout.nnx.DropConnect(nnx.Linear(4, 8, rngs=rngs), 0.5, rngs=rngs)
      >>> layer(jnp.ones((2, 4))).shape
      (2, 8)
      >>> lstm = nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=rngs))
      >>> layer = jdropout.nnx.DropConnect(lstm, 0.5, select=["dense_h/kernel"], rngs=rngs)
      >>> layer(jnp.ones((2, 10, 4))).shape
      (2, 10, 8)

    References:
      Wan, Zeiler, Zhang, LeCun and Fergus, "Regularization of neural networks using
      DropConnect" (ICML 2013), section 3; Merity, Keskar and Socher, "Regularizing and
      optimizing LSTM language models" (ICLR 2018), section 2, "Weight-dropped LSTM".
    """

    _arguments = "module, rate"

    def __init__(
        self,
        module: Any,
        rate: float,
        *,
        select: Callable[[str], bool] | Sequence[str] = ("kernel",),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.select: Callable[[str], bool] | Sequence[str] = check_select(select)
        check_function("module", module)
        self.module = module

    def __call__(
        self,
        *args: Any,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the module, in training with dropped weights.

        Args:
          *args: positional arguments of the module.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value. Not passed to the module.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key. Not passed to the module.
          **kwargs: further keyword arguments of the module.

        Returns:
          The result of the module.

        Raises:
          ValueError: if nothing is selected, or neither the call nor the constructor gave a
            flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)

        def drop(params: Any) -> Any:
            return drop_connect_tree(key, params, self.rate, select=self.select, deterministic=flag)

        return with_params(drop, self.module, lambda module: module(*args, **kwargs))


def with_params(change: Callable[[Any], Any], module: Any, use: Callable[[Any], Any]) -> Any:
    """Calls ``use`` with a twin of the module that has the parameters ``change(params)``.

    The twin shares all other variables with the module. Variables that it creates, as ``sow``
    does, are copied to the module afterwards.
    """
    parts: Any = nnx.split(module, nnx.Param, ...)  # its type is too complex for mypy
    graph, params, others = parts
    before: list[Any] = list(nnx.to_flat_state(params))
    after: list[Any] = list(nnx.to_flat_state(change(params)))
    changed = [_value(a[1]) is not _value(b[1]) for a, b in zip(before, after, strict=True)]
    if not any(changed):
        return use(module)
    flat = [new if is_new else old for old, new, is_new in zip(before, after, changed, strict=True)]
    twin = nnx.merge(graph, nnx.from_flat_state(flat), others)
    result = use(twin)
    known = {path for path, _ in before} | set(nnx.to_flat_state(others).paths)
    made = [(path, v) for path, v in nnx.to_flat_state(nnx.state(twin)) if path not in known]
    if made:
        nnx.update(module, nnx.from_flat_state(made))
    return result


def _value(variable: Any) -> Any:
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable
