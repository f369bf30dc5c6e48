"""The loops over the blocks of the attention matrix, which skip what is masked."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jdropout._attention._blocks import Axis, Plan, Tiles, indices

_Carry = TypeVar("_Carry")


def over_blocks(
    plan: Plan,
    visited: jax.Array | None,
    tiles: Tiles,
    start: _Carry,
    visit: Callable[..., _Carry],
    finish: Callable[[_Carry, Any], Any],
    remade: Callable[..., Any] = lambda function: function,
) -> Any:
    """Runs over the blocks of keys for every block of queries.

    A skipped block costs as much as writing its part of every result, above all in the backward
    pass, so blocks are skipped by the chunk first, and one by one in the chunks that are left.

    Args:
      plan: says how the matrix is cut.
      visited: which blocks are needed, booleans of (blocks of queries, blocks of keys).
      tiles: what is known of queries, keys and both.
      start: carry of a block of queries before its first block of keys.
      visit: maps (carry, i, j, and the tiles of a row, a column and a cell) to the next carry.
      finish: maps the last carry and the tiles of the row to a result.
      remade: applied to the bodies of loops, to compute them again in the backward pass.

    Returns:
      The results, stacked over blocks of queries.
    """
    rows = (indices(plan.rows), tiles.rows)
    columns = (indices(plan.columns), tiles.columns)
    cells = (visited, tiles.cells)

    @remade
    def visit_block(carry: _Carry, row: Any, column: Any, cell: Any) -> _Carry:
        (i, in_row), (j, in_column), (needed, in_cell) = row, column, cell
        visit_it = remade(lambda carry: visit(carry, i, j, in_row, in_column, in_cell))
        return _where(needed, visit_it, carry)

    @remade
    def visit_row(carry: _Carry, row: Any, columns: Any, cells: Any) -> _Carry:
        def step(carry: _Carry, xs: Any) -> tuple[_Carry, None]:
            return visit_block(carry, row, *xs), None

        return lax.scan(step, carry, (columns, cells))[0]

    @remade
    def whole_row(row: Any, columns: Any, cells: Any) -> Any:
        return finish(visit_row(start, row, columns, cells), row[1])

    if plan.rows.chunk_size == 1:  # and all keys are in one
        return lax.map(lambda xs: whole_row(xs[0], columns, xs[1]), (rows, cells))

    @remade
    def visit_chunk(carries: _Carry, rows: Any, columns: Any, cells: Any) -> _Carry:
        def visit_it(carries: _Carry) -> _Carry:
            return lax.map(
                lambda xs: visit_row(xs[0], xs[1], columns, xs[2]), (carries, rows, cells)
            )

        return _where(cells[0].any(), visit_it, carries)

    @remade
    def whole_rows(rows: Any, columns: Any, cells: Any) -> Any:
        def step(carries: _Carry, xs: Any) -> tuple[_Carry, None]:
            return visit_chunk(carries, rows, *xs), None

        size = plan.rows.chunk_size
        carries = jax.tree.map(lambda x: jnp.broadcast_to(x, (size, *x.shape)), start)
        carries, _ = lax.scan(step, carries, (columns, cells))
        return lax.map(lambda xs: finish(*xs), (carries, rows[1]))

    rows, columns = _in_chunks(plan.rows, rows), _in_chunks(plan.columns, columns)
    cells = _in_chunks(plan.columns, _swapped(_in_chunks(plan.rows, cells), 0, 2))
    # From (chunks of keys, keys, queries, chunks of queries, ...):
    cells = _swapped(_swapped(cells, 0, 3), 1, 3)
    results = lax.map(lambda xs: whole_rows(xs[0], columns, xs[1]), (rows, cells))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _swapped(tree: Any, a: int, b: int) -> Any:
    return jax.tree.map(lambda x: jnp.swapaxes(x, a, b), tree)


def _in_chunks(axis: Axis, tree: Any) -> Any:
    shape = (axis.num_blocks // axis.chunk_size, axis.chunk_size)
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)


def _where(needed: jax.Array | None, visit: Callable[[_Carry], _Carry], carry: _Carry) -> _Carry:
    return visit(carry) if needed is None else lax.cond(needed, visit, lambda carry: carry, carry)
