"""What a traced prefill kept."""

from __future__ import annotations

from torch import Tensor

from zsaa.passes import Prefill


class Trace:
    """What the last prefill under `trace` kept; positions count from the first real token of each sample.

    counts: list over layers of lists over samples, N_l. lengths: N_0 of each sample. kept: list over layers of lists
    over samples of int64 tensors, the original positions that the layer passed on.
    """

    def __init__(self):
        self._seen: tuple[list[list[int]], list[int], list[Tensor]] | None = None

    def record(self, step: Prefill) -> None:
        """Keep what a prefill kept, and nothing else of it: a trace may live long."""
        positions = [step.positions(stage) for stage in range(1, len(step.rows))]
        self._seen = step.plan.counts, list(step.request.lengths), positions

    def _get(self, what: int):
        if self._seen is None:
            raise RuntimeError("no prefill has run under this trace yet.")
        return self._seen[what]

    @property
    def counts(self) -> list[list[int]]:
        return self._get(0)

    @property
    def lengths(self) -> list[int]:
        return self._get(1)

    @property
    def kept(self) -> list[list[Tensor]]:
        return [[p[p >= 0].cpu() for p in layer] for layer in self._get(2)]
