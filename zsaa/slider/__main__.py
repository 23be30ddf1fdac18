"""`python -m zsaa.slider` makes the demo page, docs/slider.html, anew: SmolLM2-135M with the committed adapter, on
held-out reviews. --refresh only puts the current script and style around the numbers that are in the page; --picture
photographs it with Playwright and an installed Chromium."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from zsaa.kit.files import write_text
from zsaa.kit.store import RESULTS
from zsaa.slider import page

ROOT = RESULTS.parent
PAGE = ROOT / "docs" / "slider.html"
ADAPTER = RESULTS / "adapters" / "imdb-lora-salience"
TEXTS = ("0", "2", "3", "1", "4")  # a right answer that fades, one that flips, two that stay, and a short text
TITLE = "One dial between a language model's speed and its accuracy"
ABOUT = (
    "Drag α: the smaller, the fewer of the tokens go on at each layer, those on which a learned score expects the "
    "answer to hang; the others are dropped for good. The model, SmolLM2-135M-Instruct (Q4_1), was fine-tuned once, "
    "with α drawn anew at every step; it reads held-out film reviews. Every number was computed or measured with the "
    "real model (times: on a CPU)."
)


def read(path: Path) -> dict:
    """The data of an exported page."""
    found = re.search(
        r'<script type="application/json" id="zsaa-data">(.*?)</script>', path.read_text(encoding="utf-8")
    )
    if not found:
        raise ValueError(f"{path} is not an exported slider page.")
    return json.loads(found[1])


def demo(**options):
    """The slider over the committed model, not yet shown."""
    from zsaa import finetune
    from zsaa.slider.widget import Slider

    model, tokenizer = finetune.load(ADAPTER, kind="sequence-classification")
    return Slider(model.merge_and_unload(), tokenizer, labels=("negative", "positive"), **options)


def photograph(path: Path, picture: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = browser.new_page(viewport={"width": 1060, "height": 800}, device_scale_factor=1.5)
        view.goto(path.resolve().as_uri())
        view.wait_for_selector(".zsaa[data-exact=true]")
        view.screenshot(path=picture, full_page=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m zsaa.slider", description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--picture", type=Path, help="PNG to write, for example figures/slider.png")
    chosen = parser.parse_args()
    if chosen.refresh:
        from zsaa.slider.widget import Slider

        write_text(chosen.output, page.html(read(chosen.output), Slider._esm, Slider._css))
    else:
        slider = demo(prefetch=False)
        slider.text = TEXTS[0]
        slider.export(chosen.output, TEXTS, taus=(2, 5), title=TITLE, about=ABOUT, rounds=4)
        slider.close()
    if chosen.picture:
        photograph(chosen.output, chosen.picture)
    print(f"{chosen.output}: {chosen.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
