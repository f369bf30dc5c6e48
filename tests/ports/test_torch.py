"""The port's known answers, and its numbers against the library's.

Run by `pip install -e ".[test,ports]"` and `pytest tests/ports -m ports`.
"""

import jax
import jax.numpy as jnp
import known_answers
import law_twin
import numpy as np
import pytest

import jdropout

pytestmark = pytest.mark.ports

KEY = (0, 42)  # the words of jax.random.key(42)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def port(torch):
    return law_twin.load_port("torch/jdropout_torch.py")


@pytest.mark.parametrize("step", known_answers.STEPS, ids=lambda step: step.__name__)
def test_known_answers(step, port):
    step(port)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(
    ("rate", "options"), [(0.3, {}), (0.001, {}), (0.5, {"broadcast_dims": (1,)})]
)
def test_dropout_is_that_of_jax_in_both_passes(dtype, rate, options, torch, port):
    values = np.random.default_rng(0).standard_normal((3, 10, 7)) + 3
    x = torch.tensor(values, dtype=getattr(torch, dtype), requires_grad=True)
    y = port.dropout(KEY, x, rate, **options)
    (y.float() ** 2).sum().backward()

    with jax.enable_x64(dtype == "float64"):
        theirs = jnp.asarray(values, dtype)
        expected, pull = jax.vjp(
            lambda x: jdropout.dropout(jax.random.key(42), x, rate, **options), theirs
        )
        (gradient,) = pull((2 * expected.astype("float32")).astype(dtype))
        wide = dtype if dtype == "float64" else "float32"
        expected, gradient = (np.asarray(a.astype(wide)) for a in (expected, gradient))
    np.testing.assert_array_equal(y.detach().to(torch.float64), expected)
    np.testing.assert_array_equal(x.grad.to(torch.float64), gradient)


def test_nothing_is_stored_and_derivatives_have_any_order(torch, port):
    x = torch.linspace(1, 2, 60, dtype=torch.float64).reshape(6, 10).requires_grad_()
    stored = []

    def pack(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = port.dropout(KEY, x, 0.3)
    assert stored == []
    (slope,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    scale = 1 / (1 - port.effective_rate(0.3))
    mask = port.keep_mask(KEY, 0.3, x.shape)
    torch.testing.assert_close(curvature, torch.where(mask, 6 * x * scale**3, 0.0))


def test_evaluation_and_ends_of_the_rate(torch, port):
    x = torch.ones(4, 4)
    assert port.dropout(None, x, 0.3, training=False) is x
    assert port.dropout(None, x, 0.0) is x
    assert not port.dropout(KEY, x, 1.0).any()
    assert port.effective_rate(0.1) == jdropout.effective_rate(0.1)
    for arguments, message in (((KEY, x, 1.5), "rate must be"), ((None, x, 0.3), "key is missing")):
        with pytest.raises(ValueError, match=message):
            port.dropout(*arguments)


def test_of_equal_numbers_the_first_are_kept(torch, port, monkeypatch):
    alternating = torch.tensor([1, 0]).repeat(500)
    monkeypatch.setattr(port, "uniform_numbers", lambda *arguments: alternating)
    indices = port.keep_indices(KEY, 0.25, 1000, groups=2)
    expected = [i for i in range(1000) if i % 2 or i % 500 < 250]
    assert indices.tolist() == expected
