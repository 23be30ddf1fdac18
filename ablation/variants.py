"""What the ablation compares: which tokens are chosen, how many, what becomes of the rest, and what that costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from zsaa.cost import attention_widths, layer_weights
from zsaa.measure.checks import check_flag, check_number, check_whole
from zsaa.rule import Rule, check_tau

SCORES = (  # ablation/forward.py says what each is
    *("column_sum", "column_mean", "value_sum", "value_mean", "last_query", "last_8", "last_32", "norm"),
    *("recent", "first", "even", "random"),
)
DROPPED = ("gone", "merged", "weighted", "keys", "noted")
SCHEDULES = ("geometric", "rising", "easing", "front", "late", "early", "once", "twice", "deep", "linear", "zipf")
NUMBERED = ("rising", "easing", "once", "deep", "zipf")  # of these, the ones that take a number, as in "once:10"


@dataclass(frozen=True)
class Variant(Rule):
    """The package's rule with more scores and schedules, and what becomes of the rest; tokens are counted there.

    tau: as there. score: a name of SCORES. sinks: first tokens that are always kept. recent: share of the kept places
        that goes to the latest tokens, whatever their score.
    schedule: how the total number of drops is spread over the layers (see `weights`): "geometric" (Eq. 2), "front" (as
        if a quarter of the layers' drops were behind layer 1, the rest as in Eq. 2), "rising" (layer l keeps alpha^w
        of what enters it, w growing as exp(l / L): lower layers drop less, upper ones more; "rising:2" as
        exp(2 l / L)), "easing" (as exp(4 l / (L d)), d = -L log(alpha), the drops of all layers together: the slope
        eases off as the dial turns; "easing:2" half as steep), "late" (the first third of the layers spared), "early"
        (all drops in the first third), "once" (all behind layer 1), "once:10" (all behind layer 10), "deep" (once, with
        the token-layers of Eq. 2 at this alpha: the more there are, the deeper; "deep:0.9" deeper still), "twice"
        (behind layers 1 and 4), "linear" (equal numbers of tokens per layer), "zipf" (behind layer l as many as
        1 / (1 + k l) of all, with alpha of them behind layer 1: many go at once, few stay for long; "zipf:0.5" to this
        power), or one weight per layer.
    smooth: scores are averaged over so many neighbouring tokens, so that phrases stay together.
    reference: None counts by each sample's own length (Eq. 2); a number counts as if shorter samples had so many
        tokens, so that they keep all for longer, as they do when inputs are truncated.
    dropped: "gone" (the paper), "merged" (into the next kept token: its mean, by the tokens it stands for), "weighted"
        (merged by score), "keys" (kept as keys and values, of the state in which it was dropped, for all layers
        above) or "noted" (a learned note of what it said is added to the next kept token: needs a scorer with notes).
    ahead: the score looks at the states that enter a layer, not at its attention: what goes on is known beforehand, and
        only that asks queries.
    scorer_macs: what a learned score costs per row that enters a layer that drops some: (the first of these layers,
        those above).

    ValueError or TypeError for others.
    """

    schedule: str | tuple[float, ...] = "geometric"
    dropped: str = "gone"
    sinks: int = 0
    recent: float = 0.0
    smooth: int = 1
    reference: int | None = None
    ahead: bool = False
    scorer_macs: tuple[int, int] = (0, 0)

    def __post_init__(self):
        object.__setattr__(self, "tau", check_tau(self.tau))
        if not isinstance(self.schedule, str):  # a configuration's list
            object.__setattr__(self, "schedule", tuple(self.schedule))
        for name, known in (("score", SCORES), ("dropped", DROPPED)):
            if getattr(self, name) not in known:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}. Available: {', '.join(known)}.")
        named(self.schedule), check_flag("ahead", self.ahead), check_number("recent", self.recent, "[0, 1]")
        check_whole("sinks", self.sinks, least=0), check_whole("smooth", self.smooth)
        check_whole("reference", self.reference, also={None: "each sample's own length"})
        for cost in self.scorer_macs:
            check_whole("scorer_macs", cost, least=0)

    def stages(self, n: int, alpha: float, num_layers: int, exempt: int | None = None) -> list[int]:
        """What enters each layer and what leaves the last: by the rule, or by a schedule that is no share of what
        enters. `exempt`: as there."""
        if self.reference is not None and n < self.reference:
            allowed = self.stages(self.reference, alpha, num_layers, exempt)
            return [min(n, most) for most in allowed]
        kind, number = named(self.schedule)
        if kind in COUNTS:
            return [n, *COUNTS[kind](n, alpha, num_layers, self, number)]
        return super().stages(n, alpha, num_layers, exempt)

    def shares(self, alpha: float, num_layers: int) -> tuple[float, ...]:
        return _shares(alpha, self.schedule, num_layers)


# ---------------------------------------------------------------------------------------------------- schedules


def weights(schedule: str | Sequence[float], layers: int) -> list[float]:
    """How strongly each layer drops: it keeps alpha^w of what enters; the weights sum to the number of layers, so that
    the top layer is left with the same share under every schedule."""
    kind, number = named(schedule)
    if kind in WEIGHTS:
        given = WEIGHTS[kind](layers, number)
    elif kind:
        raise ValueError(f"schedule {schedule!r} has no weights: it is no share of what enters a layer.")
    else:
        given = [float(w) for w in schedule]
        if len(given) != layers or min(given) < 0 or sum(given) == 0:
            raise ValueError(f"a schedule needs {layers} weights >= 0, one per layer, not all 0; got {schedule}.")
    return [w * layers / sum(given) for w in given]


def named(schedule: str | Sequence[float]) -> tuple[str, float | None]:
    """The kind of a schedule, one of SCHEDULES, and the number behind its colon, if it has one; kind "" for one weight
    per layer. ValueError for others."""
    if not isinstance(schedule, str):
        return "", None
    kind, _, number = schedule.partition(":")
    try:
        if kind in SCHEDULES and (not number or kind in NUMBERED):
            return kind, float(number) if number else None
    except ValueError:
        pass
    raise ValueError(
        f"unknown schedule {schedule!r}. Available: {', '.join(SCHEDULES)}, {', '.join(NUMBERED)} also with a number, "
        "as once:10, or one weight per layer."
    )


def _rising(layers: int, slope: float | None) -> list[float]:
    slope = 1.0 if slope is None else slope
    return [math.exp(slope * layer / layers) for layer in range(layers)]


def _once(layers: int, behind: float | None) -> list[float]:
    behind = 1 if behind is None else int(behind)
    return [float(layer == behind) for layer in range(1, layers + 1)]


WEIGHTS: dict[str, Callable[[int, float | None], list[float]]] = {
    "geometric": lambda layers, _: [1.0] * layers,
    "rising": _rising,
    "front": lambda layers, _: [max(1.0, layers / 4)] + [1.0] * (layers - 1),
    "late": lambda layers, _: [0.0] * (layers // 3) + [1.0] * (layers - layers // 3),
    "early": lambda layers, _: [1.0] * (layers // 3) + [0.0] * (layers - layers // 3),
    "once": _once,
    "twice": lambda layers, _: [1.0 if layer in (0, min(3, layers - 1)) else 0.0 for layer in range(layers)],
}


@lru_cache
def _shares(alpha: float, schedule: str | tuple[float, ...], layers: int) -> tuple[float, ...]:
    """What each layer keeps of what enters. Training asks for many lengths at one alpha."""
    kind, slope = named(schedule)
    if kind == "easing":
        slope = (4.0 if slope is None else slope) / max(1.0, -layers * math.log(alpha))
        schedule = f"rising:{slope}"
    return tuple(alpha**w for w in weights(schedule, layers))


def _deep(n: int, alpha: float, layers: int, variant: Variant, share: float | None) -> list[int]:
    share, floor = 0.6 if share is None else share, min(n, variant.tau)
    token_layers = sum(replace(variant, schedule="geometric", reference=None).counts(n, alpha, layers))
    whole = max(0, math.floor(share * token_layers / n + 1e-9) - 1)  # layers that drop nothing
    kept = min(n, max(floor, (token_layers - whole * n) // (layers - whole)))
    return [n] * whole + [kept] * (layers - whole)


def _zipf(n: int, alpha: float, layers: int, variant: Variant, power: float | None) -> list[int]:
    power, floor = 1.0 if power is None else power, min(n, variant.tau)
    pace = alpha ** (-1 / power) - 1
    shares = ((1 + pace * layer) ** -power for layer in range(1, layers + 1))
    return [min(n, max(math.floor(share * n + 1e-6), floor)) for share in shares]


def _linear(n: int, alpha: float, layers: int, variant: Variant, _: float | None) -> list[int]:
    top = max(math.floor(alpha**layers * n + 1e-6), min(n, variant.tau))
    return [round(n - (n - top) * (layer + 1) / layers) for layer in range(layers)]


COUNTS = {"deep": _deep, "zipf": _zipf, "linear": _linear}  # schedules that are no shares of what enters


def layer_macs(config, n: int, alpha: float, variant: Variant) -> list[int]:
    """Multiply-accumulates of a prefill of n tokens, in zsaa.cost's convention, layer by layer; kept keys count with
    the projections to keys and values, and in the attention of those that go on."""
    entering_weights, kept_weights = layer_weights(config)
    (q_dim, kv_dim), size = attention_widths(config), config.hidden_size  # a config is slow to read
    found, alive, scoring = [], n, variant.scorer_macs[0]
    for kept in variant.counts(n, alpha, config.num_hidden_layers):
        beside = n - alive if variant.dropped == "keys" else 0
        asking = kept if variant.ahead else alive
        cost = alive * entering_weights - (alive - asking) * q_dim * size + kept * kept_weights
        cost += 2 * asking * (alive + beside) * q_dim + beside * 2 * kv_dim * size
        if kept < alive:
            cost, scoring = cost + alive * scoring, variant.scorer_macs[1]
        found.append(cost)
        alive = kept
    return found


def macs(config, n: int, alpha: float, variant: Variant, depth: int | None = None) -> int:
    """Those of the first `depth` layers together."""
    return sum(layer_macs(config, n, alpha, variant)[:depth])


def total_macs(config, counted: Counter, alpha: float, variant: Variant, depth: int | None = None) -> int:
    """The sum of `macs` over lengths, each as often as `counted` says; at once, where the schedule is shares of what
    enters: training asks for it dozens of times a step."""
    if named(variant.schedule)[0] in COUNTS or variant.reference is not None or variant.dropped == "keys":
        return sum(times * macs(config, n, alpha, variant, depth) for n, times in counted.items())
    entering_weights, kept_weights = layer_weights(config)
    (q_dim, _), size = attention_widths(config), config.hidden_size
    alive, times = (np.array(list(x), dtype=np.int64) for x in (counted.keys(), counted.values()))
    floor, total, scored = np.minimum(alive, variant.tau), 0, np.zeros_like(alive, dtype=bool)
    for share in variant.shares(alpha, config.num_hidden_layers)[:depth]:
        kept = np.minimum(alive, np.maximum(np.floor(share * alive + 1e-6).astype(np.int64), floor))
        asking = kept if variant.ahead else alive
        total = total + alive * entering_weights - (alive - asking) * q_dim * size + kept * kept_weights
        total = total + 2 * asking * alive * q_dim
        drops = kept < alive
        total = total + np.where(drops, alive * np.where(scored, variant.scorer_macs[1], variant.scorer_macs[0]), 0)
        scored, alive = scored | drops, kept
    return int((total * times).sum())


def alpha_for(
    config, lengths: Sequence[int], mac_reduction: float, variant: Variant, depth: int | None = None
) -> float:
    """The largest alpha that divides the MACs of samples of these lengths by `mac_reduction`, to 1e-4, where the first
    `depth` layers run."""
    if mac_reduction <= 1:
        return 1.0
    counted = Counter(lengths)

    def total(alpha: float) -> int:
        return total_macs(config, counted, alpha, variant, depth)

    whole, low, high = total_macs(config, counted, 1.0, variant), 1e-4, 1.0
    if whole / total(1.0) >= mac_reduction:
        return 1.0
    if whole / total(low) < mac_reduction:
        raise ValueError(f"{variant} cannot reach {mac_reduction}x on these samples.")
    while high - low > 1e-4:
        middle = (low + high) / 2
        reached = whole / total(middle) >= mac_reduction
        low, high = (middle, high) if reached else (low, middle)
    return low
