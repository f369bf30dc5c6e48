"""Runs a traced program and takes the fingerprint of every value on the way."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jdropout import _jaxprs
from jdropout.testing._fingerprint import fingerprints, has_fingerprint, plain
from jdropout.testing._program import Block, Equation, Program
from jdropout.testing._tracing import inlined

Tap = Callable[[jax.Array, int, int, tuple[Any, ...]], jax.Array]
"""Sees, and may replace, an output: its value, the equation's number, the output's number, and the
iterations and devices around it. Arguments have equation -1, constants -2."""


def probe(
    closed: core.ClosedJaxpr, program: Program, keep_values: bool, tap: Tap | None = None
) -> Callable[..., tuple[list[Any], jax.Array, list[jax.Array]]]:
    """Makes a function of the constants and arguments of a program.

    It returns the outputs; the fingerprints, as uint32 with two columns; and the values, if they
    are to be kept.
    """

    def run(
        on: jax.Array, constants: Sequence[Any], arguments: Sequence[Any]
    ) -> tuple[list[Any], jax.Array, list[jax.Array]]:
        prober = _Prober(on, keep_values, tap)
        taken = prober.taken()
        arguments = [taken.add(x, -1, i, ()) for i, x in enumerate(map(jnp.asarray, arguments))]
        constants = [taken.add(x, -2, i, ()) for i, x in enumerate(map(jnp.asarray, constants))]
        outputs = prober.body(
            _jaxprs.open_jaxpr(closed),
            [*constants, *arguments],
            iter(program.block.equations),
            (),
            taken,
        )
        rows, values = taken.all()
        return outputs, rows, values

    return run


_TOGETHER = 16
"""So many values are in memory until their fingerprints are taken."""


class _Probes(NamedTuple):
    """What was taken in a block."""

    rows: jax.Array
    """Two uint32 for every fingerprint."""
    values: list[jax.Array]


class _Taken:
    """Collects what is taken in a block."""

    def __init__(self, prober: "_Prober") -> None:
        self.prober = prober
        self.rows: list[jax.Array] = []
        self.pending: list[jax.Array] = []
        """Outputs whose fingerprints are not yet taken."""
        self.values: list[jax.Array] = []

    def add(self, x: Any, equation: int, output: int, place: tuple[Any, ...]) -> Any:
        if not has_fingerprint(jax.typeof(x)):
            return x
        if self.prober.tap is not None:
            x = self.prober.tap(x, equation, output, place)
        self.pending.append(x)
        if len(self.pending) == _TOGETHER:
            self.flush()
        if self.prober.keep_values:
            self.values.append(plain(x))
        return x

    def flush(self) -> None:
        if self.pending:
            self.rows.append(self.prober.fingerprints(self.pending))
        self.pending = []

    def count(self, number: jax.Array) -> None:
        """A row that holds a number itself."""
        self.flush()
        low = number.astype(jnp.uint32) + self.prober.zero
        self.rows.append(jnp.stack([low, jnp.zeros_like(low)])[None])

    def extend(self, probes: _Probes) -> None:
        self.flush()
        self.rows.append(probes.rows)
        self.values += probes.values

    def all(self) -> _Probes:
        self.flush()
        rows = jnp.concatenate(self.rows) if self.rows else jnp.zeros((0, 2), jnp.uint32)
        return _Probes(rows, self.values)


class _Prober:
    def __init__(self, on: jax.Array, keep_values: bool, tap: Tap | None) -> None:
        self.on = on
        self.keep_values = keep_values
        self.tap = tap
        # In a shard_map, a zero of every device: what is added to it may differ between devices,
        # whatever it was made from, as the carries and branches there must agree on.
        self.zero: Any = jnp.uint32(0)

    def fingerprints(self, values: list[jax.Array]) -> jax.Array:
        """Takes the fingerprints in a conditional, into which XLA cannot fuse the values.

        Otherwise it would compute every value again for its fingerprint, from the last one that is
        in memory: the rounds of Threefry up to 300 times, which took four times as long to compile.
        """
        return lax.cond(
            self.on,
            lambda own: fingerprints(own) + self.zero,
            lambda own: jnp.zeros((len(own), 2), jnp.uint32) + self.zero,
            values,
        )

    def taken(self) -> _Taken:
        return _Taken(self)

    def block(
        self, body: Any, operands: Sequence[Any], block: Block, place: tuple[Any, ...]
    ) -> tuple[list[Any], _Probes]:
        taken = self.taken()
        constants = list(getattr(body, "consts", ()))
        outputs = self.body(
            _jaxprs.open_jaxpr(body),
            [*constants, *operands],
            iter(block.equations),
            place,
            taken,
        )
        return outputs, taken.all()

    def body(
        self,
        jaxpr: Any,
        operands: Sequence[Any],
        described: Iterator[Equation],
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        """Runs the equations of a body, which were described in the same order."""
        values: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], operands, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            own = [read(atom) for atom in equation.invars]
            inside = inlined(equation)
            if inside is not None:
                own = [*getattr(inside, "consts", ()), *_as_called(equation, own, "in")]
                results = self.body(_jaxprs.open_jaxpr(inside), own, described, place, taken)
                results = _as_called(equation, results, "out")
            else:
                words = next(described)
                results = self.equation(jaxpr, equation, own, words, place, taken)
                results = [taken.add(x, words.number, i, place) for i, x in enumerate(results)]
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self,
        jaxpr: Any,
        equation: Any,
        operands: list[Any],
        words: Equation,
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        if words.kind == "scan":
            return self.scan(equation, operands, words, place, taken)
        if words.kind == "while":
            return self.while_loop(equation, operands, words, place, taken)
        if words.kind == "cond":
            return self.cond(equation, operands, words, place, taken)
        if words.kind == "shard_map":
            return self.shard_map(equation, operands, words, place, taken)
        return _evaluate(jaxpr, equation, operands)

    def scan(
        self,
        equation: Any,
        operands: list[Any],
        words: Equation,
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        params = equation.params
        constants, carries = _jaxprs.scan_counts(equation)
        fixed = operands[:constants]
        start, slices = operands[constants:][:carries], operands[constants + carries :]
        reverse = params["reverse"]

        def step(carry: list[Any], numbered: Any) -> Any:
            number, parts = numbered
            inside = (*place, number)
            outputs, probes = self.block(
                params["jaxpr"], [*fixed, *carry, *parts], words.bodies[0], inside
            )
            return outputs[:carries], (outputs[carries:], probes)

        numbers = np.arange(words.length, dtype=np.uint32)
        carry, (stacked, probes) = lax.scan(
            step,
            start,
            (numbers[::-1] if reverse else numbers, slices),
            length=words.length,
            reverse=reverse,
            unroll=params["unroll"],
        )
        if reverse:  # in the order of execution
            probes = jax.tree.map(lambda x: jnp.flip(x, 0), probes)
        taken.extend(_Probes(probes.rows.reshape(-1, 2), probes.values))
        return [*carry, *stacked]

    def while_loop(
        self,
        equation: Any,
        operands: list[Any],
        words: Equation,
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        params = equation.params
        of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
        condition_fixed, body_fixed = operands[:of_condition], operands[of_condition:][:of_body]
        start = operands[of_condition + of_body :]
        limit = words.length

        # The condition is evaluated in the body, since only there its fingerprints can be kept.
        def condition(number: jax.Array, carry: list[Any]) -> tuple[jax.Array, _Probes]:
            [going], probes = self.block(
                params["cond_jaxpr"], [*condition_fixed, *carry], words.bodies[0], (*place, number)
            )
            return going, probes

        def run(number: jax.Array, carry: list[Any]) -> tuple[list[Any], _Probes]:
            return self.block(
                params["body_jaxpr"], [*body_fixed, *carry], words.bodies[1], (*place, number)
            )

        def write(kept: _Probes, number: jax.Array, *parts: _Probes) -> _Probes:
            slot = jnp.minimum(number, jnp.uint32(limit))
            rows = jnp.concatenate([part.rows for part in parts])
            # All further iterations share the last slot, in a sum that depends on their order.
            rows = rows + jnp.where(number >= limit, kept.rows[slot] * jnp.uint32(0x01000193), 0)
            values = [value for part in parts for value in part.values]
            return jax.tree.map(
                lambda old, new: lax.dynamic_update_index_in_dim(old, self.vary(new), slot, 0),
                kept,
                _Probes(rows, values),
            )

        def step(state: Any) -> Any:
            number, going, before, carry, kept = state
            after, probes = run(number, carry)
            # The condition of a loop under vmap is an array: some examples may have ended.
            carry = [
                _where(going, new, old) if going.ndim else new
                for new, old in zip(after, carry, strict=True)
            ]
            kept = write(kept, number, before, probes)
            number = number + jnp.uint32(1)
            return number, *condition(number, carry), carry, kept

        zero = self.zero + jnp.uint32(0)
        going, before = condition(zero, start)
        nothing = self.nothing(
            params["body_jaxpr"], [*body_fixed, *start], words.bodies[1], (*place, zero)
        )
        kept = jax.tree.map(
            lambda x: self.vary(jnp.zeros((limit + 1, *x.shape), x.dtype)),
            _Probes(
                jnp.concatenate([before.rows, nothing.rows]), [*before.values, *nothing.values]
            ),
        )
        number, _, before, carry, kept = lax.while_loop(
            lambda state: state[1].any(), step, (zero, going, before, start, kept)
        )
        kept = write(kept, number, before, nothing)
        taken.extend(_Probes(kept.rows.reshape(-1, 2), kept.values))
        taken.count(number)
        return list(carry)

    def cond(
        self,
        equation: Any,
        operands: list[Any],
        words: Equation,
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        index, *operands = operands
        bodies = equation.params["branches"]
        nothing = [
            self.nothing(body, operands, block, place)
            for body, block in zip(bodies, words.bodies, strict=True)
        ]
        most = max(probes.rows.shape[0] for probes in nothing)

        def branch(number: int) -> Callable[..., Any]:
            def run(*own: Any) -> Any:
                outputs, probes = self.block(bodies[number], own, words.bodies[number], place)
                padding = jnp.zeros((most - probes.rows.shape[0], 2), jnp.uint32) + self.zero
                of_all = [other.values for other in nothing]
                of_all[number] = list(map(self.vary, probes.values))
                values = [value for part in of_all for value in part]
                return outputs, _Probes(jnp.concatenate([probes.rows, padding]), values)

            return run

        branches = [branch(i) for i in range(len(bodies))]
        platforms = equation.params.get("branches_platforms")
        if platforms is None:
            outputs, probes = lax.switch(index, branches, *operands)
        else:
            named = {
                name: run
                for names, run in zip(platforms, branches, strict=True)
                for name in (("default",) if names is None else names)
            }
            outputs, probes = lax.platform_dependent(*operands, **named)
        taken.count(jnp.asarray(index))
        taken.extend(probes)
        return list(outputs)

    def shard_map(
        self,
        equation: Any,
        operands: list[Any],
        words: Equation,
        place: tuple[Any, ...],
        taken: _Taken,
    ) -> list[Any]:
        params = equation.params
        names = tuple(name for name, _ in words.axes)
        outside = self.on, self.zero

        def run(on: jax.Array, devices: jax.Array, *own: Any) -> Any:
            device = devices[0]
            self.on, self.zero = on, device * jnp.uint32(0)
            try:
                outputs, probes = self.block(
                    params["jaxpr"], own, words.bodies[0], (*place, device)
                )
                return outputs, jax.tree.map(lambda x: self.vary(x)[None], probes)
            finally:
                self.on, self.zero = outside

        outputs, probes = jax.shard_map(
            run,
            mesh=params["mesh"],
            in_specs=(P(), P(names), *params["in_specs"]),
            out_specs=(list(params["out_specs"]), P(names)),
            axis_names=set(names),
            check_vma=params["check_vma"],
        )(self.on, jnp.arange(words.length, dtype=jnp.uint32) + self.zero, *operands)
        rows = probes.rows.transpose(1, 0, 2).reshape(-1, 2)
        taken.extend(_Probes(rows, probes.values))
        return list(outputs)

    def nothing(
        self, body: Any, operands: Sequence[Any], block: Block, place: tuple[Any, ...]
    ) -> _Probes:
        """The probes of a block that is not run: zeros."""
        shapes: list[Any] = []
        if self.keep_values:
            shapes = jax.eval_shape(
                lambda own: self.block(body, own, block, place)[1].values, operands
            )
        rows = jnp.zeros((block.rows, 2), jnp.uint32) + self.zero
        return _Probes(rows, [self.vary(jnp.zeros(x.shape, x.dtype)) for x in shapes])

    def vary(self, x: jax.Array) -> jax.Array:
        """Lets a value differ between the devices of a `shard_map`."""
        return jnp.where(self.zero == 0, x, jnp.zeros_like(x))


def _where(condition: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Chooses along the first axes."""
    axes = range(condition.ndim)
    return jnp.where(lax.broadcast_in_dim(condition, x.shape, tuple(axes)), x, y)


def _evaluate(jaxpr: Any, equation: Any, operands: list[Any]) -> list[Any]:
    """Evaluates an equation of a jaxpr as it is, with its mesh, its name and its line."""
    variables: dict[Any, Any] = {
        atom: value
        for atom, value in zip(equation.invars, operands, strict=True)
        if not isinstance(atom, core.Literal)
    }
    alone = jaxpr.replace(
        constvars=[],
        invars=list(variables),
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*variables.values())


def _as_called(equation: Any, values: list[Any], side: str) -> list[Any]:
    """Keeps what a call asks of its operands or results when its body is inlined."""
    if side == "in" and equation.params.get("differentiated") and equation.params["prevent_cse"]:
        values = lax.optimization_barrier(values)
    shardings = equation.params.get(f"{side}_shardings") or [None] * len(values)
    return [
        lax.with_sharding_constraint(value, sharding)
        if isinstance(sharding, NamedSharding)
        else value
        for value, sharding in zip(values, shardings, strict=True)
    ]
