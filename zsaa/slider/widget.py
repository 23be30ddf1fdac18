"""The slider as a Jupyter widget (anywidget): what the browser asks, and what it is told.

State is in traits that both sides may change (`alpha`, `tau`, `score`, `text`); everything else is a message.

    browser -> kernel   {"type": "hello"}                 a view was opened: tell it all that is known
                        {"type": "own", "text": str}      read this text
                        {"type": "stream"}, {"type": "stop"}
                        {"type": "save"}                  make the page
                        {"type": "retry"}
    kernel -> browser   {"type": "text", "id", "text", "pieces", "cut", "part", "costs", "label"}
                        {"type": "points", "text", "points": {key: point}}          a key: see `Slider._key`
                        {"type": "stream", "text", "key", "event": None | {...}}    None: it begins
                        {"type": "ready"}                     the setting shown is computed
                        {"type": "forget"}                    no point holds any longer
                        {"type": "status", "busy": bool, "done", "of"}              of the page being made
                        {"type": "page", "html"}
                        {"type": "error", "title", "message", "remedy"}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any

import anywidget
import torch
import traitlets

from zsaa.finetune import ALPHA_RANGE, DEEP_ALPHA_RANGE
from zsaa.learned.asked import Scorer
from zsaa.learned.salience import Salience
from zsaa.rule import ASKED, ENTRY, LEARNED, SUMS, TAU, check_alpha, check_score, check_tau
from zsaa.score import FUNCTIONS
from zsaa.slider.engine import STOCK, TAUS, Engine, Interrupted, Text, accuracy_curve, default_alphas
from zsaa.slider.export import Exporting
from zsaa.slider.texts import named
from zsaa.slider.worker import Worker

ASSETS = files("zsaa.slider")
RECENT = 8  # typed texts that stay in the cache


def remedy(error: BaseException) -> str:
    """What to do about an error of the model, in one sentence."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower():
        return "Use a shorter text, or free memory and press Retry."
    if isinstance(error, ValueError):
        return "Change the text or the setting."
    return "Check that model(**tokenizer(text, return_tensors='pt')) runs in a cell, mend it there, then press Retry."


class Slider(Exporting, anywidget.AnyWidget):
    """The alpha slider. Display it (last line of a cell), drag, and read its traits; `close()` frees it.

    model: any model that zsaa.enable takes, on any device; it is not touched.
    tokenizer: its tokenizer.
    text: one text, several, {name: text}, or None for held-out film reviews from the packaged data.
    alpha, tau, score: where the dial starts; by default as on `model`'s dial (0.9 where that says 1), else the paper's
        tau and score.
    question: one about each text, of a language model whose dial has the score "asked" and the schedule "entry": the
        texts are documents in a prompt then (its form: zsaa.finetune.questions), of which only what the question asks
        for enters the model; all else of it stays.
    labels: names of the classes, in the order of the model's outputs; by default those of its config.
    accuracy: "auto", a result file's content, path or name, or None; see zsaa.slider.engine.accuracy_curve.
    alphas: the slider's stops; by default round numbers from the range that the model was trained for up to 1.
    samples: whether film reviews are offered beside `text`.
    max_tokens: longer texts are cut, and the view says so; by default 1024, or the model's positions.
    new_tokens: length of the continuations of generation models.
    prefetch: whether settings that nobody asked for yet are computed when nothing else is to do.

    Traits: alpha (float), tau (int), score (str), text (the id of the text that is shown). Setting one moves the view.
    ValueError, TypeError: an argument out of range. UnsupportedModelError: a model that the dial cannot prune.
    """

    _esm = ASSETS.joinpath("slider.js").read_text(encoding="utf-8")
    _css = ASSETS.joinpath("slider.css").read_text(encoding="utf-8")

    meta = traitlets.Dict().tag(sync=True)
    alpha = traitlets.Float(0.9).tag(sync=True)
    tau = traitlets.Int(TAU).tag(sync=True)
    score = traitlets.Unicode("column_sum").tag(sync=True)
    text = traitlets.Unicode("0").tag(sync=True)

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        text: str | Sequence[str] | Mapping[str, str] | None = None,
        *,
        alpha: float | None = None,
        tau: int | None = None,
        score: str | None = None,
        question: str | None = None,
        labels: Sequence[str] | None = None,
        accuracy: Any = "auto",
        alphas: Sequence[float] | None = None,
        samples: bool = True,
        max_tokens: int | None = None,
        new_tokens: int = 48,
        prefetch: bool = True,
    ):
        self._engine = engine = Engine(model, tokenizer, labels, max_tokens)
        dial = engine.dial
        self._question = _asked(question, dial)
        trained = dial["alpha_range"]
        low = ALPHA_RANGE.get(engine.config.model_type, DEEP_ALPHA_RANGE)[0]
        low = trained[0] if trained and trained[0] < 1 else low
        self.alphas = sorted({*map(check_alpha, alphas), 1.0}) if alphas else default_alphas(low, engine.num_layers)
        if alpha is None:  # a dial may hold one alpha for each request of a batch
            alpha = dial["alpha"] if isinstance(dial["alpha"], float) and dial["alpha"] < 1 else 0.9
        alpha = check_alpha(alpha)
        self._scores = {name: _first_sentence(what) for name, what in _scores(dial).items()}
        tau, score = check_tau(dial["tau"] if tau is None else tau), self._offered(score or dial["score"])
        self.taus = sorted({*TAUS, tau})
        self._samples = named(text, samples)
        self._new_tokens, self._prefetch = new_tokens, prefetch
        self._texts: dict[str, tuple[Text, dict]] = {}  # id -> tokens, costs
        self._points: dict[str, dict[str, dict]] = {}  # id -> key -> point
        self._stock: dict[str, Any] = {}  # id -> probabilities at alpha = 1
        self._streams: dict[str, dict[str, list]] = {}  # id -> key -> events
        self._error: dict | None = None
        self._own = 0
        meta = {
            "model": getattr(model, "name_or_path", "") or type(model).__name__,
            "kind": engine.kind,
            "labels": engine.labels,
            "layers": engine.num_layers,
            "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else engine.device.type,
            "alphas": self.alphas,
            "taus": self.taus,
            "schedule": dial["schedule"],
            "scores": self._scores,
            "trained": list(trained) if trained else None,
            "accuracy": accuracy_curve(model, accuracy),
            "texts": [{k: v for k, v in sample.items() if k != "text"} for sample in self._samples],
            "live": True,
        }
        super().__init__(meta=meta, alpha=self._stop_near(alpha), tau=tau, score=score)
        self._worker = Worker(self._fail)
        self.observe(self._moved, ["alpha", "tau", "score", "text"])
        self.on_msg(self._hear)
        self._show()

    # --------------------------------------------------------------------------------------- texts and settings

    def _stop_near(self, alpha: float) -> float:
        return min(self.alphas, key=lambda a: abs(a - alpha))

    @traitlets.validate("alpha")
    def _valid_alpha(self, proposal):
        return self._stop_near(check_alpha(proposal["value"]))

    @traitlets.validate("tau")
    def _valid_tau(self, proposal):
        return min(self.taus, key=lambda t: abs(t - check_tau(proposal["value"])))

    @traitlets.validate("score")
    def _valid_score(self, proposal):
        return self._offered(proposal["value"])

    def _offered(self, score: Any) -> str:
        if check_score(score) not in self._scores:
            raise ValueError(f"this slider has no score {score!r}. It offers: {', '.join(self._scores)}.")
        return score

    def _key(self, text: str, alpha: float, tau: int, score: str) -> str:
        """What a point is known by: settings that keep the same numbers of tokens by the same score are one point."""
        slot = self._texts[text][1]["slot"][str(tau)][self.alphas.index(alpha)]
        return f"{score}/{slot}" if slot else STOCK

    def point(self, alpha: float | None = None, tau: int | None = None, score: str | None = None) -> dict | None:
        """What is known of the text shown at a setting (default: the one shown); None where it was not computed."""
        tau, score = self.tau if tau is None else tau, score or self.score
        if self.text not in self._texts:
            return None
        key = self._key(self.text, self.alpha if alpha is None else self._stop_near(alpha), tau, score)
        return self._points[self.text].get(key)

    # ----------------------------------------------------------------------------------------- from the browser

    def _moved(self, change: dict) -> None:
        self._worker.drop("stream")
        self._show()

    def _hear(self, _: Any, message: dict, __: Any = None) -> None:
        kind = message.get("type")
        if kind == "hello":
            self._tell_all()
        elif kind == "own":
            self.read(str(message.get("text", "")))
        elif kind == "stream":
            self._worker.submit("stream", self._streaming(self.text, self.alpha, self.tau, self.score))
        elif kind == "stop":
            self._worker.drop("stream")
        elif kind == "save":
            self._worker.submit("save", self._saving(self.text, self.tau))
        elif kind == "retry":
            self._show()

    def read(self, text: str) -> None:
        """Show `text`, as if it had been typed into the view."""
        self._own += 1
        self._samples.append({"id": f"own{self._own}", "name": "Your own text", "text": text, "label": None})
        self.text = f"own{self._own}"

    def refresh(self) -> None:
        """Forget what was computed. Call it after the model's weights have changed; they are shared, not copied."""
        self._worker.drop("stream", "save", "fill")
        self._worker.submit("show", self._showing(self.text, self.alpha, self.tau, self.score, forget=True))

    # ------------------------------------------------------------------------------------------ in the worker

    def _show(self) -> None:
        self._worker.submit("show", self._showing(self.text, self.alpha, self.tau, self.score))

    def _showing(self, text: str, alpha: float, tau: int, score: str, forget: bool = False) -> Iterator[None]:
        if forget:
            for known in (*self._points.values(), *self._streams.values(), self._stock):
                known.clear()
            self.send({"type": "forget"})
        if text not in self._texts:
            self._load(text)
            yield
        known = self._points[text]
        if STOCK not in known:
            self._compute(text, 1.0, tau, score)
            yield
        if self._key(text, alpha, tau, score) not in known:
            self._compute(text, alpha, tau, score)
        self._error = None
        self.send({"type": "ready"})
        if self._prefetch:
            self._worker.submit("fill", self._filling(text, tau, score))

    def _load(self, text: str) -> None:
        sample = next((s for s in self._samples if s["id"] == text), None)
        if sample is None:
            raise ValueError(f"there is no text {text!r}. Known: {', '.join(s['id'] for s in self._samples)}.")
        for old in [t for t in self._texts if t.startswith("own")][:-RECENT]:
            for store in (self._texts, self._points, self._stock, self._streams):
                store.pop(old, None)
        asked, read = self._question, self._engine.encode
        encoded = read(sample["text"]) if asked is None else self._engine.ask(sample["text"], asked)
        costs = self._engine.costs(encoded, self.alphas, self.taus)
        self._texts[text] = encoded, costs
        self._points.setdefault(text, {})
        self._streams.setdefault(text, {})
        self.send(self._text_message(text))

    def _compute(self, text: str, alpha: float, tau: int, score: str) -> dict:
        """The point at a setting, from the cache or by one pass of the model, and told to the browser."""
        key = self._key(text, alpha, tau, score)
        if key not in self._points[text]:
            stock, encoded = self._stock.get(text), self._texts[text][0]
            point, probabilities = self._engine.point(encoded, alpha, tau, score, stock, self._worker.overtaken)
            if key == STOCK:
                self._stock[text] = probabilities
            self._points[text][key] = point
            self.send({"type": "points", "text": text, "points": {key: point}})
        return self._points[text][key]

    def _wanted(self, text: str, taus: Sequence[int], scores: Sequence[str]) -> list[tuple]:
        """One setting per point, over all stops; first a coarse grid, then what lies between."""
        last, order = len(self.alphas) - 1, []
        for step in (16, 8, 4, 2, 1):
            order += [i for i in range(last, -1, -step) if i not in order]
        settings = [(self.alphas[i], tau, score) for tau in taus for score in scores for i in order]
        return list({self._key(text, *setting): setting for setting in reversed(settings)}.values())[::-1]

    def _filling(self, text: str, tau: int, score: str) -> Iterator[None]:
        for setting in self._wanted(text, [tau], [score]):
            while self._key(text, *setting) not in self._points[text]:
                yield
                with suppress(Interrupted):
                    self._compute(text, *setting)

    def _streaming(self, text: str, alpha: float, tau: int, score: str) -> Iterator[None]:
        if self._engine.kind != "generate":
            raise ValueError("this model does not continue texts: it has no language-model head.")
        while text not in self._texts:
            yield
        key, events = self._key(text, alpha, tau, score), []
        self.send({"type": "stream", "text": text, "key": key, "alpha": alpha, "event": None})
        encoded = self._texts[text][0]
        for event in self._engine.race(encoded, alpha, tau, score, self._new_tokens, self._worker.overtaken):
            events.append(event)
            self.send({"type": "stream", "text": text, "key": key, "event": event})
            yield
        self._streams[text][key] = {"alpha": alpha, "events": events}

    def _fail(self, name: str, error: BaseException) -> None:
        title = {"show": "This setting could not be computed", "stream": "The continuation failed"}.get(
            name, "The page could not be made" if name == "save" else "A setting could not be computed"
        )
        self._error = {
            "type": "error",
            "title": title,
            "message": f"{type(error).__name__}: {error}",
            "remedy": remedy(error),
        }
        self.send(self._error)

    # ------------------------------------------------------------------------------------------- to the browser

    def send(self, content: dict, buffers: Any = None) -> None:
        """A message to every view; nothing after close()."""
        if self.comm is not None:
            super().send(content, buffers)

    def _text_message(self, text: str) -> dict:
        encoded, costs = self._texts[text]
        sample = next(s for s in self._samples if s["id"] == text)
        return {
            "type": "text",
            "id": text,
            "text": sample["text"],
            "pieces": encoded.pieces,
            "cut": encoded.cut,
            "part": encoded.part,
            "costs": costs,
            "label": sample["label"] if sample["label"] in self._engine.labels else None,
        }

    def _tell_all(self) -> None:
        for text in list(self._texts):
            self.send(self._text_message(text))
            self.send({"type": "points", "text": text, "points": dict(self._points[text])})
        if self._error:
            self.send(self._error)

    # ---------------------------------------------------------------------------------------------- for scripts

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the setting shown is computed (and, with `prefetch`, all that is fetched ahead); False if that
        takes more than `timeout` seconds."""
        return self._worker.wait(timeout=timeout)

    def close(self) -> None:
        """End the worker thread, free what was computed, and close the view. The model is as it was all along."""
        if hasattr(self, "_worker"):
            self._worker.close()
            self._engine = None
            for store in (self._texts, self._points, self._stock, self._streams):
                store.clear()
        super().close()


def _asked(question: str | None, dial: dict) -> str | None:
    """The question, if this dial can be asked one; else ValueError."""
    if question is None:
        return None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text with at least one word, or None, got {question!r}.")
    if (dial["score"], dial["schedule"]) != (ASKED, ENTRY):
        raise ValueError(
            f"question= needs a dial with score='asked' and schedule='entry', and this one has {dial['score']!r} and "
            f"{dial['schedule']!r}: zsaa.enable(model, score='asked', schedule='entry') first, with a scorer "
            "(zsaa.asked.by_words makes one that needs no training)."
        )
    return question


def _first_sentence(function: Any) -> str:
    text = " ".join((function.__doc__ or function.__name__).split())
    return text.split(". ")[0].rstrip(".") + "."


def _scores(dial: dict) -> dict[str, Any]:
    """The scores to choose from, under the dial's schedule; a learned one only for a model that has learned it. By
    "asked" a question never leaves, so that its settings keep other numbers of tokens: it stands alone."""
    if dial["score"] == ASKED:
        return {ASKED: Scorer}
    plain = {name: what for name, what in FUNCTIONS.items() if dial["schedule"] != ENTRY or name not in SUMS}
    return {**plain, LEARNED: Salience} if dial["score"] == LEARNED else plain
