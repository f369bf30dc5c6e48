"""`audit` finds every mistake that it knows, in any guise, and none in the repaired twin."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import (
    CORE_GUISES,
    DROPOUTS,
    GUISES,
    NOT_CUSTOM,
    OURS,
    RATE,
    assert_found,
    by_hand,
    gradient,
    in_turn,
    with_custom_jvp,
)
from jax import lax

import jdropout
from jdropout.keys import site_key


@pytest.fixture(params=["ours", "by hand"])
def drop(request):
    return DROPOUTS[request.param]


@pytest.fixture
def x():
    return jnp.ones((8, 16))


# --- one key, several sites ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("guise", "name"),
    [
        (guise, name if (guise, name) not in NOT_CUSTOM else "ours")
        for guise, name in in_turn(
            [*GUISES, "custom_jvp"],
            ["ours", "by hand", "custom_vjp"],
            also=[
                *itertools.product(CORE_GUISES, ["ours", "by hand", "custom_vjp"]),
                *itertools.product(["plain", "grad"], DROPOUTS),
            ],
        )
    ],
)
def test_a_reused_key_is_found_in_every_guise(guise, name, key, x):
    drop, wrap = DROPOUTS[name], GUISES.get(guise, with_custom_jvp)

    def reused(key, x):
        return drop(key, jnp.sin(drop(key, x)))

    def repaired(key, x):
        first, second = jax.random.split(key)
        return drop(first, jnp.sin(drop(second, x)))

    assert_found([("key-reused", (0, 1))], 2, wrap(reused), key, x)
    assert_found([], 2, wrap(repaired), key, x)


def test_parts_of_one_mask_may_share_a_key(key, x):
    def parts(key, x, *starts):
        part = functools.partial(jdropout.dropout, key, rate=0.5, global_shape=(24, 16))
        return [part(x, start=(start, 0)) for start in starts]

    for wrap in (lambda f: f, jax.jit):
        assert_found([], 2, wrap(lambda key, x: parts(key, x, 0, 8)), key, x)
        assert_found([], 2, wrap(parts), key, x, 0, 8)
        twice = wrap(lambda key, x: parts(key, x, 8, 8))
        assert_found([("key-reused", (0, 1))], 2, twice, key, x)


@pytest.mark.parametrize(
    ("impl", "name", "raw"),
    in_turn(["threefry2x32", "rbg", "unsafe_rbg"], DROPOUTS, [False, True]),
)
def test_a_reused_key_of_any_kind_is_found(impl, name, raw, x):
    drop, key = DROPOUTS[name], jax.random.key(1, impl=impl)

    def reused(key, x):
        if raw:  # and typed again, for one of the two
            return drop(jax.random.wrap_key_data(key, impl=impl), drop(key, x))
        return drop(jax.random.key_data(key), drop(key, x))

    with jax.default_prng_impl(impl):  # which raw keys are taken for
        key = jax.random.key_data(key) if raw else key
        assert_found([("key-reused", (0, 1))], 2, gradient(reused), key, x)


def test_three_sites_and_two_keys_are_two_findings(drop, key, x):
    def step(key, x):
        first, second = jax.random.split(key)
        for k in (first, second, first, second, first):
            x = drop(k, x)
        return x

    assert_found([("key-reused", (0, 2, 4)), ("key-reused", (1, 3))], 5, step, key, x)


def test_one_layer_called_twice_with_one_key_is_found(drop, key, x):
    layer = jax.jit(jax.jit(drop))
    layer.trace(key, x)  # traced before
    assert_found([("key-reused", (0, 1))], 2, lambda k, x: layer(k, layer(k, x)), key, x)

    def clean(k, x):
        return layer(k, layer(jax.random.fold_in(k, 1), x))

    assert_found([], 2, clean, key, x)


def test_dropout_of_two_libraries_with_one_key_is_found(key, x):
    def step(key, x):
        return by_hand(key, jdropout.dropout(key, x, RATE))

    assert_found([("key-reused", (0, 1))], 2, step, key, x)


def test_keys_of_loops_are_compared(drop, key, x):
    def scanned(keys, x):
        return lax.scan(lambda x, key: (drop(key, x), None), x, keys)[0]

    def counted(key, x):
        return lax.fori_loop(0, 3, lambda i, x: drop(jax.random.fold_in(key, i), x), x)

    def carried(key, x):
        def body(carry, _):
            key, use = jax.random.split(carry[0])
            return (key, drop(use, carry[1])), None

        return lax.scan(body, (key, x), length=3)[0][1]

    def over_keys(key, x):
        return scanned(jax.random.split(key, 3), x)

    for loop in (over_keys, counted, carried):

        def twice(key, x, loop=loop):
            return loop(key, loop(key, x))

        assert_found([("key-reused", (0, 1))], 2, twice, key, x)
        assert_found([("key-reused", (0, 1))], 2, gradient(jax.jit(twice)), key, x)

        def apart(key, x, loop=loop):
            return loop(jax.random.fold_in(key, 1), loop(jax.random.fold_in(key, 2), x))

        assert_found([], 2, apart, key, x)


def test_loops_with_other_updates_of_their_keys_do_not_share_them(key, x):
    def by(stride):
        def body(carry):
            i, x = carry
            return i + stride, OURS(jax.random.fold_in(key, i), x)

        return lambda x: lax.while_loop(lambda carry: carry[0] < 8, body, (stride, x))[1]

    assert_found([], 2, lambda key, x: by(2)(by(3)(x)) + key, jnp.float32(0), x)


def test_branches_may_share_a_key(drop, key, x):
    def step(key, x):
        return lax.switch(
            jnp.int32(x[0, 0]), [lambda x: drop(key, x), lambda x: -drop(key, x), jnp.sin], x
        )

    assert_found([], 2, step, key, x)
    assert_found([], 2, gradient(step), key, x)

    def after(key, x):
        return drop(key, step(key, x))

    assert_found([("key-reused", (0, 1, 2))], 3, after, key, x)


@pytest.mark.parametrize(
    ("guise", "name"),
    in_turn(["plain", "grad", "jit", "grad of checkpoint"], ["ours", "by hand"]),
)
def test_keys_that_meet_in_value_are_found(guise, name, key, x):
    drop, wrap = DROPOUTS[name], GUISES[guise]

    def meeting(key, x):
        return drop(jax.random.fold_in(key, 0), drop(jax.random.split(key)[0], x))

    assert_found([("same-mask", (0, 1))], 2, wrap(meeting), key, x)

    def apart(key, x):
        return drop(site_key(key, step=0, site="a"), drop(site_key(key, step=0, site=0), x))

    assert_found([], 2, wrap(apart), key, x)


def test_keys_that_meet_in_branches_are_none(key, x):
    def step(key, x):
        return lax.cond(
            x[0, 0] > 0,
            lambda x: OURS(jax.random.fold_in(key, 0), x),
            lambda x: OURS(jax.random.split(key)[0], x),
            x,
        )

    assert_found([], 2, step, key, x)


# --- keys that do not change --------------------------------------------------------------


@pytest.mark.parametrize(
    ("guise", "name"),
    in_turn(
        ["jit", "cond"],
        ["ours", "by hand"],
        also=itertools.product(
            ["plain", "grad", "grad of scan of checkpoint"], ["ours", "by hand"]
        ),
    ),
)
def test_a_key_that_is_made_in_the_step_is_found(guise, name, key, x):
    drop, wrap = DROPOUTS[name], GUISES[guise]
    fixed = jax.random.key(7)
    codes = [("key-independent-of-step", (0,))]
    if "scan" in guise:
        codes.append(("key-independent-of-iteration", (0,)))
    makes = [lambda: fixed, lambda: jax.random.key(7), lambda: jax.random.PRNGKey(7)]
    for make in makes if guise in CORE_GUISES else makes[:1]:

        def step(key, x, make=make):
            return drop(make(), x)

        assert_found(codes, 1, wrap(step), key, x)


def test_a_key_that_the_step_is_left_out_of_is_found(drop, key, x):
    def left_out(state, key, x):
        return {"step": state["step"] + 1}, key, drop(key, x)

    def folded(state, key, x):
        return left_out(state, jax.random.fold_in(key, state["step"]), x)

    for step in (0, jnp.int32(0), jax.ShapeDtypeStruct((), jnp.int32)):
        state = {"step": step}
        report = assert_found([("key-independent-of-step", (0,))], 1, left_out, state, key, x)
        assert "depends on key, but not on state.step" in report.findings[0].message
        report = assert_found([], 1, jax.jit(folded), state, key, x)
        assert set(report.sites[0].key_sources) == {"key", "state.step"}


def test_a_key_that_the_step_advances_is_new_in_every_step(drop, key, x):
    def step(state, x):
        key, use = jax.random.split(state["key"])
        return {"key": key, "step": state["step"] + 1}, drop(use, x)

    def forgets(state, x):
        return {**step(state, x)[0], "key": state["key"]}, step(state, x)[1]

    for any_key in (key, jax.random.key_data(key)):
        state = {"key": any_key, "step": 0}
        assert_found([], 1, jax.jit(step), state, x)

        def many(state, x):
            return lax.scan(lambda s, _: (step(s, x)[0], step(s, x)[1]), state, length=2)

        assert_found([("key-reused", (0, 1))], 2, many, state, x)
    assert_found(
        [("key-reused", (0, 1)), ("key-independent-of-step", (0, 1))], 2, forgets, state, x
    )


def test_the_count_of_an_optimizer_is_no_step(drop, key, x):
    """A key that the caller makes anew in every call, next to a state that counts."""

    def step(optimizer_state, key, x):
        return {"count": optimizer_state["count"] + 1}, drop(key, x)

    assert_found([], 1, step, {"count": jnp.int32(0)}, key, x)


# --- loops --------------------------------------------------------------------------------

LOOPS = {
    "scan": lambda body, k, x: lax.scan(lambda x, i: (body(k, i, x), None), x, jnp.arange(3))[0],
    "scan of checkpoint": lambda body, k, x: lax.scan(
        jax.checkpoint(lambda x, i: (body(k, i, x), None)), x, jnp.arange(3)
    )[0],
    "fori_loop": lambda body, k, x: lax.fori_loop(0, 3, lambda i, x: body(k, i, x), x),
    "nested": lambda body, k, x: lax.fori_loop(
        0, 2, lambda i, x: lax.fori_loop(0, 3, lambda j, x: body(k, 3 * i + j, x), x), x
    ),
}


@pytest.mark.parametrize(
    ("loop", "guise", "name"),
    in_turn(
        LOOPS,
        ["plain", "jit of grad of jit"],
        [*DROPOUTS],
        also=itertools.product(["scan"], ["plain"], DROPOUTS),
    ),
)
def test_a_loop_whose_iterations_share_a_mask_is_found(loop, guise, name, key, x):
    drop, wrap = DROPOUTS[name], GUISES[guise]
    shared = functools.partial(LOOPS[loop], lambda key, i, x: drop(key, x))
    own = functools.partial(LOOPS[loop], lambda key, i, x: drop(jax.random.fold_in(key, i), x))
    loops = ("scan of 2", "scan of 3") if loop == "nested" else ("scan of 3",)
    found = [("key-independent-of-iteration", (0,))] * len(loops)
    for step, expected in ((shared, found), (own, [])):
        report = assert_found(expected, 1, wrap(step), key, x)
        assert report.sites[0].loops == loops


def test_a_while_loop_whose_iterations_share_a_mask_is_found(drop, key, x):
    def loop(advance):
        def body(carry):
            i, key, x = carry
            return i + 1, advance(key), drop(key, x)

        return lambda key, x: lax.while_loop(lambda carry: carry[0] < 3, body, (0, key, x))

    report = assert_found([("key-independent-of-iteration", (0,))], 1, loop(lambda k: k), key, x)
    assert report.sites[0].loops == ("while loop",)
    assert_found([], 1, loop(lambda k: jax.random.fold_in(k, 1)), key, x)


def test_equal_keys_that_are_scanned_over_are_found(drop, key, x):
    def step(keys, x):
        return lax.scan(lambda x, key: (drop(key, x), None), x, keys)[0]

    assert_found([("key-independent-of-iteration", (0,))], 1, step, jnp.stack([key] * 3), x)
    assert_found([], 1, step, jax.random.split(key, 3), x)


def test_what_a_loop_hands_on_depends_on_what_it_is_made_of(key, x):
    """A key that went through a loop unchanged, or with the step in it, is told apart."""

    def step(fold, key, step, x):
        def body(carry, _):
            key, x = carry
            return (jax.random.fold_in(key, step) if fold else key, jnp.sin(x)), None

        (key, x), _ = lax.scan(body, (key, x), length=3)
        return OURS(key, x)

    found = [("key-independent-of-step", (0,))]
    assert_found(found, 1, functools.partial(step, False), key, 0, x)
    assert_found([], 1, functools.partial(step, True), key, 0, x)


# --- rates and flags ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "code"),
    [
        (0.0, "rate-zero"),
        (0, "rate-zero"),
        (1e-12, "rate-zero"),
        (1.0, "rate-one"),
        (1, "rate-one"),
    ],
)
def test_rates_that_drop_nothing_or_everything_are_found(rate, code, key, x):
    def step(key, x):
        return jdropout.dropout(key, x, rate)

    for wrap in (GUISES["plain"], GUISES["jit"], GUISES["grad"]):
        assert_found([(code, (0,))], 1, wrap(step), key, x)
    assert_found([(code, (0,))], 1, jdropout.dropout, key, x, rate)
    assert_found([], 1, lambda x: jdropout.dropout(None, x, rate, deterministic=True), x)


def test_rates_of_others_that_drop_nothing_or_everything_are_found(key, x):
    guises = (
        lambda kept, x: jnp.where(kept, x, 0.0),
        lambda kept, x: jnp.where(~kept, 0.0, x),
        lambda kept, x: x * (1 - (~kept).astype(x.dtype)),
    )
    for (keep, code), guise in itertools.product([(1.0, "rate-zero"), (0.0, "rate-one")], guises):

        def step(key, x, keep=keep, guise=guise):
            return guise(jax.random.bernoulli(key, keep, x.shape), x)

        assert_found([(code, (0,))], 1, step, key, x)


def test_a_mask_and_attention_have_rates_too(key):
    assert_found([("rate-one", (0,))], 1, lambda key: jdropout.keep_mask(key, 1.0, (8, 4)), key)
    q = jnp.ones((2, 8, 4, 16))

    def attend(key, q, rate):
        return jdropout.dot_product_attention(q, q, q, dropout_key=key, dropout_rate=rate)

    assert_found([("rate-one", (0,))], 1, attend, key, q, 1.0)
    assert_found([("rate-zero", (0,))], 1, attend, key, q, 0.0)
    assert_found([], 1, attend, key, q, 0.1)


def test_traced_rates_and_flags_are_clean(key, x):
    def step(key, x, rate, flag):
        return jdropout.dropout(key, x, rate, deterministic=flag)

    for rate, flag in ((jnp.float32(0), jnp.bool(True)), (jnp.float32(1), False)):
        report = assert_found([], 1, step, key, x, rate, flag)
        assert report.sites[0].rate is None
        assert "traced" in str(report)
    report = assert_found([], 1, jax.jit(step), key, x, 0.0, False)
    assert report.sites[0].deterministic is None


def evaluate(key, x, drop):
    return drop(key, x)


def predictBatch(key, x, drop):  # noqa: N802  # its words are found in camel case too
    return drop(key, x)


def test_step(key, x, drop):
    return drop(key, x)


test_step.__test__ = False


def forward(key, x, drop):
    return evaluate(key, x, drop)


def mc_predict(key, x, drop):
    return jax.vmap(lambda key: drop(key, x))(jax.random.split(key, 3))


def train_and_evaluate(key, x, drop):
    return drop(key, x)


class TestedModel:
    def __call__(self, key, x, drop):
        return drop(key, x)


EVALUATIONS = {f.__name__: f for f in (evaluate, predictBatch, test_step, forward)}


@pytest.mark.parametrize(
    ("function", "guise", "name"),
    in_turn(
        EVALUATIONS,
        ["plain", "jit"],
        [*DROPOUTS],
        also=itertools.product(["evaluate"], ["plain", "jit"], DROPOUTS),
    ),
)
def test_dropout_that_is_on_in_evaluation_is_found(function, guise, name, key, x):
    drop, wrap = DROPOUTS[name], GUISES[guise]
    function = wrap(functools.partial(EVALUATIONS[function], drop=drop))
    report = assert_found([("on-in-evaluation", (0,))], 1, lambda k, x: function(k, x), key, x)
    assert "a function named" in report.findings[0].message


def test_evaluation_with_dropout_off_is_clean(key, x):
    off = functools.partial(OURS, deterministic=True)
    for function in (evaluate, predictBatch, test_step, forward):
        assert_found([], 1, function, None, x, off)


def test_evaluation_that_is_none_is_clean(drop, key, x):
    for function in (mc_predict, train_and_evaluate, TestedModel()):
        assert_found([], 1, function, key, x, drop)


def test_a_model_named_predict_may_drop_where_it_is_differentiated(drop, key, x):
    def predict(key, x):
        return drop(key, x)

    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert_found([], 1, jax.jit(gradient(wrap(predict))), key, x)
        assert_found([("on-in-evaluation", (0,))], 1, wrap(predict), key, x)


# --- masks that are shared ----------------------------------------------------------------


def over(dims):
    """Dropout whose elements share their fate along axes: ours, and by hand."""

    def unshared(shape):
        return tuple(1 if axis in dims else size for axis, size in enumerate(shape))

    def ours(key, x):
        return jdropout.dropout(key, x, RATE, broadcast_dims=dims)

    def by_hand(key, x, keep=1 - RATE):
        mask = jax.random.bernoulli(key, keep, unshared(x.shape))
        return jnp.where(jnp.broadcast_to(mask, x.shape), x / keep, 0.0)

    def by_product(key, x, keep=1 - RATE):
        mask = jax.random.bernoulli(key, keep, unshared(x.shape)).astype(x.dtype)
        return jax.lax.mul(x, jnp.broadcast_to(mask / keep, x.shape))

    return ours, by_hand, by_product


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: jax.jit(gradient(jax.checkpoint(f)))])
def test_a_mask_that_the_batch_shares_is_found(wrap, key):
    x = jnp.ones((8, 5, 16))
    for drop in over((0,)):
        report = assert_found([("shared-over-batch", (0,))], 1, wrap(drop), key, x)
        assert report.sites[0].shared_axes == (0,)
    for dims in ((1,), (2,), (1, 2)):  # spatial dropout, dropped paths
        for drop in over(dims):
            report = assert_found([], 1, wrap(drop), key, x)
            assert report.sites[0].shared_axes == dims


def test_a_batch_of_one_shares_nothing(key):
    for drop in over((0,)):
        assert_found([], 1, drop, key, jnp.ones((1, 16)))


@pytest.mark.parametrize(
    ("guise", "name"),
    [*itertools.product(["plain"], DROPOUTS), ("grad", "ours"), ("jit", "by hand")],
)
def test_a_key_that_vmap_does_not_split_is_found(guise, name, key):
    drop, wrap, x = DROPOUTS[name], GUISES[guise], jnp.ones((8, 5, 16))

    def shared(key, x):
        return jax.vmap(drop, in_axes=(None, 0))(key, x)

    assert_found([("shared-over-batch", (0,))], 1, wrap(shared), key, x)

    def copied(key, x):
        return jax.vmap(drop)(jnp.broadcast_to(key, 8), x)

    assert_found([("shared-over-batch", (0,))], 1, wrap(copied), key, x)

    def own(key, x):
        return jax.vmap(drop)(jax.random.split(key, 8), x)

    report = assert_found([], 1, wrap(own), key, x)
    assert report.sites[0].shape == (5, 16)


def test_the_axes_under_vmap_are_those_of_an_example(key):
    """Variational dropout over time, of one example with (time, features)."""
    for drop in over((0,)):

        def step(key, x, drop=drop):
            return jax.vmap(drop)(jax.random.split(key, 8), x)

        report = assert_found([], 1, step, key, jnp.ones((8, 5, 16)))
        assert (report.sites[0].shape, report.sites[0].shared_axes) == ((5, 16), (0,))


def test_attention_whose_batch_or_heads_share_a_mask_is_found(key):
    q = jnp.ones((2, 8, 4, 16))

    def attend(dims, key, q):
        return jdropout.dot_product_attention(
            q, q, q, dropout_key=key, dropout_rate=RATE, dropout_broadcast_dims=dims
        )

    codes = {0: ("shared-over-batch", (0,)), 1: ("shared-over-heads", (0,))}
    for dims, guise in [
        ((), "plain"),
        ((0,), "grad of checkpoint"),
        ((1,), "jit"),
        ((2,), "plain"),
    ]:
        step = GUISES[guise](functools.partial(attend, dims))
        report = assert_found([codes[axis] for axis in dims if axis < 2], 1, step, key, q)
        assert (report.sites[0].kind, report.sites[0].shape) == ("attention", (2, 4, 8, 8))


def test_attention_of_one_example_has_heads_first(key):
    q = jnp.ones((2, 8, 4, 16))

    def attend(dims, key, q):
        def one(key, q):
            return jdropout.dot_product_attention(
                q, q, q, dropout_key=key, dropout_rate=RATE, dropout_broadcast_dims=dims
            )

        return jax.vmap(one)(jax.random.split(key, 2), q)

    assert_found([], 1, functools.partial(attend, ()), key, q)
    found = [("shared-over-heads", (0,))]
    assert_found(found, 1, functools.partial(attend, (0,)), key, q)


# --- what is no dropout -------------------------------------------------------------------


def test_random_choices_that_zero_nothing_are_no_sites(key, x):
    def augment(key, images, tokens):
        flip, mix, replace, noise = jax.random.split(key, 4)
        flipped = jnp.where(jax.random.bernoulli(flip, 0.5, (8, 1)), images[:, ::-1], images)
        mixed = jnp.where(jax.random.bernoulli(mix, 0.5, (8, 1)), flipped, flipped + 1)
        tokens = jnp.where(jax.random.bernoulli(replace, 0.15, tokens.shape), 0, tokens)
        return mixed + jax.random.normal(noise, mixed.shape), tokens, jax.random.bernoulli(key, 0.5)

    assert_found([], 0, augment, key, x, jnp.ones((8, 16), jnp.int32))


def test_augmentation_with_the_key_of_dropout_shows_dropout_alone(drop, key, x):
    def step(key, x):
        flip = jax.random.bernoulli(key, 0.5, (8, 1))
        return drop(key, jnp.where(flip, x[:, ::-1], x))

    assert_found([], 1, gradient(step), key, x)


def test_site_keys_are_clean(drop, key, x):
    def step(root, step, x):
        for site in (("block", 0), ("block", 1), "head"):
            x = drop(site_key(root, step=step, site=site), x)

        def layer(x, i):
            return drop(site_key(root, step=step, site=("layer", i)), x), None

        return lax.scan(layer, x, jnp.arange(3))[0].sum()

    for number in (0, np.int32(5)) if drop is OURS else (jnp.int32(0),):
        assert_found([], 4, jax.jit(jax.grad(step, 2)), key, number, x)


def test_accumulation_over_microbatches(drop, key, x):
    def accumulate(numbered, root, step, x):
        def loss(x, microbatch):
            key = site_key(root, step=step, microbatch=microbatch if numbered else 0, site="h")
            return drop(key, x).sum()

        def add(total, i):
            return total + jax.grad(loss)(x, i), None

        return lax.scan(add, jnp.zeros_like(x), jnp.arange(4))[0]

    found = [("key-independent-of-iteration", (0,))]
    assert_found(found, 1, functools.partial(accumulate, False), key, 0, x)
    assert_found([], 1, functools.partial(accumulate, True), key, 0, x)
