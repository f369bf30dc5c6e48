"""Ctrl-C at any moment of what changes the process for a while: afterwards it is as it was."""

import contextlib
import contextvars
import os
import time

import cheap
import interrupts
import jax
import pytest
from flax import linen, nnx

import jdropout.linen
import jdropout.nnx
from jdropout import _flax, _flax_attention, _record
from jdropout.testing import _module_scopes
from jdropout.testing._determinism import compare


def replacing():
    with jdropout.nnx.replacing():
        pass


def names():
    return nnx.Dropout, nnx.MultiHeadAttention


def conditions():
    with compare._other_time(), compare._other_process(), compare._other_order():
        pass


def replaced_functions():
    return time.time, time.time_ns, os.listdir, os.scandir, jax.process_index


def naming():
    with _module_scopes.named_modules():
        pass


def calls_of_modules():
    return [vars(kind).get("__call__") for kind in _module_scopes._subclasses(nnx.Module)]


def recorded():
    _record.recorded(lambda: None)


def attention_call():
    _flax_attention.attention_call(lambda: None)


def variables():
    return contextvars.copy_context().get(_record._calls), _flax_attention._layer_call.get()


@pytest.mark.parametrize(
    ("function", "state"),
    [
        (replacing, names),
        (conditions, replaced_functions),
        (naming, calls_of_modules),
        (recorded, variables),
        (attention_call, variables),
    ],
)
def test_what_is_changed_for_a_while_is_as_before(function, state, monkeypatch):
    # Not all modules of this process, nor all classes of the tests.
    monkeypatch.setattr(_flax, "sys", type("sys", (), {"modules": {}}))
    # JAX's context is left as it is if Ctrl-C comes between it and ours, for all tests that follow.
    for module in (_module_scopes, _record):
        monkeypatch.setattr(module, "set_xla_metadata", lambda **_: contextlib.nullcontext())
    kinds = {nnx.Linear, nnx.Dropout, jdropout.nnx.Dropout}
    monkeypatch.setattr(_module_scopes, "_subclasses", lambda kind: kinds)
    before = state()
    total = interrupts.count(function)
    assert total >= 2
    for moment in range(total):
        assert interrupts.interrupt(function, moment)
        assert state() == before, moment
    assert not interrupts.interrupt(function, total)


@pytest.mark.parametrize("package", [jdropout.nnx, jdropout.linen])
def test_install_binds_all_names_or_none(package, monkeypatch):
    monkeypatch.setattr(_flax, "sys", type("sys", (), {"modules": {}}))
    framework, classes = (nnx, linen)[package is jdropout.linen], package._replace._CLASSES

    def bound():
        return [getattr(framework, name) is ours for name, (_, ours) in classes.items()]

    for moment in range(interrupts.count(package.install)):
        package.uninstall()
        assert interrupts.interrupt(package.install, moment)
        assert len(set(bound())) == 1, moment
    for moment in range(interrupts.count(package.uninstall)):
        package.install()
        assert interrupts.interrupt(package.uninstall, moment)
        assert len(set(bound())) == 1, moment
    package.uninstall()
    assert not any(bound())


def test_attention_that_was_half_replaced_is_replaced():
    model = nnx.MultiHeadAttention(
        2, 4, dropout_rate=0.5, kernel_init=cheap.UNIFORM, rngs=nnx.Rngs(0)
    )
    model.attention_fn = jdropout.nnx.dot_product_attention  # the last thing before its class
    assert jdropout.nnx.replace_dropout(model) == 1
    assert type(model) is jdropout.nnx.MultiHeadAttention
