"""Findings about sites that are off, and streams that advance in one branch."""

import jax
import jax.numpy as jnp
import pytest
from cheap import UNIFORM
from flax import nnx

import jdropout
import jdropout.nnx

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


class Layer(nnx.Module):
    def __init__(self, rate=0.5):
        self.dropout = jdropout.nnx.Dropout(rate, deterministic=None)

    def __call__(self, x, key, deterministic=True):
        return self.dropout(x, rngs=key, deterministic=deterministic)


class Model(nnx.Module):
    def __init__(self, rate=0.5):
        self.told = Layer()
        self.forgotten = Layer(rate)

    def __call__(self, x, key, deterministic):
        a, b = jax.random.split(key)
        return self.forgotten(self.told(x, a, deterministic), b)


def test_a_site_that_is_off_while_others_are_on_is_found():
    report = jdropout.audit(lambda model, key: model(X, key, False), Model(), KEY)
    (finding,) = report.findings
    assert (finding.code, finding.sites) == ("off-while-others-are-on", (1,))
    assert "it is switched off, while 1 of the same program drop" in finding.message


def test_no_site_is_off_by_mistake_if_all_are_off_or_it_is_on_elsewhere():
    jdropout.audit(lambda model, key: model(X, key, True), Model(), KEY).assert_clean()
    jdropout.audit(lambda model, key: model(X, key, False), Model(rate=0.0), KEY).assert_clean()

    def train_and_check(layer, key):
        return [layer(X, key, flag) for flag in (False, True)]

    jdropout.audit(train_and_check, Layer(), KEY).assert_clean()


def test_findings_may_be_accepted_at_some_paths_only():
    def train(model, key):
        a, b = jax.random.split(key)
        return model.told(model.forgotten(X, a, False), b, False)

    report = jdropout.audit(train, Model(rate=0.0), KEY)
    assert [finding.code for finding in report.findings] == ["rate-zero"]
    report.assert_clean(allow={"rate-zero": "*/dropout"})
    report.assert_clean(allow=["rate-zero"])
    with pytest.raises(AssertionError, match="rate-zero"):
        report.assert_clean(allow={"rate-zero": "Encoder/*"})
    with pytest.raises(ValueError, match="codes of findings"):
        report.assert_clean(allow={"rate": "*"})


def test_a_stream_that_advances_in_one_branch_of_a_conditional_is_clean():
    model = nnx.Sequential(
        nnx.Linear(4, 4, kernel_init=UNIFORM, rngs=nnx.Rngs(0)),
        jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(1)),
    )
    graph, state = nnx.split(model)

    def step(state, run):
        model = nnx.merge(graph, state)
        y = nnx.cond(run, lambda model, x: model(x), lambda model, x: x, model, X)
        return y.sum(), nnx.state(model)

    jdropout.audit(step, state, jnp.array(True)).assert_clean()

    def forgets(state, run):
        return step(state, run)[0]

    report = jdropout.audit(forgets, state, jnp.array(True))
    assert [finding.code for finding in report.findings] == ["key-independent-of-step"]
