"""Training of one row: conventional, on cut prompts, or a dial in ladder steps (alpha = 1, weak, strong)."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ablation.answers import cost, teach
from ablation.answers.controls import WAYS, cut
from ablation.answers.data import Data
from ablation.answers.descent import descend, rounds
from ablation.answers.model import adapt
from ablation.answers.reader import Batch, Rows, at_answers, batch, norm, ranks, read
from ablation.answers.teach import look, mixed
from zsaa.finetune.exits import drawn as drawn_depths

STRONGEST = 12.0  # reduction of MACs
DRAWN = (1.0, 2.0, 3.0, 5.0, 7.0, 11.0)  # as they are judged
# "with": a pass at alpha = 1 in each step, and one short; "drawn": one pass a step, at a reduction of DRAWN
METHODS = ("conventional", "cuts", "dial", "with cuts", "with dial", "drawn cuts", "drawn dial")


@dataclass(frozen=True)
class Row:
    """One variant. schedule and scorer are a dial's; `whole` keeps the turns before the question out of the choice."""

    name: str
    method: str  # one of METHODS
    schedule: str = ""
    scorer: str = ""
    whole: bool = False
    epochs: float = 2.5
    rate: float = 5e-4
    size: int = 32
    seed: int = 0
    rank: int = 16
    start: str = ""  # the row whose adapters it goes on with
    cuts: tuple[str, ...] = ()  # how prompts are cut, drawn evenly; RIVALS where none is named
    drawn: tuple[float, ...] = DRAWN  # reductions
    stills: tuple[int, ...] = ()  # layers from which on the region stands still, drawn with the reduction
    exits: int = 0  # depths below all layers, drawn in each pass, that answer too: half of the loss is theirs

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: one of {', '.join(METHODS)}.")
        if unknown := set(self.cuts) - set(WAYS):
            raise ValueError(f"no cuts {sorted(unknown)}; there are {', '.join(WAYS)}.")

    @property
    def steps(self) -> cost.Schedule:
        return cost.SCHEDULES[self.schedule]

    @property
    def depth(self) -> int:
        """Layers below the first drop: they stay as they are, so that the scorer finds what it was taught on."""
        return self.steps[0][0] if self.method == "dial" else 0


@dataclass
class Dial:
    """A schedule and its scorer on a model: how a batch is read at a reduction of MACs."""

    row: Row
    scorer: torch.nn.Module
    config: object
    close: bool = False  # what is left is numbered anew
    still: int | None = None  # from which layer on the region stands still

    def _prompts(self, b: Batch):
        """(tokens, exempt ones, those behind the region, MACs of the scorer) of each prompt."""
        asks = (b.part > 0).sum(1).tolist()
        for n, exempt, region, head in zip(b.prompt.tolist(), b.exempt.tolist(), b.region.tolist(), asks):
            yield n, exempt, n - region, self.scorer.macs(region, head)

    def kept(self, b: Batch, reduction: float) -> list[tuple[int, ...]]:
        """Tokens that stay at each step, by prompt."""
        shape, steps = cost.shape_of(self.config), self.row.steps
        return [cost.solve(shape, n, exempt, reduction, steps, price, self.still, asking)
                for n, exempt, asking, price in self._prompts(b)]  # fmt: skip

    def rank(self, x, b: Batch):
        """How many of its prompt's tokens stay longer than each [batch, tokens]; x: states before the first step."""
        return ranks(look(self.scorer, x, b), b, teach.units(self.scorer, b))

    def how(self, b: Batch, reduction: float) -> dict:
        """Arguments of `read` and `answer`."""
        still = {} if self.still is None else {"still": self.still}
        if reduction <= 1:
            return still
        return {**still, "steps": [layer for layer, _ in self.row.steps], "close": self.close,
                "keep": torch.tensor(self.kept(b, reduction), device=b.ids.device),
                "unit": teach.units(self.scorer, b),
                "choose": torch.no_grad()(lambda x: look(self.scorer, x, b))}  # fmt: skip

    def reached(self, b: Batch, reduction: float) -> list[float]:
        """MACs of the whole pass over those of the dial's, scorer included, by prompt."""
        shape, steps, out = cost.shape_of(self.config), self.row.steps, []
        for (n, _, asking, price), kept in zip(self._prompts(b), self.kept(b, reduction)):
            out.append(cost.macs(shape, n) / (cost.macs(shape, n, steps, kept, self.still, asking) + price))
        return out


def reductions(step: int, seed: int) -> tuple[float, float]:
    """A weak and a strong one."""
    rng, half = random.Random(f"{seed}-{step}"), math.sqrt(STRONGEST)
    return half ** rng.random(), half ** (1 + rng.random())


def drawn(step: int, seed: int, reductions: tuple[float, ...] = DRAWN) -> float:
    """The reduction of a step that makes one pass."""
    return random.Random(f"{seed}-{step}").choice(reductions)


def fit(row: Row, lm, scorer, data: Data, device, log, seconds: float, steps: int | None = None, micro: int = 14_000,
        begin: dict | None = None, dial: Dial | None = None):  # fmt: skip
    """Train the row's adapters. Should the time run out, the learning rate has come down to its end by then. micro:
    tokens of a micro-batch, padding included; begin: the adapters to go on with; dial: one that reads otherwise than
    the row says. Returns the steps that were done."""
    torch.manual_seed(row.seed)
    rng, trained = random.Random(row.seed + 1), adapt(lm, row.depth, row.rank)
    if begin is not None:
        lm.load_state_dict({name: value.float() for name, value in begin.items()}, strict=False)
    if dial is None and row.method.endswith("dial"):
        dial = Dial(row, scorer, lm.config)
    turns = data.questions("train")
    steps = steps or int(len(turns) // row.size * row.epochs)
    taken = rounds(turns, row.size, rng)

    def gradients(step: int) -> float:
        samples = [data.sample(i, 1 if step % 2 else 3, rng) for i in next(taken)]
        samples.sort(key=lambda s: len(s.body))
        said = sum(len(s.answer) for s in samples)
        most = micro * drawn(step, row.seed, row.drawn) if row.method.startswith("drawn") else micro
        return sum(lesson(row, lm, dial, part, said, data, device, step, rng) for part in _parts(samples, most))

    done = descend(trained, steps, gradients, row.rate, 0.06 * steps + 1, time.time() + seconds, log, every=20)
    lm.eval()
    if device == "cuda":
        torch.cuda.empty_cache()  # other rows share the card
    return done


def _parts(samples: list, tokens: float) -> list[list]:
    """Neighbours, together while they stay below so many tokens; samples come from short to long."""
    parts: list[list] = [[]]
    for s in samples:
        longest = len(s.body) + len(s.older) + len(s.last) + len(s.line) + len(s.answer)
        if parts[-1] and (len(parts[-1]) + 1) * longest > tokens:
            parts.append([])
        parts[-1].append(s)
    return parts


def lesson(row: Row, lm, dial: Dial | None, part, said: int, data: Data, device, step: int, rng) -> float:
    """The gradients of one micro-batch; returns its loss at alpha = 1, on the cut prompts, or of the one pass."""
    passes = [batch(part, device, history=row.whole)]
    strengths = [1.0]
    if row.method == "cuts":
        passes = [batch([_shorter(s, lm.config, data, rng) for s in part], device)]
    elif row.method == "dial":
        strengths += reductions(step, row.seed)
    elif row.method == "with dial":
        strengths += [STRONGEST ** random.Random(f"{row.seed}-{step}").random()]
    elif row.method == "with cuts":
        passes.append(batch([_shorter(s, lm.config, data, rng, RIVALS) for s in part], device))
        strengths += [1.0]
    elif row.method == "drawn dial":
        strengths = [drawn(step, row.seed, row.drawn)]
        if row.stills:
            dial = replace(dial, still=random.Random(f"still-{row.seed}-{step}").choice(row.stills))
    elif row.method == "drawn cuts":
        reduction = drawn(step, row.seed, row.drawn)
        passes = [batch([_shorter(s, lm.config, data, rng, row.cuts, reduction) for s in part], device)]
    passes += passes[:1] * (len(strengths) - len(passes))
    teacher, first = None, 0.0
    for b, reduction in zip(passes, strengths):
        passed: list[Rows] = []
        with mixed(device):
            rows = read(lm, b, **(dial.how(b, reduction) if dial else {}), **({"passed": passed} if row.exits else {}))
            logs, gold, _ = at_answers(lm, rows, b)
        loss = F.nll_loss(logs, gold, reduction="sum") / said
        if teacher is None:
            teacher, first = logs.detach(), loss.item()
        else:
            loss = 0.5 * loss + 0.5 * F.kl_div(logs, teacher, log_target=True, reduction="sum") / said
        if passed:
            loss = 0.5 * loss + 0.5 * early(lm, passed, drawn_depths(row.exits, len(passed) - 1, rng), b, logs) / said
        (loss / len(passes)).backward()
    return first


def early(lm, passed: list[Rows], depths: list[int], b: Batch, taught: torch.Tensor) -> torch.Tensor:
    """What is lost behind so many layers, in the mean over `depths`: half by the answers, half by what all layers say
    (`taught`); summed over answer tokens."""
    losses = []
    for depth in depths:
        with mixed(b.ids.device.type):
            x, place, real = passed[depth].x, passed[depth].place, passed[depth].real
            logs, gold, _ = at_answers(lm, Rows(norm(lm.model.norm, x), place, real), b)
        told = F.kl_div(logs, taught.detach(), log_target=True, reduction="sum")
        losses.append((F.nll_loss(logs, gold, reduction="sum") + told) / 2)
    return torch.stack(losses).mean()


CUTS = ("last", "ends", "lexical", "lexical", "lexical-all")
RIVALS = ("bm25-all", "bm25-all", "bm25-all-line", "bm25", "last")  # of the second study


def _shorter(sample, config, data: Data, rng, kinds=CUTS, reduction: float | None = None):
    """The prompt cut to a reduction of MACs, drawn from 1 to STRONGEST if none is given."""
    n = len(sample.body + sample.older + sample.last + sample.line)
    if reduction is None:
        reduction = math.exp(rng.random() * math.log(STRONGEST))
    return cut(sample, cost.whole(cost.shape_of(config), n, reduction), rng.choice(kinds), data, rng)
