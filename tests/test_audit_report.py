"""What a report of `audit` says of each site, and that an audit leaves everything as it was."""

import concurrent.futures
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout._audit.report import FIXES

RATE = 0.1


@pytest.fixture
def x():
    return jnp.ones((8, 16))


def by_hand(key, x):
    return jnp.where(jax.random.bernoulli(key, 1 - RATE, x.shape), x / (1 - RATE), 0.0)


def mistaken(key, x):
    x = jdropout.dropout(key, x, RATE)
    return jdropout.dropout(key, x, 1 / 3, broadcast_dims=(1,)).sum()


# --- sites --------------------------------------------------------------------------------


def test_a_site_says_what_it_drops(key, x):
    first, second = jdropout.audit(mistaken, key, x).sites
    assert (first.path, first.kind, first.shape) == ("mistaken", "dropout", (8, 16))
    assert (first.rate, first.effective_rate) == (RATE, jdropout.effective_rate(RATE))
    assert (first.shared_axes, second.shared_axes) == ((), (1,))
    assert second.effective_rate == jdropout.effective_rate(1 / 3)
    assert first.deterministic is False
    assert first.key == second.key == "k1"
    assert first.functions == ("mistaken",)


@pytest.mark.parametrize("drop", [lambda k, x: jdropout.dropout(k, x, RATE), by_hand, None])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_location_is_the_users_line(drop, wrap, key, x):
    layer = nnx.Dropout(RATE)

    def step(key, x):
        x = jnp.sin(x)
        return layer(x, rngs=key) if drop is None else drop(key, x)

    (site,) = jdropout.audit(wrap(step), key, x).sites
    user = step if drop is None else drop
    lines, first = inspect.getsourcelines(user)
    last = first + len(lines) - 1
    file, line = site.location.split(":")
    assert file == "test_audit_report.py"
    assert int(line) == (last if user in (step, by_hand) else first)


@pytest.mark.parametrize("layer", [jdropout.nnx.Dropout, nnx.Dropout])
def test_paths_of_nnx_modules(layer, x):
    class Inner(nnx.Module):
        def __init__(self, rngs):
            self.dropout = layer(RATE, rngs=rngs)

        def __call__(self, x):
            return self.dropout(x)

    class Outer(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.List([Inner(rngs)])

        def __call__(self, x):
            return self.inner[0](x)

    (site,) = jdropout.audit(nnx.jit(lambda model, x: model(x)), Outer(nnx.Rngs(0)), x).sites
    # Frames of other libraries have no objects, only functions.
    ours = layer is jdropout.nnx.Dropout
    assert site.path == ("Outer/inner/0/dropout" if ours else "Inner.__call__")


@pytest.mark.parametrize("layer", [jdropout.linen.Dropout, linen.Dropout])
def test_paths_of_linen_modules(layer, key, x):
    class Inner(linen.Module):
        @linen.compact
        def __call__(self, x):
            return layer(RATE, deterministic=False)(x)

    class Outer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return Inner(name="encoder")(x)

    def apply(key, x):
        return Outer().apply({}, x, rngs={"dropout": key}).sum()

    for wrap in (lambda f: f, jax.jit, lambda f: jax.grad(f, 1), lambda f: jax.jit(jax.grad(f, 1))):
        (site,) = jdropout.audit(wrap(apply), key, x).sites
        assert site.path == "Outer/encoder/Dropout_0"


@pytest.mark.parametrize("options", [{}, {"precision": 32, "broadcast_dims": (0,)}])
def test_stored_bytes_are_those_of_the_residuals_of_ours(options, key, x):
    def drop(key, x):
        return jdropout.dropout(key, x, RATE, **options)

    def part(key, x):
        return drop(key, x[:3]) if options else jdropout.dropout(
            key, x, RATE, start=(jnp.int32(2), 0), global_shape=(32, 16)
        )  # fmt: skip

    rbg = jax.random.key(0, impl="rbg")
    for drop_x, any_key in ((drop, key), (drop, rbg), (part, key)):

        def residuals(x, drop_x=drop_x, any_key=any_key):
            return jax.vjp(jax.jit(lambda x: drop_x(any_key, x)), x)[1]

        (site,) = jdropout.audit(drop_x, any_key, x).sites
        leaves = jax.tree.leaves(jax.eval_shape(residuals, x))
        assert site.stored_bytes == sum(
            leaf.size * leaf.dtype.itemsize for leaf in leaves if leaf.dtype != x.dtype
        )


def test_stored_bytes_are_those_of_the_residuals_of_others(key, x):
    _check_stored_bytes(by_hand, key, x)

    def half(key, x):
        return x * (jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype) / 0.5)

    _check_stored_bytes(half, key, np.ones((8, 16), jnp.bfloat16))
    layer = nnx.Dropout(RATE, broadcast_dims=(1,))
    _check_stored_bytes(lambda key, x: layer(x, rngs=key), key, x)


def _check_stored_bytes(drop, key, x):
    (site,) = jdropout.audit(drop, key, x).sites
    residuals = jax.tree.leaves(jax.vjp(jax.jit(lambda x: drop(key, x)), x)[1])
    # Flax's also has an array of zeros and a scale, which the compiler knows.
    stored = [leaf for leaf in residuals if leaf.dtype != x.dtype or np.unique(leaf).size > 1]
    assert site.stored_bytes == sum(leaf.nbytes for leaf in stored)


def test_key_sources_are_names_of_arguments(key, x):
    a, b, c = jax.random.split(key, 3)

    def positional(x, state, *more, last, **others):
        keys = [state["dropout"][1], more[0], last, others["extra"]]
        for key in keys:
            x = jdropout.dropout(key, x, RATE)
        return x

    report = jdropout.audit(positional, x, {"dropout": (0.5, a)}, b, last=c, extra=key)
    names = [site.key_sources for site in report.sites]
    assert names == [("state.dropout.1",), ("more.0",), ("last",), ("others.extra",)]


def test_key_sources_of_a_module_are_its_streams(x):
    model = nnx.Sequential(jdropout.nnx.Dropout(RATE, rngs=nnx.Rngs(0)))
    (site,) = jdropout.audit(lambda net, x: net(x), model, x).sites
    assert site.key_sources == ("net.layers.0.rngs.count", "net.layers.0.rngs.key")


# --- the report ---------------------------------------------------------------------------


def test_the_table_lines_up(key, x):
    text = str(jdropout.audit(mistaken, key, x))
    lines = text.splitlines()
    assert lines[0] == "dropout in mistaken: 2 sites, 1 finding"
    assert not [line for line in lines if line != line.rstrip()]
    header, _, *rows = lines[2:6]
    for title in ("path", "location", "kind", "shape", "rate", "stored", "saves", "key", "from"):
        column = header.index(title)
        assert all(row[column] != " " and row[column - 1] == " " for row in rows)
    assert "key-reused (sites 0, 1): their keys are the same." in lines
    assert f"  fix: {FIXES['key-reused']}" in lines


def test_the_table_says_what_a_site_saves(key, x):
    def some(key, x):
        x = jdropout.stochastic_depth(key, jnp.sin, x, 0.25)
        x = jdropout.stochastic_depth(key, jnp.sin, x, 0.25, deterministic=True)
        x = jdropout.layer_drop(key, lambda x: x + 1, x, 0.5)
        return jdropout.dropout(key, x, RATE)

    def traced(rate, key, x):
        return jdropout.layer_drop(key, lambda x: x + 1, x, rate)

    def saves(report):
        lines = str(report).splitlines()
        begin = lines[2].index("saves")
        return [line[begin:].split()[0] for line in lines[4 : 4 + len(report.sites)]]

    report = jdropout.audit(some, key, x)
    assert [site.saved_work for site in report.sites] == [0.25, 0, 0.5, 0]
    assert saves(report) == ["25%", "-", "50%", "-"]
    report = jdropout.audit(traced, jnp.float32(0.5), key, x)
    assert report.sites[0].saved_work is None
    assert saves(report) == ["traced"]


def test_a_function_without_dropout_has_a_report_of_one_line(x):
    report = jdropout.audit(jnp.sin, x)
    assert str(report) == "dropout in sin: 0 sites, 0 findings"
    report.assert_clean()


def test_a_report_is_json(key, x):
    report = jdropout.audit(mistaken, key, x)
    again = json.loads(json.dumps(report.to_dict()))
    assert again["name"] == "mistaken"
    assert [site["rate"] for site in again["sites"]] == [RATE, 1 / 3]
    assert again["findings"][0]["code"] == "key-reused"
    assert again["findings"][0]["sites"] == [0, 1]


def test_assert_clean_raises_the_table(key, x):
    report = jdropout.audit(mistaken, key, x)
    with pytest.raises(AssertionError, match=re.escape(str(report))):
        report.assert_clean()
    report.assert_clean(allow=["key-reused"])
    report.assert_clean(allow="key-reused")
    with pytest.raises(AssertionError):
        report.assert_clean(allow=["same-mask"])
    with pytest.raises(ValueError, match="key-reuse'"):
        report.assert_clean(allow=["key-reuse"])


def test_the_documentation_has_every_finding():
    page = pathlib.Path(__file__).parent.parent / "docs" / "audit.md"
    documented = re.findall(r"^\| `([a-z-]+)` ", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(FIXES)


# --- arguments ----------------------------------------------------------------------------


def test_arguments_may_be_abstract(key, x):
    abstract = jax.eval_shape(lambda: (key, x))
    concrete, from_shapes = jdropout.audit(mistaken, key, x), jdropout.audit(mistaken, *abstract)
    assert from_shapes.to_dict() == concrete.to_dict()


def test_numbers_that_must_be_static_stay_so(key):
    def step(key, rows, step, rate, mode, flag, sizes):
        assert isinstance(rows, int)
        assert mode == "train"
        key = jax.random.fold_in(key, step)
        return jdropout.dropout(key, jnp.ones((rows, *sizes)), rate) if flag else None

    report = jdropout.audit(step, key, 8, 3, RATE, "train", True, (4, 2))
    assert report.sites[0].shape == (8, 4, 2)
    assert report.sites[0].key_sources == ("key", "step")
    assert report.sites[0].rate == RATE
    report.assert_clean()
    jitted = jax.jit(step, static_argnums=(1, 3, 4, 5, 6))
    assert jdropout.audit(jitted, key, 8, 3, RATE, "train", True, (4, 2)) == report


def test_what_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="fn must be a function, got int"):
        jdropout.audit(3)


@pytest.mark.parametrize("arguments", [(1, 2.0), (jnp.ones(3), 2)])
def test_errors_of_the_function_come_through(arguments):
    def step(x, n):
        raise KeyError("a mistake in the function")

    with pytest.raises(KeyError, match="a mistake in the function") as raised:
        jdropout.audit(step, *arguments)
    assert raised.value.__context__ is None
    with pytest.raises(TypeError, match="missing"):
        jdropout.audit(step)


# --- an audit leaves no trace -------------------------------------------------------------


def test_an_audit_changes_no_mask_and_compiles_nothing_anew(key, x):
    traces = 0

    @jax.jit
    def step(key, x):
        nonlocal traces
        traces += 1
        return jdropout.dropout(key, x, RATE)

    before = step(key, x)
    jdropout.audit(step, key, x)
    jdropout.audit(step, key, x)
    during = traces
    np.testing.assert_array_equal(step(key, x), before)
    assert traces == during == 3
    assert "jdropout" not in str(jax.make_jaxpr(lambda key, x: mistaken(key, x))(key, x))


def test_an_audit_leaves_modules_as_they_are(x):
    model = jdropout.nnx.Dropout(RATE, rngs=nnx.Rngs(0))
    jdropout.audit(model, x)
    jdropout.audit(nnx.jit(lambda model, x: model(x)), model, x)
    assert model.rngs.count[...] == 0


def test_an_audit_uses_up_no_key(key, x):
    with jax.debug_key_reuse(True):
        jdropout.audit(mistaken, key, x)
        jdropout.audit(by_hand, key, x)
        jdropout.dropout(key, x, RATE)


def test_nothing_is_run(x):
    def called(_):
        raise AssertionError("it was run")

    def step(x):
        number = jax.pure_callback(called, jax.ShapeDtypeStruct((), jnp.int32), 0)
        jax.debug.callback(called, x)
        return jdropout.dropout(jax.random.key(number), x, RATE)

    assert len(jdropout.audit(step, x).sites) == 1


def test_an_audit_may_be_in_another_one(key, x):
    inner = []

    def step(key, x):
        inner.append(jdropout.audit(mistaken, key, x))
        return jdropout.dropout(key, x, RATE)

    outer = jdropout.audit(step, key, x)
    assert (len(outer.sites), len(inner[0].sites)) == (1, 2)
    jax.jit(step)(key, x)
    assert [len(report.findings) for report in inner] == [1, 1]


def test_audits_in_threads_do_not_mix(key, x):
    def step(count):
        def apply(key, x):
            for i in range(count):
                x = jdropout.dropout(jax.random.fold_in(key, i), x, RATE)
            return x

        return len(jdropout.audit(apply, key, x).sites)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(step, range(1, 6))) == list(range(1, 6))
