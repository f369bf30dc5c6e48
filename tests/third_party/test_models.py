"""Models of other packages, unedited, before and after `install`.

Run by `pip install -e '.[third_party]'` and `pytest tests/third_party -m third_party`.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jdropout
import jdropout.linen
import jdropout.nnx

pytestmark = pytest.mark.third_party

KEY = jax.random.key(0)
IDS = np.arange(10).reshape(2, 5)
POSITIONS = np.broadcast_to(np.arange(5), IDS.shape)
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 20,
}


def bert(transformers):
    model = transformers.FlaxBertForSequenceClassification(transformers.BertConfig(**SMALL))
    more = (
        jnp.ones_like(IDS),
        jnp.zeros_like(IDS),
        POSITIONS,
        None,
    )
    return model, (IDS, *more)


def gpt2(transformers):
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    model = transformers.FlaxGPT2LMHeadModel(config)
    more = (jnp.ones_like(IDS), POSITIONS)
    return model, (IDS, *more)


def vit(transformers):
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    config = transformers.ViTConfig(
        **sizes,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    model = transformers.FlaxViTForImageClassification(config)
    return model, (jnp.ones((2, 8, 8, 3)),)


def roberta(transformers):
    config = transformers.RobertaConfig(**SMALL, max_position_embeddings=16)
    model = transformers.FlaxRobertaForSequenceClassification(config)
    more = (
        jnp.ones_like(IDS),
        jnp.zeros_like(IDS),
        POSITIONS,
        None,
    )
    return model, (IDS, *more)


def bart(transformers):
    config = transformers.BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    model = transformers.FlaxBartForConditionalGeneration(config)
    ones = jnp.ones_like(IDS)
    return model, (IDS, ones, IDS, ones, POSITIONS, POSITIONS)


class Trained:
    """A model of Hugging Face: its loss in training, and its evaluation."""

    def __init__(self, make):
        transformers = pytest.importorskip("transformers", reason="pip install '.[third_party]'")
        self.model, self.inputs = make(transformers)

    def logits(self, params, key, *, train, apply=None):
        rngs = {"dropout": key} if train else {}
        apply = apply or self.model.module.apply
        return apply({"params": params}, *self.inputs, deterministic=not train, rngs=rngs)[0]

    def loss(self, params, key):
        return jnp.square(self.logits(params, key, train=True)).mean()


@pytest.fixture(autouse=True)
def promotion():
    """Other people's models are not as strict as our tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def installed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that were bound before
        jdropout.linen.install()
        yield
        jdropout.linen.uninstall()


# The table in docs/migration.md: sites, those that are ours, bytes stored before and after.
TABLE = {
    bert: (8, 6, 1032, 248),
    gpt2: (7, 5, 1000, 240),
    vit: (7, 5, 1000, 240),
    roberta: (9, 7, 1064, 256),
    bart: (7, 7, 1120, 56),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("make", TABLE, ids=lambda make: make.__name__)
def test_a_model_of_hugging_face_runs_unedited(make, request):
    before = Trained(make)
    params = before.model.params
    evaluated = before.logits(params, KEY, train=False)
    report_before = jdropout.audit(before.loss, params, KEY)

    request.getfixturevalue("installed")
    after = Trained(make)
    np.testing.assert_allclose(
        after.logits(params, KEY, train=False), evaluated, rtol=1e-5, atol=1e-6
    )
    loss, gradient = jax.jit(jax.value_and_grad(after.loss))(params, KEY)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))

    report = jdropout.audit(after.loss, params, KEY)
    drops = [site for site in report.sites if site.effective_rate]  # before, others are not seen
    assert len(drops) == len(report_before.sites)
    ours = [site for site in drops if site.kind != "bernoulli"]
    assert all("/" in site.path and site.stored_bytes == 8 for site in ours)
    stored = [sum(site.stored_bytes for site in each.sites) for each in (report_before, report)]
    assert (len(drops), len(ours), *stored) == TABLE[make]

    apply = jdropout.linen.with_site_keys(after.model.module.apply, KEY, step=3)
    keyed = [apply({"params": params}, *after.inputs, deterministic=False)[0] for _ in range(2)]
    np.testing.assert_array_equal(*keyed)
    assert (keyed[0] != evaluated).any()


@pytest.mark.filterwarnings("default")
def test_a_model_of_hugging_face_is_sampled():
    bert_model = Trained(bert)
    params = bert_model.model.params

    def call(module, x):
        return module(*x).logits

    prediction = jdropout.linen.mc_predict(
        bert_model.model.module, {"params": params}, bert_model.inputs, KEY,
        num_samples=400, apply=call,
    )  # fmt: skip
    keys = jax.random.split(KEY, 400)
    samples = jax.vmap(lambda key: bert_model.logits(params, key, train=True))(keys)
    np.testing.assert_allclose(prediction.variance, samples.var(0), rtol=0.4)


def test_a_module_in_a_model_of_numpyro():
    numpyro = pytest.importorskip("numpyro", reason="pip install '.[third_party]'")
    from numpyro.contrib.module import flax_module

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(4)(x)
            return linen.Dropout(0.5, deterministic=False)(x)

    def model(x):
        net = flax_module("net", Net(), apply_rng=["dropout"], input_shape=x.shape)
        return net(x, rngs={"dropout": numpyro.prng_key()})

    def run(key, x):
        return numpyro.handlers.seed(model, key)(x)

    x = jnp.ones((3, 4))
    replaced = jdropout.linen.replacing()(run)
    kinds = [jdropout.audit(fn, KEY, x).sites[0].kind for fn in (run, replaced)]
    assert kinds == ["bernoulli", "dropout"]


def test_a_model_of_nnx_that_flax_ships():
    class Decoder(nnx.Module):
        def __init__(self, rngs):
            cell = nnx.OptimizedLSTMCell(4, 8, rngs=rngs)
            self.rnn = nnx.RNN(cell)
            self.attention = nnx.MultiHeadAttention(
                2, 8, dropout_rate=0.1, decode=False, rngs=rngs, keep_rngs=True
            )
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.attention(self.rnn(x), deterministic=False))

    model = Decoder(nnx.Rngs(0))
    assert jdropout.nnx.replace_dropout(model) == 2
    jdropout.nnx.set_site_keys(model, KEY, step=0)
    report = jdropout.audit(Decoder.__call__, model, jnp.ones((2, 3, 4)))
    report.assert_clean()
    assert [site.kind for site in report.sites] == ["attention", "dropout"]


def test_dropout_in_a_function_of_haiku():
    haiku = pytest.importorskip("haiku", reason="pip install '.[third_party]'")

    @haiku.transform
    def net(x):
        x = haiku.Linear(8)(x)
        return jdropout.dropout(haiku.next_rng_key(), x, 0.5)

    x = jnp.ones((3, 4))
    params = net.init(KEY, x)
    report = jdropout.audit(lambda key: net.apply(params, key, x), KEY)
    report.assert_clean()
    assert [site.kind for site in report.sites] == ["dropout"]

    def sample(key, params, x):
        return net.apply(params, key, x)

    prediction = jdropout.mc_predict(sample, KEY, params, x, num_samples=400)
    whole = x @ params["linear"]["w"] + params["linear"]["b"]
    np.testing.assert_allclose(prediction.variance, np.square(whole), rtol=0.4)
