"""Keys from (root, step, microbatch, site): bit for bit against the NumPy twin, and distinct."""

import hashlib
import itertools
import json
import pathlib
import re
import struct
import time

import jax
import jax.extend
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax import lax
from scipy import stats

import jdropout
from jdropout import _law, keys
from jdropout.keys import at_site, site_key, step_key

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_keys.json").read_text())

ROOT = jax.random.key(20140614)

# Keys of two words and of four; the kind of key does not matter otherwise.
every_width = pytest.mark.parametrize(
    "impl", ["threefry2x32", pytest.param("rbg", marks=pytest.mark.one_version)]
)

POINTS = [
    # step, microbatch, site
    (0, 0, "hidden"),
    (0, 0, 0),
    (1, 2, ("decoder", 3, "mlp")),
    (2**31, 2**31, ("decoder", 2**32 - 1)),
    (2**32 + 5, 0, ("層", "", 7)),
    (2**63 - 1, 2**32 - 1, (1, 2, 3)),
]


def words_of(key):
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(key) if typed else key)


def numbers(keys):
    """Two-word keys as 64-bit numbers."""
    words = words_of(keys).reshape(-1, 2).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def assert_same_keys(actual, expected):
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(words_of(actual), words_of(expected))


# --- the law ------------------------------------------------------------------------------


@pytest.mark.parametrize("root", sorted({tuple(v["root_words"]) for v in GOLDEN["vectors"]}))
def test_golden_keys_are_reproduced(root):
    assert GOLDEN["law_version"] == 1
    for vector in (v for v in GOLDEN["vectors"] if tuple(v["root_words"]) == root):
        key = site_key(
            jnp.array([int(word, 16) for word in root], jnp.uint32),
            step=int(vector["step"], 16),
            microbatch=vector["microbatch"],
            site=tuple(vector["site"]),
        )
        assert [f"{word:08x}" for word in words_of(key)] == vector["key_words"]


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
@pytest.mark.parametrize(("step", "microbatch", "site"), POINTS, ids=str)
def test_keys_equal_the_twin_and_are_of_the_roots_kind(impl, step, microbatch, site):
    root = jax.random.key(11, impl=impl)
    raw = jax.random.key_data(root)
    twin = law_twin.site_key(words_of(root), step, site, microbatch)
    for kind in (root, raw, np.asarray(raw)):
        key = site_key(kind, step=step, microbatch=microbatch, site=site)
        assert isinstance(key, jax.Array)
        assert (key.shape, key.dtype) == (kind.shape, kind.dtype)
        np.testing.assert_array_equal(words_of(key), twin)
    assert jax.random.key_impl(site_key(root, step=step, site=site)) == jax.random.key_impl(root)


@pytest.mark.parametrize("shape", [(1,), (3,), (5,), (2, 2)], ids=str)
def test_keys_of_a_users_own_implementation_equal_the_twin(shape):
    name = f"own_keys{len(shape)}{shape[0]}"
    implementation = jax.extend.random.define_prng_impl(
        key_shape=shape,
        seed=lambda seed: jnp.zeros(shape, jnp.uint32),
        split=lambda key, sizes: jnp.zeros((*sizes, *shape), jnp.uint32),
        random_bits=lambda key, width, sizes: jnp.zeros(sizes, jnp.uint32),
        fold_in=lambda key, data: key,
        name=name,
        tag=name,
    )
    words = np.arange(7, 7 + np.prod(shape), dtype=np.uint32)
    root = jax.random.wrap_key_data(jnp.array(words).reshape(shape), impl=implementation)
    key = site_key(root, step=5, site=("a", 3))
    assert key.dtype == root.dtype
    twin = law_twin.site_key(words, 5, ("a", 3))
    np.testing.assert_array_equal(words_of(key).reshape(-1), twin)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *(
            ("threefry2x32", f"{kind}{bits}")
            for bits in (8, 16, 32, 64)
            for kind in ("int", "uint")
        ),
        ("rbg", "int32"),
        ("rbg", "uint64"),
    ],
)
def test_traced_numbers_of_every_dtype_give_the_keys_of_static_ones(impl, dtype):
    root = jax.random.key(3, impl=impl)
    largest = min(np.iinfo(dtype).max, 2**63 - 1)

    def make(step, microbatch, index):
        return site_key(root, step=step, microbatch=microbatch, site=("layer", index, "mlp"))

    with jax.enable_x64(dtype in ("int64", "uint64")):
        traced = jax.jit(make)
        steps = [0, 100, largest] + ([2**32, 2**62 + 2**33 + 5] if largest > 2**32 else [])
        for step, index in itertools.product(steps, [0, min(largest, 2**32 - 1)]):
            arguments = [np.dtype(dtype).type(number) for number in (step, 2, index)]
            expected = make(step, 2, index)
            assert_same_keys(traced(*arguments), expected)
            assert_same_keys(make(*arguments), expected)
            assert_same_keys(make(*map(jnp.asarray, arguments)), expected)


@every_width
def test_vmap_scan_and_loops_over_numbers_equal_the_loop_in_python(impl):
    root = jax.random.key(3, impl=impl)

    def make(i):
        return site_key(root, step=1000 + i, microbatch=i, site=("layer", i))

    expected = jnp.stack([make(i) for i in range(5)])
    several = jnp.arange(5)
    assert_same_keys(jax.jit(jax.vmap(make))(several), expected)
    assert_same_keys(lax.scan(lambda c, i: (c + 1, make(c)), 0, several)[1], expected)
    if impl == "threefry2x32":  # The others have more words, which are hashed alike.
        start = jax.random.split(root, 5)
        looped = lax.fori_loop(0, 5, lambda i, keys: keys.at[i].set(make(i)), start)
        assert_same_keys(looped, expected)


@every_width
def test_vmap_over_roots_equals_the_loop(impl):
    roots = jax.random.split(jax.random.key(3, impl=impl), 4)
    batched = jax.vmap(lambda root: site_key(root, step=2, site="a"))(roots)
    assert_same_keys(batched, jnp.stack([site_key(root, step=2, site="a") for root in roots]))


@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
@every_width
def test_a_path_is_walked_part_by_part(impl, raw):
    root = jax.random.key(3, impl=impl)
    root = jax.random.key_data(root) if raw else root
    key = step_key(root, step=7, microbatch=1)
    path = ("decoder", 3, "mlp")
    whole = at_site(key, path)
    assert_same_keys(site_key(root, step=7, microbatch=1, site=path), whole)
    assert_same_keys(at_site(at_site(key, path[:1]), path[1:]), whole)
    assert_same_keys(at_site(at_site(at_site(key, "decoder"), 3), "mlp"), whole)


def test_a_site_that_is_no_tuple_is_a_path_of_one_part():
    assert_same_keys(at_site(ROOT, "a"), at_site(ROOT, ("a",)))
    assert_same_keys(at_site(ROOT, 3), at_site(ROOT, (3,)))


def test_a_training_loop_compiles_once():
    @jax.jit
    def step_of_training(step, microbatch, layer):
        return site_key(ROOT, step=step, microbatch=microbatch, site=("layer", layer))

    for number in range(5):
        step_of_training(number, number, number)
    assert step_of_training._cache_size() == 1


def test_eager_keys_of_sites_of_one_form_compile_once():
    site_key(ROOT, step=0, site=("a", 1))
    size = keys._descend._cache_size()
    for number, name in enumerate("bcdef"):
        site_key(ROOT, step=2**40 * number, microbatch=number, site=(name, number))
    assert keys._descend._cache_size() == size


def test_stacked_keys_of_a_vector_of_indices_compile_in_seconds():
    @jax.jit
    def make(step, indices):
        key = step_key(ROOT, step=step)
        return jnp.stack([jax.vmap(lambda i, n=n: at_site(key, (n, i)))(indices) for n in "abc"])

    start = time.perf_counter()
    made = make(5, jnp.arange(40))  # levels fused into one loop took minutes
    assert time.perf_counter() - start < 30
    assert_same_keys(made[2, 7], site_key(ROOT, step=5, site=("c", 7)))


# --- no two keys are the same -------------------------------------------------------------


@pytest.fixture(scope="module")
def grid():
    """Step keys of 1000 steps and 4 microbatches, and the keys of 200 sites below each."""

    @jax.jit
    def make(steps, microbatches, indices):
        def below(step, microbatch):
            key = step_key(ROOT, step=step, microbatch=microbatch)
            index_keys = [
                jax.vmap(lambda index, name=name: at_site(key, (name, index)))(indices)
                for name in ("encoder", "decoder", "layer_0", "layer_1", "")
            ]
            return key, jnp.stack(index_keys)

        return jax.vmap(lambda step: jax.vmap(lambda mb: below(step, mb))(microbatches))(steps)

    return make(jnp.arange(1000), jnp.arange(4), jnp.arange(40))


def collisions(words):
    return words.size - np.unique(words).size


@pytest.mark.one_version
def test_keys_of_a_million_dropouts_are_distinct(grid):
    """n = 804 000 keys, 3.2e11 pairs; false alarm 2e-8."""
    step_keys, site_keys = grid
    assert (step_keys.size, site_keys.size) == (4_000, 800_000)
    every = np.concatenate([numbers(step_keys), numbers(site_keys)])
    assert collisions(every) == 0
    # Control: hashes of 32 bits, such as Flax linen's of a path, meet 75 times.
    assert collisions(every.astype(np.uint32)) > 20


@pytest.mark.one_version
def test_keys_are_none_that_jax_makes_of_the_root_or_of_step_keys(grid):
    """n = 804 000 keys and 600 000 of JAX's, 4.8e11 pairs; false alarm 3e-8."""
    step_keys, site_keys = grid
    few = 50
    fold = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
    jax_keys = [
        fold(ROOT, jnp.arange(100_000)),
        jax.random.split(ROOT, 100_000),
        jax.vmap(lambda key: fold(key, jnp.arange(few)))(step_keys.reshape(-1)),
        jax.vmap(lambda key: jax.random.split(key, few))(step_keys.reshape(-1)),
    ]
    jax_keys = np.unique(np.concatenate([numbers(made) for made in jax_keys]))
    ours = np.concatenate([numbers(step_keys), numbers(site_keys)])
    assert np.intersect1d(ours, jax_keys).size == 0
    # Control: one key that JAX makes among ours is found.
    ours[5] = numbers(jax.random.fold_in(step_keys[999, 3], few - 1))[0]
    assert np.intersect1d(ours, jax_keys).size == 1


def test_names_and_indices_of_the_same_text_differ():
    sites = ["3", 3, ("3", ""), ("", "3"), ("a", "b"), ("ab",), ("ab", ""), ("a/b",), ("b", "a")]
    sites += [(0,), (0, 0), (0, 0, 0), ("",), ("", "")]
    made = np.concatenate([numbers(site_key(ROOT, step=0, site=site)) for site in sites])
    assert collisions(made) == 0


@pytest.fixture
def counters(monkeypatch):
    """Counters of all levels that keys are taken from, as NumPy words."""
    seen = []
    descend = keys._descend

    def record(key, counters):
        seen.extend((int(high), int(low)) for high, low in counters)
        return descend(key, counters)

    monkeypatch.setattr(keys, "_descend", record)
    return seen


def test_every_level_has_counters_that_no_other_level_has(counters):
    numbers = [0, 1, 2**31, 2**32 - 1]
    for step in [*numbers, 2**32, 2**62, 2**63 - 1]:
        step_key(ROOT, step=step)
        assert counters[-2] == (2**31 | step >> 32, step & 0xFFFFFFFF)
    for number in numbers:
        step_key(ROOT, step=0, microbatch=number)
        at_site(ROOT, number)
        assert counters[-2:] == [(0x6A646978, number)] * 2
    del counters[:]
    for name in map(str, range(1000)):
        at_site(ROOT, name)
    assert not {high for high, _ in counters} & {0, 0x6A646978, 0x6A64726F, 0x6A647764}
    assert len(set(counters)) == 1000


RESERVED = [0, 0x6A64726F, 0x6A646978, 0x6A647764]  # fold_in and split, masks, indices, words


@pytest.mark.parametrize("skipped", [*itertools.combinations(RESERVED, 3)], ids=str)
def test_a_name_whose_hash_begins_with_a_reserved_word_takes_the_next(skipped, monkeypatch):
    class Digest:
        def __init__(self, words):
            self.digest = lambda: struct.pack(">8I", *words)

    faked = [word for high in skipped for word in (high, 9)] + [0x12345678, 0x9ABCDEF0]
    monkeypatch.setattr(hashlib, "sha256", lambda text: Digest(faked))
    assert tuple(map(int, keys._name_counter.__wrapped__("a"))) == (0x12345678, 0x9ABCDEF0)
    assert law_twin.name_counter("a") == (0x12345678, 0x9ABCDEF0)
    assert sorted(RESERVED) == sorted(keys._RESERVED)


@every_width
def test_masks_are_drawn_from_no_key_of_a_site(impl):
    key = step_key(jax.random.key(3, impl=impl), step=0)
    drawn = {tuple(map(int, pair)) for pair in _law.mask_keys(_law.key_words(key), 2)}
    sites = [*map(str, range(200)), *range(200)]
    made = {tuple(words_of(at_site(key, site))[:2].tolist()) for site in sites}
    assert (len(drawn), len(made)) == (2, 400)
    assert not drawn & made


# --- independent masks --------------------------------------------------------------------

NEIGHBOURS = [
    *(dict(step=0, site=("layer", index)) for index in range(6)),
    *(dict(step=step, site=("layer", 0)) for step in (1, 2, 2**32, 2**62)),
    *(dict(step=0, microbatch=number, site=("layer", 0)) for number in (1, 2, 3)),
    *(dict(step=0, site=name) for name in ("layer", "Dropout_0", "Dropout_1", "", 0, 1)),
]


@every_width
def test_masks_of_neighbouring_keys_are_independent(impl):
    """n = 2^18 fair coins, 171 pairs of 19 masks; false alarm 1e-8, by Bonferroni."""
    n, root = 1 << 18, jax.random.key(1, impl=impl)
    made = [site_key(root, **place) for place in NEIGHBOURS]
    masks = [np.asarray(jdropout.keep_mask(key, 0.5, (512, 512))) for key in made]
    signs = np.where(np.stack(masks).reshape(len(masks), n), np.float32(1), np.float32(-1))
    pairs = np.triu_indices(len(masks), k=1)
    bound = stats.norm.isf(1e-8 / 2 / pairs[0].size)

    def largest_z(signs):
        return np.abs(signs @ signs.T)[pairs].max() / np.sqrt(n)

    assert largest_z(signs) < bound
    # Control: one mask in which one element of 50 is another's.
    signs[3, ::50] = signs[7, ::50]
    assert largest_z(signs) > bound


# --- key reuse ----------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_keys_of_many_sites_are_no_reuse_of_the_root(wrap):
    def model(root, x):
        for step, name in itertools.product(range(2), "ab"):
            x = jdropout.dropout(site_key(root, step=step, site=name), x, 0.5)
        return x

    with jax.debug_key_reuse(True):
        wrap(model)(jax.random.key(0), jnp.ones(4))


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_site_key_in_two_dropouts_is_reported_as_reuse(wrap):
    def model(root, x):
        key = site_key(root, step=0, site="a")
        return jdropout.dropout(key, jdropout.dropout(key, x, 0.5), 0.5)

    with jax.debug_key_reuse(True), pytest.raises(jax.errors.KeyReuseError):
        wrap(model)(jax.random.key(0), jnp.ones(4))


# --- errors -------------------------------------------------------------------------------

INTEGER = "must be an integer or an integer scalar array, got"
WHOLE = "must be a whole number of at least 0 and below"
SITE = "site must be a name, an index or a tuple of them, got"

CASES = {
    "root missing": (dict(root=None), ValueError, "Pass root=jax.random.key(seed)"),
    "root missing, why": (dict(root=None), ValueError, "root is None, but keys are made from it"),
    "root seed": (dict(root=0), TypeError, "root must be a JAX PRNG key, got 0 of type int"),
    "root seed, fix": (dict(root=0), TypeError, "Make one with jax.random.key(seed)"),
    "root floats": (dict(root=jnp.ones(2)), TypeError, "dtype float32"),
    "root batch": (dict(root=jax.random.split(ROOT, 3)), ValueError, "root must be a single key"),
    "root raw width": (dict(root=jnp.zeros(3, jnp.uint32)), ValueError, "uint32 words, got 3"),
    "step negative": (dict(step=-1), ValueError, f"step {WHOLE} 2**63, got -1"),
    "step array negative": (dict(step=jnp.int32(-1)), ValueError, f"step {WHOLE} 2**63, got Array"),
    "step large": (dict(step=2**63), ValueError, f"2**63, got {2**63}"),
    "step float": (dict(step=1.0), TypeError, f"step {INTEGER} 1.0 of type float"),
    "step array of floats": (dict(step=jnp.float32(1)), TypeError, f"step {INTEGER} Array(1."),
    "step bool": (dict(step=True), TypeError, "got True of type bool"),
    "step numpy bool": (dict(step=np.bool_(True)), TypeError, f"step {INTEGER}"),
    "step array of bools": (dict(step=jnp.array(True)), TypeError, f"step {INTEGER}"),
    "step vector": (dict(step=np.arange(3)), TypeError, "integer scalar array, got array([0, 1"),
    "step None": (dict(step=None), TypeError, "got None of type NoneType"),
    "step name": (dict(step="1"), TypeError, "got '1' of type str"),
    "microbatch negative": (dict(microbatch=-1), ValueError, f"microbatch {WHOLE} 2**32, got -1"),
    "microbatch large": (dict(microbatch=2**32), ValueError, f"2**32, got {2**32}"),
    "microbatch float": (dict(microbatch=0.0), TypeError, f"microbatch {INTEGER} 0.0"),
    "site empty": (dict(site=()), ValueError, "site must not be empty, got ()"),
    "site empty, fix": (dict(site=()), ValueError, "such as site='hidden' or site=('layer', 3)"),
    "site None": (dict(site=None), TypeError, f"{SITE} None of type NoneType"),
    "site None, fix": (dict(site=None), TypeError, "Write it as a string or an integer"),
    "site bytes": (dict(site=b"a"), TypeError, f"{SITE} b'a' of type bytes"),
    "site list": (dict(site=["a", 3]), TypeError, f"{SITE} ['a', 3] of type list"),
    "site float": (dict(site=("a", 3.0)), TypeError, f"{SITE} 3.0 of type float"),
    "site bool": (dict(site=("a", True)), TypeError, f"{SITE} True of type bool"),
    "site nested": (dict(site=("a", ("b", 3))), TypeError, f"{SITE} ('b', 3) of type tuple"),
    "site vector": (dict(site=jnp.arange(3)), TypeError, f"{SITE} Array([0, 1, 2]"),
    "site key": (dict(site=("a", ROOT)), TypeError, SITE),
    "site negative": (dict(site=("a", -1)), ValueError, f"site {WHOLE} 2**32, got -1"),
    "site large": (dict(site=2**32), ValueError, f"site {WHOLE} 2**32, got {2**32}"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_site_key_names_the_argument_the_value_and_the_fix(case, wrap):
    changes, error, text = CASES[case]
    arguments = dict(root=ROOT, step=0, site="a") | changes
    with pytest.raises(error, match=re.escape(text)):
        wrap(lambda: site_key(arguments.pop("root"), **arguments))()


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("site")])
def test_step_key_raises_the_same(case):
    changes, error, text = CASES[case]
    arguments = dict(root=ROOT, step=0) | changes
    with pytest.raises(error, match=re.escape(text)):
        step_key(arguments.pop("root"), **arguments)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("site", "root"))])
def test_at_site_raises_the_same(case):
    changes, error, text = CASES[case]
    arguments = dict(root=ROOT, site="a") | changes
    with pytest.raises(error, match=re.escape(text.replace("root", "key"))):
        at_site(arguments["root"], arguments["site"])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (jnp.arange(2), ValueError, "a scalar, got an array of shape (2,)"),
        (jnp.arange(2), ValueError, "use jax.vmap"),
        (jnp.float32(1), TypeError, "float32[]"),
        (jnp.array(True), TypeError, "bool[]"),
    ],
)
@pytest.mark.parametrize("name", ["step", "microbatch", "site"])
def test_traced_arrays_that_are_no_integer_scalars_are_refused(name, value, error, text):
    def make(value):
        return site_key(ROOT, **(dict(step=0, site="a") | {name: value}))

    with pytest.raises(error, match=f"^{name} must be.*{re.escape(text)}"):
        jax.jit(make)(value)


def test_errors_come_before_any_computation():
    with jax.no_tracing(), pytest.raises(ValueError, match="step must be a whole number"):
        site_key(ROOT, step=-1, site="a")
