"""The playground in a browser: its bits against Python's, its trainings, and who can use it.

Run by `pip install -e ".[playground]"` and `pytest tests/playground -m playground`. They need
Chromium, and npm for axe-core.
"""

import itertools
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdropout
import jdropout.keys
import jdropout.schedules

pytestmark = pytest.mark.playground

ROOT = pathlib.Path(__file__).parents[2]
SOURCE = ROOT / "docs" / "playground"
DATA = ROOT / "tests" / "data"
AXE = "axe-core@4.14.1"
SERVED = "http://playground.test/"
CARDS = ("scale", "strip", "band", "mistakes", "schedules", "nested", "keys", "gallery")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


# --- a browser ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not path:
        pytest.fail("There is no Chromium: install Debian's chromium, or set CHROMIUM to its path.")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The page in one file, as a reader opens it from a folder."""
    path = tmp_path_factory.mktemp("playground") / "playground.html"
    subprocess.run([sys.executable, SOURCE / "build.py", path], check=True)
    return path


@pytest.fixture
def open_page(browser, file):
    """Opens the page; asserts at the end that it asked for nothing and complained of nothing."""
    contexts, requests, complaints = [], [], []

    def opened(language="en", width=1200, **options):
        options = {"locale": {"en": "en-GB", "zh": "zh-CN"}[language], **options}
        context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert set(requests) == {file.as_uri()}
    assert complaints == []


@pytest.fixture
def served(browser):
    """A page that has the modules as they are, from a server that answers within the browser."""
    context = browser.new_context()
    page = context.new_page()

    def answer(route):
        name = route.request.url.removeprefix(SERVED)
        folders = SOURCE, ROOT / "tests" / "playground"
        path = next(folder / name for folder in folders if (folder / name).is_file())
        route.fulfill(path=path)

    page.route(f"{SERVED}**", answer)
    page.goto(f"{SERVED}index.html")
    yield page
    context.close()


def python_lines(page, card):
    texts = page.locator(f"#{card} .line code").all_text_contents()
    return [text for text in texts if text.startswith("jdropout.")]


def evaluate(line):
    """What a line of the page gives, with the import that the page asks for."""
    return eval(line, {"jax": jax, "jnp": jnp, "jdropout": jdropout})


def bits(page, card):
    return page.locator(f"#{card} .bits code").all_text_contents()


def packed(mask):
    return np.packbits(np.asarray(mask).reshape(-1)).tobytes().hex()


def fill(page, card, name, text):
    page.locator(f"#{card}" if card else "header").get_by_label(name, exact=True).fill(text)


def numbers_in(text):
    return [float(number) for number in re.findall(r"-?\d+\.\d+|-?\d+", text)]


RATE = "Rate: probability of dropping"
SITE = "Site: names and numbers, with / between them"
SECONDS = 1000


def train(page, card):
    """Trains a card's networks to the end, and returns what it says then."""
    page.locator(f"#{card} button.primary").click()
    done = page.locator(f"#{card}").get_by_role("button", name="Train again")
    done.wait_for(timeout=120 * SECONDS)
    return page.locator(f"#{card} .note").text_content()


# --- bits ---------------------------------------------------------------------------------


def test_the_laws_give_all_known_answers(served):
    files = {path.name: json.loads(path.read_text()) for path in DATA.glob("*.json")}
    module = f"{SERVED}known_answers.js"
    script = "async ([module, files]) => (await import(module)).failures(files)"
    answer = served.evaluate(script, [module, files])
    assert answer["wrong"] == []
    assert answer["asked"] >= 193


@pytest.mark.parametrize(
    ("seed", "rate", "step", "microbatch", "site"),
    [
        ("37", "0.4", "3", "0", "decoder/3/mlp"),
        ("4294967295", "1e-4", "9223372036854775806", "4294967295", "密/4294967295/é"),
        ("0", "1", "0", "1", "hidden"),
    ],
)
def test_masks_and_their_lines_of_python_agree(seed, rate, step, microbatch, site, open_page):
    page = open_page()
    fill(page, None, "Seed", seed)
    for name, text in {"Step": step, "Microbatch": microbatch, SITE: site, RATE: rate}.items():
        fill(page, "keys", name, text)
    fill(page, "scale", RATE, rate)
    fill(page, "nested", "First rate", rate)
    for card in ("keys", "scale", "nested"):
        expected = [evaluate(line) for line in python_lines(page, card)]
        assert bits(page, card) == [packed(mask) for mask in expected], card
    drawn = page.locator("#scale .cells rect.blue").count()
    assert drawn == int(evaluate(python_lines(page, "scale")[0]).sum())


def test_the_known_key_is_derived_in_the_page(open_page):
    page = open_page()
    fill(page, None, "Seed", "0")
    for name, text in {"Step": "1000", "Microbatch": "3", SITE: "decoder/3/mlp"}.items():
        fill(page, "keys", name, text)
    vectors = json.loads((DATA / "golden_keys.json").read_text())["vectors"]
    known = next(v for v in vectors if v["site"] == ["decoder", 3, "mlp"])
    assert (known["step"], known["microbatch"]) == (f"{1000:016x}", 3)
    words = page.locator("#keys .words code").last.text_content()
    assert words.split() == known["key_words"]


def test_thinned_networks_are_those_of_their_steps(open_page):
    page = open_page()
    page.locator("#strip button.primary").click()
    first = evaluate(python_lines(page, "strip")[0])
    text = page.locator("#strip ol code").first.text_content()
    assert text.split()[0] == "".join("01"[int(kept)] for kept in first)
    assert "step=8" in python_lines(page, "strip")[0]


@pytest.mark.parametrize(("seed", "rate"), [(37, 0.3), (5, 0.55)])
def test_the_gallery_is_that_of_the_documentation(seed, rate, served, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    gallery = runpy.run_path(str(ROOT / "examples" / "gallery.py"))
    script = """async ([module, seed, rate]) => {
        const { FAMILY } = await import(module);
        return Object.entries(FAMILY).map(([name, panel]) => {
            const { shape, values } = panel([0, seed], rate);
            return [name, shape, [...values].map(String)];
        });
    }"""
    drawn = served.evaluate(script, [f"{SERVED}laws/family.js", seed, rate])
    key = jax.random.key(seed)
    panels = [panel for part in gallery["FAMILY"].values() for panel in part(key, rate)]
    left_out = ("subset", "subsetGroups", "strata")  # which the picture does not have
    ours = [panel for panel in drawn if panel[0] not in left_out]
    for (name, shape, texts), panel in zip(ours, panels, strict=True):
        values = np.array([float(text) for text in texts]).reshape(shape)
        expected = np.asarray(panel.values, np.float64)
        expected = expected.reshape((1,) * (4 - expected.ndim) + expected.shape)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_lines_of_the_gallery_give_what_is_drawn(open_page):
    page = open_page()
    for panel in page.locator("figure.panel").all():
        name = panel.get_attribute("data-panel")
        (line,) = (t for t in panel.locator(".line code").all_text_contents())
        value = np.asarray(evaluate(line), np.float64)
        styles = panel.locator("rect").evaluate_all(
            "all => all.map((r) => r.getAttribute('class'))"
        )
        styles = np.array(styles)
        if name in ("patch", "subset", "subsetGroups"):  # indices of what is kept
            kept = np.zeros((8, 16), bool)
            np.put_along_axis(kept, value.astype(int), True, axis=1)
            expected = np.where(kept, "value", "left-out")
        elif name == "word":
            padding = np.array(panel.locator("text").all_text_contents()) == "<pad>"
            expected = np.where((value.reshape(-1) == 0) & ~padding, "replaced", "value")
        else:
            if value.ndim == 4:  # drawn as a tile for each example and channel
                value = value.transpose(0, 3, 1, 2)
            expected = np.where(
                value == 0, "dropped", np.where(np.isinf(value), "replaced", "value")
            )
        # Of three panels the line gives the first step, cell or column.
        first = {"pathBatch": styles[:24], "layer": styles[:1], "zoneout": styles[::17]}
        shown = first.get(name, styles)
        np.testing.assert_array_equal(shown, expected.reshape(-1), err_msg=name)


def test_coupled_samples_drop_a_unit_in_its_share_of_them(open_page):
    page = open_page()
    rects = page.locator('[data-panel="strata"] rect')
    styles = rects.evaluate_all("all => all.map((rect) => rect.getAttribute('class'))")
    dropped = np.array(styles).reshape(10, 17) == "dropped"
    assert set(dropped.sum(0)) == {3}


def test_a_unit_is_kept_above_its_own_number_and_not_at_it(served):
    script = """async (module) => {
        const { maskBelow, uniformNumbers } = await import(module);
        const { data } = uniformNumbers([0, 37], 1, [5, 3]);
        const masks = [0, 1].map((more) => Array.from(data, (number, i) =>
            maskBelow([0, 37], { threshold: number + more, digits: 1 }, [5, 3])[i]));
        return masks;
    }"""
    at, above = served.evaluate(script, f"{SERVED}laws/mask.js")
    assert set(at) == {0}
    assert set(above) == {1}


# --- experiments --------------------------------------------------------------------------


def test_sums_are_right_on_average_with_the_scale_alone(open_page):
    page = open_page(reduced_motion="reduce")
    page.locator("#scale button.primary").click()
    page.get_by_text("Mean over 1000 masks").wait_for()
    note = page.locator("#scale .note").text_content()
    masks, unscaled, scaled, threshold, _, scale = numbers_in(note)[:6]
    assert (masks, threshold) == (1000, 39322)
    # Six standard deviations of the mean of 1000 sums: 6 * sqrt(100 * 0.4 * 0.6 / 1000).
    assert abs(unscaled - 60) < 0.93
    assert abs(scaled - 100) < 0.93 * scale


def test_in_evaluation_nothing_is_dropped(open_page):
    page = open_page()
    page.get_by_role("switch").first.check()
    assert page.locator("#scale .cells rect.blue").count() == 100
    assert page.locator("#scale .sums b").all_text_contents() == ["100"]
    assert evaluate(python_lines(page, "scale")[0]).sum() == 100
    page.get_by_role("switch").first.uncheck()
    assert page.locator("#scale .cells rect.blue").count() < 100


def test_training_reduces_the_loss_and_the_band_opens_in_the_gap(open_page):
    page = open_page()
    first, last, _, inside, gap, beyond, _ = numbers_in(train(page, "band"))
    assert last < first / 20
    assert gap > 1.3 * inside
    assert beyond > 1.3 * inside


@pytest.mark.parametrize("mistake", ["the scale", "the key", "the flag"])
def test_what_is_forgotten_shows(mistake, open_page):
    page = open_page(reduced_motion="reduce")
    page.get_by_label(mistake, exact=True).check()
    steps, right, wrong, *losses = numbers_in(train(page, "mistakes"))
    assert steps == 800
    assert wrong > 1.5 * right
    if mistake == "the key":  # which the training loss hides
        assert losses[1] < losses[0]


def test_schedules_race_at_their_rates(open_page):
    page = open_page(reduced_motion="reduce")
    train(page, "schedules")
    rows = page.locator("#schedules tbody tr").all()
    rates = {
        row.locator("th").text_content(): row.locator("td").first.text_content() for row in rows
    }
    ends = {
        "none": "0.00",
        "constant": "0.30",
        "early": "0.00",
        "late": "0.30",
        "curriculum": "0.30",
    }
    assert rates == ends
    errors = [float(row.locator("td").nth(1).text_content()) for row in rows]
    assert errors[0] == min(errors)  # without dropout a network learns the noise as well
    early, late = evaluate(python_lines(page, "schedules")[0])
    assert (float(early(400)), float(late(399)), float(late(400))) == (0, 0, np.float32(0.3))


def test_schedules_are_those_of_the_library(served):
    script = """async (module) => {
        const { early, late, curriculum } = await import(module);
        const all = [early(0.3, 7), late(0.3, 7), curriculum(0.3, 0.1)];
        return all.map((schedule) => [0, 3, 6, 7, 20].map(schedule));
    }"""
    ours = served.evaluate(script, f"{SERVED}laws/schedules.js")
    s = jdropout.schedules
    for rates, schedule in zip(
        ours, [s.early(0.3, 7), s.late(0.3, 7), s.curriculum(0.3, 0.1)], strict=True
    ):
        expected = [float(schedule(step)) for step in (0, 3, 6, 7, 20)]
        np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-8)


def test_lines_need_no_other_import_than_the_page_says(open_page):
    page = open_page()
    imports = page.locator("header .line code").text_content()
    names = {line[: line.index("(")] for card in CARDS for line in python_lines(page, card)}
    assert "jdropout.schedules.early" in names
    program = "\n".join([imports, *sorted(names)])
    subprocess.run([sys.executable, "-c", program], check=True)


def test_masks_of_one_key_are_nested(open_page):
    page = open_page()
    for rates in (("0.2", "0.7"), ("0.7", "0.2"), ("0.5", "0.5"), ("0", "1"), ("1e-7", "0.5")):
        fill(page, "nested", "First rate", rates[0])
        fill(page, "nested", "Second rate", rates[1])
        low, high = (page.locator("#nested .note").text_content().split(":")[i] for i in (1, 4))
        both = int(low.split(".")[0])
        assert int(high.split(",")[0]) == 0
        kept = [int(evaluate(line).sum()) for line in python_lines(page, "nested")]
        assert both == min(kept)
        assert page.locator("#nested .cells rect.orange").count() == max(kept) - min(kept)


# --- who can use it -----------------------------------------------------------------------


def test_both_languages_say_everything(open_page, served):
    script = """async (modules) => {
        const [{ EN }, { ZH }] = await Promise.all(modules.map((module) => import(module)));
        const kinds = (texts) => Object.entries(texts).map(([name, text]) => [name, typeof text]);
        return [kinds(EN), kinds(ZH)];
    }"""
    english, chinese = served.evaluate(script, [f"{SERVED}text/en.js", f"{SERVED}text/zh.js"])
    assert dict(english) == dict(chinese)

    page = open_page("zh")
    assert page.evaluate("document.documentElement.lang") == "zh-Hans"
    for text in page.locator(
        "h2, label, button:not([lang]), legend, .try, .note"
    ).all_text_contents():
        assert re.search("[\u4e00-\u9fff]|^$", text), text
    page.get_by_role("button", name="English").click()
    assert page.evaluate("document.documentElement.lang") == "en"
    assert "undefined" not in page.locator("body").inner_text()
    for text in page.locator("body :not([lang]):not(:has(*))").all_text_contents():
        assert not re.search("[\u4e00-\u9fff]", text), text


def test_the_keyboard_reaches_and_works_every_control(open_page):
    page = open_page()
    controls = """() => {
        const all = [...document.querySelectorAll("a, button, input, summary")];
        const there = (e) => !e.disabled && e.checkVisibility();
        return all.filter((e) => there(e) && (e.type !== "radio" || e.checked));
    }"""
    count = page.evaluate(f"({controls})().length")
    assert count > 60
    for number in range(count):
        page.keyboard.press("Tab")
        reached, outline = page.evaluate(
            f"""() => {{
                const style = getComputedStyle(document.activeElement);
                const width = style.outlineStyle === "none" ? 0 : parseFloat(style.outlineWidth);
                return [({controls})().indexOf(document.activeElement), width];
            }}"""
        )
        assert reached == number
        assert outline >= 2, number

    bits_before = bits(page, "scale")
    page.locator("#scale input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#scale").get_by_label(RATE, exact=True).input_value() == "0.41"
    assert ", 0.41, " in python_lines(page, "scale")[0]
    page.keyboard.press("End")
    assert page.locator("#scale .cells rect.blue").count() == 0
    page.keyboard.press("Home")
    assert page.locator("#scale .cells rect.blue").count() == 100
    assert bits(page, "scale") != bits_before

    page.get_by_role("switch").first.focus()
    page.keyboard.press("Space")
    assert page.get_by_role("switch").first.is_checked()

    page.locator("#keys button.primary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#keys").get_by_label("Step", exact=True).input_value() == "4"

    page.get_by_label("the scale", exact=True).focus()
    page.keyboard.press("ArrowRight")
    assert page.get_by_label("the key", exact=True).is_checked()
    assert "step=0" in page.locator("#mistakes .python").first.text_content()

    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_narrow_screen_needs_no_scrolling_sideways(language, open_page):
    page = open_page(language, width=360)
    page.locator("summary").evaluate_all("all => all.forEach((e) => e.click())")
    step, _, site, _ = page.locator("#keys input[type=text]").all()
    step.fill("9" * 200)
    site.fill("a" * 200)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 360
    wide = """all => all.filter((e) => e.getBoundingClientRect().right > 360.5).length"""
    assert page.locator("body *:not(.skip)").evaluate_all(wide) == 0


BAD_RATES = ["", "abc", "1.5", "-0.1", "0,4", "NaN", "Infinity", "1e999", "0x1"]
BAD_NUMBERS = ["", "-1", "1.5", "x", "1e3"]
BAD_FIELDS = {
    ("scale", RATE): BAD_RATES,
    ("strip", RATE): BAD_RATES[:2],
    ("band", RATE): ["0.95"],
    ("mistakes", RATE): ["0.95"],
    ("schedules", RATE): ["0.95"],
    ("nested", "Second rate"): BAD_RATES[:3],
    ("gallery", "Rate of all panels"): ["0", "0.95"],
    (None, "Seed"): [*BAD_NUMBERS, str(2**32), "9" * 400],
    ("keys", "Step"): [*BAD_NUMBERS, str(2**63)],
    ("keys", "Microbatch"): [*BAD_NUMBERS, str(2**32)],
    ("keys", SITE): ["", " ", "a//b", "/", f"a/{2**32}"],
}


def test_bad_input_is_named_and_changes_nothing(open_page):
    page = open_page()
    for (card, name), texts in BAD_FIELDS.items():
        place = page.locator(f"#{card}" if card else "header")
        field = place.get_by_label(name, exact=True)
        good = field.input_value()
        lines = page.locator("main .line code").all_text_contents()
        for text in texts:
            field.fill(text)
            assert field.get_attribute("aria-invalid") == "true", (name, text)
            message = page.locator(f"#{field.get_attribute('aria-describedby')}").text_content()
            named = text.strip().split("/")[-1] if str(2**32) in text else text.strip()
            assert f"“{named}”" in message
            assert re.search("Type .*, for example|type .*, for example|Type a smaller", message)
            assert page.locator("main .line code").all_text_contents() == lines
        field.fill(good)
        assert field.get_attribute("aria-invalid") == "false"
        assert page.locator('[role="alert"]:not(:empty)').count() == 0


def test_only_within_the_documentation_is_there_a_link_to_it(browser, file):
    build = runpy.run_path(str(SOURCE / "build.py"))
    page = browser.new_page()
    page.set_content(build["bundle"]("index.html"))
    assert page.locator("footer a").get_attribute("href") == "index.html"
    page.goto(file.as_uri())
    assert page.locator("footer a").count() == 0
    page.close()


def test_light_and_dark_follow_the_system(open_page):
    def brightness(scheme):
        page = open_page(color_scheme=scheme)
        return [
            sum(numbers_in(page.evaluate(f"getComputedStyle(document.body).{of}"))[:3])
            for of in ("backgroundColor", "color")
        ]

    (light, dark_ink), (dark, light_ink) = brightness("light"), brightness("dark")
    assert light > 700 > dark_ink
    assert dark < 100 < light_ink


def test_who_wants_little_motion_gets_the_end_alone(open_page):
    shown = {}
    for motion in ("reduce", "no-preference"):
        page = open_page(reduced_motion=motion)
        page.evaluate(
            """() => {
                window.shown = new Set();
                const bar = document.querySelector("#band progress");
                const note = () => bar.value > 0 && shown.add(bar.value);
                new MutationObserver(note).observe(bar, { attributes: true });
            }"""
        )
        train(page, "band")
        shown[motion] = page.evaluate("[...window.shown]")
    assert shown["reduce"] == [1200]
    assert len(shown["no-preference"]) > 10


def test_nothing_flickers(open_page):
    """A run counts hundreds of masks in a second, of which at most three may be drawn."""
    page = open_page()
    page.evaluate(
        """() => {
            window.times = [];
            new MutationObserver(() => times.push(performance.now()))
                .observe(document.querySelector("#scale .cells"), { attributes: true });
        }"""
    )
    page.locator("#scale button.primary").click()
    page.get_by_text("Mean over 1000 masks").wait_for(timeout=60 * SECONDS)
    times = page.evaluate("window.times")[:-1]  # the last one is drawn at the end, whenever it is
    assert len(times) >= 3
    assert all(later - time > 1000 for time, later in zip(times, times[3:], strict=False))
    counted = numbers_in(page.locator("#scale .note").text_content())[0]
    assert counted == 1000
    assert "step=1000" in python_lines(page, "scale")[0]


def test_what_is_announced_comes_once_at_the_end(open_page):
    page = open_page()
    page.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => {
                const status = document.querySelector('[role="status"]');
                if (status && heard.at(-1) !== status.textContent) heard.push(status.textContent);
            }).observe(document.body, { childList: true, subtree: true, characterData: true });
        }"""
    )
    train(page, "band")
    page.locator("#scale input[type=range]").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    heard = page.evaluate("window.heard")
    assert len(heard) == 1
    assert heard[0].startswith("Mean squared error on the data")


def test_lines_can_be_copied_without_a_clipboard_too(served):
    """Over plain http there is no clipboard: the line is selected instead."""
    served.locator("#scale .copy").click()
    served.get_by_text("Selected").first.wait_for()
    assert served.evaluate("getSelection().toString()") == python_lines(served, "scale")[0]


def test_a_reset_during_training_starts_from_the_beginning(open_page):
    page = open_page()
    for card in ("scale", "band", "mistakes", "schedules"):
        page.locator(f"#{card} button.primary").click()
        page.wait_for_timeout(200)
        page.locator(f"#{card}").get_by_role("button", name="Start over").click()
    page.wait_for_timeout(300)
    steps = [progress.get_attribute("value") for progress in page.locator("progress").all()]
    assert steps == ["0", "0", "0"]
    assert "Mean over" not in page.locator("#scale .note").text_content()
    fill(page, None, "Seed", "5")
    assert "key(5)" in python_lines(page, "band")[0]


@pytest.fixture(scope="module")
def axe(pytestconfig):
    """The source of axe-core, which is loaded once and kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("axe-core")
    archive = folder / f"{AXE.replace('@', '-')}.tgz"
    if not archive.exists():
        try:
            subprocess.run(
                ["npm", "pack", "--silent", AXE], cwd=folder, check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", b"").decode() or error
            pytest.fail(f"The audit needs {AXE}, but `npm pack {AXE}` failed: {reason}")
    with tarfile.open(archive) as files:
        return files.extractfile("package/axe.min.js").read().decode()


@pytest.mark.parametrize(
    ("scheme", "language", "width"),
    [(*each, 1200) for each in itertools.product(["light", "dark"], ["en", "zh"])]
    + [("light", "en", 360)],
)
def test_an_audit_finds_nothing(scheme, language, width, axe, open_page):
    page = open_page(language, width, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True)
    page.locator("summary").first.click()
    page.locator("#scale input[type=text]").fill("abc")  # errors have to be legible as well
    page.locator("#strip button.primary").click()
    page.evaluate(axe)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
    found = page.evaluate("tags => axe.run(document, { runOnly: tags })", tags)
    places = [
        (problem["id"], problem["help"], [node["html"][:200] for node in problem["nodes"]][:3])
        for problem in found["violations"]
    ]
    assert places == []
    assert len(found["passes"]) > 25
