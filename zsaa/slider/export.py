"""The slider as one page that works without a kernel: all that it shows is computed beforehand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from zsaa.kit.files import check_writable, write_text
from zsaa.measure import hardware, provenance
from zsaa.rule import check_score, check_tau
from zsaa.slider import page
from zsaa.slider.engine import STOCK, Interrupted


class Exporting:
    """What a `Slider` does to be written to a file."""

    def _saving(self, text: str, tau: int) -> Iterator[None]:
        scores = list(self.meta["scores"])
        yield from self._completing(text, [tau], scores)
        self.send({"type": "page", "html": self._page([text], [tau], scores)})

    def _completing(self, text: str, taus: Sequence[int], scores: Sequence[str]) -> Iterator[None]:
        """Every point of a text that the page needs."""
        while text not in self._texts:
            yield
            self._load(text)
        settings = [(1.0, taus[0], scores[0]), *self._wanted(text, taus, scores)]
        for done, setting in enumerate(settings):
            while self._key(text, *setting) not in self._points[text]:
                yield
                with suppress(Interrupted):
                    self._compute(text, *setting)
            if done % 8 == 0:
                self.send({"type": "status", "busy": True, "done": done, "of": len(settings)})
        self.send({"type": "status", "busy": False})

    def _timing_again(self, text: str, taus: Sequence[int], scores: Sequence[str]) -> Iterator[None]:
        encoded, known = self._texts[text][0], self._points[text]
        for setting in self._wanted(text, taus, scores):
            yield
            with suppress(Interrupted):
                again, _ = self._engine.point(encoded, *setting, self._stock[text], self._worker.overtaken)
                point = known[self._key(text, *setting)]
                point["ms"] = min(point["ms"], again["ms"])

    def export(
        self,
        path: str | Path,
        texts: Sequence[str] | None = None,
        taus: Sequence[int] | None = None,
        scores: Sequence[str] | None = None,
        title: str = "",
        about: str = "",
        rounds: int = 1,
    ) -> Path:
        """Write one self-contained HTML page that works without a kernel: every stop of the slider, computed now where
        it is not known yet.

        texts: ids of the texts to include (see `meta["texts"]`), by default the one shown. taus, scores: the settings
        to include; by default the tau shown and all scores. title, about: a heading and a line below it. rounds: how
        often every setting is run, one after the other, for its fastest time: a busy spell of the machine then sticks
        to none of them.
        ValueError for another suffix than .html: the buttons in the view save pictures (PNG, SVG). OSError, before
        anything is run, where it cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".html", ".htm"):
            raise ValueError(f"export writes .html, got {path.name}. The buttons below the view save PNG and SVG.")
        texts, taus = list(texts or [self.text]), [check_tau(t) for t in taus or [self.tau]]
        if unknown := [t for t in taus if t not in self.taus]:
            raise ValueError(f"tau {unknown[0]} is none of the slider's stops: {self.taus}.")
        scores = [check_score(s) for s in scores or self.meta["scores"]]
        check_writable(path)
        complete, errors = [], []

        def job() -> Iterator[None]:
            try:
                for text in texts:
                    yield from self._completing(text, taus, scores)
                for _ in range(rounds - 1):
                    for text in texts:
                        yield from self._timing_again(text, taus, scores)
                complete.append(True)
            except Exception as error:
                errors.append(error)

        self._worker.submit("save", job())
        self._worker.wait("save")
        if errors:
            raise errors[0]
        if not complete:
            raise RuntimeError(
                "the page was given up, as another was asked for or the slider was closed. Export again."
            )
        return write_text(path, self._page(texts, taus, scores, title, about, rounds))

    def _page(
        self,
        texts: Sequence[str],
        taus: Sequence[int],
        scores: Sequence[str],
        title: str = "",
        about: str = "",
        rounds: int = 1,
    ) -> str:
        data = []
        for text in texts:
            keys = {self._key(text, *setting) for setting in self._wanted(text, taus, scores)} | {STOCK}
            points = {key: self._points[text][key] for key in sorted(keys)}
            data.append({**self._text_message(text), "points": points, "streams": self._streams[text]})
        meta = {**self.meta, "live": False, "taus": sorted(taus), "title": title, "about": about, "rounds": rounds}
        meta["scores"] = {name: self.meta["scores"][name] for name in scores}
        facts = provenance(hardware=hardware(self._engine.device))
        machine = facts["hardware"]["cpu"] if facts["hardware"]["device"] == "cpu" else facts["hardware"]["device"]
        passes = "one pass" if rounds == 1 else f"the fastest of {rounds} passes"
        meta["provenance"] = (
            f"{meta['model']}; zsaa {facts['versions']['zsaa']}, commit {(facts['commit'] or 'unknown')[:7]}, "
            f"{facts['date'][:10]}; times: {passes} on {machine}, "
            f"{facts['hardware']['threads']} threads"
        )
        samples = {sample["id"]: sample for sample in self._samples}
        meta["texts"] = [{k: samples[t][k] for k in ("id", "name", "label")} for t in texts]
        start = {
            "alpha": self.alpha,
            "tau": self.tau if self.tau in taus else taus[0],
            "score": self.score if self.score in scores else scores[0],
            "text": self.text if self.text in texts else texts[0],
        }
        return page.html({"meta": meta, "start": start, "texts": data}, self._esm, self._css)
