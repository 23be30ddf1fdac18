"""The results that the paper's claims are judged by (zsaa/kit/claims.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zsaa.kit.labels import by_eq_2
from zsaa.kit.store import rows_of


@dataclass(frozen=True)
class Held:
    """The results that the claims are judged by. sampled, usual: IMDB after alpha-sampled and after conventional
    fine-tuning, under the paper's schedule."""

    results: Sequence[dict]

    def of(self, kind: str) -> list[dict]:
        return [result for result in self.results if result["kind"] == kind]

    @property
    def curves(self) -> list[dict]:
        return [result for result in self.of("curve") if by_eq_2(result)]

    @property
    def sampled(self) -> dict | None:
        return find(self.curves, "imdb", method="alpha-sampled", tuning="full")

    @property
    def usual(self) -> dict | None:
        return find(self.curves, "imdb", method="conventional", tuning="full")


def find(curves: Sequence[dict], task: str, **recipe) -> dict | None:
    """The curve of that task and recipe that has the most samples; of several the first."""
    found = [r for r in curves if r["task"]["name"] == task]
    found = [r for r in found if all(r["recipe"].get(k) == v for k, v in recipe.items())]
    return max(found, key=lambda r: r["provenance"]["eval_samples"], default=None)


def row_at(result: dict | None, control: str, target: float) -> dict | None:
    return next((r for r in rows_of(result, control) if r["target"] == target), None) if result else None


def span(values: Sequence[float]) -> str:
    """The range of these, once where both ends look alike."""
    return " to ".join(dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values))))
