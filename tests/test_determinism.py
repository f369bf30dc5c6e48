"""`check_determinism` finds what is free to differ, and nothing where nothing is."""

import functools
import glob
import itertools
import json
import os
import pathlib
import random
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

import jdropout
import jdropout.nnx
from jdropout.keys import site_key
from jdropout.testing import check_determinism

X = np.ones((4, 8), np.float32)
INDEX = np.zeros((3,), np.int32)
UPDATES = np.ones((3, 8), np.float32)
KEY = jax.random.key(0)
FLAGS = "--xla_gpu_exclude_nondeterministic_ops=true --xla_gpu_autotune_level=0"


def check(function, *args, platform="cuda", **environment):
    return check_determinism(function, *args, platform=platform, environment=environment)


def codes(*args, **options):
    return {finding.code for finding in check(*args, **options).findings}


def on_devices(function, x=X, then=lambda x: x, **options):
    """The function on each device of a mesh, under check."""
    devices = np.array(jax.devices()[:1])
    mesh = Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    return codes(lambda x: then(mapped(x)), x, **options)


@pytest.fixture
def no_cache():
    """The tests have a compilation cache, next to which JAX puts its choice of kernels."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


# --- operations -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scatter", "collides"),
    [
        (lambda x, i, u: x.at[i].add(u), True),
        (lambda x, i, u: x.at[i].multiply(u), True),
        (lambda x, i, u: x.at[i].set(u), True),
        (lambda x, i, u: jax.ops.segment_sum(u, i, 4), True),
        (lambda x, i, u: jax.grad(lambda x: ((x * x)[i] * u)[0, 0])(x), True),
        (lambda x, i, u: jax.vmap(lambda x: x.at[i].add(u[:, 0]))(x.T), True),
        (lambda x, i, u: lax.fori_loop(0, 3, lambda _, x: x.at[i].add(u), x), True),
        (lambda x, i, u: x.at[i].set(u, unique_indices=True), False),
        (lambda x, i, u: x.at[i].add(u, unique_indices=True), False),
        (lambda x, i, u: x.at[i].max(u), False),
        (lambda x, i, u: x.at[i].min(u), False),
        (lambda x, i, u: x.at[1].set(u[0]), False),
        (lambda x, i, u: x.astype(jnp.int32).at[i].add(u.astype(jnp.int32)), False),
        (lambda x, i, u: x[i] * u, False),
    ],
)
def test_colliding_updates_have_an_order_on_a_gpu_alone(scatter, collides):
    expected = {"scatter-order"} if collides else set()
    found = functools.partial(codes, scatter, X, INDEX, UPDATES)
    assert found() == expected
    assert found(platform="cpu") == set()


@pytest.mark.parametrize("flag", ["deterministic_ops", "exclude_nondeterministic_ops"])
@pytest.mark.parametrize("value", ["", "=true", "=1", "=false"])
def test_a_flag_gives_colliding_updates_an_order(flag, value):
    def scatter(x, i, u):
        return x.at[i].add(u)

    expected = {"scatter-order"} if value == "=false" else set()
    flags = f"--xla_other=2 --xla_gpu_{flag}{value}"
    assert codes(scatter, X, INDEX, UPDATES, XLA_FLAGS=flags) == expected


def test_the_gradient_of_a_maximum_over_windows_is_a_scatter():
    def pool(x):
        return jnp.sin(lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "SAME"))

    assert "scatter-order" in codes(jax.grad(lambda x: pool(x).sum()), X)
    assert "scatter-order" not in codes(pool, X)


def dot(x):
    return jnp.dot(x, x.T, precision="highest")


def convolve(x):
    return lax.conv(x[None, None], x[None, None], (1, 1), "SAME", precision="highest")


@pytest.mark.parametrize(
    ("flags", "of_dot", "of_convolution"),
    [
        ("", ("runs", "machines"), ("runs", "machines")),
        ("--xla_gpu_deterministic_ops", None, None),
        ("--xla_gpu_autotune_level=0", None, ("runs",)),
        ("--xla_gpu_load_autotune_results_from=a.txt", None, ("runs",)),
        ("--xla_gpu_per_fusion_autotune_cache_dir=a", ("machines",), ("runs", "machines")),
        ("--xla_gpu_exclude_nondeterministic_ops", ("runs", "machines"), ("runs", "machines")),
        (FLAGS, None, None),
    ],
)
def test_kernels_are_chosen_by_time_unless_that_is_off(flags, of_dot, of_convolution, no_cache):
    for function, expected in ((dot, of_dot), (convolve, of_convolution)):
        findings = check(function, X, XLA_FLAGS=flags).findings
        between = {finding.code: finding.between for finding in findings}
        assert between.get("autotuning") == expected
        assert "autotuning" not in codes(function, X, platform="cpu")


def test_the_compilation_cache_keeps_the_choice_of_kernels(no_cache, tmp_path):
    for folder, expected in ((None, ("runs", "machines")), (str(tmp_path), ("machines",))):
        jax.config.update("jax_compilation_cache_dir", folder)
        (finding,) = (f for f in check(dot, X).findings if f.code == "autotuning")
        assert finding.between == expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.sum(), {"sum-order"}),
        (lambda x: jnp.cumsum(x, axis=1), {"sum-order"}),
        (lambda x: x[:2].sum(0), set()),  # two terms commute
        (lambda x: x.astype(jnp.int32).sum(), set()),
        (lambda x: x.max(), set()),
        (lambda x: jnp.dot(x, x.T), {"sum-order", "matmul-precision"}),
        (dot, {"sum-order"}),
        (lambda x: jnp.dot(x.astype(jnp.bfloat16), x.T.astype(jnp.bfloat16)), {"sum-order"}),
        (lambda x: jnp.argsort(x, stable=False), {"unstable-sort"}),
        (lambda x: jnp.argsort(x), set()),
        (lambda x: lax.sort(x, is_stable=False), set()),  # equal numbers are equal
        (lambda x: lax.approx_max_k(x, 2), {"approximate-top-k"}),
        (lambda x: lax.top_k(x, 2), set()),
        (lambda x: jax.pure_callback(np.sin, x, x), {"callback"}),
        (lambda x: jax.experimental.io_callback(np.sin, x, x), {"callback"}),
        (lambda x: jax.experimental.io_callback(print, None, x), {"callback"}),
        (lambda x: jax.experimental.io_callback(print, None, x, ordered=True), set()),
        (lambda x: jax.debug.print("{}", x), set()),
        (
            lambda x: jax.ffi.ffi_call("theirs", jax.ShapeDtypeStruct((), x.dtype))(x),
            {"opaque-kernel"},
        ),
        (lambda x: lax.rng_uniform(x[0, 0], x[0, 1], (3,)), {"stateful-random"}),
    ],
)
def test_other_operations(function, expected):
    assert codes(function, X, platform="tpu") == expected


def test_a_kernel_of_pallas_is_not_reordered():
    from jax.experimental import pallas as pl

    def kernel(x, y):
        y[...] = jnp.dot(x[...], x[...].T)

    assert (
        codes(pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((4, 4), X.dtype)), X) == set()
    )


def test_sums_over_gpus_follow_nccl():
    def total(x):
        return lax.psum(x, "data")

    assert on_devices(total) == {"nccl", "sum-order"}
    assert on_devices(total, NCCL_ALGO="^NVLS") == {"sum-order"}
    assert on_devices(total, NCCL_ALGO="NVLS") == {"nccl", "sum-order"}
    assert on_devices(total, platform="tpu") == {"sum-order"}
    assert on_devices(lambda x: lax.pmax(x, "data")) == set()
    assert on_devices(lambda x: lax.psum(x.astype(jnp.int32), "data")) == set()


def test_the_instructions_of_a_cpu_round_in_their_own_way():
    assert codes(jnp.tanh, X, platform="cpu") == {"instruction-set"}
    assert codes(jnp.tanh, X, platform="cpu", XLA_FLAGS="--xla_cpu_max_isa=AVX2") == set()
    assert codes(jnp.tanh, X) == codes(lambda x: x * 2, X, platform="cpu") == set()


# --- keys -----------------------------------------------------------------------------------


def test_a_key_of_the_device_is_found_where_it_is_made():
    def draw(x, fold):
        key = fold(jax.random.key(0), lax.axis_index("data"))
        return x + jax.random.uniform(key, x.shape, x.dtype)

    def in_a_loop(key, i):
        return lax.fori_loop(0, 3, lambda _, key: jax.random.fold_in(key, i), key)

    def in_a_branch(key, i):
        return lax.cond(i > 1, lambda key: jax.random.fold_in(key, i), lambda key: key, key)

    def made_in_a_branch(key, i):
        i = lax.cond(key.size > 1, lambda: jnp.int32(0), lambda: lax.axis_index("data"))
        return jax.random.fold_in(key, i)

    in_bodies = (in_a_loop, in_a_branch, made_in_a_branch)
    for fold in (jax.random.fold_in, jax.jit(jax.random.fold_in), *in_bodies):
        assert on_devices(functools.partial(draw, fold=fold)) == {"axis-index-key"}, fold
    assert (
        on_devices(functools.partial(draw, fold=lambda key, i: jax.random.fold_in(key, 1))) == set()
    )
    assert on_devices(functools.partial(draw, fold=lambda key, i: key)) == set()

    def by_position(x):
        start = (lax.axis_index("data") * x.shape[0], 0)
        return jdropout.dropout(KEY, x, 0.5, start=start, global_shape=(8, 8))

    def draw_afterwards(x):
        return jax.random.bits(jax.random.key(x[0, 0].astype(jnp.int32)), (3,), jnp.uint32)

    assert on_devices(by_position) == set()
    assert on_devices(by_position, then=draw_afterwards) == set()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys_of_the_kind_rbg_are_found_and_do_no_harm_to_our_masks(impl):
    def draw(key, shape=(3,)):
        return jax.random.bits(jax.random.fold_in(key, 1), shape, jnp.uint32)

    key = jax.random.key(0, impl=impl)
    keys = jax.random.split(key, 2)
    rbg = {"rbg"} if "rbg" in impl else set()
    assert codes(draw, key) == rbg
    assert codes(jax.vmap(draw), keys) == (rbg | {"rbg-vmap"} if rbg else set())
    split = {"rbg"} if impl == "unsafe_rbg" else set()
    assert codes(lambda key: jax.random.key_data(jax.random.split(key)), key) == split
    assert codes(lambda key, x: jdropout.dropout(key, x, 0.5), key, X) == set()
    unsafe = "--xla_tpu_spmd_rng_bit_generator_unsafe=1"
    for variable in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        for finding in check(draw, key, **{variable: unsafe}).findings:
            assert "every sharding" in finding.message


def test_the_generator_of_the_compiler_is_found_unless_it_is_named():
    def draw(words, algorithm):
        return lax.rng_bit_generator(words, (3,), algorithm=algorithm)[1]

    words = np.zeros(4, np.uint32)
    default, philox = (
        functools.partial(draw, algorithm=each)
        for each in (lax.RandomAlgorithm.RNG_DEFAULT, lax.RandomAlgorithm.RNG_PHILOX)
    )
    assert codes(default, words) == {"rbg"}
    assert codes(philox, words) == set()


def test_a_setting_of_threefry_changes_its_numbers_but_not_our_masks():
    def draw(key):
        return jax.random.bits(key, (3,), jnp.uint32)

    with jax.threefry_partitionable(False):
        assert codes(draw, KEY) == {"threefry"}
        assert codes(lambda key, x: jdropout.dropout(key, x, 0.5), KEY, X) == set()
    assert codes(draw, KEY) == set()


# --- Python ---------------------------------------------------------------------------------


counter = itertools.count()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + next(counter), "python-state"),
        (lambda x: x * np.random.rand(), "python-state"),
        (lambda x: x * random.random(), "python-state"),
        (
            lambda x: x + np.random.default_rng().normal(size=x.shape).astype(np.float32),
            "python-state",
        ),
        (lambda x: x + time.time(), "python-state"),  # equal in float32, but for another day
        (lambda x: x if next(counter) % 2 else x + 1, "python-state"),
        (lambda x: (x, next(counter)), "python-state"),
        (jax.jit(lambda x: x + next(counter)), "python-state"),
        (lambda x: lax.map(lambda x: x + next(counter), x), "python-state"),
        (lambda x: x + np.random.default_rng(0).random(), None),
        (lambda x: x + jax.process_index(), "process-index"),
        (lambda x: x * ["a", "b"].index("ab"[jax.process_index()]), "process-index"),
        (lambda x: x + [1, 2][: jax.process_index() + 1][-1], "process-index"),
        (lambda x: x + (1.0,)[jax.process_index()], "process-index"),  # fails in another process
        (lambda x: x + jax.process_count(), None),
    ],
)
def test_what_python_lets_into_a_program(function, expected):
    assert codes(function, X) == ({expected} if expected else set())


@pytest.mark.parametrize(
    "list_names",
    [
        lambda folder: os.listdir(folder),
        lambda folder: [entry.name for entry in os.scandir(folder)],
        lambda folder: [pathlib.Path(name).name for name in glob.glob(f"{folder}/*")],
        lambda folder: [path.name for path in pathlib.Path(folder).iterdir()],
    ],
)
def test_the_order_of_files_is_found_unless_they_are_sorted(list_names, tmp_path):
    for name in "abc":
        (tmp_path / name).touch()

    def step(x, order):
        for name in order(list_names(tmp_path)):
            x = x * ord(name)
        return x

    before = os.listdir, os.scandir, time.time, jax.process_index
    assert codes(functools.partial(step, order=list), X) == {"file-order"}
    assert codes(functools.partial(step, order=sorted), X) == set()
    assert before == (os.listdir, os.scandir, time.time, jax.process_index)


@pytest.mark.parametrize("on", [False, True])
def test_what_double_precision_changes_is_found(on):
    with jax.enable_x64(on):
        assert codes(lambda key, x: x + jax.random.normal(key, x.shape, x.dtype), KEY, X) == set()
        assert codes(lambda key, x: jdropout.dropout(key, x, 0.5), KEY, X) == set()
        assert codes(lambda key: jax.random.randint(key, (3,), 0, 9), KEY) == {"x64"}
        report = check(lambda x: jnp.linspace(0.0, 1.0, 3), X)
    (finding,) = report.findings
    assert finding.code == "x64"
    assert f"is {'on' if on else 'off'} here" in finding.message
    assert len(finding.places) == 1


# --- the report -----------------------------------------------------------------------------


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 8, rngs=rngs)
        self.dense = nnx.Linear(8, 8, precision="highest", rngs=rngs)
        self.dropout = jdropout.nnx.Dropout(0.1)

    def __call__(self, tokens, key):
        return self.dense(self.dropout(self.embed(tokens), rngs=key))


def test_a_model_is_located_and_unchanged_and_made_deterministic_by_flags():
    def loss(model, tokens, root, step):
        return model(tokens, site_key(root, step=step, site="hidden"))[0, 0]

    model, tokens = Model(nnx.Rngs(0)), jnp.zeros(3, jnp.int32)
    before = nnx.state(model)
    step = jax.tree_util.Partial(lambda *args: nnx.grad(loss)(*args))
    report = check(step, model, tokens, KEY, 0)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(model)))
    places = {
        f.code: {(p.path, p.location.split(":")[0]) for p in f.places} for f in report.findings
    }
    assert places["scatter-order"] == {("Model/embed", "test_determinism.py")}
    assert places["autotuning"] == {("Model/dense", "test_determinism.py")}
    with pytest.raises(AssertionError, match="scatter-order"):
        report.assert_clean(between="runs")
    check(step, model, tokens, KEY, 0, XLA_FLAGS=FLAGS).assert_clean(between=["runs", "machines"])


def test_what_is_accepted_depends_on_code_place_and_purpose():
    def step(x):
        return x.at[np.zeros(2, np.int32)].add(x[:2]).sum()

    report = check(step, X)
    assert [finding.code for finding in report.findings] == ["scatter-order", "sum-order"]
    report.assert_clean(allow=["scatter-order", "sum-order"])
    report.assert_clean(allow={"scatter-order": "test_determinism.py:*", "sum-order": "*"})
    report.assert_clean(between="machines")
    report.assert_clean(between="runs", allow="scatter-order")
    report.assert_clean(between=["devices"], allow="sum-order")
    for options in (
        {},
        {"between": "runs"},
        {"between": ["machines", "batch sizes"]},
        {"allow": "sum-order"},
        {"allow": {"scatter-order": "other.py:*", "sum-order": "*"}},
    ):
        with pytest.raises(AssertionError, match="determinism of step on cuda: 2 findings"):
            report.assert_clean(**options)
    for options in ({"between": "days"}, {"between": []}, {"allow": "sum"}):
        with pytest.raises(ValueError, match="must hold"):
            report.assert_clean(**options)


def test_a_report_in_words_and_as_data():
    def sums(x):
        for _ in range(7):
            x = x + x.sum()
        return jnp.stack([x.sum(), jnp.sin(x).sum(), x.sum(), x.sum(0)[0]])  # one line

    report = check(sums, X)
    (finding,) = report.findings
    assert [place.count for place in finding.places] == [7, 4]
    text = str(report)
    assert text.startswith(
        "determinism of sums on cuda: 1 finding\n\nsum-order (between devices, b"
    )
    assert "reduce_sum  in sums  7 times\n" in text
    assert f"\n  fix: {finding.fix}" in text
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["places"][0]["count"] == 7


def test_a_fingerprint_stands_for_program_and_constants():
    def step(x, order):
        for name in order:
            x = x * {"a": 2, "b": 3}[name]
        return x + np.full((4, 8), len(order), np.float32)

    def fingerprint(order):
        return check(functools.partial(step, order=order), X).fingerprint

    assert fingerprint("ab") == fingerprint("ab")
    assert len({fingerprint(order) for order in ("ab", "ba", "aab", "")}) == 4
    differences = (lambda x, y: x - y, lambda x, y: y - x)
    assert len({check(each, X, X).fingerprint for each in differences}) == 2


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"platform": "rocm"}, ValueError, "'cpu' or 'cuda' or 'tpu', got 'rocm'"),
        ({"environment": "XLA_FLAGS="}, TypeError, "environment must be a mapping"),
    ],
)
def test_wrong_arguments(options, error, match):
    with pytest.raises(error, match=match):
        check_determinism(jnp.sin, X, **options)
    with pytest.raises(TypeError, match="fn"):
        check_determinism(1.0)


def test_the_platform_and_the_environment_are_those_of_the_process(monkeypatch):
    assert check_determinism(jnp.sin, X).platform == jax.default_backend()
    assert check_determinism(jnp.sin, X, platform="gpu").platform == "cuda"
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    assert check_determinism(jnp.sin, X, platform="cpu").findings == ()
