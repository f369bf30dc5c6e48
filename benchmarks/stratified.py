"""Measures what coupled masks gain: `jdropout.mc_predict` with ``sampling="stratified"``.

    python benchmarks/stratified.py            # about 20 minutes on two cores
    python benchmarks/stratified.py --quick    # small numbers, as a trial

Networks and data are those of examples/train_mlp.py, train_cnn.py, uncertainty_regression.py and
train_transformer.py, each trained at every rate; the means of a few masks are compared with the
mean of very many independent ones. Then come functions for which coupling could do harm.
"""

import argparse
import functools
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# At the end: examples/ has an uncertainty.py too, and the one here is meant.
sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import train_charlm
import train_cnn
import train_mlp
import train_transformer
import uncertainty_regression
from flax import nnx
from harness import Row
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich import box
from rich.console import Console
from run import RESULTS, describe_environment, table
from subset_quality import CNN, around, digits_options

import jdropout
from jdropout import uncertainty
from jdropout.keys import at_site
from jdropout.nnx import set_site_keys

RATES = (0.1, 0.25, 0.5)
COUNTS = (2, 4, 8, 10, 16, 20, 32, 50, 100)
PICTURE = pathlib.Path(__file__).parents[1] / "docs" / "images" / "monte_carlo_error.png"
PICTURE_RATE = 0.25


class Plan(NamedTuple):
    """How much is done."""

    steps: float
    """Fraction of the training steps."""
    repetitions: int
    masks: int
    """Number of masks of a reference."""


ENTROPY = "expected entropy"
"""Output that is compared in another way than the others."""

FULL, QUICK = Plan(1, 48, 20_000), Plan(0.02, 8, 500)


class Method(NamedTuple):
    """Options of `mc_predict`."""

    sampling: Any
    batch_size: Callable[[int], int | None]

    def options(self, count: int) -> dict[str, Any]:
        """Options for a number of masks."""
        return {"sampling": self.sampling, "batch_size": self.batch_size(count)}

    def is_default(self, count: int) -> bool:
        """Whether the batch size is given, but is the one that would be chosen."""
        size = self.batch_size(count)
        return self.sampling == "stratified" and size == count and 2 < size <= 20


METHODS = {
    "independent": Method("independent", lambda count: None),
    "antithetic": Method("stratified", lambda count: 2),
    "stratified": Method("stratified", lambda count: None),
    "one group": Method("stratified", lambda count: count),
}
COUPLED = tuple(METHODS)[1:]


class Case(NamedTuple):
    """A function of a key and arguments, whose mean over masks is asked for."""

    function: Callable[..., Any]
    """Returns a dictionary of arrays."""
    args: tuple[Any, ...]
    labels: jax.Array | None = None
    chunk: int = 8
    """Repetitions that are computed together; there are as many more of them."""
    masks: int = 1
    """Factor of the number of masks of the reference."""
    more: Mapping[str, Any] = {}
    """More options of `mc_predict`."""


Network = Callable[[Plan], dict[float, Case]]
"""Trains a network at each rate."""


def main() -> None:
    options = parse_arguments()
    plan = QUICK if options.quick else FULL
    environment = describe_environment(time.strftime("%Y-%m-%d"))
    console = Console(width=300, record=True, highlight=False)
    console.print(*(f"- {name}: {value}" for name, value in environment.items()), sep="\n")
    results = Results()
    for name in options.only or NETWORKS:
        for rate, case in NETWORKS[name](plan).items():
            begin = time.perf_counter()
            results.add(f"{name}, {rate}", case, plan)
            print(f"{name}, {rate}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for section in (gains, masks_needed, uncertainties, coverage, variances):
        show(console, section, list(section(results)))
    if not options.only:
        show(console, special_cases, list(special_cases(results, plan)))
    show(console, worse, list(worse(results)))
    parts = ["stratified", *options.only, *(["quick"] if options.quick else [])]
    name = f"{environment['device'].replace(' ', '-')}-jax{environment['jax']}-{'-'.join(parts)}"
    text = f"# What coupled masks gain\n\n{console.export_text()}"
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip() + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{name}.md").write_text(text)
    if not options.only:
        draw(options.picture, results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few steps, repetitions and masks, as a trial")
    add("--only", action="append", default=[], choices=NETWORKS, help="may be repeated")
    add("--output", type=pathlib.Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    add("--picture", type=pathlib.Path, default=PICTURE, metavar="FILE", help="file to draw")
    return parser.parse_args()


def show(console: Console, section: Callable[..., Any], rows: list[Row]) -> None:
    text = re.sub(r"\n +", "\n", section.__doc__ or "")
    console.print(f"\n## {section.__name__.replace('_', ' ')}\n\n{text}\n", markup=False)
    if rows:
        console.print(table(rows, box.MARKDOWN))
    else:
        console.print("None.")


# --- measurements -------------------------------------------------------------------------


class Scores(NamedTuple):
    """Scores of one output under one method and number of masks, for each repetition."""

    squared_error: np.ndarray
    """Of the mean; the part that the reference contributes is subtracted."""
    covered: np.ndarray
    """Fraction of the elements that are inside the interval around the mean."""
    variance: np.ndarray
    """Mean of the variances, relative to that of very many masks."""
    variance_error: np.ndarray
    """Mean squared error of the variance, relative to the mean squared variance."""


class Results:
    """Everything that was measured."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}
        self.scores: dict[tuple[str, str], dict[tuple[str, int], Scores]] = {}
        """By case and output, then by method and number of masks."""
        self.uncertainties: dict[str, dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]] = {}
        """By case, then by quantity and method: errors' means and mean squares."""

    def add(
        self,
        name: str,
        case: Case,
        plan: Plan,
        counts: Sequence[int] = COUNTS,
        methods: Sequence[str] = tuple(METHODS),
    ) -> None:
        """Measures a case."""
        self.cases[name] = case
        reference = find_reference(case, plan)
        for count in counts:
            for method in methods:
                if METHODS[method].is_default(count):
                    continue
                key = at_site(at_site(jax.random.key(1), method), count)
                scores = measure(case, METHODS[method], count, key, reference, plan)
                for output, score in scores.items():
                    self.scores.setdefault((name, output), {})[method, count] = score
        if case.labels is not None and counts is COUNTS:
            self.uncertainties[name] = measure_uncertainties(case, reference, plan)

    def gain(self, name: tuple[str, str], method: str, count: int) -> tuple[float, float] | None:
        """The ratio of mean squared errors, independent / other, and its standard error."""
        of_case = self.scores[name]
        if (method, count) not in of_case:  # in the table under its other name
            return None
        return ratio(
            of_case["independent", count].squared_error, of_case[method, count].squared_error
        )


def ratio(over: np.ndarray, under: np.ndarray) -> tuple[float, float]:
    value = over.mean() / under.mean()
    errors = [x.std(ddof=1) / np.sqrt(len(x)) / x.mean() for x in (over, under)]
    return float(value), float(abs(value) * np.hypot(*errors))


def find_reference(case: Case, plan: Plan) -> jdropout.MCPrediction:
    """The moments over very many independent masks."""
    key = at_site(jax.random.key(1), "reference")
    return jdropout.mc_predict(
        case.function,
        key,
        *case.args,
        num_samples=case.masks * plan.masks,
        batch_size=16,
        **case.more,
    )


def measure(
    case: Case,
    method: Method,
    count: int,
    key: jax.Array,
    reference: jdropout.MCPrediction,
    plan: Plan,
) -> dict[str, Scores]:
    def predict(key: jax.Array) -> jdropout.MCPrediction:
        return jdropout.mc_predict(
            case.function,
            key,
            *case.args,
            num_samples=count,
            **method.options(count),
            **case.more,
        )

    parts = []
    for keys in chunks(key, case, plan):
        prediction = jax.vmap(predict)(keys)
        groups = int(prediction.num_groups[0])
        # A single group has no standard error of its own: then it is the bound.
        quantile = scipy.stats.t.ppf(0.975, groups - 1) if groups >= 4 else 2.0
        parts.append(jax.device_get(score(prediction, reference, np.float32(quantile))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def chunks(key: jax.Array, case: Case, plan: Plan) -> Iterator[jax.Array]:
    yield from jax.random.split(key, (-(-plan.repetitions // 8), case.chunk))


@jax.jit
def score(
    prediction: jdropout.MCPrediction, reference: jdropout.MCPrediction, quantile: jax.Array
) -> dict[str, Scores]:
    scores = {}
    for name, mean in reference.mean.items():
        if name == ENTROPY:  # is only needed of the reference
            continue
        error = prediction.mean[name] - mean
        true = reference.variance[name]
        variance = prediction.variance[name]
        axes = tuple(range(1, error.ndim))
        scores[name] = Scores(
            jnp.square(error).mean(axes) - reference.error_variance[name].mean(),
            (jnp.abs(error) <= quantile * prediction.standard_error[name]).mean(axes),
            variance.mean(axes) / true.mean(),
            jnp.square(variance - true).mean(axes) / jnp.square(true).mean(),
        )
    return scores


FEW = 10
"""Number of masks whose entropies and calibration are measured."""


def measure_uncertainties(
    case: Case, reference: jdropout.MCPrediction, plan: Plan
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Errors of quantities that are not means over the masks."""
    true = derived(jnp.log(reference.mean["probabilities"]), reference.mean[ENTROPY], case.labels)
    found: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for name in ("independent", "antithetic", "stratified"):

        def of_samples(key: jax.Array, method: Method = METHODS[name]) -> dict[str, jax.Array]:
            samples = jdropout.mc_predict(
                case.function,
                key,
                *case.args,
                num_samples=FEW,
                return_samples=True,
                **method.options(FEW),
            ).samples["logits"]
            mean = uncertainty.log_mean_probabilities(samples)
            return derived(mean, uncertainty.expected_entropy(samples), case.labels)

        parts = []
        for keys in chunks(at_site(jax.random.key(2), name), case, plan):
            errors = jax.tree.map(lambda x, y: x - y[None], jax.vmap(of_samples)(keys), true)
            parts.append(jax.device_get(errors))
        for quantity, errors in jax.tree.map(lambda *x: np.concatenate(x), *parts).items():
            errors = errors.reshape(len(errors), -1)
            moments = errors.mean(1), np.square(errors).mean(1)
            found.setdefault(quantity, {})[name] = moments
    return found


def derived(
    log_mean: jax.Array, expected_entropy: jax.Array, labels: jax.Array | None
) -> dict[str, jax.Array]:
    entropy = uncertainty.entropy(log_mean)
    assert labels is not None
    return {
        "predictive entropy": entropy,
        "mutual information": entropy - expected_entropy,
        "ECE": uncertainty.expected_calibration_error(log_mean, labels),
        "NLL": train_mlp.cross_entropy(log_mean, labels),
    }


# --- tables -------------------------------------------------------------------------------


def gains(results: Results) -> Iterator[Row]:
    """Mean squared error of the mean over T independent masks, divided by that over T coupled ones,
    ± standard error over the repetitions. Antithetic: pairs (batch_size=2). Stratified: the default
    (a single group up to 20 masks, groups of 10 up to 79, else of 20). One group: batch_size=T.
    """
    for name in results.scores:
        for method in COUPLED:
            gains = {count: results.gain(name, method, count) for count in COUNTS}
            cells = {f"T = {count}": with_error(gain, "-") for count, gain in gains.items()}
            case, output = name
            yield Row({"network, rate": case, "output": output, "masks": method}, cells, {})


def with_error(value: tuple[float, float] | None, missing: str = "", form: str = ".2f") -> str:
    if value is None:
        return missing
    return f"{value[0]:{form}} ± {value[1]:{form}}" if value[0] < 1000 else "above 1000"


def masks_needed(results: Results) -> Iterator[Row]:
    """Number of coupled masks with the error of 50 independent ones, interpolated between the
    measured numbers.
    """
    for name, scores in results.scores.items():
        target = scores["independent", 50].squared_error.mean()
        cells = {}
        for method in ("antithetic", "stratified"):
            curve = [scores[method, count].squared_error.mean() for count in COUNTS]
            cells[method] = crossing(COUNTS, curve, target)
        yield Row({"network, rate": name[0], "output": name[1]}, cells, {})


def crossing(counts: Sequence[int], errors: Sequence[float], target: float) -> str:
    """The first number at which a curve falls to the target, on logarithmic scales."""
    if errors[0] <= target:
        return f"below {counts[0]}"
    for index in range(1, len(counts)):
        if errors[index] <= target:
            (x0, x1), (y0, y1) = (
                np.log(counts[index - 1 : index + 1]),
                np.log(errors[index - 1 :][:2]),
            )
            return f"{np.exp(x0 + (x1 - x0) * (np.log(target) - y0) / (y1 - y0)):.1f}"
    return f"above {counts[-1]}"


def uncertainties(results: Results) -> Iterator[Row]:
    """Errors of the values from 10 masks, against those from very many: their mean (bias) and root
    mean square, over test inputs and repetitions. Entropies are in nats, per input; ECE and NLL are
    one number for all test inputs.
    """
    for name, quantities in results.uncertainties.items():
        for quantity, methods in quantities.items():
            cells = {}
            for method, (bias, _) in methods.items():
                cells[f"bias, {method}"] = with_error(
                    (bias.mean(), standard_error(bias)), "", ".4f"
                )
            for method, (_, squares) in methods.items():
                cells[f"RMSE, {method}"] = f"{np.sqrt(squares.mean()):.4f}"
            yield Row({"network, rate": name, "quantity": quantity}, cells, {})


def standard_error(x: np.ndarray) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def coverage(results: Results) -> Iterator[Row]:
    """How often, in percent, the mean over very many masks is within mean ± quantile *
    standard_error, ± standard error over the repetitions. The quantile is the 0.975 quantile of
    Student's distribution with num_groups - 1 degrees of freedom, so 95 % is nominal; for 10
    stratified masks, which are a single group, it is 2 and the standard error that of independent
    masks.
    """
    for name, scores in results.scores.items():
        cells = {}
        for count in (10, 50, 100):
            for method in ("independent", "stratified"):
                covered = 100 * scores[method, count].covered
                value = covered.mean(), standard_error(covered)
                cells[f"{method}, T = {count}"] = with_error(value, "", ".1f")
        yield Row({"network, rate": name[0], "output": name[1]}, cells, {})


def variances(results: Results) -> Iterator[Row]:
    """The mean of prediction.variance over the variance of very many masks (1 is unbiased), ±
    standard error over the repetitions, and its root mean squared error relative to the root mean
    square of the variance of very many masks.
    """
    for name, scores in results.scores.items():
        cells = {}
        for count in (10, 50):
            for method in ("independent", "stratified"):
                variance = scores[method, count].variance
                value = variance.mean(), standard_error(variance)
                cells[f"{method}, T = {count}"] = with_error(value, "", ".3f")
        for count in (10, 50):
            for method in ("independent", "stratified"):
                error = np.sqrt(scores[method, count].variance_error.mean())
                cells[f"RMSE, {method}, T = {count}"] = f"{error:.2f}"
        yield Row({"network, rate": name[0], "output": name[1]}, cells, {})


def worse(results: Results) -> Iterator[Row]:
    """All gains that are below 1 by more than three standard errors."""
    for name, scores in results.scores.items():
        for method, count in scores:
            gain = results.gain(name, method, count)
            if method != "independent" and gain and gain[0] < 1 - 3 * gain[1]:
                labels = {"case": name[0], "output": name[1], "masks": method, "T": str(count)}
                yield Row(labels, {"gain": with_error(gain)}, {})


# --- networks -----------------------------------------------------------------------------


def classifier(
    apply: Callable[..., jax.Array], args: tuple[Any, ...], labels: jax.Array | None, **more: Any
) -> Case:
    """A case from a function of a key and arguments that returns logits."""
    return Case(outputs_of(apply), args, labels, **more)


@functools.cache
def outputs_of(apply: Callable[..., jax.Array]) -> Callable[..., dict[str, jax.Array]]:
    def outputs(key: jax.Array, *args: Any) -> dict[str, jax.Array]:
        logits = apply(key, *args)
        entropy = uncertainty.entropy(logits)
        return {"logits": logits, "probabilities": jax.nn.softmax(logits), ENTROPY: entropy}

    return outputs


WIDTH = 64


def mlp(plan: Plan, rates: Sequence[float] = RATES) -> dict[float, Case]:
    """Two hidden layers of 64 with dropout, on digits."""
    return on_digits(apply_mlp, init_mlp, rates, plan, steps=2000, inputs=200, masks=4)


def init_mlp(key: jax.Array) -> Any:
    return train_mlp.linen_network(WIDTH, 0.0).init(key)


def apply_mlp(key: jax.Array | None, rate: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    return train_mlp.linen_network(WIDTH, rate).apply(params, x, key)


def cnn(plan: Plan) -> dict[float, Case]:
    """Three residual blocks of 16 channels with dropout at the end of their branches, on digits."""
    return on_digits(apply_cnn, init_cnn, RATES, plan, steps=300, inputs=40, masks=2)


def init_cnn(key: jax.Array) -> Any:
    return nnx.state(new_cnn("dropout", nnx.Rngs(key)))


def new_cnn(kind: str, rngs: nnx.Rngs) -> CNN:
    return CNN(functools.partial(around, kind), [0.0] * 3, 16, rngs)


def apply_cnn(
    key: jax.Array | None, rate: Any, params: Any, x: jax.Array, kind: str = "dropout"
) -> jax.Array:
    structure = nnx.graphdef(nnx.eval_shape(lambda: new_cnn(kind, nnx.Rngs(0))))
    model = nnx.merge(structure, params)
    model.rates = (rate,) * 3
    return model(x, key)


def on_digits(
    apply: Callable[..., jax.Array],
    init: Callable[[jax.Array], Any],
    rates: Sequence[float],
    plan: Plan,
    *,
    steps: int,
    inputs: int,
    masks: int = 1,
) -> dict[float, Case]:
    """Trains at each rate, as the examples do: with 500 samples, 30 % of whose labels are wrong."""
    options = digits_options(batch_size=64, learning_rate=1e-3)
    options.seeds = 1
    optimizer = optax.adam(options.learning_rate)

    def training(rate: Any) -> train_mlp.Training:
        network = train_mlp.Network(init, lambda params, x, key: apply(key, rate, params, x))
        return train_mlp.Training(lambda _: network, optimizer, options.batch_size)

    @jax.jit
    def train(rate: jax.Array, run: train_mlp.Run) -> train_mlp.Run:
        step = functools.partial(train_mlp.train_step, training(rate))
        return jax.lax.fori_loop(0, round(steps * plan.steps), step, run)

    start = jax.tree.map(lambda leaf: leaf[0], train_mlp.start(options, training(0.0)))
    cases = {}
    for rate in rates:
        run = train(jnp.float32(rate), start)
        test = _digits.Samples(*(leaf[:inputs] for leaf in run.data.test))
        args = (jnp.float32(rate), run.params, test.images)
        cases[rate] = classifier(apply, args, test.labels, masks=masks)
    return cases


def regression(name: str, plan: Plan) -> dict[float, Case]:
    """One hidden layer of 50 with dropout at input and hidden units."""
    options = argparse.Namespace(learning_rate=1e-2, steps=500, batch_size=32, width=50)
    options.steps = round(options.steps * plan.steps)
    key = jax.random.key(0)
    examples, _ = uncertainty_regression.split_at_random(key, uncertainty_regression.TABLES[name]())
    parts = uncertainty_regression.make_parts(len(examples.y))
    part = jax.tree.map(lambda rows: jnp.asarray(rows[-1]), parts)
    cases = {}
    for rate in RATES:
        job = uncertainty_regression.Job(
            jnp.float32(rate), jnp.float32(1e-3), jnp.int32(0), jnp.array(False)
        )
        train = functools.partial(uncertainty_regression.train, options, key, examples, part)
        network = jax.jit(train)(job)
        cases[rate] = Case(
            apply_regression, (network, jnp.asarray(examples.x[part.asked])), None, 64, 4
        )
    return cases


def apply_regression(key: jax.Array, network: Any, x: jax.Array) -> dict[str, jax.Array]:
    return {"output": uncertainty_regression.forward(key, network, x)[:, 0]}


TRANSFORMER = argparse.Namespace(
    layers=2,
    width=32,
    heads=2,
    context=32,
    batch_size=16,
    learning_rate=1e-2,
    train_chars=20000,
    attention="jdropout",
    steps=600,
)


def transformer(plan: Plan) -> dict[float, Case]:
    """Two blocks of width 32 that predict characters; dropout everywhere, also in attention."""
    cases = {}
    for rate in RATES:
        apply = apply_transformer(rate, rate)
        windows = held_out_windows()
        args = (train_characters(apply, plan), windows[:, :-1])
        cases[rate] = classifier(apply, args, windows[:, 1:])
    return cases


def train_characters(apply: Callable[..., jax.Array], plan: Plan) -> Any:
    optimizer = train_transformer.make_optimizer(TRANSFORMER)
    text = jnp.asarray(train_transformer.load_text(TRANSFORMER.train_chars).train)
    key = jax.random.key(0)

    def take_step(step: jax.Array, state: Any) -> Any:
        batch_key, dropout_key = jax.random.split(jax.random.fold_in(key, step))
        windows = train_transformer.draw_windows(
            batch_key, text, TRANSFORMER.batch_size, TRANSFORMER.context + 1
        )

        def loss(params: Any) -> jax.Array:
            logits = apply(dropout_key, params, windows[:, :-1])
            return train_transformer.cross_entropy(logits, windows)

        return train_transformer.update(optimizer, state, jax.grad(loss)(state.params))

    @jax.jit
    def train() -> Any:
        params = nnx.state(train_transformer.Transformer(TRANSFORMER, 0.0, nnx.Rngs(key)))
        state = train_transformer.State(params, optimizer.init(params))
        steps = round(TRANSFORMER.steps * plan.steps)
        return jax.lax.fori_loop(0, steps, take_step, state).params

    return train()


def held_out_windows() -> jax.Array:
    text = train_transformer.load_text(TRANSFORMER.train_chars).held_out
    return train_transformer.spread_windows(text, 4, TRANSFORMER.context + 1)


@functools.cache
def apply_transformer(attention: float, rate: float) -> Callable[..., jax.Array]:
    """The transformer of the example, with a rate of attention and another one elsewhere."""
    structure = train_transformer.structure(TRANSFORMER, 0.0)

    def apply(key: jax.Array | None, params: Any, x: jax.Array) -> jax.Array:
        model = nnx.merge(structure, params)
        model.dropout.rate = rate
        for block in model.blocks:
            block.dropout.rate = rate
            block.attention.dropout_rate = attention
        return model(x, key)

    return apply


NETWORKS: dict[str, Network] = {
    "MLP, digits": mlp,
    "CNN, digits": cnn,
    "regression, diabetes": functools.partial(regression, "diabetes"),
    "regression, wine": functools.partial(regression, "wine"),
    "transformer, text": transformer,
}


# --- functions for which coupling could do harm -----------------------------------------------

FEW_COUNTS = (2, 10, 50)


def special_cases(results: Results, plan: Plan) -> Iterator[Row]:
    """The same ratios of mean squared errors for other kinds of dropout, rates and functions. The
    pure interactions are products of centred masks, whose sites have no effect of their own. With 2
    masks both kinds of coupling are the same.
    """
    for name, case in find_special_cases(results, plan):
        begin = time.perf_counter()
        results.add(name, case, plan, FEW_COUNTS, ("independent", "antithetic", "stratified"))
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        for of_case, output in list(results.scores):
            if of_case == name:
                cells = {}
                for count in FEW_COUNTS:
                    for method in ("antithetic", "stratified"):
                        if count > 2 or method == "stratified":
                            gain = results.gain((name, output), method, count)
                            cells[f"{method}, T = {count}"] = with_error(gain)
                yield Row({"case": name, "output": output}, cells, {})


def find_special_cases(results: Results, plan: Plan) -> Iterator[tuple[str, Case]]:
    for count, rates in {2: (0.1, 0.25, 0.5, 0.9), 3: (0.5,), 8: (0.5,)}.items():
        for rate in rates:
            args = (jnp.float32(rate), jnp.ones((1000, count)))
            yield f"{count} units, {rate}", Case(apply_interaction, args)
    for rate, case in mlp(plan, (0.8, 0.95)).items():
        yield f"MLP, {rate}", case
    _, params, x = results.cases["MLP, digits, 0.5"].args
    mlps = {
        "MLP, consistent=True, 0.5": (jdropout.dropout, 0.5, {"consistent": True}),
        "MLP, gaussian_dropout, 0.5": (jdropout.gaussian_dropout, 0.5, {}),
        "MLP, Flax's own dropout, 0.5": (flax_dropout, 0.5, {}),
        "MLP, broadcast_dims=(0,), 0.5": (drop_whole_columns, 0.5, {}),
    }
    for name, (drop, rate, more) in mlps.items():
        apply = functools.partial(apply_mlp_with, drop, rate)
        shared = "consistent" in more or "broadcast" in name
        yield (
            name,
            classifier(
                apply,
                (params, x[:50]),
                None,
                chunk=64 if shared else 8,
                masks=5 if shared else 1,
                more=more,
            ),
        )
    for rate in (0.1, 0.5):
        apply = functools.partial(apply_connected, rate)
        yield (
            f"MLP, drop_connect, {rate}",
            classifier(apply, (params, x[:50]), None, chunk=64, masks=5),
        )
    yield from special_cnns(results, plan)
    params, x = results.cases["transformer, text, 0.25"].args
    for rate in (0.1, 0.5):
        apply = apply_transformer(rate, 0.0)
        yield f"transformer, only attention, {rate}", classifier(apply, (params, x), None)
    yield "LSTM, train_charlm.py", charlm(plan)


def apply_interaction(key: jax.Array, rate: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    y = jdropout.dropout(key, x, rate)
    return {"product": y.prod(-1), "pure interaction": (y - 1).prod(-1)}


def flax_dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    return nnx.Dropout(rate, deterministic=False)(x, rngs=key)


def drop_whole_columns(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    return jdropout.dropout(key, x, rate, broadcast_dims=(0,))


def apply_mlp_with(
    drop: Callable[..., jax.Array], rate: float, key: jax.Array, params: Any, x: jax.Array
) -> jax.Array:
    """The MLP with other dropout after its hidden layers."""
    for index in range(2):
        layer = params["params"][f"Dense_{index}"]
        x = drop(at_site(key, index), nnx.relu(x @ layer["kernel"] + layer["bias"]), rate)
    layer = params["params"]["Dense_2"]
    return x @ layer["kernel"] + layer["bias"]


def apply_connected(rate: float, key: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    """The MLP with dropout of the weights of its last two layers."""
    for index in range(3):
        layer = params["params"][f"Dense_{index}"]
        kernel = layer["kernel"]
        if index:
            kernel = jdropout.drop_connect(at_site(key, index), kernel, rate)
        x = x @ kernel + layer["bias"]
        if index < 2:
            x = nnx.relu(x)
    return x


def special_cnns(results: Results, plan: Plan) -> Iterator[tuple[str, Case]]:
    _, params, x = results.cases["CNN, digits, 0.25"].args
    for kind in ("drop_path", "stochastic_depth"):
        apply = functools.partial(apply_named_cnn, kind, 0.25)
        yield f"CNN, {kind}, 0.25", classifier(apply, (params, x), None)
    yield "CNN, layer_drop, 0.25", classifier(apply_layer_drop, (params, x), None, chunk=32)
    yield "CNN, train_cnn.py, 0.25", classifier(apply_structured_cnn, (params, x), None)
    patches = on_digits(apply_patches, init_patches, (0.5,), plan, steps=1000, inputs=200)
    yield "MLP of patches, patch_dropout, 0.5", patches[0.5]


def apply_named_cnn(
    kind: str, rate: float, key: jax.Array | None, params: Any, x: jax.Array
) -> jax.Array:
    return apply_cnn(key, rate, params, x, kind)


def apply_layer_drop(key: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    def skip(key: jax.Array, branch: Any, x: jax.Array, rate: float) -> jax.Array:
        return jdropout.layer_drop(key, lambda x: x + branch(x), x, rate)

    structure = nnx.graphdef(nnx.eval_shape(lambda: new_cnn("dropout", nnx.Rngs(0))))
    model = nnx.merge(structure, params)
    model.rates, model.around = (0.25,) * 3, skip
    return model(x, key)


def apply_structured_cnn(key: jax.Array, params: Any, x: jax.Array) -> jax.Array:
    """The CNN of the example, with drop_block, spatial_dropout and drop_path."""

    def new() -> train_cnn.CNN:
        return train_cnn.CNN(train_cnn.KINDS, 3, 3, 16, 0.25, nnx.Rngs(0))

    return nnx.merge(nnx.graphdef(nnx.eval_shape(new)), params)(x, key)


def init_patches(key: jax.Array) -> Any:
    shapes = {"w1": (4, 32), "positions": (16, 32), "w2": (32, 32), "w3": (32, 10)}
    return {
        name: jax.random.normal(at_site(key, name), shape) / np.float32(np.sqrt(shape[0]))
        for name, shape in shapes.items()
    }


def apply_patches(key: jax.Array | None, rate: Any, params: Any, x: jax.Array) -> jax.Array:
    """A network of each of 16 patches, of which half are dropped, and the mean of the others."""
    patches = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 16, 4)
    tokens = patches @ params["w1"] + params["positions"]
    tokens, _ = jdropout.patch_dropout(
        key, tokens, 0.5, num_prefix_tokens=0, deterministic=key is None
    )
    hidden = nnx.relu(nnx.relu(tokens) @ params["w2"]).mean(axis=1)
    return hidden @ params["w3"]


def charlm(plan: Plan) -> Case:
    """The LSTM of the example with all its kinds of dropout."""
    options = argparse.Namespace(learning_rate=1e-2, steps=300, batch_size=16, context=32)
    text = train_transformer.load_text(20000)
    rates = {"embedding_dropout": 0.05, "locked_dropout": 0.3, "drop_connect": 0.2, "zoneout": 0.1}
    model = train_charlm.CharLM(1, 32, rates, nnx.Rngs(0))
    structure, params, streams = nnx.split(model, nnx.Param, ...)
    optimizer = train_transformer.make_optimizer(options)
    training = train_charlm.Training(
        structure, streams, optimizer, options.batch_size, options.context
    )
    train_text, root = jnp.asarray(text.train), jax.random.key(0)

    @jax.jit
    def train(state: train_transformer.State) -> train_transformer.State:
        def step(index: jax.Array, state: train_transformer.State) -> train_transformer.State:
            return train_charlm.train_step(training, state, train_text, root, index)

        return jax.lax.fori_loop(0, round(options.steps * plan.steps), step, state)

    def apply(key: jax.Array, params: Any, x: jax.Array) -> jax.Array:
        model = training.model(params)
        set_site_keys(model, key, step=0)
        return model(x)

    params = train(train_transformer.State(params, optimizer.init(params))).params
    return classifier(apply, (params, held_out_windows()[:, :-1]), None)


# --- picture ------------------------------------------------------------------------------

PANELS = {
    ("MLP, digits", "logits"): "MSE of the logits (nats²)",
    ("CNN, digits", "logits"): "MSE of the logits (nats²)",
    ("regression, diabetes", "output"): "MSE (variances of the target)",
    ("transformer, text", "logits"): "MSE of the logits (nats²)",
}
LINES = {
    "independent": ("#0f172a", "o", "independent masks"),
    "antithetic": ("#c2410c", "^", "antithetic pairs"),
    "stratified": ("#1d4ed8", "s", "stratified masks"),
}


def draw(path: pathlib.Path, results: Results) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(
        f"Mean squared error of the mean over T masks, at rate {PICTURE_RATE:g}", fontsize=13
    )
    panels = figure.subplots(2, 2, sharex=True)
    for panel, ((network, output), label) in zip(panels.flat, PANELS.items(), strict=True):
        panel.set_title(network, loc="left", fontsize=11)
        panel.set_ylabel(label, fontsize=11)
        draw_panel(panel, results.scores[f"{network}, {PICTURE_RATE}", output])
    for panel in panels[1]:
        panel.set_xlabel("number of masks T", fontsize=11)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=11, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white")


def draw_panel(axes: Axes, scores: Mapping[tuple[str, int], Scores]) -> None:
    counts = np.array(COUNTS)
    for method, (colour, marker, label) in LINES.items():
        errors = [scores[method, count].squared_error.mean() for count in COUNTS]
        axes.plot(
            counts, errors, color=colour, marker=marker, linewidth=2, markersize=6, label=label
        )
    first = scores["independent", COUNTS[0]].squared_error.mean() * COUNTS[0]
    guide = 1.7 * first / counts
    axes.plot(counts, guide, color="0.45", linestyle=":", linewidth=1.5, label="slope of 1/T")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    main()
