"""Schedules: the formulas, the boundaries, and their use in a training step."""

import functools
import itertools
import re

import cheap
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen
from jax.experimental import checkify

import jdropout
import jdropout.linen
from jdropout import schedules

LAST = 2**31 - 128

# Name: a schedule of JAX, and the same formula in float64.
FORMULAS = {
    "constant": (schedules.constant(0.3), lambda t: np.full_like(t, 0.3)),
    "linear down": (
        schedules.linear(0.9, 0.2, 70, 10),
        lambda t: 0.9 + (0.2 - 0.9) * np.clip((t - 10) / 70, 0, 1),
    ),
    "linear up": (schedules.linear(0.0, 1.0, 7), lambda t: np.clip(t / 7, 0, 1)),
    "linear flat": (schedules.linear(0.1, 0.1, 7), lambda t: np.full_like(t, 0.1)),
    "cosine down": (
        schedules.cosine(0.9, 0.2, 70, 10),
        lambda t: 0.2 + (0.9 - 0.2) * (1 + np.cos(np.pi * np.clip((t - 10) / 70, 0, 1))) / 2,
    ),
    "cosine up": (
        schedules.cosine(0.0, 1.0, 33),
        lambda t: (1 - np.cos(np.pi * np.clip(t / 33, 0, 1))) / 2,
    ),
    "warmup": (schedules.warmup(0.7, 13), lambda t: 0.7 * np.minimum(t / 13, 1)),
    "piecewise": (
        schedules.piecewise([0.1, 0.9, 0.4], [20, 50]),
        lambda t: np.select([t < 20, t < 50], [0.1, 0.9], 0.4),
    ),
    "early": (schedules.early(0.6, 40), lambda t: 0.6 * np.maximum(1 - t / 40, 0)),
    "early constant": (
        schedules.early(0.6, 40, decay="constant"),
        lambda t: np.where(t < 40, 0.6, 0),
    ),
    "late": (schedules.late(0.6, 40), lambda t: np.where(t < 40, 0, 0.6)),
    "curriculum": (
        schedules.curriculum(0.75, 0.1),
        lambda t: 1 - ((1 - 0.25) * np.exp(-0.1 * t) + 0.25),
    ),
    "join": (
        schedules.join([schedules.warmup(0.5, 20), schedules.early(0.5, 60)], [30]),
        lambda t: np.where(
            t < 30, 0.5 * np.minimum(t / 20, 1), 0.5 * np.maximum(1 - (t - 30) / 60, 0)
        ),
    ),
}
STEPS = np.arange(100)

every_schedule = pytest.mark.parametrize(
    ("schedule", "formula"), FORMULAS.values(), ids=FORMULAS.keys()
)


@functools.cache
def eager_rates(schedule):
    return [schedule(int(step)) for step in STEPS]


@every_schedule
def test_rates_follow_the_formula(schedule, formula):
    rates = eager_rates(schedule)
    assert all(isinstance(rate, jax.Array) and rate.shape == () for rate in rates)
    assert all(rate.dtype == jnp.float32 and not rate.weak_type for rate in rates)
    np.testing.assert_allclose(rates, formula(np.float64(STEPS)), atol=1.5e-7, rtol=0)


CONVERSIONS = [
    *(getattr(np, name) for name in ("int8", "uint8", "int32", "uint32", "int64", "uint64")),
    *(np.float16, np.float32, np.float64, float, np.asarray),
    *(jnp.int8, jnp.uint8, jnp.int32, jnp.uint32, jnp.float16, jnp.bfloat16, jnp.float32),
]
# Every schedule reads its step in one way: two of them with all types, the others with some.
TYPES = {"linear down": CONVERSIONS, "join": CONVERSIONS}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_type_of_the_step_makes_no_difference(name):
    schedule, _ = FORMULAS[name]
    steps = (0, 1, 19, 20, 39, 40, 99)
    expected = [schedule(step) for step in steps]
    for convert in TYPES.get(name, [np.uint64, np.float64, np.asarray, jnp.int8, jnp.bfloat16]):
        rates = [schedule(convert(step)) for step in steps]
        assert {rate.dtype for rate in rates} == {jnp.dtype(jnp.float32)}
        np.testing.assert_array_equal(rates, expected, str(convert))


@every_schedule
def test_transformations_change_the_rates_by_rounding_at_most(schedule, formula):
    del formula

    def write(step, rates):
        return rates.at[step].set(schedule(step))

    @jax.jit  # of all together, to compile once
    def transformed(steps):
        return {
            "vmap": jax.vmap(schedule)(steps),
            "scan": jax.lax.scan(lambda _, step: (None, schedule(step)), None, steps)[1],
            "counter": jax.lax.scan(
                lambda step, _: (step + 1, schedule(step)), jnp.int32(0), length=100
            )[1],
            "fori_loop": jax.lax.fori_loop(0, 100, write, jnp.zeros(100)),
        }

    expected = np.array(eager_rates(schedule))
    for name, rates in transformed(STEPS).items():
        np.testing.assert_allclose(rates, expected, atol=1.2e-7, rtol=0, err_msg=name)
    for steps in (STEPS[::9], np.float32(STEPS[::9])):
        rates = list(map(jax.jit(schedule), steps))
        np.testing.assert_allclose(rates, expected[::9], atol=1.2e-7, rtol=0)


@every_schedule
def test_rates_stay_in_bounds_at_every_step(schedule, formula):
    del formula
    extremes = [-(2**31), -1, 2**24 - 1, 2**24 + 1, 2**31 - 1]
    many = jax.jit(jax.vmap(schedule))(np.array([*range(-10, 2000), *extremes], np.int32))
    many = np.asarray(many)
    assert ((many >= 0) & (many <= 1)).all()
    for step in (-1, -0.5, 2**31, 2**32 - 1, 2**63, -(2**63), float("inf"), jnp.float32(jnp.inf)):
        expected = schedule(0) if step < 0 else schedule(LAST)
        np.testing.assert_array_equal(schedule(step), expected)


@pytest.mark.parametrize("make", [schedules.linear, schedules.cosine])
def test_ends_are_exact_and_nothing_lies_beyond_them(make):
    generator = np.random.default_rng(0)
    for start, end in generator.random((40, 2)):
        num_steps = int(generator.integers(1, 300))
        rates = np.asarray(jax.vmap(make(start, end, num_steps, 5))(np.arange(400)))
        np.testing.assert_array_equal(rates[:6], np.float32(start))
        np.testing.assert_array_equal(rates[5 + num_steps :], np.float32(end))
        assert rates.min() >= np.float32(min(start, end))
        assert rates.max() <= np.float32(max(start, end))
        changes = np.diff(rates) * np.sign(end - start)
        assert changes.min() >= (0 if make is schedules.linear else -6e-8)  # a rounding of sin


def test_curriculum_never_falls_nor_exceeds_its_limit():
    rates = jax.jit(jax.vmap(schedules.curriculum(0.3, 10 / 1000)))(np.arange(5000))
    rates = np.asarray(rates)
    assert rates[0] == 0
    assert np.diff(rates).min() >= 0
    assert 0 < 0.3 - rates[1000] < 1e-4  # what the paper chooses its 10 / T for
    assert rates.max() == rates[-1] == np.float32(0.3)


@pytest.mark.parametrize("gamma", [1e-45, 1e-30, 1e30, np.finfo(np.float32).max])
def test_extreme_gammas_give_rates(gamma):
    rates = [float(schedules.curriculum(0.3, gamma)(step)) for step in (0, 1, 2**31)]
    assert rates[0] == 0
    assert all(0 <= rate <= np.float32(0.3) for rate in rates)


INTEGERS = [int, np.int32, np.uint32, np.int64, jnp.int32, jax.jit(jnp.int32), jnp.uint32]


@pytest.mark.parametrize("boundary", [1, 2**24, 2**24 + 1, 2**30 + 1, LAST - 1, LAST])
def test_boundaries_are_exact_beyond_the_integers_of_float32(boundary):
    late, early = schedules.late(0.5, boundary), schedules.early(0.5, boundary, decay="constant")
    linear = schedules.linear(0.5, 0.0, boundary)
    expected = {"late": [0, 0.5, 0.5], "early": [0.5, 0, 0]}
    if boundary < LAST:
        begin = schedules.linear(0.5, 0.0, 1, start_step=boundary)
        expected["begin"] = [0.5, 0.5, 0]

    def rates(step):
        made = {"late": late(step), "early": early(step), "linear": linear(step)}
        return made | ({"begin": begin(step)} if boundary < LAST else {})

    steps = [[convert(boundary + i) for i in (-1, 0, 1)] for convert in (*INTEGERS, np.float64)]
    eager = [[rates(step) for step in of_type] for of_type in steps]
    # Under jit, JAX would round the float64 step to float32.
    jitted = jax.jit(lambda steps: jax.tree.map(rates, steps))(steps[:-1])
    for found in (*eager, *jitted):
        for name, values in expected.items():
            assert [float(of_step[name]) for of_step in found] == values, name
        assert float(found[1]["linear"]) == float(found[2]["linear"]) == 0


def test_a_float32_step_is_not_rounded_up_to_a_boundary():
    late = schedules.late(0.5, 2**24 + 1)
    step = jnp.float32(2**24)
    assert [float(late(step)), float(late(step + 2))] == [0, 0.5]
    just_before = np.nextafter(np.float32(8), np.float32(0))
    assert float(schedules.late(0.5, 8)(just_before)) == 0
    assert float(schedules.early(0.5, 8)(just_before)) > 0


def test_fractional_steps_lie_between_their_neighbours():
    assert float(schedules.linear(0.0, 1.0, 4)(jnp.float32(1.5))) == 0.375
    assert float(schedules.linear(0.0, 1.0, 4, 1)(1.5)) == 0.125
    assert float(schedules.early(0.5, 4)(0.5)) == 0.4375
    assert float(schedules.piecewise([0.5, 0.25], [2])(1.5)) == 0.5
    joined = schedules.join([schedules.constant(0.0), schedules.warmup(0.5, 4)], [10])
    assert float(joined(jnp.float32(10.5))) == 0.0625


def test_early_and_late_against_the_tables_of_the_published_scheduler():
    rate, cutoff, total = 0.4, 50, 120
    tables = {
        "early linear": (schedules.early(rate, cutoff - 1), np.linspace(rate, 0, cutoff), 0),
        "early constant": (
            schedules.early(rate, cutoff, decay="constant"),
            np.full(cutoff, rate),
            0,
        ),
        "late constant": (schedules.late(rate, cutoff), np.zeros(cutoff), rate),
    }
    found = jax.jit(
        lambda steps: [jax.vmap(schedule)(steps) for schedule, _, _ in tables.values()]
    )(np.arange(total))
    for rates, (_, first, rest) in zip(found, tables.values(), strict=True):
        table = np.concatenate([first, np.full(total - cutoff, rest)])
        np.testing.assert_allclose(rates, table, atol=6e-8, rtol=0)


def test_joined_schedules_count_from_their_own_boundaries():
    seen = []

    def spy(step):
        seen.append(step)
        return 0.5

    schedule = schedules.join([spy, spy, spy], [10, 2**24 + 1])
    for step, expected in {
        7: [7, 0, 0],
        10: [10, 0, 0],
        2**24 + 2: [2**24 + 2, 2**24 - 8, 1],
    }.items():
        seen.clear()
        schedule(step)
        assert [int(counted) for counted in seen] == expected
        assert all(counted.dtype == jnp.int32 for counted in seen)


OPTAX = {
    "constant": lambda: optax.constant_schedule(0.3),
    "constant integer": lambda: optax.constant_schedule(0),
    "linear": lambda: optax.linear_schedule(0.5, 0.1, 20, 5),
    "cosine": lambda: optax.cosine_decay_schedule(0.5, 30),
    "exponential": lambda: optax.exponential_decay(0.5, 10, 0.5, transition_begin=3),
    "piecewise": lambda: optax.piecewise_constant_schedule(0.5, {10: 0.5, 20: 0.5}),
    "warmup": lambda: optax.warmup_cosine_decay_schedule(0.0, 0.5, 10, 40),
    "join": lambda: optax.join_schedules(
        [optax.linear_schedule(0.0, 0.5, 10), optax.constant_schedule(0.5)], [10]
    ),
}


@jax.numpy_dtype_promotion("standard")  # some of Optax's need it
@pytest.mark.parametrize("make", OPTAX.values(), ids=OPTAX.keys())
def test_schedules_of_optax_can_be_joined(make):
    plain = make()
    schedule = schedules.join([schedules.constant(0.25), plain], [7])
    steps = np.arange(60, dtype=np.int32)
    integers, floats = jax.jit(lambda *steps: [jax.vmap(schedule)(s) for s in steps])(
        steps, np.float32(steps)
    )
    expected = jax.jit(jax.vmap(lambda step: jnp.float32(plain(step))))(steps[:53])
    for rates in (np.asarray(integers), np.asarray(floats)):
        np.testing.assert_array_equal(rates[:7], np.float32(0.25))
        np.testing.assert_allclose(rates[7:], expected, atol=1.2e-7, rtol=0)
    rate = jax.eval_shape(schedule, 0)
    assert rate.dtype == jnp.float32
    assert not rate.weak_type


@jax.numpy_dtype_promotion("standard")
def test_linear_and_cosine_equal_those_of_optax():
    ours = schedules.linear(0.5, 0.1, 50, 20), schedules.cosine(0.5, 0.0, 80)
    theirs = optax.linear_schedule(0.5, 0.1, 50, 20), optax.cosine_decay_schedule(0.5, 80)

    @jax.jit
    @jax.vmap
    def rates(step):
        return [schedule(step) for schedule in ours], [schedule(step) for schedule in theirs]

    np.testing.assert_allclose(*rates(np.arange(100)), atol=1.2e-7, rtol=0)


def test_schedules_of_optax_serve_as_rates(key):
    x = np.ones((8, 16), np.float32)
    schedule = optax.linear_schedule(0.5, 0.0, 4)
    step_of = jax.jit(lambda step: jdropout.dropout(key, x, schedule(step)))
    expected = jax.jit(lambda rate: jdropout.dropout(key, x, rate))
    for step, rate in enumerate([0.5, 0.375, 0.25, 0.125, 0.0]):
        np.testing.assert_array_equal(step_of(step), expected(rate))


def test_joining_schedules_of_ours_with_optax_in_optax():
    parts, boundaries = [schedules.warmup(0.5, 5), schedules.early(0.5, 10)], [8]
    ours, theirs = schedules.join(parts, boundaries), optax.join_schedules(parts, boundaries)
    both = jax.jit(jax.vmap(lambda step: (ours(step), theirs(step))))
    np.testing.assert_array_equal(*both(np.arange(30)))


@pytest.mark.parametrize("name", ["constant", "join"])
def test_a_training_step_is_compiled_once_for_all_its_rates(name, key):
    schedule, _ = FORMULAS[name]
    traces = []

    @jax.jit
    def train_step(w, step):
        traces.append(step)

        def loss(w):
            hidden = jnp.tanh(w @ w)
            dropped = jdropout.dropout(jax.random.fold_in(key, step), hidden, schedule(step))
            return jnp.mean(dropped**2)

        return w - 0.1 * jax.grad(loss)(w), step + 1

    w, step = cheap.normal(8, 8), jnp.int32(0)
    for _ in range(100):
        w, step = train_step(w, step)
    assert len(traces) == 1
    assert train_step._cache_size() == 1
    assert int(step) == 100
    assert np.isfinite(w).all()


def test_the_same_step_in_one_loop_and_step_by_step(key):
    schedule = schedules.join([schedules.warmup(0.5, 10), schedules.early(0.5, 30)], [20])

    def train_step(step, x):
        return jdropout.dropout(jax.random.fold_in(key, step), x + 1, schedule(step))

    x = np.zeros((16, 8), np.float32)
    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 60, train_step, x))(x)
    jitted = jax.jit(train_step)
    for step in range(60):
        x = jitted(step, x)
    np.testing.assert_allclose(looped, x, rtol=1e-5)


def test_linen_dropout_takes_the_rate_of_a_schedule(key):
    schedule, x = schedules.linear(0.75, 0.0, 4), np.ones((16, 32), np.float32)

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x, step):
            return jdropout.linen.Dropout(schedule(step))(x, deterministic=False, rng=key)

    apply = jax.jit(lambda step: Model().apply({}, x, step))
    expected = jax.jit(lambda step: jdropout.dropout(key, x, schedule(step)))
    for step in range(6):
        np.testing.assert_array_equal(apply(step), expected(step))
    assert apply._cache_size() == 1


def test_a_higher_rate_of_a_schedule_drops_a_superset(key):
    schedule = schedules.curriculum(0.9, 0.1)
    make = jax.jit(jax.vmap(lambda step: jdropout.keep_mask(key, schedule(step), (64, 64))))
    masks = np.asarray(make(np.arange(60)))
    for earlier, later in itertools.pairwise(masks):
        assert (earlier | ~later).all()  # kept later means kept earlier
    kept = masks.mean(axis=(1, 2))
    assert kept[0] == 1
    assert kept[-1] < 0.15


def test_dropout_is_exactly_off_where_the_rate_is_zero(key):
    schedule, x = schedules.early(0.5, 3), cheap.normal(8, 8)
    apply = jax.jit(lambda step: jdropout.dropout(key, x, schedule(step)))
    assert not bool((apply(2) == x).all())
    for step in (3, 4, 2**31 - 1):
        np.testing.assert_array_equal(apply(step), x)


def test_rates_may_be_traced():
    def ends(rate):
        return jnp.stack(
            [
                schedules.constant(rate)(5),
                schedules.linear(rate, 0.0, 10)(5),
                schedules.cosine(0.0, rate, 10)(10),
                schedules.late(rate, 3)(3),
                schedules.curriculum(rate, 1.0)(2**30),
            ]
        )

    for rates in (jnp.float32([0.0, 0.5, 1.0]), jnp.bfloat16([0.0, 0.5, 1.0])):
        expected = np.float32(rates)[:, None] * np.float32([1, 0.5, 1, 1, 1])
        np.testing.assert_array_equal(jax.jit(jax.vmap(ends))(rates), expected)


@every_schedule
def test_64_bit_mode_changes_no_rate(schedule, formula):
    del formula
    with jax.enable_x64(True):
        rates_of = jax.jit(lambda *steps: [jax.vmap(schedule)(of_type) for of_type in steps])
        *of_types, late = rates_of(STEPS, np.float64(STEPS), np.array([2**40, LAST]))
        assert late[0] == late[1]
    for rates in of_types:
        assert rates.dtype == jnp.float32
        np.testing.assert_allclose(rates, eager_rates(schedule), atol=1.2e-7, rtol=0)


def test_joined_rates_outside_the_range_are_errors_where_they_hold():
    schedule = schedules.join([lambda step: step / 10, schedules.constant(0.0)], [10])
    assert float(schedule(9)) == np.float32(0.9)
    assert float(schedule(50)) == 0  # the first part would give 5, but does not hold any more
    outside = schedules.join([lambda step: step / 10], [])
    with pytest.raises(ValueError, match=re.escape("a joined schedule must be in [0, 1], got 1.5")):
        outside(15)
    error, _ = checkify.checkify(jax.jit(outside))(15)
    assert "a joined schedule must be in [0, 1], got 1.5" in error.get()


HALF = schedules.constant(0.5)
ERRORS = {
    "rate too large": (schedules.constant, (1.5,), ValueError, "rate must be in [0, 1], got 1.5"),
    "rate NaN": (schedules.warmup, (float("nan"), 5), ValueError, "rate must be in [0, 1]"),
    "rate boolean": (schedules.late, (True, 5), TypeError, "rate must be a number in [0, 1]"),
    "rate string": (schedules.curriculum, ("0.5", 1), TypeError, "got '0.5' of type str"),
    "start rate": (schedules.linear, (2, 0.5, 5), ValueError, "start_rate must be in [0, 1]"),
    "end rate": (schedules.cosine, (0.5, -1, 5), ValueError, "end_rate must be in [0, 1], got -1"),
    "one of the rates": (schedules.piecewise, ([0, 5], [1]), ValueError, "rates[1] must be in"),
    "no steps": (schedules.linear, (0, 1, 0), ValueError, "num_steps must be at least 1, got 0"),
    "steps not whole": (schedules.warmup, (0.5, 2.0), TypeError, "num_steps must be an integer"),
    "steps not whole, fix": (schedules.warmup, (0.5, 1e3), TypeError, "int(num_steps)"),
    "too many steps": (schedules.warmup, (0.5, 2**31), ValueError, "step 2147483520 at the latest"),
    "late end": (schedules.linear, (0, 1, LAST, 1), ValueError, f"got {LAST} after 1"),
    "start before 0": (schedules.cosine, (0, 1, 5, -1), ValueError, "start_step must be at least"),
    "cutoff 0": (schedules.early, (0.5, 0), ValueError, "cutoff_step must be at least 1, got 0"),
    "cutoff float": (schedules.late, (0.5, 0.5), TypeError, "cutoff_step must be an integer"),
    "boundaries missing": (schedules.piecewise, ([0, 1], []), ValueError, "got 0 for 2"),
    "boundaries too many": (schedules.join, ([HALF], [5]), ValueError, "one less than schedules"),
    "boundaries equal": (schedules.piecewise, ([0, 1, 0], [3, 3]), ValueError, "must increase"),
    "boundaries falling": (schedules.join, ([HALF] * 3, [3, 2]), ValueError, "got (3, 2). Sort"),
    "boundary alone": (schedules.join, ([HALF] * 2, 3), TypeError, "Write [step] for one"),
    "boundary 0": (schedules.join, ([HALF] * 2, [0]), ValueError, "boundaries[0] must be at least"),
    "boundary float": (schedules.join, ([HALF] * 2, [1.5]), TypeError, "boundaries[0] must be an"),
    "a number joined": (schedules.join, ([HALF, 0.5], [1]), TypeError, "constant(rate)"),
    "gamma 0": (schedules.curriculum, (0.5, 0), ValueError, "gamma must be a finite number above"),
    "gamma, fix": (schedules.curriculum, (0.5, -1), ValueError, "Take 10 / num_steps"),
    "gamma infinite": (schedules.curriculum, (0.5, float("inf")), ValueError, "got inf"),
    "gamma beyond float32": (schedules.curriculum, (0.5, 1e39), ValueError, "got 1e+39"),
    "gamma NaN": (schedules.curriculum, (0.5, float("nan")), ValueError, "got nan"),
    "gamma array": (schedules.curriculum, (0.5, jnp.float32(1)), TypeError, "must be a number"),
    "decay": (
        functools.partial(schedules.early, decay="cosine"),
        (0.5, 5),
        ValueError,
        "decay must be 'linear' or 'constant', got 'cosine'",
    ),
    "step vector": (HALF, (jnp.arange(3),), ValueError, "jax.vmap(schedule)(steps)"),
    "step boolean": (HALF, (True,), TypeError, "step must be a number, got True"),
    "step None": (schedules.warmup(0.5, 3), (None,), TypeError, "step must be a number, got None"),
    "step NaN": (HALF, (float("nan"),), ValueError, "step must be a number, got nan"),
    "step string": (HALF, ("3",), TypeError, "step must be a number, got '3'"),
}


@pytest.mark.parametrize(("function", "arguments", "error", "text"), ERRORS.values(), ids=ERRORS)
def test_bad_arguments_are_named(function, arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        function(*arguments)


def test_a_rate_that_rounds_beyond_its_end_is_held_there():
    """0.9 + (1e-9 - 0.9) is 0 in float32: below both, at a step whose share rounds to 1."""
    num_steps = 2**30
    for schedule in (
        schedules.linear(0.9, 1e-9, num_steps),
        schedules.cosine(0.9, 1e-9, num_steps),
    ):
        assert schedule(num_steps - 1) >= np.float32(1e-9)


def test_buckets_round_to_the_nearest_static_rate_and_compile_once_for_each():
    schedule = schedules.buckets(optax.linear_schedule(0.0, 0.5, 100), [0.5, 0, 0.25])
    rates = [schedule(step) for step in range(101)]
    assert rates[25] == 0.0
    assert rates[26] == 0.25
    assert schedule(jnp.int32(100)) == 0.5
    assert all(type(rate) is float for rate in rates)
    traced = []

    @functools.partial(jax.jit, static_argnames="rate")
    def step(key, rate):
        traced.append(rate)
        return jdropout.keep_indices(key, rate, 8)

    assert [step(jax.random.key(0), rate).size for rate in rates[::20]] == [8, 8, 6, 6, 4, 4]
    assert traced == [0.0, 0.25, 0.5]
    with pytest.raises(TypeError, match="step must be a number here"):
        jax.jit(schedule)(3)
    with pytest.raises(ValueError, match=r"rates\[1\] must be in"):
        schedules.buckets(schedule, [0.5, 1.5])
    with pytest.raises(ValueError, match="rates must not be empty"):
        schedules.buckets(schedule, [])
    with pytest.raises(ValueError, match=r"the rate of the schedule must be in .*got nan"):
        schedules.buckets(lambda step: jnp.nan, [0.5])(3)
