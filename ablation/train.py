"""Fine-tuning of a classifier under one variant, and its accuracy along the dial: one row of the ablation."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ablation.forward import Variant, alpha_for, forward, total_macs
from ablation.forward import weights as schedule_weights
from ablation.scorers import GRADIENTS, KINDS, Evidence, Probe, Words, make
from zsaa.budget import truncation_for
from zsaa.cost import attention_widths, layer_weights
from zsaa.data.batching import pad
from zsaa.evaluation.accuracy import tally
from zsaa.evaluation.controls import cut
from zsaa.families import find_decoder
from zsaa.finetune import window

SAMPLINGS = ("conventional", "alpha", "compute", "log", "sandwich", "ladder", "truncated", "cuts")
CUTS = ("first", "last", "ends")
ON_CUTS = ("truncated", "cuts")  # samplings of rows that know no dial
STRONGEST = 12.0  # the largest MAC reduction that training draws
ROWS = 16384  # rows of a pass in training, padding included; larger batches are split


@dataclass(frozen=True)
class Training:
    """How a row is trained.

    sampling: what each step draws. "conventional": nothing, alpha = 1; "alpha": alpha ~ U(alpha_range) (Eq. 3);
        "compute": the share of the MACs, uniformly; "log": the MAC reduction, log-uniformly from 1 to STRONGEST;
        "sandwich": alpha = 1, a log-uniform draw and STRONGEST in one step; "ladder": alpha = 1 and a log-uniform draw
        from either half; "truncated": alpha = 1 on inputs cut log-uniformly, by `side`; "cuts": the ladder on cut
        inputs, whole ones and two cuts in one step.
    distill: weight of the divergence from the alpha = 1 pass of the same step (sandwich, ladder and cuts; of whole
        inputs), or from the teacher's verdict, the rest is the labels'.
    teacher: a result of the same task, by its name, whose model (run.py's --weights) has judged each whole text before.
    layers: the model's first layers alone, so many; 0: all of them.
    match: weight of the distance between the last token's final state and that of the alpha = 1 pass, over the latter's
        length, squared.
    deep: match the last token's states behind every layer, in the mean, not only the final one.
    crops: the share of the texts that a step reads only a random window of, half of their tokens or more.
    probe: "" scores as the variant says; "gradient" learns a linear score per dropping layer on the way, which
        predicts each token's |state x gradient| in the alpha = 1 pass; "wide" the same with a hidden layer,
        "salience" with a table of tokens, too, "wide-phrases" with phrases in the first layer; "words" scores tokens
        by the weights of a bag of words (ablation/words.py), fitted to the same labels beforehand; "evidence" learns
        on the way how much each token tells about the label by itself (see `Evidence`); "both" is evidence in the
        first layer and "gradient" above; "votes" the same, but phrases vote, by what enters the first layer; "told"
        adds what that saw to the kept states; "phrases" scores phrases in the first layer, by gradients as those
        above; "notes" learns notes alone, and the variant's score decides.
    everywhere: gradients teach the probe in pruned passes, too, among the tokens that are left there.
    rivals: the last token, which is kept anyway, is left out of what gradients teach.
    lengths: they teach |state| x |gradient|, not |state x gradient|.
    warm: the first share of the training runs at alpha = 1 only, so that a learned score knows something before it
        decides.
    auxiliary: weight of the loss that trains "evidence".
    ahead: epochs in which "evidence" is trained alone beforehand, through the first layers only, the model as it is.
    weakest: the least MAC reduction that "log" draws; every 16th step is then at alpha = 1, lest it be forgotten.
    start: a folder with a trained LoRA adapter to go on from.
    half: compute in bfloat16 on a CPU, too.
    lora: rank of adapters on all linear layers, trained in place of the weights; 0 trains the weights. Without dropout
        they are computed as part of the weights, which is faster.
    bends: the schedule is learned on the way (see `Bend`), from the variant's on.
    compute: training ends after so many passes over the data's MACs at alpha = 1 (None: no limit); epochs likewise by
        samples seen: at equal compute the cheaper draws see more samples.
    """

    sampling: str = "alpha"
    alpha_range: tuple[float, float] = (0.5, 1.0)
    side: str = "ends"
    distill: float = 0.0
    match: float = 0.0
    deep: bool = False
    crops: float = 0.0
    probe: str = ""
    everywhere: bool = False
    rivals: bool = False
    lengths: bool = False
    warm: float = 0.0
    auxiliary: float = 0.3
    ahead: float = 0.0
    weakest: float = 1.0
    start: str = ""
    half: bool = False
    teacher: str = ""
    layers: int = 0
    lora: int = 0
    bends: bool = False
    epochs: float | None = 1.0
    compute: float | None = None
    learning_rate: float = 4e-5
    batch_size: int = 32
    dropout: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if self.sampling not in SAMPLINGS or self.side not in CUTS:
            raise ValueError(f"sampling must be one of {SAMPLINGS} and side one of {CUTS}; got {self}.")
        taught = (self.distill and not self.teacher) or self.match or self.probe in GRADIENTS
        if taught and self.sampling not in ("sandwich", "ladder", "cuts"):
            raise ValueError(
                f"distill, match and gradients need the alpha = 1 pass of a sandwich or ladder; got {self}."
            )
        if self.sampling in ON_CUTS and (self.match or self.probe):
            raise ValueError(f"match and probe are of the dial, which inputs that are cut do not know; got {self}.")
        if self.teacher and not (self.distill and self.sampling == "conventional"):
            raise ValueError(f"a teacher needs distill > 0, and conventional sampling; got {self}.")
        if self.layers < 0 or (self.layers and self.sampling != "conventional"):
            raise ValueError(f"layers must be 0 or more, and fewer than all are for conventional sampling; got {self}.")
        if self.bends and not self.distill:
            raise ValueError(f"bends needs distill > 0: the divergence from the alpha = 1 pass; got {self}.")
        if self.probe not in KINDS or (self.epochs is None and self.compute is None):
            raise ValueError(f"probe must be one of {KINDS}, epochs or compute must be given; got {self}.")


class Bend:
    """A schedule that is learned: the layers' weights are those given times the exponential of a line and a parabola
    over depth. Each pruned pass tries a neighbour of the present bend; every ROUND passes a linear regression of the
    log divergence from the alpha = 1 pass on what was tried, on the MAC reduction (and its square) and on time says
    which way to go."""

    SPREAD, ROUND, LONGEST = 0.4, 100, 0.2

    def __init__(self, given: Sequence[float], seed: int):
        depth = torch.linspace(-1, 1, len(given), dtype=torch.float64)
        self.given = torch.tensor(given, dtype=torch.float64)
        self.basis = torch.stack([depth, depth.square() - depth.square().mean()])
        self.at, self.tried = torch.zeros(2, dtype=torch.float64), []
        self.draw = torch.Generator().manual_seed(seed)

    def weights(self, bend: Tensor | None = None) -> tuple[float, ...]:
        found = self.given * ((self.at if bend is None else bend) @ self.basis).exp()
        return tuple(schedule_weights(found.tolist(), len(found)))

    def neighbour(self) -> Tensor:
        return self.at + self.SPREAD * torch.randn(2, generator=self.draw, dtype=torch.float64)

    def learn(self, bend: Tensor, mac_reduction: float, divergence: float) -> None:
        size = math.log(mac_reduction)
        self.tried.append([1.0, size, size * size, len(self.tried), *bend.tolist(), math.log(max(divergence, 1e-6))])
        if len(self.tried) % self.ROUND == 0:
            table = torch.tensor(self.tried[-2 * self.ROUND :], dtype=torch.float64)
            slope = torch.linalg.lstsq(table[:, :-1], table[:, -1:], driver="gelsd").solution[4:6, 0]
            self.at = self.at - slope * min(1.0, self.LONGEST / slope.norm().item())


class Merged:
    """LoRA adapters without dropout, computed as part of the weights: each linear layer multiplies by W + s B A once,
    where peft multiplies three times. `merge` before a step's passes, `split` behind them (the gradients of B and A
    from those of W + s B A), `release` at the end."""

    def __init__(self, model: nn.Module):
        self.layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
        for layer in self.layers:
            dropped = any(isinstance(m, nn.Dropout) and m.p for m in layer.lora_dropout.values())
            if dropped or not isinstance(layer.base_layer, nn.Linear):
                raise ValueError(f"only adapters of nn.Linear without dropout can be merged; got {layer}.")
        shapes = [layer.base_layer.weight.shape for layer in self.layers]
        self.groups = [[m for m, s in zip(self.layers, shapes) if s == shape] for shape in dict.fromkeys(shapes)]
        self.weights: list[list[Tensor]] = []

    @staticmethod
    def _stacked(group) -> tuple[Tensor, Tensor, float]:
        a = torch.stack([m.lora_A["default"].weight for m in group])
        return a, torch.stack([m.lora_B["default"].weight for m in group]), group[0].scaling["default"]

    @torch.no_grad()
    def merge(self) -> None:
        self.weights = []
        for group in self.groups:
            a, b, scale = self._stacked(group)
            whole = torch.stack([m.base_layer.weight for m in group]).baddbmm_(b, a, alpha=scale)
            self.weights.append([w.detach().requires_grad_() for w in whole.unbind()])
            for layer, weight in zip(group, self.weights[-1]):
                layer.forward = partial(F.linear, weight=weight, bias=layer.base_layer.bias)

    @torch.no_grad()
    def split(self) -> None:
        for group, weights in zip(self.groups, self.weights):
            a, b, scale = self._stacked(group)
            pull = torch.stack([w.grad for w in weights])
            of_a, of_b = scale * b.mT @ pull, scale * pull @ a.mT
            for layer, da, db in zip(group, of_a, of_b):
                layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad = da, db

    def release(self) -> None:
        for layer in self.layers:
            del layer.forward
        self.weights = []


def first_layers(config, n: int, layer: int) -> int:
    """MACs of n tokens up to the attention output of a layer (0: the first)."""
    entering, kept = layer_weights(config)
    attention = n * entering + 2 * n * n * attention_widths(config)[0]
    return (layer + 1) * attention + layer * n * kept


def logits_of(
    model: nn.Module, ids: Tensor, lengths: Sequence[int], alpha: float, variant: Variant, **more
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """float32 [batch, classes]: the task head on each sample's last token; that token's final state; and what each
    layer passed on."""
    hidden, trail = forward(model, ids, lengths, alpha, variant, **more)
    last = (trail[-1] >= 0).sum(1) - 1
    state = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return model.score(state).float(), state.float(), trail


def _batches(lengths: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Batches of similar lengths in random order, for ever: 50 batches are drawn, sorted and dealt out at a time."""
    order = random.Random(f"ablation {seed}")
    while True:
        rest = list(range(len(lengths)))
        order.shuffle(rest)
        for start in range(0, len(rest), 50 * size):
            part = sorted(rest[start : start + 50 * size], key=lambda i: -lengths[i])
            batches = [part[i : i + size] for i in range(0, len(part), size)]
            order.shuffle(batches)
            yield from batches


def train(
    model: nn.Module, samples: Sequence, labels: Sequence[int], variant: Variant, training: Training, progress=True,
    verdicts: Tensor | None = None,
) -> tuple[Probe | Evidence | Words | None, dict]:  # fmt: skip
    """Fine-tune `model` (a sequence classifier, float32 weights) in place on samples (lists of token ids). verdicts
    [samples, classes]: the teacher's, as probabilities. On a GPU it is computed, and left, in bfloat16, while the
    optimizer keeps its weights in float32. Returns the trained probe, if there is one, and a log: steps, samples
    seen, MACs spent in units of one epoch at alpha = 1, loss per 1/20 of the training, seconds."""
    torch.manual_seed(training.seed)
    decoder, _ = find_decoder(model)
    config, device = decoder.config, next(model.parameters()).device
    for module in decoder.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = training.dropout
    probe = make(training.probe, config, variant, max(labels) + 1, samples, labels)
    probe = probe if probe is None else probe.to(device)
    weights = [p for p in model.parameters() if p.requires_grad]
    merged = Merged(model) if training.lora and not training.dropout else None
    exact = weights
    if device.type == "cuda" or training.half:
        exact = [p.detach().float().clone() for p in weights]
        model.to(torch.bfloat16)
    groups = [{"params": exact, "lr": training.learning_rate}]
    groups += [] if probe is None else probe.groups()
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=device.type == "cuda")
    rates = [group["lr"] for group in groups]
    lengths = [len(s) for s in samples]
    epoch = total_macs(config, Counter(lengths), 1.0, variant)
    draw, crop = (random.Random(f"ablation {what} {training.seed}") for what in ("draws", "crops"))
    bend = Bend(schedule_weights(variant.schedule, config.num_hidden_layers), training.seed) if training.bends else None
    seen, spent, step, losses, started = 0, 0, 0, [], time.perf_counter()
    if training.ahead:
        _votes_alone(model, probe, samples, labels, variant, training, optimizer, progress)
    model.train()
    bar = tqdm(total=100, disable=not progress, mininterval=5, unit="%")
    for batch in _batches(lengths, training.batch_size, training.seed):
        shares = [seen / len(samples) / training.epochs] if training.epochs else []
        shares += [spent / epoch / training.compute] if training.compute else []
        done = max(shares, default=1.0)  # no epochs at all: the scorer alone
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, rates):  # 5% warm-up, then linearly to zero
            group["lr"] = rate * min(1.0, (step + 1) / 20, done / 0.05 + 0.05) * (1 - done)
        texts, wanted = [samples[i] for i in batch], torch.tensor([labels[i] for i in batch], device=device)
        texts = [window(text, crop) if crop.random() < training.crops else text for text in texts]
        if merged:
            merged.merge()
        taught = None if verdicts is None else verdicts[batch].to(device)
        loss, cost = _step(
            model, probe, texts, wanted, variant, training, draw, bend, warm=done < training.warm, taught=taught
        )
        if merged:
            merged.split()
        if exact is not weights:
            for p, low in zip(exact, weights):
                p.grad, low.grad = low.grad.float(), None
        nn.utils.clip_grad_norm_(exact, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if exact is not weights:
            with torch.no_grad():
                torch._foreach_copy_(weights, exact)
        losses.append((done, loss))
        seen, spent, step = seen + len(batch), spent + cost, step + 1
        bar.n = round(100 * done)
        bar.set_postfix_str(f"loss {sum(v for _, v in losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
        bar.update(0)
    bar.close()
    if merged:
        merged.release()
    model.eval()
    if probe is not None:
        probe.eval()
    if device.type == "cuda":
        torch.cuda.synchronize()
    curve = [[v for share, v in losses if int(20 * share) == part] for part in range(20)]
    return probe, {
        "steps": step,
        "samples": seen,
        "epochs_of_compute": round(spent / epoch, 4),
        "loss": [round(sum(part) / len(part), 4) if part else None for part in curve],
        "seconds": round(time.perf_counter() - started, 1),
        **({"schedule": [round(w, 3) for w in bend.weights()]} if bend else {}),
    }


def _votes_alone(model, probe, samples, labels, variant, training, optimizer, progress) -> None:
    """Train the scorer through the first layers only, the model as it is."""
    device = next(model.parameters()).device
    batches = _batches([len(s) for s in samples], training.batch_size, training.seed + 1)
    steps = round(training.ahead * len(samples) / training.batch_size)
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for step in tqdm(range(steps), disable=not progress, mininterval=5, desc="votes"):
        for group, rate in zip(groups, rates):
            group["lr"] = rate * (1 - step / steps)
        texts, wanted = zip(*((samples[i], labels[i]) for i in next(batches)))
        ids, _ = pad(texts, 0, device)
        watch = _Watch(probe)
        with torch.no_grad(), contextlib.suppress(_SeenEnough):
            forward(model, ids, [len(text) for text in texts], 1.0, variant, scorer=watch)
        for inputs in watch.inputs:
            probe(*inputs)
        probe.loss(torch.tensor(wanted, device=device)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(groups, rates):
        group["lr"] = rate


class _SeenEnough(Exception):
    """The layers above are not needed."""


class _Watch:
    """Notes what the scorer is shown."""

    def __init__(self, probe: Evidence):
        self.watches, self.inputs, self.last = probe.watches, [], max(map(int, probe.heads))

    def __call__(self, layer: int, *inputs) -> Tensor:
        self.inputs.append((layer, *inputs))
        if layer == self.last:
            raise _SeenEnough
        return inputs[-1].float()


def _step(model, probe, texts, wanted, variant, training, draw, bend, warm=False, taught=None) -> tuple[float, int]:
    """Forward and backward passes of one optimizer step; returns the first pass' loss and the MACs of all."""
    decoder, _ = find_decoder(model)
    config, lengths = decoder.config, [len(text) for text in texts]
    tried = None if bend is None else bend.neighbour()
    variant = variant if bend is None else replace(variant, schedule=bend.weights(tried))

    def reduced_to(reduction: float) -> float:
        try:
            return alpha_for(config, lengths, reduction, variant)
        except ValueError:  # short texts: as far as tau lets them
            return 1e-4

    log_uniform = math.exp(draw.uniform(math.log(training.weakest), math.log(STRONGEST)))
    kind, alphas, middle, views = training.sampling, [1.0], math.sqrt(STRONGEST), []
    warm = warm or (training.weakest > 1 and draw.random() < 1 / 16)
    if kind == "truncated":
        k = truncation_for(config, lengths, log_uniform)
        texts = [cut(text, k, training.side) for text in texts]
        lengths = [len(text) for text in texts]
    elif kind == "alpha":
        alphas = [draw.uniform(*training.alpha_range)]
    elif kind == "compute":
        alphas = [reduced_to(1 / draw.uniform(1 / STRONGEST, 1))]
    elif kind == "log":
        alphas = [reduced_to(log_uniform)]
    elif kind == "sandwich":
        alphas = [1.0, reduced_to(log_uniform), reduced_to(STRONGEST)]
    elif kind == "cuts":
        kept = [truncation_for(config, lengths, middle ** (half + draw.random())) for half in (0, 1)]
        views, alphas = [[cut(text, k, training.side) for text in texts] for k in kept], [1.0, 1.0, 1.0]
    elif kind == "ladder":
        alphas = [1.0, reduced_to(middle ** draw.random()), reduced_to(middle ** (1 + draw.random()))]
    if warm:
        alphas, views = [1.0], []
    views = [texts, *(views or [texts] * (len(alphas) - 1))]
    first, parts = 0.0, -(-len(texts) * max(lengths) // ROWS)
    for part in range(parts):  # one after another, for the memory's sake
        chosen = slice(part * len(texts) // parts, (part + 1) * len(texts) // parts)
        share = len(lengths[chosen]) / len(lengths)
        some, verdicts = [view[chosen] for view in views], None if taught is None else taught[chosen]
        loss, divergences = _passes(model, probe, some, wanted[chosen], alphas, variant, training, share, verdicts)
        first += share * loss
        for alpha, divergence in zip(alphas[1:], divergences if bend else ()):
            cost = (total_macs(config, Counter(lengths[chosen]), a, variant) for a in (1.0, alpha))
            bend.learn(tried, next(cost) / next(cost), divergence.item())
    return first, sum(total_macs(config, Counter(map(len, v)), a, variant) for v, a in zip(views, alphas))


def _passes(
    model, probe, views, wanted, alphas, variant, training, share: float, verdicts: Tensor | None = None
) -> tuple[float, list[Tensor]]:
    """A forward and a backward pass at each alpha on its view of the texts, which are this share of the step's. The
    first loss, and how far the answers are from the teacher's: `verdicts`, or, of all but the first, the first's."""
    config, device = find_decoder(model)[0].config, wanted.device
    teacher, example, first, divergences = verdicts, None, None, []
    taught = None if probe is None else probe.by_gradient
    for texts, alpha in zip(views, alphas):
        lengths = [len(text) for text in texts]
        ids, mask = pad(texts, config.pad_token_id or 0, device)
        entered = {} if taught is not None and (alpha == 1.0 or training.everywhere) else None
        more = {"scorer": probe} if probe is not None else {}
        passed = {}
        if entered is not None or training.deep:
            more["entered"] = passed = _Retaining(entered, taught, training.deep)
        logits, state, trail = logits_of(model, ids, lengths, alpha, variant, **more)
        states = [*last_states(passed, trail), state]
        loss = F.cross_entropy(logits, wanted)
        if teacher is not None and training.distill:
            soft = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
            loss = (1 - training.distill) * loss + training.distill * soft
            divergences.append(soft.detach())
        whole = loss
        if example is not None and training.match:
            apart = [(s - e).square().sum(-1) / e.square().sum(-1) for s, e in zip(states, example)]
            whole = whole + training.match * torch.stack(apart).mean()
        if isinstance(probe, Evidence) and probe.deciding:
            whole = whole + training.auxiliary * probe.loss(wanted)
        (share * whole / len(alphas)).backward()
        if entered is not None:
            whole_texts = torch.arange(ids.shape[1], device=device).where(mask.bool(), -1)
            (share * taught.loss(entered, ids, [whole_texts, *trail], training.rivals, training.lengths)).backward()
        first = loss.item() if first is None else first
        if teacher is None and alpha == 1.0:
            teacher, example = logits.detach().softmax(-1), [s.detach() for s in states]
    return first, divergences


class _Retaining(dict):
    """Takes the states that enter the layers: `kept` those that the probe is taught by, whose gradients are kept, and
    the dict itself all of them, if `every`."""

    def __init__(self, kept: dict[int, Tensor] | None, probe: Probe | None, every: bool):
        super().__init__()
        self.kept, self.every = kept, every
        self.layers = set() if kept is None else set(map(int, probe.heads))

    def __setitem__(self, layer: int, hidden: Tensor) -> None:
        if self.every:
            super().__setitem__(layer, hidden)
        if layer in self.layers:
            if not hidden.requires_grad:  # under adapters the embedding learns nothing
                hidden.requires_grad_()
            hidden.retain_grad()
            self.kept[layer] = hidden


def last_states(entered: dict[int, Tensor], trail: Sequence[Tensor]) -> list[Tensor]:
    """float32 [batch, size] per layer but the top one: the last token's state behind it."""
    found = []
    for layer in sorted(set(entered) - {0}):
        hidden, last = entered[layer], (trail[layer - 1] >= 0).sum(1) - 1
        found.append(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
    return found


@torch.no_grad()
def accuracy(
    model: nn.Module, samples: Sequence, labels: Sequence[int], alpha: float, variant: Variant, probe, batch_size: int,
    votes_of: int | None = None,
) -> dict:  # fmt: skip
    """The tally of one setting (see `zsaa.evaluation.accuracy.tally`); votes_of: of the votes in this layer alone."""
    device = next(model.parameters()).device
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i]))
    right = [0] * len(samples)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        ids, _ = pad([samples[i] for i in batch], 0, device)
        more = {"scorer": probe} if probe is not None else {}
        logits, *_ = logits_of(model, ids, [len(samples[i]) for i in batch], alpha, variant, **more)
        found = (logits if votes_of is None else probe.together[votes_of]).argmax(-1)
        for i, answer in zip(batch, found.tolist()):
            right[i] = int(answer == labels[i])
    return tally(right)


def curve(
    model: nn.Module, samples: Sequence, labels: Sequence[int], variant: Variant, training: Training, probe, targets,
    batch_size: int = 192, sides: Sequence[str] = (),
) -> list[dict]:  # fmt: skip
    """Accuracy at each target MAC reduction; for the dial, and for inputs cut by each of `sides` at alpha = 1. Targets
    out of reach are left out."""
    config = find_decoder(model)[0].config
    lengths = [len(s) for s in samples]
    counted = Counter(lengths)
    whole = total_macs(config, counted, 1.0, variant)
    rows = []
    if isinstance(probe, Evidence) and probe.deciding:
        # What the votes know by themselves, at the price of what they look at in the first scored layer.
        layer = min(map(int, probe.heads))
        found = accuracy(model, samples, labels, 1.0, variant, probe, batch_size, votes_of=layer)
        looked_at = 0 if variant.ahead else 1
        only = sum(first_layers(config, n, layer) * looked_at + n * variant.scorer_macs[0] for n in lengths)
        rows.append({"control": "scorer", "target": None, "mac_reduction": whole / only, **found})
    for target in targets:
        if training.sampling not in ON_CUTS:
            try:
                alpha = alpha_for(config, lengths, target, variant)
            except ValueError:
                continue
            reached = whole / total_macs(config, counted, alpha, variant)
            found = accuracy(model, samples, labels, alpha, variant, probe, batch_size)
            rows.append({"control": "alpha", "target": target, "alpha": alpha, "mac_reduction": reached, **found})
        k = truncation_for(config, lengths, target)
        for side in sides if target > 1 or training.sampling in ON_CUTS else ():
            shorter = [cut(s, k, side) for s in samples]
            reached = whole / total_macs(config, Counter(map(len, shorter)), 1.0, variant)
            found = accuracy(model, shorter, labels, 1.0, variant, None, batch_size)
            rows.append({"control": side, "target": target, "keep_tokens": k, "mac_reduction": reached, **found})
            if target == 1:
                break
    return rows
