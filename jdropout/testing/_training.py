"""Records the steps of a training."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _inputs
from jdropout._arrays import readable
from jdropout._values import check_flag, check_function, check_positive
from jdropout.testing._fingerprint import fingerprint
from jdropout.testing._recording import MAX_ITERATIONS, Recorder, Recording, about, as_64_bits


def record_training(
    step: Callable[[Any, Any], Any],
    state: Any,
    batches: Iterable[Any],
    *,
    every: int = 1,
    values: bool = False,
    max_iterations: int = MAX_ITERATIONS,
) -> Recording:
    """Runs a training, and keeps fingerprints of its state at every step and of some whole steps.

    The training itself is not changed: `step` is called as it is, so compile it as usual. Before
    every `every`-th call, a second program, compiled once, repeats the step and takes the
    fingerprints, as `record` does. `first_difference` of two such recordings finds the first step
    whose result differs, and the equation in it if the step was recorded. It is cheapest to begin
    with a large `every`, and to record again with the one that the difference names.

    Args:
      step: function of state and batch that returns the next state, or a tuple of the next state
        and anything else; or None if it changes the Flax nnx modules of `state` in place.
      state: pytree of arrays and Flax nnx modules.
      batches: the batches, pytrees of arrays and numbers, one for each step. For steps that are
        numbered, pass ``range(100)``.
      every: which steps to record: 0, `every`, 2 * `every` and so on.
      values: if True, keep the values of the recorded steps in memory, as `record` does.
      max_iterations: iterations of a while loop with fingerprints of their own.

    Returns:
      A `Recording`, to save or to compare with `first_difference`.

    Raises:
      TypeError: if `step` is not callable or another argument has the wrong type.
      ValueError: if `every` or `max_iterations` is less than 1, there are no batches, a step
        returns something else than a state, or the batches have different shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdropout.testing import first_difference, record_training
      >>> @jax.jit
      ... def step(w, x):
      ...     return w + jnp.sin(w * x)
      >>> def batches(last):
      ...     return [jnp.float32(x) for x in (1, 2, last)]
      >>> a, b = (record_training(step, jnp.float32(1), batches(last)) for last in (3, 4))
      >>> difference = first_difference(a, b)
      >>> difference.step, difference.name
      (2, 'argument x')

    References:
      Chris Wellons, "hash-prospector", for the mix of 32 bits.
    """
    check_function("step", step)
    check_flag("values", values)
    every = check_positive("every", every)
    max_iterations = check_positive("max_iterations", max_iterations)
    try:
        iterator = None if isinstance(batches, str | bytes) else iter(batches)
    except TypeError:  # an array without axes is an Iterable, too
        iterator = None
    if iterator is None:
        raise TypeError(f"batches must be iterable, got {batches!r}. Pass a list of batches.")
    return _Training(step, state, every, values, max_iterations).run(iterator)


class _Training:
    def __init__(self, step: Any, state: Any, every: int, values: bool, max_iterations: int):
        self.step = step
        self.state = state
        self.every = every
        self.keep_values = values
        self.max_iterations = max_iterations
        self.structure: Any = jax.tree.structure(state)
        self.traced: Any = None
        self.recorder: Any = None
        self.of_state = jax.jit(lambda leaves: jnp.stack([fingerprint(x) for x in leaves]))

    def run(self, batches: Iterable[Any]) -> Recording:
        states, steps, values = [], [], []
        for number, batch in enumerate(batches):
            states.append(self.fingerprints())
            if number % self.every == 0:
                rows, kept = self.record(number, batch)
                steps.append(rows)
                values.append(kept)
            self.advance(batch)
        if not states:
            raise ValueError("batches must not be empty. Pass at least one batch.")
        states.append(self.fingerprints())
        fingerprints = np.zeros((len(states), len(states[0]) + steps[0].size), np.uint64)
        fingerprints[:, : len(states[0])] = states
        fingerprints[: len(states) - 1 : self.every, len(states[0]) :] = steps
        leaves = [[name, [str(x.dtype), list(x.shape)]] for name, x in self.leaves()]
        words = about(every=self.every, steps=len(states) - 1, state=leaves)
        return Recording(
            self.traced.program, fingerprints, words, values if self.keep_values else []
        )

    def leaves(self) -> list[tuple[str, Any]]:
        inputs = _inputs.flatten(lambda state: None, (self.state,), {})
        pairs = zip(inputs.names, inputs.leaves, strict=True)
        return [
            (name, readable("state", leaf) if isinstance(leaf, np.ndarray) else leaf)
            for name, leaf in pairs
            if _inputs.is_array(leaf)
        ]

    def fingerprints(self) -> np.ndarray:
        leaves = [leaf for _, leaf in self.leaves()]
        if not leaves:
            raise ValueError(
                f"state must hold an array, so that its changes can be seen, got {self.state!r}. "
                "Pass parameters, or a Flax nnx module."
            )
        return as_64_bits(self.of_state(leaves))

    def record(self, number: int, batch: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        from jdropout.testing import _tracing

        _tracing.check_leaves("batches", batch, numbers=True)
        if self.traced is None:
            self.traced = _tracing.trace(
                self.step, (self.state, batch), self.max_iterations, numbers=True
            )
            self.recorder = Recorder(self.traced, self.keep_values)
        leaves = _tracing.leaves_of(self.step, (self.state, batch))
        types = [[_type(leaf) for leaf in each] for each in (leaves, self.traced.leaves)]
        if types[0] != types[1]:
            raise ValueError(
                f"batches must all have the types of the first one, {types[1]} with the state, got "
                f"{types[0]} for step {number}. Drop or pad the last batch."
            )
        _, rows, kept = self.recorder(leaves)
        return rows, kept

    def advance(self, batch: Any) -> None:
        result = self.step(self.state, batch)
        if result is None:  # it changed the modules
            return
        if self.is_state(result):
            self.state = result
        elif isinstance(result, tuple) and result and self.is_state(result[0]):
            self.state = result[0]
        else:
            raise ValueError(
                "step must return the next state, a tuple that begins with it, or None, got "
                f"{jax.tree.structure(result)} for a state {self.structure}. Return (state, loss), "
                "for example."
            )

    def is_state(self, tree: Any) -> bool:
        return bool(self.structure == jax.tree.structure(tree))


def _type(leaf: Any) -> str:
    return str(jax.typeof(leaf))
