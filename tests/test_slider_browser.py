"""The slider in a real browser: the exported page, the widget against a kernel in this process, and JupyterLab."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import torch

pytest.importorskip("anywidget", reason="the slider needs anywidget: pip install 'zsaa[lab]'")
pytest.importorskip("playwright", reason="playwright is not installed: pip install playwright")

from playwright import sync_api
from test_slider import Recorder, expected, kept, word_tokenizer

import zsaa
from zsaa.cost import macs
from zsaa.rule import SPREAD
from zsaa.slider import __main__ as demo
from zsaa.slider.widget import Slider

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("ZSAA_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no browser: install chromium (apt install chromium) or set ZSAA_CHROMIUM to its path"
    ),
]

TEXTS = {
    "Long": " ".join(f"w{(7 * i) % 95}" for i in range(120)),
    "Short": "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11 w12",
}
NAMES = ("negative", "positive")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens an address in a page of its own; at the end there must have been no error and no request but for it."""
    with contextlib.ExitStack() as stack:
        complaints = []

        def opened(address=None, width=1000, height=900, **options):
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(90000)
            page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            if address:
                page.on(
                    "request", lambda r: complaints.append(r.url) if r.url.split(":")[0] in ("http", "https") else None
                )
                page.goto(address)
                page.wait_for_selector(".zsaa[data-exact=true]")
            return page

        yield opened
    assert complaints == []


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Exported pages of tiny models: a classifier, and a language model with a recorded continuation."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for kind, head, options in (
        ("classify", "sequence-classification", {"labels": NAMES}),
        ("generate", "causal-lm", {"new_tokens": 12}),
    ):
        slider = Recorder(tiny.make("llama", head), word_tokenizer(), TEXTS, samples=False, prefetch=False, **options)
        slider.wait()
        if kind == "generate":
            slider.say(type="stream")
            slider.wait()
        found[kind] = slider.export(folder / f"{kind}.html", texts=["0", "1"], taus=[2, 5]).as_uri()
        slider.close()
    return found


def settle(page):
    """Let the next frames be drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def set_range(page, name, index):
    """Move a range control as a drag does, with an input event."""
    page.evaluate(
        """([name, index]) => { const e = document.querySelector(`[id$="-${name}"]`); e.value = index;
        e.dispatchEvent(new Event("input", { bubbles: true })) }""",
        [name, index],
    )
    page.wait_for_selector(".zsaa[data-exact=true]")
    settle(page)


def shown(page):
    """What the page shows."""
    settle(page)
    return page.evaluate(
        """() => ({
        alpha: document.querySelector(".z-big").textContent,
        alive: [...document.querySelectorAll(".z-tokens > span")]
            .flatMap((e, i) => e.classList.contains("gone") ? [] : [i]),
        text: [...document.querySelectorAll(".z-tokens > span")].map((e) => e.textContent).join(""),
        layer: document.querySelector(".z-layer").textContent,
        facts: [...document.querySelectorAll(".z-fact")].map((e) => e.innerText),
        options: [...document.querySelectorAll(".z-option")]
            .map((e) => [e.children[0].textContent, Number(e.dataset.p)]),
        says: document.querySelector(".z-says").textContent,
        notice: document.querySelector(".z-notice").textContent,
        })"""
    )


# ------------------------------------------------------------------------------------------ the exported page


@pytest.mark.parametrize("schedule", SPREAD)
def test_what_it_says_of_the_layers_holds_under_the_schedule(schedule, open_page, tmp_path):
    model = zsaa.enable(tiny.make("llama", "sequence-classification"), schedule=schedule)
    slider = Recorder(model, word_tokenizer(), TEXTS, samples=False, prefetch=False, labels=NAMES)
    slider.wait()
    page = open_page(slider.export(tmp_path / "page.html", texts=["0"], taus=[5]).as_uri())
    slider.close()
    rising = schedule == "rising"
    assert ("Every layer passes on" in shown(page)["says"]) is not rising
    assert ("lower ones more, upper ones less" in shown(page)["says"]) is rising
    named = page.evaluate("document.querySelector('.z-foot .z-schedule').textContent")
    assert named == (
        "lower layers keep more, upper ones less (rising)" if rising else "every layer keeps the same share (Eq. 2)"
    )


@pytest.mark.parametrize("kind", ["classify", "generate"])
def test_the_page_shows_what_the_package_computes(open_page, pages, kind):
    page = open_page(pages[kind])
    data = demo.read(Path(pages[kind].removeprefix("file://")))
    meta = data["meta"]
    oracle = tiny.make("llama", "sequence-classification" if kind == "classify" else "causal-lm")
    config = oracle.config
    for text, alpha, tau, score in (
        ("0", 0.9, 5, "column_sum"),
        ("0", 0.7, 2, "column_mean"),
        ("1", 0.8, 5, "column_sum"),
        ("0", 1.0, 2, "column_sum"),
    ):
        page.select_option("select[id$=-text]", text)
        page.select_option("select[id$=-score]", score)
        set_range(page, "tau", meta["taus"].index(tau))
        set_range(page, "alpha", meta["alphas"].index(alpha))
        words = list(TEXTS.values())[int(text)]
        ids = word_tokenizer()(words).input_ids
        layers, probabilities = expected(oracle, ids, alpha, tau, score)
        for layer in range(config.num_hidden_layers + 1):
            set_range(page, "layer", layer)
            view = shown(page)
            alive = layers[layer - 1] if layer else list(range(len(ids)))
            assert view["alive"] == alive
            assert f"{len(alive)} " in view["layer"]
        assert view["text"] == words
        assert float(view["alpha"]) == alpha
        assert f"{len(layers[-1])} of {len(ids)}" in view["facts"][0]
        less = macs(config, len(ids)) / macs(config, len(ids), alpha, tau)
        assert ("all" if alpha == 1 else f"{less:.1f}× less") in view["facts"][1]
        if kind == "classify":
            assert [name for name, _ in view["options"]] == list(NAMES)
            assert [p for _, p in view["options"]] == pytest.approx(probabilities.tolist(), abs=1e-6)
            assert NAMES[probabilities.argmax()] in view["says"]
        else:
            best = probabilities[-1].topk(3)
            assert [name for name, _ in view["options"][:3]] == [f"“w{i}”" for i in best.indices]
            assert [p for _, p in view["options"][:3]] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_dragging_moves_text_map_and_numbers_together(open_page, pages):
    page = open_page(pages["classify"])
    seen = [shown(page)]
    box = page.locator("input[id$=-alpha]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.95, box["y"] + box["height"] / 2)
    page.mouse.down()
    for share in (0.8, 0.5, 0.2):
        page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2, steps=3)
        seen.append(shown(page))
    page.mouse.up()
    values = [float(view["alpha"]) for view in seen[1:]]
    assert values == sorted(values, reverse=True)
    assert len({len(view["alive"]) for view in seen}) > 2
    assert len({view["says"] for view in seen}) == 4
    # The map is drawn from the same layers: at the end of each column of pixels is where the token is dropped.
    painted = page.evaluate(
        """() => { const c = document.querySelector(".z-map"); const g = c.getContext("2d");
        const of = (y) => g.getImageData(2, y, 1, 1).data.join(); return [of(2), of(c.height - 5)] }"""
    )
    paper = page.evaluate("() => getComputedStyle(document.querySelector('.z-tokens')).backgroundColor")
    assert ", ".join(painted[0].split(",")[:3]) not in paper


def test_everything_works_by_keyboard(open_page, pages):
    page = open_page(pages["generate"])
    reached, outlines = [], []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e); return [e === document.body ? null
            : e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent,
            s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2] }"""
        )
        if name is None:
            break
        reached.append(name)
        outlines.append(outline)
    assert all(outlines), [name for name, outline in zip(reached, outlines) if not outline]
    assert all(reached)
    for control in ("α", "Text", "The text, token by token", "One layer back", "Layer", "One layer on", "Play",
                    "Continue the text", "at least τ", "ranked by", "Picture (PNG)", "Drawing (SVG)"):  # fmt: skip
        assert any(control in name for name in reached), (control, reached)

    page.focus("input[id$=-alpha]")
    page.keyboard.press("End")
    assert shown(page)["alpha"] == "1.00"
    page.keyboard.press("ArrowLeft")
    assert float(shown(page)["alpha"]) < 1
    assert page.get_attribute("input[id$=-alpha]", "aria-valuetext") == shown(page)["alpha"]
    page.keyboard.press("Home")
    assert shown(page)["alpha"] == "0.50"
    page.focus("input[id$=-layer]")
    page.keyboard.press("Home")
    assert "Input" in shown(page)["layer"]
    page.keyboard.press("ArrowRight")
    assert "After layer 1 of 4" in shown(page)["layer"]
    page.click("button[aria-label='One layer on']")
    assert "After layer 2 of 4" in shown(page)["layer"]

    page.focus(".z-tokens")
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.get_attribute(".z-tokens > :nth-last-child(2)", "data-here") == ""
    info = page.text_content(".z-info")
    assert re.search(r"dropped by (the first layer|layer \d of 4)|goes through all 4 layers", info)
    assert page.text_content("[role=status][aria-live=polite]") == info
    page.focus("input[id$=-alpha]")
    page.keyboard.press("End")
    page.wait_for_function("() => /stock model/.test(document.querySelector('[aria-live=polite]').textContent)")


def test_text_and_map_point_at_one_another(open_page, pages):
    page = open_page(pages["classify"])
    page.hover(".z-tokens > :nth-child(3)")
    settle(page)
    assert "w14" in page.text_content(".z-info")
    box = page.locator(".z-map").bounding_box()
    columns = box["width"] - 46
    page.mouse.click(box["x"] + columns * 50.5 / 120, box["y"] + box["height"] * 0.6)
    view = shown(page)
    assert "After layer 3 of 4" in view["layer"]
    assert page.get_attribute(".z-tokens > :nth-child(51)", "data-here") == ""


def test_recorded_continuations_play(open_page, pages):
    page = open_page(pages["generate"])
    streams = demo.read(Path(pages["generate"].removeprefix("file://")))["texts"][0]["streams"]
    (recording,) = streams.values()
    set_range(page, "alpha", 0)  # pressing the button goes back to the setting that was recorded
    page.get_by_role("button", name="Continue the text").click()
    for side in (0, 1):
        text = "".join(e["piece"] for e in recording["events"] if e["side"] == side)
        page.wait_for_function(
            "([i, text]) => document.querySelectorAll('.z-stream')[i].textContent === text", arg=[side, text]
        )
    assert float(shown(page)["alpha"]) == recording["alpha"]
    clocks = page.locator(".z-side p").all_text_contents()
    assert all(re.search(r"first token after .* a token; \d+ tokens in", clock) for clock in clocks)


def test_pictures_are_saved(open_page, pages, tmp_path):
    page = open_page(pages["classify"])
    saved = {}
    for name, button in (("svg", "Drawing (SVG)"), ("png", "Picture (PNG)")):
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
        download.value.save_as(tmp_path / name)
        saved[name] = (tmp_path / name).read_bytes()
    drawing = ElementTree.fromstring(saved["svg"])
    words = [node.text or "" for node in drawing.iter("{http://www.w3.org/2000/svg}text")]
    assert "".join(words).endswith(TEXTS["Long"])
    struck = [n for n in drawing.iter("{http://www.w3.org/2000/svg}text") if n.get("text-decoration")]
    assert len(struck) == 120 - len(shown(page)["alive"])
    assert saved["png"][:8] == b"\x89PNG\r\n\x1a\n"
    assert len(saved["png"]) > 20000


def luminance(rgb):
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    a, b = sorted((luminance(a), luminance(b)))
    return (b + 0.05) / (a + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_legible_and_never_alone(open_page, pages, scheme):
    """WCAG AA for every kind of token; the ramp climbs in lightness, which all see; dropped tokens are struck."""
    page = open_page(pages["classify"], color_scheme=scheme)
    found = page.evaluate(
        """() => { const box = document.querySelector(".z-tokens"), out = {};
        for (const name of [...Array(9).keys()].map((i) => `t d${i}`).concat("t d3 gone")) {
            const e = box.appendChild(document.createElement("span")); e.className = name; e.textContent = "x";
            const s = getComputedStyle(e); out[name] = [s.color, s.backgroundColor, s.textDecorationLine]; e.remove(); }
        const own = getComputedStyle(box); out.paper = [own.color, own.backgroundColor, ""];
        const faint = getComputedStyle(document.querySelector(".z-fact .z-faint"));
        out.faint = [faint.color, getComputedStyle(document.querySelector(".z-fact")).backgroundColor, ""];
        return out }"""
    )
    rgb = lambda text: [float(x) for x in re.findall(r"[\d.]+", text)][:3]  # noqa: E731
    paper = rgb(found["paper"][1])
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for name, (ink, back, _) in found.items():
        back = paper if name.endswith("gone") else rgb(back)
        assert contrast(rgb(ink), back) >= 4.5, name
    steps = [luminance(rgb(found[f"t d{i}"][1])) for i in range(9)]
    assert steps == sorted(steps, reverse=scheme == "light")
    assert contrast(rgb(found["t d0"][1]), rgb(found["t d8"][1])) > 7
    assert found["t d3 gone"][2] == "line-through"
    assert found["t d3"][2] == "none"


def test_the_notebook_theme_goes_before_the_system_s(open_page, pages):
    page = open_page(pages["classify"], color_scheme="dark")
    back = "() => getComputedStyle(document.querySelector('.zsaa')).backgroundColor"
    dark = page.evaluate(back)
    page.evaluate("() => document.body.setAttribute('data-jp-theme-light', 'true')")
    light = page.evaluate(back)
    page.evaluate("() => document.body.setAttribute('data-jp-theme-light', 'false')")
    assert light == "rgb(255, 255, 255)"
    assert page.evaluate(back) == dark != light


@pytest.mark.parametrize("width", [400, 700, 1400])
def test_nothing_sticks_out_at_any_width(open_page, pages, width):
    page = open_page(pages["generate"], width=width)
    wide = page.evaluate(
        """() => [document.documentElement.scrollWidth, [...document.querySelectorAll(".zsaa *")]
        .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("svg"))
        .map((e) => e.className)]"""
    )
    assert wide == [width, []]


def test_a_long_text_is_not_rebuilt_while_dragging(open_page, tmp_path):
    text = " ".join(f"w{(11 * i) % 95}" for i in range(1000))
    config = tiny.CONFIGS["llama"]()
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = tiny.tf.AutoModelForSequenceClassification.from_config(config)
    slider = Slider(model, word_tokenizer(), text, samples=False, prefetch=False, alphas=[0.5, 0.7, 0.8, 0.9, 0.95])
    page = open_page(slider.export(tmp_path / "long.html").as_uri())
    slider.close()
    assert page.locator(".z-tokens > span").count() == 1000
    page.evaluate(
        """() => { window.seen = { nodes: 0, classes: 0 }; new MutationObserver((all) => { for (const one of all)
        window.seen[one.type === "childList" ? "nodes" : "classes"]++ })
        .observe(document.querySelector(".z-tokens"), { childList: true, subtree: true, attributes: true }) }"""
    )
    counts = []
    for index in (0, 1, 2, 3, 4, 5):
        set_range(page, "alpha", index)
        counts.append(len(shown(page)["alive"]))
    seen = page.evaluate("() => window.seen")
    assert seen["nodes"] == 0
    assert 0 < seen["classes"] < 6 * 1000
    assert counts == sorted(counts)
    box = page.locator(".z-tokens").bounding_box()
    assert box["height"] < 500  # it scrolls within itself


def test_the_demo_page_opens_at_once_and_shows_the_committed_numbers(open_page):
    data = demo.read(demo.PAGE)
    page = open_page(demo.PAGE.as_uri())
    view = shown(page)
    start, text = data["start"], next(t for t in data["texts"] if t["id"] == data["start"]["text"])
    assert "".join(text["pieces"]) == view["text"]
    slot = text["costs"]["slot"][str(start["tau"])][data["meta"]["alphas"].index(start["alpha"])]
    point = text["points"][f"{start['score']}/{slot}"]
    assert [p for _, p in view["options"]] == point["p"]
    layer = int(re.search(r"After layer (\d+)", view["layer"])[1])
    assert view["alive"] == kept(point, data["meta"]["layers"])[layer - 1]
    for alpha, accuracy, *_ in data["meta"]["accuracy"]["points"]:
        if alpha in data["meta"]["alphas"]:
            set_range(page, "alpha", data["meta"]["alphas"].index(alpha))
            assert f"{accuracy:.1f}%" in shown(page)["facts"][-1]


# --------------------------------------------------------------------------- the widget, its kernel in this process

STUB = """
class Model {
  constructor(state) { this.state = state; this.heard = {}; }
  get(name) { return this.state[name]; }
  set(name, value) { if (this.state[name] !== value) { this.state[name] = value; this.emit(`change:${name}`); } }
  save_changes() { const { alpha, tau, score, text } = this.state; kernel({ state: { alpha, tau, score, text } }); }
  send(message) { kernel({ message }); }
  on(name, call) { (this.heard[name] ??= []).push(call); }
  off(name, call) { this.heard[name] = this.heard[name].filter((one) => one !== call); }
  emit(name, ...given) { for (const call of [...(this.heard[name] ?? [])]) call(...given); }
}
window.start = (state) => {
  window.model = new Model(state);
  window.stop = widget.render({ model: window.model, el: document.getElementById("root") });
};
"""


class Live:
    """A page with the widget's own script, joined to a Slider in this process: all but Jupyter's transport."""

    def __init__(self, page, slider):
        self.page, self.slider, self.told = page, slider, 0
        script = slider._esm.replace("export default {", "const widget = {").replace("export function", "function")
        page.expose_function("kernel", self.hear)
        page.set_content(
            f"<!doctype html><html><body><div id=root></div><style>{slider._css}</style>"
            f"<script type=module>{script}{STUB}</script></body></html>"
        )
        page.wait_for_function("() => window.start")
        names = ("meta", "alpha", "tau", "score", "text")
        page.evaluate("(state) => start(state)", {name: getattr(slider, name) for name in names})

    def hear(self, call):
        if "state" in call:
            self.slider.set_state(call["state"])
        else:
            self.slider._handle_custom_msg(call["message"], [])

    def pump(self, until, seconds=60):
        """Carry messages to the page until it says so, or until one of the type `until` was carried."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while self.told < len(self.slider.sent):
                self.page.evaluate("(m) => model.emit('msg:custom', m)", self.slider.sent[self.told])
                self.told += 1
            self.page.evaluate("(t) => model.set('text', t)", self.slider.text)
            settle(self.page)
            carried = (message["type"] for message in self.slider.sent[: self.told])
            if until in carried or ("=>" in until and self.page.evaluate(until)):
                return
        raise AssertionError(f"not in {seconds} s: {until}; {shown(self.page)}")


@pytest.fixture
def live(open_page):
    with contextlib.ExitStack() as stack:

        def make(head="sequence-classification", text=TEXTS["Short"], **options):
            model = tiny.make("llama", head)
            slider = Recorder(model, word_tokenizer(), text, **{"samples": False, "prefetch": False, **options})
            stack.callback(slider.close)
            view = Live(open_page(), slider)
            view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
            return view

        yield make


def test_typed_text_is_read_as_it_is_typed(live):
    view = live()
    view.page.select_option("select[id$=-text]", "own")
    assert view.page.input_value("textarea") == TEXTS["Short"]
    view.page.fill("textarea", "")
    view.page.type("textarea", "w3 w1 w4 w1 w5 w9 w2 w6")
    view.pump("() => document.querySelectorAll('.z-tokens > span').length === 8")
    view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
    oracle = tiny.make("llama", "sequence-classification")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    _, probabilities = expected(oracle, ids, view.slider.alpha, 5, "column_sum")
    assert [p for _, p in shown(view.page)["options"]] == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert len(view.slider.of("text")) <= 4  # not a message per letter
    view.page.evaluate("() => { stop(); start(model.state) }")  # a second view of the same slider
    view.slider.sent.clear()
    view.told = 0
    view.slider.say(type="hello")
    view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
    assert view.page.input_value("textarea") == "w3 w1 w4 w1 w5 w9 w2 w6"
    assert view.page.is_visible("textarea")


def test_while_the_model_runs_the_nearest_setting_is_shown_and_said_so(live):
    view = live(alpha=0.9)
    before = shown(view.page)
    lock = view.slider._engine.decoder.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.3))
    view.page.focus("input[id$=-alpha]")
    view.page.keyboard.press("Home")
    now = shown(view.page)
    assert (now["alpha"], view.page.get_attribute(".zsaa", "data-exact")) == ("0.50", "false")
    assert "α = 0.90" in now["notice"]
    assert now["options"] == before["options"]
    assert now["facts"][0] != before["facts"][0]  # what Eq. 2 says needs no model
    lock.remove()
    view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
    assert shown(view.page)["options"] != before["options"]


def test_an_error_of_the_model_is_shown_with_what_to_do(live):
    view = live()
    hook = view.slider._engine.decoder.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    view.page.focus("input[id$=-alpha]")
    view.page.keyboard.press("Home")
    view.pump("() => !document.querySelector('[role=alert]').hidden")
    alert = view.page.inner_text("[role=alert]")
    assert "ZeroDivisionError: division by zero" in alert
    assert "press Retry" in alert
    hook.remove()
    view.page.get_by_role("button", name="Retry").click()
    view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
    assert view.page.evaluate("() => document.querySelector('[role=alert]').hidden")


def test_continuations_stream_live_and_can_be_stopped(live):
    view = live("causal-lm", new_tokens=8, alpha=0.7)
    view.page.get_by_role("button", name="Continue the text").click()
    view.pump("() => [...document.querySelectorAll('.z-side p')].every((e) => /tokens in/.test(e.textContent))")
    view.pump("() => !document.querySelector('.z-main-button').hidden")
    events = [m["event"] for m in view.slider.of("stream") if m["event"]]
    for side, body in enumerate(view.page.locator(".z-stream").all_text_contents()):
        assert body == "".join(e["piece"] for e in events if e["side"] == side)


def test_the_page_saved_from_the_view_opens(live, open_page, tmp_path):
    view = live(alphas=[0.5, 0.7, 0.9])
    with view.page.expect_download() as download:
        view.page.get_by_role("button", name="Page (HTML)").click()
        view.pump("page")
    download.value.save_as(tmp_path / "saved.html")
    page = open_page((tmp_path / "saved.html").as_uri())
    assert shown(page)["options"] == shown(view.page)["options"]


def test_the_view_follows_python_and_leaves_nothing_behind(live):
    view = live()
    view.slider.alpha = 0.6
    view.page.evaluate("(a) => model.set('alpha', a)", 0.6)
    view.pump("() => document.querySelector('.zsaa').dataset.exact === 'true'")
    assert shown(view.page)["alpha"] == "0.60"
    view.page.evaluate("() => stop()")
    assert view.page.evaluate(
        "() => [document.getElementById('root').children.length, Object.values(model.heard).flat().length]"
    ) == [0, 0]


# --------------------------------------------------------------------------------------------------- JupyterLab

CELL = """
import sys
sys.path.insert(0, {tests!r})
import tiny, zsaa
from test_slider import word_tokenizer
model = tiny.make("llama", "causal-lm")
s = zsaa.slider(model, word_tokenizer(), {text!r}, samples=False, alpha=0.9)
s
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a free port, without a token, over a folder with one notebook."""
    if find_spec("jupyterlab") is None:
        pytest.skip("JupyterLab is not installed: pip install 'zsaa[lab]'")
    import nbformat

    folder = tmp_path_factory.mktemp("lab")
    cell = nbformat.v4.new_code_cell(CELL.format(tests=str(Path(__file__).parent), text=TEXTS["Long"]))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_code_cell("")]), folder / "slider.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=", "--allow-root",
        f"--notebook-dir={folder}", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]  # fmt: skip
    environment = {
        **os.environ,
        **{f"JUPYTER_{kind}_DIR": str(folder / ".jupyter" / kind) for kind in ("CONFIG", "DATA", "RUNTIME")},
    }
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=environment
        )
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api").close()
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/lab/tree/slider.ipynb"
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.lab
def test_in_jupyterlab(browser, lab, tmp_path):
    """The whole way: kernel, comm, anywidget's extension, JupyterLab's own keyboard shortcuts and themes."""
    context = browser.new_context(viewport={"width": 1300, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(120000)
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" and "zsaa" in m.text else None)
    page.goto(lab)
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    with contextlib.suppress(sync_api.TimeoutError):
        page.get_by_role("button", name="Select Kernel").click(timeout=5000)
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")  # a cell run earlier is not run at all
    page.click(".jp-CodeCell .cm-content >> nth=0")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector(".zsaa[data-exact=true]")

    oracle, ids = tiny.make("llama", "causal-lm"), word_tokenizer()(TEXTS["Long"]).input_ids

    def agrees(alpha, tau=5, score="column_sum"):
        page.wait_for_selector(".zsaa[data-exact=true]")
        view = shown(page)
        assert float(view["alpha"]) == alpha
        layers, probabilities = expected(oracle, ids, alpha, tau, score)
        layer = int(re.search(r"After layer (\d+)", view["layer"])[1])
        assert view["alive"] == layers[layer - 1]
        best = probabilities[-1].topk(3)
        assert [p for _, p in view["options"][:3]] == pytest.approx(best.values.tolist(), abs=1e-6)

    agrees(0.9)
    box = page.locator(".zsaa input[id$=-alpha]").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 11)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 11, steps=12)
    page.mouse.up()
    dragged = float(shown(page)["alpha"])
    assert dragged < 0.9
    agrees(dragged)
    # Arrow keys, which JupyterLab takes for walking from cell to cell, belong to the slider here.
    page.keyboard.press("Home")
    agrees(0.5)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    agrees(0.52)
    page.click(".zsaa button[aria-label='One layer on']")
    agrees(0.52)
    page.select_option(".zsaa select[id$=-score]", "column_mean")
    agrees(0.52, score="column_mean")
    page.get_by_role("button", name="Continue the text").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.z-side p')].every((e) => /tokens in/.test(e.textContent))"
    )
    page.screenshot(path=tmp_path / "lab-light.png")

    # Python sees the view's setting, and moves it.
    page.click(".jp-CodeCell .cm-content >> nth=1")
    page.keyboard.type("print('alpha is', s.alpha, s.score); s.alpha = 0.8")
    page.keyboard.press("Shift+Enter")
    page.wait_for_selector("text=alpha is 0.52 column_mean")
    page.wait_for_function("() => document.querySelector('.z-big').textContent === '0.80'")
    agrees(0.8, score="column_mean")

    page.select_option(".zsaa select[id$=-text]", "own")
    page.fill(".zsaa textarea", "w3 w1 w4 w1 w5 w9 w2 w6")
    page.wait_for_function("() => document.querySelectorAll('.z-tokens > span').length === 8")
    page.wait_for_selector(".zsaa[data-exact=true]")

    page.evaluate("() => document.body.setAttribute('data-jp-theme-light', 'false')")
    settle(page)
    page.screenshot(path=tmp_path / "lab-dark.png")
    print(json.dumps({"screenshots": str(tmp_path)}))
    context.close()
    assert complaints == []
