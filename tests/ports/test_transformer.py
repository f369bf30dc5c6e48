"""A transformer ported to PyTorch is the example's: masks, values, gradients and a training."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import optax
import pytest
from flax import nnx

import jdropout.nnx

pytestmark = pytest.mark.ports


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """JAX's defaults, which the example needs."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def prove(promotion):
    pytest.importorskip("torch")
    sys.path.append(str(law_twin.PORTS / "torch"))
    import prove_transformer

    return prove_transformer


@pytest.fixture(scope="module")
def case(prove):
    return prove.Case(prove.small())


@pytest.fixture(scope="module")
def losses(prove, case):
    return prove.train_example(case)[0]


@pytest.fixture(scope="module")
def values(prove, case):
    return prove.example_in_float64(case, 1)[0]


@pytest.mark.parametrize("step", [0, 99])
def test_every_mask_is_the_examples(step, prove, case):
    theirs, ours = prove.masks_of_example(case, step), prove.masks_of_port(case, step)
    assert [mask.shape[1:] for mask in theirs] == [
        (32, 32),
        *[(4, 32, 32), (32, 32), (32, 128), (32, 32)] * 2,
    ]
    for their_mask, our_mask in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(our_mask, their_mask)
        assert 0.88 < their_mask.mean() < 0.92


def test_values_and_gradients_agree_in_float64(prove, case):
    assert max(prove.compare_float64(case)) < prove.TOLERANCE


def test_updates_agree_in_float64(prove, case):
    # Optax computes the learning rate in float32, and how it is rounded is up to XLA.
    assert prove.compare_updates(case) < 1e-6
    for planted in (prove.decay, prove.adams_epsilon):
        with planted():
            assert prove.compare_updates(case) > 1e-3


def test_losses_agree_at_every_one_of_100_steps(prove, case, losses):
    ours = prove.train_port(case)
    assert len(ours) == len(losses) == 100
    np.testing.assert_allclose(ours, losses, rtol=prove.LIMIT, atol=0)
    assert losses[-1] < 0.7 * losses[0]


def test_losses_differ_with_other_masks_and_without(prove, case, losses):
    steps = 7
    differing = {"root": prove.train_port(case, prove.OTHER_ROOT, steps)}
    for control in (prove.no_dropout, prove.own_masks):
        with control():
            differing[control.__name__] = prove.train_port(case, last=steps)
    for ours in differing.values():
        assert prove.off_by(losses, ours)[0] > 50 * prove.LIMIT


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("epsilon", "blocks.0.hidden_norm#0"),
        ("scale", "blocks.0.attention.out#0"),
        ("exact_gelu", "blocks.0.dropout#1"),
        ("transposed", "blocks.0.attention.out#0"),
        ("after_residual", "blocks.0.dropout#0"),
        ("after_next_call", "blocks.0.attention.out#0"),
        ("nominal_scale", "dropout#0"),
    ],
)
def test_a_planted_error_is_located(planted, name, prove, case, values):
    with getattr(prove, planted)():
        assert prove.locate(case, values).name == name


def test_a_port_without_errors_has_no_difference(prove, case, values):
    assert prove.locate(case, values) is None


def test_evaluation_has_the_same_values(prove, case):
    theirs = nnx.merge(case.structure, case.params)(case.batches[0][:, :-1], None)
    ours = case.port()(case.windows(0)[:, :-1], None)
    assert prove.named_values.deviation(theirs, ours.detach().numpy()) < 1e-5


def test_records_without_a_common_name_are_no_agreement(prove):
    one = {"a#0": np.ones(2)}
    with pytest.raises(ValueError, match="no name in common"):
        prove.first_difference(one, {"b#0": np.ones(2)}, 1.0)
    assert prove.first_difference(one, {"a#0": np.ones(3)}, 1.0).deviation == np.inf
    nan = prove.first_difference(one, {"a#0": np.array([1, np.nan])}, 1.0)
    assert nan.name == "a#0"


def test_the_learning_rate_is_optaxs(prove):
    theirs = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps=10, decay_steps=100)
    ours = functools.partial(prove.transformer.learning_rate, steps=100, peak=3e-3)
    rates = [ours(step) for step in range(100)]
    np.testing.assert_allclose(rates, jax.vmap(theirs)(np.arange(100)), rtol=1e-5, atol=1e-9)


def test_the_keys_of_set_site_keys(prove):
    port = law_twin.load_port("torch/jdropout_torch.py")
    model = nnx.List([jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)) for _ in range(2)])
    jdropout.nnx.set_site_keys(model, jax.random.key(42), step=7)
    for layer in range(2):
        stream = port.site_key((0, 42), step=7, site=(layer, "rngs"))
        for call in range(2):
            mask = port.keep_mask(port.fold_in(stream, call), 0.5, (5, 8))
            np.testing.assert_array_equal(model[layer](jnp.ones((5, 8))) != 0, mask)


def test_the_guides_code_runs(prove, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (law_twin.PORTS.parent / "docs" / "porting.md").read_text()
    flax_model = nnx.merge(case.structure, case.params)
    printed = []
    names = {"flax_model": flax_model, "characters": np.asarray(case.batches[0])[:, :-1]}
    names["print"] = printed.append
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    assert printed == [None]
