"""The contract of all Flax layers: each is a function of this library at a key of its stream."""

import copy
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, linen, nnx
from flax_layers import (
    DROPPING,
    LAYERS,
    WITH_RATE,
    Recorder,
    X,
    assert_same,
    by_names_of_linen,
    class_name,
    count_of,
    linen_layer,
    next_key,
    nnx_layer,
    same,
)

import jdropout
import jdropout.linen
import jdropout.nnx
from jdropout.keys import at_site, site_key

FRAMEWORKS = {"nnx": jdropout.nnx, "linen": jdropout.linen}
FLAGS = {"self", "deterministic", "rng_collection", "rngs", "parent", "name"}
# Flax's initializers of linen and its cells of nnx are closures.
UNPICKLABLE = {
    "nnx": ("Zoneout",),
    "linen": ("Zoneout", "VariationalDense", "DropConnect", "EmbeddingDropout"),
}

every = pytest.mark.parametrize("name", LAYERS)
both = pytest.mark.parametrize("framework", FRAMEWORKS)


def make(framework, name, *rate, **flags):
    """A layer without a stream, whose flag is left to the call unless it is given."""
    flags = {"deterministic": None} | flags
    if framework == "linen":
        return LAYERS[name].linen(*rate, **flags)
    rngs = nnx.Rngs(0) if name == "VariationalDense" else None  # for its parameters
    layer = LAYERS[name].nnx(*rate, rngs=rngs, **flags)
    layer.rngs = nnx.data(None)
    return layer


def caller(framework, name, **flags):
    """A function that calls a layer with the table's parameters and input."""
    if framework == "nnx":
        layer = nnx_layer(name, **flags)
        return lambda key=None, **call: layer(*LAYERS[name].args, rngs=key, **call)
    layer, variables = linen_layer(name, **flags)
    return lambda key=None, **call: layer.apply(variables, *LAYERS[name].args, rng=key, **call)


# --- the interface ------------------------------------------------------------------------


@both
def test_every_layer_is_in_the_table(framework):
    module = FRAMEWORKS[framework]
    base = {"nnx": nnx.Module, "linen": linen.Module}[framework]
    exported = [getattr(module, name) for name in module.__all__]
    layers = {x.__name__ for x in exported if inspect.isclass(x) and issubclass(x, base)}
    # These have test files of their own.
    others = {name for name in layers if "Attention" in name} | {"LayerDrop", "MultiSample"}
    others |= {"StochasticDepth", "LayerSubset", "RouteTokens", "UnitSubset"}
    assert layers - others == {class_name(name) for name in LAYERS}


@both
@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name].function])
def test_options_are_those_of_the_function_and_kept_as_attributes(framework, name):
    kind, function = getattr(FRAMEWORKS[framework], class_name(name)), LAYERS[name].function
    options, of_function = (inspect.signature(f).parameters for f in (kind.__init__, function))
    own = set(options) - FLAGS
    assert own - {"rate", "stddev"} >= set(LAYERS[name].options)
    for option in own:
        assert options[option].default == of_function[option].default
    layer = make(framework, name, deterministic=True, rng_collection="noise")
    for option, value in LAYERS[name].options.items():
        assert getattr(layer, option) == value
    assert (layer.deterministic, layer.rng_collection) == (True, "noise")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_table_has_a_value_other_than_the_default_for_every_option(framework):
    missing = set()
    for name in filter(lambda name: LAYERS[name].function, LAYERS):
        kind = getattr(FRAMEWORKS[framework], class_name(name))
        parameters = inspect.signature(kind.__init__).parameters
        rows = [row for other, row in LAYERS.items() if class_name(other) == class_name(name)]
        for option in set(parameters) - FLAGS - {row.arguments for row in rows}:
            default = parameters[option].default
            if all(row.options.get(option, default) == default for row in rows):
                missing.add((name, option))
    assert not missing


@pytest.mark.parametrize("name", WITH_RATE)
@both
def test_impossible_rates_are_refused_at_construction(framework, name):
    amount = "stddev" if name == "GaussianNoise" else "rate"
    with pytest.raises(ValueError, match=f"{amount} must be .*got -0.1"):
        make(framework, name, -0.1)
    with pytest.raises(TypeError, match=f"{amount} must be a.*number"):
        make(framework, name, "a")
    if framework == "nnx":
        with pytest.raises(TypeError, match=f"{amount} must be a Python number.*leaf"):
            make(framework, name, jnp.float32(0.5))


@both
def test_the_other_amounts_are_checked_as_well(framework):
    module = FRAMEWORKS[framework]
    for kind in (module.Dropout, module.DropPath, module.SpatialDropout):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 1.5"):
            kind(1.5)
    with pytest.raises(ValueError, match="rate must be below 1"):
        module.GaussianDropout(1.0)
    for rate in (0.0, 1.0):
        with pytest.raises(ValueError, match="initial_rate must be between 0 and 1"):
            module.ConcreteDropout(rate)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got 2.0"):
        module.Zoneout(None, (0.5, 2.0))


@pytest.mark.parametrize("name", [name for name in WITH_RATE if name != "GaussianNoise"])
def test_impossible_rates_are_refused_later(name):
    layer = make("nnx", name)
    before = layer.rate
    for rate, error in [(1.5, ValueError), (jnp.float32(0.5), TypeError), ("a", TypeError)]:
        with pytest.raises(error, match="rate must be"):
            jdropout.nnx.set_rate(layer, rate)
    assert layer.rate == before
    assert jdropout.nnx.set_rate(layer, np.float32(0.25)) == 1
    assert (type(layer.rate), layer.rate) == (float, 0.25)


@both
@every
def test_dtype_and_shape_are_those_of_the_function(framework, name):
    layer, variables = linen_layer(name, deterministic=False)
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        LAYERS[name].args,
    )
    if name in ("EmbeddingDropout", "DropConnect", "Zoneout", "VariationalDense"):
        half = LAYERS[name].args  # the parameters' dtype decides
    key = jax.random.key(0)
    if framework == "linen":
        y = jax.eval_shape(lambda *args: layer.apply(variables, *args, rng=key), *half)
    else:
        y = jax.eval_shape(lambda *args: nnx_layer(name)(*args, rngs=key), *half)
    expected = jax.eval_shape(lambda: LAYERS[name].expected(LAYERS[name].params, key))
    dtype = jnp.bfloat16 if half[0].dtype == jnp.bfloat16 else jnp.float32
    assert [part.shape for part in jax.tree.leaves(y)] == [
        part.shape for part in jax.tree.leaves(expected)
    ]
    assert jax.tree.leaves(y)[0].dtype == dtype


# --- training -----------------------------------------------------------------------------


@both
@every
def test_a_key_in_the_call_is_the_very_key_of_the_function(framework, name, key):
    expected = LAYERS[name].expected(LAYERS[name].params, key)
    call = caller(framework, name, deterministic=False)
    assert_same(call(key), expected)
    if name == "Dropout":
        assert_same(call(jax.random.key_data(key)), expected)


@every
def test_nnx_takes_one_key_for_each_call_from_its_own_stream(name):
    layer, outputs = nnx_layer(name), []
    for calls in (1, 2):
        expected = LAYERS[name].expected(LAYERS[name].params, next_key(layer))
        outputs.append(layer(*LAYERS[name].args))
        assert_same(outputs[-1], expected)
        assert count_of(layer) == calls
    assert not same(*outputs)


@every
def test_nnx_takes_keys_from_rngs_or_a_stream_of_the_call(name):
    layer = nnx_layer(name, rng_collection="noise")
    rngs = nnx.Rngs(noise=5)
    for count, source in enumerate((rngs, rngs["noise"])):
        taken = jax.random.fold_in(jax.random.key(5), count)
        expected = LAYERS[name].expected(LAYERS[name].params, taken)
        assert_same(layer(*LAYERS[name].args, rngs=source), expected)
    assert int(rngs["noise"].count[...]) == 2
    assert count_of(layer) == 0


@every
def test_linen_takes_a_key_from_the_stream_of_its_collection(name, key):
    layer, variables = linen_layer(name, deterministic=False, rng_collection="noise")
    outputs = []
    for own in jax.random.split(key):
        taken = Recorder("noise").apply({}, rngs={"noise": own})
        outputs.append(layer.apply(variables, *LAYERS[name].args, rngs={"noise": own}))
        assert_same(outputs[-1], LAYERS[name].expected(LAYERS[name].params, taken))
    assert not same(*outputs)


@both
@every
def test_missing_flags_and_keys_are_errors_that_say_what_to_write(framework, name):
    case, kind = LAYERS[name], class_name(name)
    layer = make(framework, name)
    if framework == "nnx":
        with pytest.raises(
            ValueError,
            match=rf"(?s)No `deterministic`.*to {kind}\. .*{kind}\({case.arguments}, det"
            r".*x, deterministic=.*nnx\.view\(",
        ):
            layer(*case.args)
        with pytest.raises(
            ValueError,
            match=rf"(?s)no `rngs` argument.*to {kind}\. .*{kind}\({case.arguments}, rngs"
            r".*x, rngs=rngs\).*x, deterministic=True\)",
        ):
            layer(*case.args, deterministic=False)
        with pytest.raises(TypeError, match=r"rngs must be .*got int"):
            layer(*case.args, deterministic=False, rngs=0)
        return
    variables, other = {"params": case.params}, {"dropout": jax.random.key(0)}
    with pytest.raises(ValueError, match="must be passed to the constructor or at call time"):
        layer.apply(variables, *case.args)
    with pytest.raises(ValueError, match="passed to the constructor and at call time"):
        layer.clone(deterministic=True).apply(variables, *case.args, deterministic=True)
    layer = layer.clone(rng_collection="noise")
    with pytest.raises(errors.InvalidRngError, match='needs PRNG for "noise"'):
        layer.apply(variables, *case.args, deterministic=False, rngs=other)


# --- evaluation ---------------------------------------------------------------------------


@both
@every
def test_evaluation_needs_no_key_wherever_the_flag_is_given(framework, name):
    case = LAYERS[name]
    expected = case.expected(case.params, None)
    y = caller(framework, name, deterministic=None)(deterministic=True)
    assert_same(y, expected)
    assert_same(caller(framework, name, deterministic=True)(), expected)
    if case.linear:
        assert y is X


@every
def test_nnx_models_switch_their_layers_and_evaluation_takes_no_key(name):
    case, layer = LAYERS[name], nnx_layer(name)
    expected = case.expected(case.params, None)
    layer.eval()
    assert layer.deterministic is True
    assert_same(layer(*case.args), expected)
    layer.train()
    assert layer.deterministic is False
    view = nnx.view(layer, deterministic=True)
    assert_same(view(*case.args), expected)
    assert_same(layer(*case.args, deterministic=True), expected)
    assert view.rngs.count is layer.rngs.count
    assert (layer.deterministic, count_of(layer)) == (False, 0)
    layer.set_view()
    assert layer.deterministic is False
    if isinstance(layer, nnx.Dropout):
        layer.set_attributes(nnx.Dropout, deterministic=True)
        assert layer.deterministic is True


@both
@pytest.mark.parametrize(
    ("name", "rate"), [(name, 0.0) for name in WITH_RATE] + [(name, 1.0) for name in DROPPING]
)
def test_no_key_is_needed_where_all_or_nothing_is_dropped(framework, name, rate):
    case = LAYERS[name]
    layer = make(framework, name, rate, deterministic=False)
    if framework == "nnx":
        y = nnx_layer(name, rate)(*case.args)
        layer(*case.args)
    else:
        y = layer.apply({"params": case.params}, *case.args)
    if rate == 0 and name not in ("PatchDropout", "Zoneout"):
        assert_same(y, case.expected(case.params, None))
    elif rate == 1 and name != "DropConnect":  # which has a bias
        assert not jnp.any(y)


# --- state --------------------------------------------------------------------------------


@every
def test_nnx_state_is_a_stream_and_the_learned_parameters(name):
    layer = nnx_layer(name)
    params = nnx.state(layer, nnx.Param)
    assert jax.tree.structure(by_names_of_linen(params)) == jax.tree.structure(LAYERS[name].params)
    floating = nnx.state(layer, lambda path, x: jnp.issubdtype(x.dtype, jnp.floating))
    assert len(jax.tree.leaves(floating)) == len(jax.tree.leaves(params))
    count, key = jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param)))
    assert (count.dtype, count.shape) == (jnp.uint32, ())
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


@every
def test_linen_variables_are_the_learned_parameters(name):
    layer, variables = linen_layer(name, deterministic=False)
    made = jax.eval_shape(lambda key: layer.init(key, *LAYERS[name].args), jax.random.key(0))
    assert made == jax.eval_shape(lambda: variables)


@every
def test_nnx_copies_and_merged_or_pickled_graphs_draw_the_same(name):
    case, layer = LAYERS[name], nnx_layer(name)
    twins = [copy.deepcopy(layer), nnx.clone(layer), nnx.merge(*nnx.split(nnx.clone(layer)))]
    if name not in UNPICKLABLE["nnx"]:
        graph = pickle.loads(pickle.dumps(nnx.graphdef(layer)))
        twins.append(nnx.merge(graph, nnx.clone(nnx.state(layer))))
    expected = layer(*case.args)
    for twin in twins:
        assert type(twin) is type(layer)
        assert_same(twin(*case.args), expected)
        assert count_of(twin) == 1


@every
def test_linen_copies_and_pickles_are_equal(name):
    layer = LAYERS[name].linen(deterministic=False)
    assert layer == layer.copy()
    if name not in UNPICKLABLE["linen"]:
        assert pickle.loads(pickle.dumps(layer)) == layer


# --- transformations ----------------------------------------------------------------------


def loss(y):
    return sum((part**2).sum() for part in jax.tree.leaves(y) if part.dtype == jnp.float32)


# Layers that apply a mask as another one does, which is compiled on every version of JAX.
VARIANTS = {
    "SpatialDropout",
    "SpatialDropout, channels first",
    "LockedDropout",
    "DropPath, batch",
    "GaussianNoise",
    "FeatureAlphaDropout",
    "EmbeddingDropout",
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.one_version] if name in VARIANTS else [])
        for name in LAYERS
    ],
)
def test_compiled_differentiated_and_batched_layers_agree(name):
    """In nnx under jit with a traced flag and a stream, in linen under jit and vmap over keys."""
    case, layer = LAYERS[name], nnx_layer(name)
    static = name == "PatchDropout"  # the shape of its output depends on the flag
    traces = []

    @nnx.jit
    def in_nnx(layer, flag, *args):
        traces.append(args)

        def total(layer):
            y = layer(*args, deterministic=False if static else flag)
            return loss(y), y

        (_, y), gradients = nnx.value_and_grad(total, has_aux=True)(layer)
        return y, gradients

    keys, outputs, gradients = [], [], []
    for calls in (1, 2):
        keys.append(next_key(layer))
        y, gradient = in_nnx(layer, False, *case.args)
        outputs.append(y)
        gradients.append(by_names_of_linen(gradient))
        assert count_of(layer) == calls
    if not static:
        y, _ = in_nnx(layer, True, *case.args)
        expected = case.expected(case.params, None)
        for a, b in zip(jax.tree.leaves(y), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert count_of(layer) == 3, "a traced flag has to take a key in either case"
    assert len(traces) == 1

    module, _ = linen_layer(name, deterministic=False)

    @jax.jit
    @jax.vmap
    def in_linen(key):
        def total(params, args):
            y = module.apply({"params": params} if params else {}, *args, rng=key)
            return loss(y), y

        floating = jnp.issubdtype(case.args[0].dtype, jnp.floating)
        arguments = (0, 1) if floating else 0
        (_, y), gradients = jax.value_and_grad(total, arguments, has_aux=True)(
            case.params, case.args
        )
        return y, gradients if floating else (gradients, ())

    batched, (of_params, of_args) = in_linen(jnp.stack(keys))
    eager = module.apply({"params": case.params}, *case.args, rng=keys[1])
    for a, b, c in zip(*map(jax.tree.leaves, (batched, outputs[1], eager)), strict=True):
        np.testing.assert_array_equal(a[1] == 0, c == 0)
        np.testing.assert_array_equal(b == 0, c == 0)
        np.testing.assert_allclose(a[1], c, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(b, c, rtol=1e-5, atol=1e-6)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], of_params)
        assert jax.tree.structure(one) == jax.tree.structure(gradients[i])
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(gradients[i]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    if case.linear:  # the mask of the backward pass is the one of the forward pass
        products = np.asarray(of_args[0]) * np.asarray(X)
        np.testing.assert_allclose(products, 2 * batched**2, rtol=1e-4, atol=1e-5)
    for gradient in jax.tree.leaves((of_params, of_args)):
        assert bool(jnp.isfinite(gradient).all())
        assert bool((gradient != 0).any())


# --- paths --------------------------------------------------------------------------------


class NNXModel(nnx.Module):
    """Every layer, and the first one twice."""

    def __init__(self):
        self.layers = nnx.List([nnx_layer(name) for name in (*LAYERS, "Dropout")])

    def __call__(self):
        cases = [*LAYERS.values(), LAYERS["Dropout"]]
        return [layer(*case.args) for layer, case in zip(self.layers, cases, strict=True)]


class Site(linen.Module):
    """A layer below a name of its own, made in it."""

    case: str

    @linen.compact
    def __call__(self):
        layer = LAYERS[self.case].linen(deterministic=False, name="layer")
        return layer(*LAYERS[self.case].args)


class LinenModel(linen.Module):
    """Every layer, and the first one twice."""

    @linen.compact
    def __call__(self):
        return [Site(case, name=f"site{i}")() for i, case in enumerate((*LAYERS, "Dropout"))]


def variables_of_linen_model():
    # A wrapped module was made in the site, and is a child of it.
    wrapped = {"EmbeddingDropout": "Embed_0", "DropConnect": "Dense_0", "Zoneout": "SimpleCell_0"}
    params = {}
    for i, (name, case) in enumerate(LAYERS.items()):
        if name in wrapped:
            (part,) = case.params.values()
            params[f"site{i}"] = {wrapped[name]: part}
        elif case.params:
            params[f"site{i}"] = {"layer": case.params}
    return {"params": params}


def test_site_keys_reach_every_nnx_layer_by_its_path(key):
    model = NNXModel()
    jdropout.nnx.set_site_keys(model, key, step=7)
    outputs = model()
    for i, case in enumerate(LAYERS.values()):
        stream = site_key(key, step=7, site=("layers", i, "rngs"))
        assert_same(outputs[i], case.expected(case.params, jax.random.fold_in(stream, 0)))
    assert not same(outputs[0], outputs[-1])


def test_site_keys_reach_every_linen_layer_by_its_path(key):
    apply = jdropout.linen.with_site_keys(LinenModel().apply, key, step=7)
    outputs = apply(variables_of_linen_model())
    for i, case in enumerate(LAYERS.values()):
        taken = at_site(site_key(key, step=7, site=(f"site{i}", "layer")), 0)
        assert_same(outputs[i], case.expected(case.params, taken))
    assert not same(outputs[0], outputs[-1])
    assert_same(apply(variables_of_linen_model()), outputs)


def test_audit_shows_the_path_of_every_nnx_layer():
    report = jdropout.audit(lambda model: model(), NNXModel())
    paths = [f"NNXModel/layers/{i}" for i in range(len(LAYERS) + 1)]
    assert [site.path for site in report.sites] == paths
    assert all(site.location.startswith("test_modules.py") for site in report.sites)
    assert len({str(site.key) for site in report.sites}) == len(paths)


def test_audit_shows_the_path_of_every_linen_layer(key):
    variables = variables_of_linen_model()
    report = jdropout.audit(lambda key: LinenModel().apply(variables, rngs={"dropout": key}), key)
    paths = [f"LinenModel/site{i}/layer" for i in range(len(LAYERS) + 1)]
    assert [site.path for site in report.sites] == paths
    assert all(site.location.startswith("test_modules.py") for site in report.sites)
    assert len({str(site.key) for site in report.sites}) == len(paths)
