"""Programs that should compute the same twice and do not, after public threads about them."""

import contextlib
import functools
import linecache
import os
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jdropout.testing import check_determinism, first_difference, record


class Case(NamedTuple):
    """A program and two ways to run it, which should agree."""

    ways: tuple[Callable[[Callable[..., Any]], Any], Callable[[Callable[..., Any]], Any]]
    """Each calls its argument with a function and the function's arguments, under one setting."""
    line: str
    """The line that is to blame, and that `check_determinism` names."""
    differs: str
    """The line that `first_difference` names; the whole shard_map, if devices are compared."""


def under(setting, function, *arguments):
    """A way to run the function with its arguments, in a context that `setting` makes."""

    def way(run):
        with setting():
            return run(function, *arguments)

    return way


def keys_of_the_kind_rbg():
    """jax-ml/jax#21663: results of a shard_map change with the number of devices."""

    def noisy(keys, x):
        def of_one_device(keys, x):
            return jax.vmap(lambda key, row: row + jax.random.uniform(key, row.shape))(keys, x)

        rows = P("data")
        return jax.shard_map(of_one_device, in_specs=(rows, rows), out_specs=rows)(keys, x)

    keys = jax.random.split(jax.random.key(0, impl="rbg"), 8)
    meshes = [
        Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
        for count in (2, 8)
    ]
    ways = [
        under(functools.partial(jax.set_mesh, mesh), noisy, keys, jnp.ones((8, 4)))
        for mesh in meshes
    ]
    return Case(
        tuple(ways), "jax.random.uniform(key, row.shape)", "return jax.shard_map(of_one_device"
    )


def a_product_whose_sums_depend_on_the_batch():
    """jax-ml/jax#34080: a row of a matrix product depends on the number of rows."""

    def logits(size, x, w):
        x = jnp.sin(x)
        return jnp.dot(x[:size], w)[0]

    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape, np.float32) for shape in ((64, 4096), (4096, 64)))
    ways = [under(contextlib.nullcontext, logits, size, x, w) for size in (1, 32)]
    line = "jnp.dot(x[:size], w)[0]"
    return Case(tuple(ways), line, line)


def a_key_of_the_process():
    """keras-team/keras#21261: every process of a training draws other weights."""

    def init(key):
        key = jax.random.fold_in(key, jax.process_index())
        return jax.random.key_data(key)

    ways = [
        under(
            functools.partial(mock.patch, "jax.process_index", lambda i=i: i),
            init,
            jax.random.key(0),
        )
        for i in range(2)
    ]
    line = "jax.random.fold_in(key, jax.process_index())"
    return Case(tuple(ways), line, line)


def files_in_the_order_of_the_folder(folder):
    """huggingface/datasets#240: glob lists files as the file system has them."""
    folder = pathlib.Path(folder)
    for i in range(3):
        (folder / f"{i}.txt").write_text(str(i))

    def train(w):
        w = w * 2
        for name in os.listdir(folder):
            w = w * 0.9 + float((folder / name).read_text())
        return w

    listdir = os.listdir
    orders = (sorted, lambda names: sorted(names, reverse=True))
    ways = [
        under(
            functools.partial(
                mock.patch, "os.listdir", lambda path, order=order: order(listdir(path))
            ),
            train,
            jnp.ones(2),
        )
        for order in orders
    ]
    line = "w * 0.9 + float((folder / name).read_text())"
    return Case(tuple(ways), line, line)


def double_precision_switched_on():
    """jax-ml/jax#27002: with 64 bits, the same key draws other numbers."""

    def noisy(key, x):
        noise = jax.random.normal(key, x.shape)
        return x + noise.astype(x.dtype)

    x = np.ones(4, np.float32)
    ways = [
        under(functools.partial(jax.enable_x64, on), noisy, jax.random.key(0), x)
        for on in (False, True)
    ]
    line = "jax.random.normal(key, x.shape)"
    return Case(tuple(ways), line, line)


def assert_located(case):
    """The two ways differ, and both tools name the line."""
    first, second = (np.asarray(way(lambda fn, *args: fn(*args))) for way in case.ways)
    assert (first != second).any()
    difference = first_difference(*(way(record) for way in case.ways))
    assert case.differs in _line(difference.location)
    report = case.ways[0](check_determinism)
    found = {finding.code: finding.places for finding in report.findings}
    return {
        code
        for code, places in found.items()
        if all(case.line in _line(p.location) for p in places)
    }


def _line(location):
    name, _, number = location.rpartition(":")
    assert name == pathlib.Path(__file__).name
    return linecache.getline(__file__, int(number))
