"""The example train_charlm.py: its runs, and where its model draws which masks."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_runs import EXAMPLES, assert_is_picture, run_twice
from flax import nnx

import jdropout
from jdropout.nnx import set_site_keys

KINDS = ["embedding_dropout", "locked_dropout", "drop_connect", "zoneout"]
HALF = dict.fromkeys(KINDS, 0.5)


@pytest.fixture
def charlm(monkeypatch):
    """The example as a module, under JAX's usual promotion, which it relies on."""
    monkeypatch.syspath_prepend(EXAMPLES)  # they import each other, as scripts do
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield importlib.import_module("train_charlm")


def parse(charlm, monkeypatch, tmp_path, *options):
    monkeypatch.setattr("sys.argv", ["train_charlm.py", "--output", str(tmp_path), *options])
    return charlm.parse_options()


@pytest.mark.examples
def test_the_table_has_a_row_for_each_training_and_another_process_gives_the_same_parameters(
    tmp_path,
):
    settings = ["--steps=3", "--width=8", "--context=8", "--batch-size=4", "--train-chars=2000"]
    # Nearly all of the time goes into compiling, for two kinds instead of all four.
    settings += ["--embedding-dropout=0", "--locked-dropout=0"]
    text = run_twice("train_charlm.py", *settings, "--output", tmp_path)
    rows = re.findall(r"│ (\w[\w ]*\w) +│ \d\.\d{3} +│ \d\.\d{3} +│ \d\.\d{3} +│ \d", text)
    assert rows == ["no dropout", "drop_connect", "zoneout", "all together"]
    assert "2000 characters for training, 1000 held out; layers: 1, width: 8" in text
    assert "held-out loss with dropout minus without: " in text
    assert_is_picture(tmp_path / "train_charlm.png")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--zoneout", "1"), ("--locked-dropout", "nan"), ("--layers", "0"), ("--context", "1000")],
)
def test_bad_options_are_named(charlm, monkeypatch, tmp_path, capsys, option, value):
    with pytest.raises(SystemExit):
        parse(charlm, monkeypatch, tmp_path, "--train-chars=2000", option, value)
    assert f"argument {option}: got {value}, pass " in capsys.readouterr().err


def test_all_kinds_are_compared_but_those_at_rate_0(charlm, monkeypatch, tmp_path, capsys):
    options = parse(charlm, monkeypatch, tmp_path)
    assert list(charlm.settings(options)) == ["no dropout", *KINDS, "all together"]
    off = ["--embedding-dropout=0", "--drop-connect=0"]
    options = parse(charlm, monkeypatch, tmp_path, *off, "--zoneout=0.4")
    both = {"locked_dropout": options.locked_dropout, "zoneout": 0.4}
    assert charlm.settings(options) == {
        "no dropout": {},
        "locked_dropout": {"locked_dropout": options.locked_dropout},
        "zoneout": {"zoneout": 0.4},
        "all together": both,
    }
    options = parse(charlm, monkeypatch, tmp_path, *off, "--locked-dropout=0")
    assert list(charlm.settings(options)) == ["no dropout", "zoneout"]
    with pytest.raises(SystemExit):
        parse(charlm, monkeypatch, tmp_path, *off, "--locked-dropout=0", "--zoneout=0")
    assert "pass a rate above 0" in capsys.readouterr().err


def test_all_trainings_start_from_the_same_parameters(charlm):
    models = [charlm.CharLM(1, 16, rates, nnx.Rngs(0)) for rates in ({}, HALF)]
    plain, dropped = (jax.tree.leaves(nnx.state(model, nnx.Param)) for model in models)
    assert len(plain) == 6
    for a, b in zip(plain, dropped, strict=True):
        np.testing.assert_array_equal(a, b)


class Recorder(nnx.OptimizedLSTMCell):
    """Puts out the recurrent weights that it finds at a time step."""

    def __call__(self, carry, inputs):
        return carry, self.dense_h.kernel[...]


def test_recurrent_weights_have_one_mask_for_all_time_steps(charlm, key):
    model = charlm.CharLM(1, 16, {"drop_connect": 0.5}, nnx.Rngs(0))
    model.layers[0].module.cell.cell = Recorder(16, 16, rngs=nnx.Rngs(1))

    @nnx.jit
    def weights(model, step):
        set_site_keys(model, key, step=step)
        return model.layers[0](np.ones((2, 5, 16), np.float32))  # (16, time, 64)

    first, other = (np.asarray(weights(model, step)) for step in range(2))
    assert first.shape == (16, 5, 64)
    np.testing.assert_array_equal(first, np.broadcast_to(first[:, :1], first.shape))
    assert 0.4 < (first[:, 0] == 0).mean() < 0.6  # of 1024 weights, at rate 0.5
    assert 0.4 < ((first == 0) != (other == 0)).mean() < 0.6


class Ones(nnx.Module):
    def __call__(self, x):
        return jnp.ones_like(x)


@pytest.mark.parametrize("layers", [[], [Ones()]], ids=["inputs", "outputs"])
def test_units_have_one_mask_for_all_time_steps(charlm, layers):
    model = charlm.CharLM(0, 16, {"locked_dropout": 0.5}, nnx.Rngs(0))
    model.layers = nnx.List(layers)
    letters = np.full((3, 6), 7)  # one character again and again
    logits = np.asarray(model(letters))
    np.testing.assert_array_equal(logits, np.broadcast_to(logits[:, :1], logits.shape))
    assert not np.allclose(logits[0], logits[1], atol=1e-3)
    assert not np.allclose(logits, model(letters), atol=1e-3)


def training_of(charlm, layers):
    """Returns what a training with all kinds of dropout consists of, and its parameters."""
    model = charlm.CharLM(layers, 8, HALF, nnx.Rngs(0))
    structure, params, streams = nnx.split(model, nnx.Param, ...)
    return charlm.Training(structure, streams, optax.sgd(0.1), batch_size=2, context=6), params


@pytest.mark.examples
def test_evaluation_draws_nothing(charlm, key):
    training, params = training_of(charlm, layers=1)
    windows = jax.random.randint(key, (2, 7), 0, 96)

    @jax.jit
    def results(step):
        model = training.model(params)
        set_site_keys(model, key, step=step)
        keyed = training._replace(streams=nnx.state(model, nnx.RngState))
        return charlm.evaluate(keyed, params, windows), model(windows)

    (loss, logits), (other_loss, other_logits) = results(0), results(1)
    assert loss == other_loss
    assert not np.allclose(logits, other_logits, atol=1e-3)


@pytest.mark.examples
def test_an_audit_of_the_step_finds_all_sites_and_nothing_wrong(charlm, key):
    training, params = training_of(charlm, layers=1)
    state = charlm.State(params, training.optimizer.init(params))

    def step(state, text, key, step):
        return charlm.train_step(training, state, text, key, step)

    report = jdropout.audit(step, state, jnp.zeros(100, jnp.int32), key, np.int32(0))
    assert report.findings == ()
    counts = {kind: [site.kind for site in report.sites].count(kind) for kind in KINDS}
    assert counts == dict(zip(KINDS, [1, 2, 1, 2], strict=True))
    assert all(set(site.key_sources) == {"key", "step"} for site in report.sites)
