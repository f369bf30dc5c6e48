"""Calls of the whole public API with good and bad arguments: `python tests/calls.py --calls 20000`.

A call is a line of Python. It is one of those in call_table.py, with some of its arguments replaced
by values of the pools below; which ones depends on the annotations. It runs eagerly, under
`jax.eval_shape`, or with an argument that is traced, batched or differentiated. Then it must

- raise an error of the library's own, which names an argument and a value;
- or return: only for arguments that fit their annotations, in the shape and dtype of the input
  where the base call does, without NaN from finite numbers, and with the mask of the law's twin.

All else is a fault. The same seed gives the same calls. Children run them, since a call can hang or
end its process, which is a fault too. Exit status 1 if there is a fault.
"""

import argparse
import ast
import collections
import collections.abc
import decimal
import fractions
import functools
import importlib
import inspect
import itertools
import json
import linecache
import operator
import os
import pathlib
import queue
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import law_twin
import ml_dtypes
import numpy as np
import test_api
from call_table import AFTER, BASE, KEY, LAYERS, METHODS, OF_LINEN, SHORT, VARIABLES
from flax import linen, nnx

import jdropout
import jdropout.equinox
import jdropout.linen
import jdropout.nnx
from jdropout import by_position, keys, schedules, testing

SECONDS = 60
"""A call that takes longer hangs. Compiling takes up to five seconds."""

# What a line of Python that is printed needs, all of which is imported here.
PREAMBLE = (
    "import decimal, fractions, jax, jax.numpy as jnp, jdropout, ml_dtypes, numpy as np\n"
    "import jdropout.equinox, jdropout.linen, jdropout.nnx\n"
    "from functools import partial; from flax import linen, nnx\n"
    "from jdropout import by_position, keys, schedules, testing, uncertainty"
)
SCOPE = {
    module.__name__.rpartition(".")[2]: module
    for module in (decimal, fractions, jax, jdropout, ml_dtypes, linen, nnx, by_position, keys)
} | dict(jnp=jnp, np=np, partial=partial, schedules=schedules, testing=testing)


# --- values, by what a parameter is for -----------------------------------------------------------


def read_values() -> dict[str, list[str]]:
    """Sources of values by the headings in the file."""
    parts = (pathlib.Path(__file__).parent / "data" / "call_values.txt").read_text().split("\n# ")
    return {part.splitlines()[0]: part.strip().splitlines()[1:] for part in parts[1:]}


VALUES = read_values()
SHAPES, DTYPES_OF_ARRAYS = VALUES.pop("shapes"), VALUES.pop("dtypes of arrays")
TRACED = VALUES.pop("traced")
"""What an argument of `jax.eval_shape` may be in place of an array."""
VALUES["arrays"] += [
    f"np.ones({shape}, {dtype})" for shape in (SHAPES[0], *SHAPES) for dtype in DTYPES_OF_ARRAYS
]
VALUES["arrays"] += [
    f"jnp.ones({shape}, jnp.{dtype})" for shape in SHAPES for dtype in ("float32", "bfloat16")
]

KINDS = {
    r"bool \| |<class 'bool'>|deterministic|inference": ["flags"],
    r"key|rng|root": ["keys"],
    r"Literal|<class 'str'>|str \|": ["strings"],
    r"Callable": ["functions"],
    r"Sequence|tuple|Iterable|Mapping": ["sequences"],
    r"dtype|Precision": ["dtypes"],
    r"Module|Cell": ["modules"],
    r"_Tree|Any": ["trees", "arrays"],
    r"complex|Array(?! \| numpy.ndarray)|ndarray, ": ["arrays"],
    r"int|float|amount|rate": ["numbers"],
}
"""Headings of values, by what an annotation or a name has in it."""

# --- calls ----------------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is called: ``before(arguments)after``."""

    name: str
    """In the public API."""
    before: str
    arguments: dict[str, str]
    """Sources by name; those that are positional have a name that begins with ``*``."""
    after: str = ""

    def parameters(self) -> dict[str, Any]:
        """Annotations by name, without those of Flax, which are strings."""
        thing = find(self.name)
        function = thing.__init__ if inspect.isclass(thing) else thing
        return {
            name: parameter.annotation
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in ("self", "parent", "name") and parameter.kind.name[:4] != "VAR_"
            if not isinstance(parameter.annotation, str)
        }

    def all_names(self) -> set[str]:
        """Names of arguments of what is called, and of its constructor."""
        owner = self.name.rpartition(".")[0]
        made = self._replace(name=owner).parameters() if owner not in test_api.MODULES else ()
        return {
            "args",
            *re.findall(r"(\w+)=", self.text({})),
            *self.parameters(),
            *made,
            *(name for name in self.arguments if name[0] != "*"),
        }

    def values(self) -> dict[str, Any]:
        """The arguments of the base call."""
        return {name: eval(source, dict(SCOPE)) for name, source in self.arguments.items()}

    def text(self, changed: dict[str, str]) -> str:
        arguments = self.arguments | changed
        written = [v if k[0] == "*" else f"{k}={v}" for k, v in arguments.items()]
        return f"{self.before}({', '.join(written)}){self.after}"


class Call(NamedTuple):
    target: Target
    changed: dict[str, str]
    form: str = "{}"
    """Around the call, such as ``jax.eval_shape(lambda: {})``."""
    traced: str = ""
    """The source of the argument that is ``v`` in the call."""

    @property
    def text(self) -> str:
        arguments = {k: "v" if v == self.traced else v for k, v in self.changed.items()}
        return ast.unparse(ast.parse(self.form.format(self.target.text(arguments), self.traced)))


SHARED: dict[str, Callable[[int], Iterable[int]]] = {
    "keep_mask": lambda rank: (),
    "dropout": lambda rank: (),
    "drop_connect": lambda rank: (),
    "spatial_dropout": lambda rank: range(1, rank - 1),
    "locked_dropout": lambda rank: (1,),
    "drop_path": lambda rank: range(1, rank),
    "embedding_dropout": lambda rank: range(1, rank),
}
"""Functions whose result is 0 where the mask drops, and along which axes by default."""


def known() -> set[str]:
    """The names of all public callables that are called here, or that need not be."""
    methods = {f"{owner}.{name}" for owner, (_, names) in METHODS.items() for name in names}
    layers = {
        f"jdropout.{module}.{name}{method}"
        for module, (name, (_, methods)) in itertools.product(("nnx", "linen"), LAYERS.items())
        for method in ("", *(f".{each}" for each in methods))
        if hasattr(getattr(jdropout, module), name)
    }
    inherited = {name for name in layers if not in_snapshot(name)}
    return {*BASE, *METHODS, *methods, *layers} - inherited - {"jdropout.schedules.early.__call__"}


def in_snapshot(name: str) -> bool:
    return f"{name}(" in test_api.SNAPSHOT.read_text()


def find(name: str) -> Any:
    """The public thing of a name; a schedule for what a schedule's name calls."""
    if name == "jdropout.schedules.early.__call__":
        return schedules.early(0.5, 3)
    module = max((m for m in test_api.MODULES if name.startswith(f"{m}.")), key=len)
    return operator.attrgetter(name.removeprefix(f"{module}."))(importlib.import_module(module))


def written_out(text: str) -> str:
    for _ in range(2):  # some hold another
        text = re.sub("|".join(rf"\b{name}\b" for name in SHORT), lambda m: SHORT[m[0]], text)
    return text


def parsed(arguments: str) -> dict[str, str]:
    call = ast.parse(f"f({written_out(arguments)})").body[0].value
    positional = {f"*{i}": ast.unparse(argument) for i, argument in enumerate(call.args)}
    return positional | {word.arg: ast.unparse(word.value) for word in call.keywords}


def targets() -> list[Target]:
    found = [
        Target(
            name,
            name,
            parsed(base),
            AFTER.get(name) or AFTER.get(name.rpartition(".")[0], ""),
        )
        for name, base in BASE.items()
        if base is not None
    ]
    for name, (owner, methods) in METHODS.items():
        for method, arguments in methods.items():
            if arguments is not None:
                before = written_out(owner) + ("" if method == "__call__" else f".{method}")
                found.append(Target(f"{name}.{method}", before, parsed(arguments)))
    found.append(Target("jdropout.equinox.Dropout", "jdropout.equinox.Dropout", {"p": "0.5"}))
    for module, (name, (made, methods)) in itertools.product(("nnx", "linen"), LAYERS.items()):
        full = f"jdropout.{module}.{name}"
        if not hasattr(getattr(jdropout, module), name):
            continue
        for old, new in OF_LINEN.items() if module == "linen" else ():
            made = made.replace(old, new)
        if module == "nnx" and "MultiHead" in name:
            made += ", in_features=6, decode=False, rngs=nnx.Rngs(0)"
        made = parsed(made)
        owner = Target(full, full, made)
        for method, arguments in methods.items():
            if arguments is None:
                continue
            fixed = parsed(arguments)
            if method in ("__call__", "attend"):
                fixed |= {"deterministic": "False"}
            if module == "linen":
                params = written_out(VARIABLES.get(name, "{}"))
                called = ".apply"
                fixed = {"*": f"{{'params': {params}}}", **fixed, "rngs": f"{{'dropout': {KEY}}}"}
                if "MultiHead" in name or name == "SelfAttention":
                    called = ".init_with_output"
                    fixed = {"*": f"{{'params': {KEY}, 'dropout': {KEY}}}", **parsed(arguments)}
                    fixed["deterministic"] = "False"
                if method != "__call__":
                    fixed["method"] = repr(method)
            else:
                called = "" if method == "__call__" else f".{method}"
                if method in ("__call__", "attend"):
                    fixed |= {"rngs": KEY}
            use = Target(f"{full}.{method}", owner.text({}) + called, fixed)
            found.append(use)
            if method == "__call__":
                found.append(Target(full, full, made, called + use.text({})[len(use.before) :]))
    return found


FORMS = ("jax.eval_shape(lambda v: {}, {})",) * 4 + (
    "jax.eval_shape(jax.vmap(lambda v: {}), {})",
    "jax.eval_shape(lambda v: jax.vjp(lambda v: {}, v)[0], {})",
)
# They run what they are given, so under a trace of ours they would only see tracers.
EAGER = ("testing.", "jdropout.audit", "Rngs", "stratified_key(axis")


@functools.cache
def every_target() -> list[Target]:
    return [target for target in targets() if target.parameters()]


def make(seed: int, number: int, quick: bool) -> Call:
    """The call of a number. A quick one hardly ever compiles."""
    random_ = random.Random(f"{seed} {number}")
    target = random_.choice(every_target())
    parameters = target.parameters()
    names = random_.sample(list(parameters), min(len(parameters), random_.choice((1, 1, 1, 2, 3))))
    changed = {}
    for name in names:
        if any(k[0] == "*" for k in target.arguments) and not keyword(target, name):
            continue
        changed[name] = random_.choice(pool(name, parameters[name], random_))
    eager = any(word in target.text({}) for word in EAGER)
    kind = random_.random()
    if eager or kind < (0.4 if quick else 0.15):
        if quick:
            changed = {name: random_.choice(VALUES["nothing"]) for name in changed}
        return Call(target, changed)
    if kind < 0.6 or not changed:
        return Call(target, changed, "jax.eval_shape(lambda: {})")
    name = random_.choice(list(changed))
    value = changed[name] = random_.choice(TRACED)
    return Call(target, changed, random_.choice(FORMS), value)


def keyword(target: Target, name: str) -> bool:
    """Whether an argument is not one of those that the base call gives by position."""
    thing = find(target.name)
    names = list(inspect.signature(thing.__init__ if inspect.isclass(thing) else thing).parameters)
    names = [x for x in names if x != "self"]
    return names.index(name) >= sum(k[0] == "*" and k != "*" for k in target.arguments)


def pool(name: str, annotation: Any, random_: random.Random) -> list[str]:
    kinds = list(VALUES) if random_.random() < 0.3 else fitting(name, annotation)
    return VALUES[random_.choice(kinds)]


def fitting(name: str, annotation: Any) -> list[str]:
    """Headings of values that are meant for a parameter, or nearly."""
    words = f"{annotation} {name}"
    kinds = [kind for part, kinds in KINDS.items() if re.search(part, words) for kind in kinds]
    return kinds or list(VALUES)


# --- verdicts -------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    kind: str
    """"error" of the library's own, "result", "caller" for an error of the caller's function,
    "before" for one that came before the library was called, or "fault"."""
    reason: str = ""


def judge(call: Call) -> Verdict:
    filtering = jax.config.jax_traceback_filtering
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            jax.config.update("jax_traceback_filtering", "off")  # else errors begin in JAX's frames
            result = eval(compile(call.text, "<call>", "eval"), dict(SCOPE))
        except Exception as error:
            return of_error(call, error)
        finally:
            jax.config.update("jax_traceback_filtering", filtering)
        return of_result(call, result)


def of_error(call: Call, error: Exception) -> Verdict:
    frames = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own = [i for i, (file, _) in enumerate(frames) if file.startswith(PACKAGE)]
    described = f"{type(error).__name__}: {str(error)[:300]}"
    if not own:
        return Verdict("before", described)
    file, line = frames[-1]
    ours = file.startswith((PACKAGE, FLAX))
    # Under the library, the caller's function or module was called.
    below = any(name == "<call>" or re.search(CALLERS, name) for name, _ in frames[own[-1] :])
    if below or re.search(MISFITS, str(error)):
        return Verdict("caller", described)
    listed = test_api.sections(find(call.target.name))
    kinds = {kind.__name__ for kind in type(error).__mro__} - {"TypeError", "ValueError"}
    if isinstance(error, flax.errors.FlaxError) or any(kind in listed for kind in kinds):
        return Verdict("error", described)
    reason = "not an error of a check"
    if ours and linecache.getline(file, line).strip().startswith("raise"):
        reason = what_is_missing(call, error, file.startswith(FLAX))
    where = " <- ".join(f"{os.path.basename(f)}:{n}" for f, n in frames[: own[-1] - 1 : -1][-3:])
    return Verdict("fault", f"{reason}: {described} [{where}]") if reason else Verdict("error")


def what_is_missing(call: Call, error: Exception, of_flax: bool) -> str:
    """What the text of a check's error lacks, if anything."""
    text = str(error)
    values = {name: eval(source, dict(SCOPE)) for name, source in call.changed.items()}
    if of_flax and any(told(value, text) for value in values.values()):
        return ""
    if not isinstance(error, TypeError | ValueError):
        return "an undocumented type"
    known = [name for name in call.target.all_names() if is_named(name, text)]
    if not known:
        return "names no argument"
    named = [value for name, value in values.items() if is_named(name, text)]
    if named and len(known) == 1 and not of_flax and not any(told(value, text) for value in named):
        return "does not tell the value"
    return ""


ALIASES = {
    "inputs": ("x", "args", "tokens", "carry", "new"),
    "carry": ("old",),
    "batch": ("first", "size", "count"),
    "inputs_k": ("query", "key"),
    "inputs_v": ("query", "value"),
    "train": ("result",),
    "select": ("step",),
    "schedule": ("deterministic",),
    "dropout_rng": ("key",),
    "rng": ("key",),
    "rngs": ("key",),
    "p": ("rate",),
    "inference": ("deterministic",),
    "apply": ("fn",),
    "fn": ("step",),
    "layer": ("layers", "stacked_params", "step", "branch"),
}
"""What Flax and Equinox call the arguments of functions."""


CALLERS = (
    r"flax/(core/scope|nnx/variablelib|(nnx/nn|linen)/(linear|recurrent|attention|stochastic))\.py$"
)
"""Files with the modules of Flax that a caller gives to a layer."""
MISFITS = r"\(\) (takes|got|missing) .*argument|takes no keyword|valid JAX type|^pjit"
"""What Python and JAX say of a function of the caller's that takes or returns other things."""
PACKAGE, FLAX = os.path.dirname(jdropout.__file__), os.path.dirname(flax.__file__)
ARRAY = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)


def is_named(name: str, text: str) -> bool:
    names = "|".join((name, *ALIASES.get(name, ())))
    return re.search(rf"(?<!\w)({names})(?!\w)", text) is not None


def told(value: Any, text: str) -> bool:
    """Whether an error tells a value, its type or what is wrong in it."""
    if value is None or callable(value):  # a default, or it is told what the function returns
        return True
    words = [repr(value), str(value), type(value).__name__, "one leaf", "has none", "must return"]
    words.append(str(jax.tree.structure(value)))
    for leaf in [value, *jax.tree.leaves(value)]:
        if isinstance(leaf, ARRAY):
            narrow = str(leaf.dtype).replace("64", "32").replace("complex128", "complex64")
            narrow = narrow.removeprefix(">").replace("f4", "float32").replace("i8", "int32")
            words += ["array", "Tracer", "masked", str(leaf.dtype), narrow, str(leaf.shape)]
            if isinstance(leaf, np.ndarray):
                words += [str(number).removesuffix(".0") for number in leaf.ravel()[:1]]
            words += [str(leaf.shape[1:]), str(len(leaf.shape)), *map(str, leaf.shape)]
    if (elements := elements_of(value)) is not None:
        words += [repr(tuple(elements)), str((len(elements),))]
        words += ["empty", *map(repr, elements), *(type(x).__name__ for x in elements)]
    if isinstance(value, int):
        words += [f"{value.bit_length()} bits"]
    if isinstance(value, int | float):
        words.append(str(value).removeprefix("-").removesuffix(".0"))
    if isinstance(value, bool | int | float | complex):
        words += ["()", "scalar", "float32", "int32", "complex64", "bool"]
    if isinstance(value, dict | list | tuple):
        words += ["FrozenDict", "tuple", "an array"]
    return any(word in text for word in words)


def elements_of(value: Any) -> list[Any] | None:
    try:
        return list(value)
    except TypeError:
        return None


def of_result(call: Call, result: Any) -> Verdict:
    parameters = call.target.parameters()
    for name, source in call.changed.items():
        # A key is where nothing is drawn, and a flag may be an array where it says "bool".
        ignored = re.search("key|rng|deterministic|broadcast_dropout", name) is not None
        if not ignored and not fits(eval(source, dict(SCOPE)), parameters[name]):
            return Verdict("fault", f"accepted {name}={source}, which is not {parameters[name]}")
    changed = {name: eval(source, dict(SCOPE)) for name, source in call.changed.items()}
    arguments = call.target.values() | changed
    like = next((arguments[name] for name in LIKE if name in arguments), None)
    if call.traced or call.target.name.rpartition(".")[0] != "jdropout":
        return Verdict("result")
    function = call.target.name.removeprefix("jdropout.")
    if function in LIKE_INPUT.split() and described(result) != described(like):
        return Verdict("fault", f"returned {described(result)} for {described(like)}")
    if call.form == "{}":
        return of_values(function, arguments, like, result)
    return Verdict("result")


def described(x: Any) -> str:
    dtype = getattr(x, "dtype", None) or jnp.result_type(x)
    native = dtype.newbyteorder("=") if isinstance(dtype, np.dtype) else dtype
    return f"{jax.dtypes.canonicalize_dtype(native)}{list(np.shape(x))}"


LIKE = ("x", "w", "table", "tokens")
LIKE_INPUT = """alpha_dropout concrete_dropout drop_block standout
    feature_alpha_dropout gaussian_dropout gaussian_noise targeted_dropout uniform_noise
    variational_dropout word_dropout dropout drop_connect spatial_dropout locked_dropout drop_path
    embedding_dropout"""
"""Functions that return an array like their input."""


def of_values(name: str, arguments: dict[str, Any], x: Any, result: Any) -> Verdict:
    """Compares masks with the law's twin, and looks for NaN."""
    if name in LIKE_INPUT.split() and is_floating(x):
        given = [leaf for leaf in jax.tree.leaves(arguments) if is_floating(leaf)]
        finite = [np.isfinite(np.asarray(array, result.dtype)).all() for array in (*given, result)]
        if all(finite[:-1]) and not finite[-1]:
            return Verdict("fault", "returned NaN or infinity for a finite input")
    axes = SHARED.get(name, lambda rank: ())
    key, rate = arguments.get("key"), arguments.get("rate")
    words = () if name not in SHARED or key is None else np.ravel(jax.random.key_data(key))
    options = {*arguments} - {"key", "x", "w", "table", "rate", "shape"}
    if len(words) != 2 or options - {"broadcast_dims", "start", "global_shape", "precision"}:
        return Verdict("result")
    shape = arguments["shape"] if x is None else np.shape(x)
    shared = arguments.get("broadcast_dims", axes(len(shape)))
    shared = tuple(int(axis) % len(shape) for axis in shared)
    precision = arguments.get("precision") or (16 if isinstance(rate, jax.Array) else None)
    place = (arguments.get("start"), arguments.get("global_shape"), precision)
    expected = law_twin.keep_mask(words, float(rate), tuple(shape), shared, *place)
    kept = np.asarray(result) if x is None else np.asarray(result) != 0
    if not (kept == expected & np.asarray(True if x is None else x, bool)).all():
        return Verdict("fault", "returned another mask than the law's twin")
    return Verdict("result")


def is_floating(leaf: Any) -> bool:
    array = isinstance(leaf, ARRAY) and jnp.issubdtype(leaf.dtype, jnp.floating)
    return array or isinstance(leaf, float)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of an annotated type; also integers and scalars of all libraries are."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty) or isinstance(annotation, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return isinstance(value, str) and value in arguments
    if origin is collections.abc.Callable:
        return callable(value)
    if annotation is None or annotation is type(None):
        return value is None
    array = isinstance(value, ARRAY)
    scalar, dtype = (value.shape == (), value.dtype) if array else (True, None)
    if annotation is bool:
        return isinstance(value, bool | np.bool_)
    if annotation is int:
        return scalar and not isinstance(value, bool) and hasattr(value, "__index__")
    if annotation in (float, complex):
        number = isinstance(value, int | float | complex) and not isinstance(value, bool)
        return number or (scalar and dtype is not None and jnp.issubdtype(dtype, np.number))
    if annotation in (jax.Array, np.ndarray):
        return fits(value, complex) or dtype is not None or hasattr(value, "__jax_array__")
    if annotation in (linen.Module, linen.RNNCellBase):
        return callable(value)
    if annotation is nnx.Module:
        return isinstance(value, nnx.Pytree)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        elements = None if isinstance(value, str) else elements_of(value)
        if elements is None:
            return False
        return not arguments or all(fits(x, arguments[0]) for x in elements)
    return not isinstance(annotation, type) or isinstance(value, annotation)


# --- runs -----------------------------------------------------------------------------------------


class Result(NamedTuple):
    number: int
    text: str
    verdict: Verdict


def run(numbers: range, seed: int, quick: bool) -> Iterator[Result]:
    for number in numbers:
        call = make(seed, number, quick)
        yield Result(number, call.text, judge(call))


def run_in_children(numbers: range, seed: int, jobs: int) -> Iterator[Result]:
    """Runs calls in processes. One that a call ends, or that hangs, is replaced by another."""
    results: queue.Queue[Result | None] = queue.Queue()
    threads = [
        threading.Thread(target=watch, args=(numbers[job::jobs], seed, results), daemon=True)
        for job in range(jobs)
    ]
    for thread in threads:
        thread.start()
    ended = 0
    while ended < jobs:
        if (result := results.get()) is None:
            ended += 1
        else:
            yield result


def watch(numbers: range, seed: int, results: "queue.Queue[Result | None]") -> None:
    while numbers:
        words = [str(word) for word in (numbers.start, numbers.stop, numbers.step, seed)]
        child = subprocess.Popen(
            [sys.executable, __file__, "--child", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        last, timer = None, None
        for line in child.stdout:
            if timer is not None:
                timer.cancel()
            timer = threading.Timer(SECONDS, child.kill)
            timer.start()
            if line.startswith(MARK):
                last = Result(*json.loads(line.removeprefix(MARK)))
                results.put(last._replace(verdict=Verdict(*last.verdict)))
                numbers = numbers[numbers.index(last.number) + 1 :]
        if timer is not None:
            timer.cancel()
        code = child.wait()
        if not numbers:
            break
        if last is None and code == 1:  # it could not begin
            results.put(Result(-1, "import calls", Verdict("fault", "the child ended at once")))
            break
        how = f"hangs for {SECONDS} s" if code == -9 else f"ends its process with code {code}"
        results.put(Result(numbers[0], make(seed, numbers[0], False).text, Verdict("fault", how)))
        numbers = numbers[1:]
    results.put(None)


MARK = "call: "  # JAX and XLA may print too


def child(numbers: range, seed: int) -> None:
    # A call that asks for more memory than there is gets an error.
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    print("begins", flush=True)
    for result in run(numbers, seed, quick=False):
        print(MARK + json.dumps(result), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--child", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        *numbers, seed = options.child
        os.chdir(tempfile.mkdtemp())  # some calls write files
        child(range(*numbers), seed)
        return 0
    # The optimizations that are left out double the time of a call that compiles.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    counts: collections.Counter[str] = collections.Counter()
    print(PREAMBLE, flush=True)
    numbers = range(options.first, options.first + options.calls)
    for result in run_in_children(numbers, options.seed, options.jobs):
        counts[result.verdict.kind] += 1
        if result.verdict.kind == "fault":
            print(f"{result.text}\n    # {result.number}: {result.verdict.reason}", flush=True)
        if counts.total() % 1000 == 0:
            print(f"# {counts.total()} calls: {dict(counts)}", flush=True)
    print(f"# JAX {jax.__version__}, seed {options.seed}, {counts.total()} calls: {dict(counts)}")
    return 1 if counts["fault"] else 0


if __name__ == "__main__":
    sys.exit(main())
