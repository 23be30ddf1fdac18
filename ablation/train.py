"""Fine-tuning of a classifier under one variant."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ablation import exits
from ablation.bend import Bend
from ablation.curves import logits_of
from ablation.forward import forward
from ablation.merged import Merged
from ablation.scorers import Evidence, Probe, Words, make
from ablation.training import STRONGEST, Training
from ablation.variants import Variant, alpha_for, total_macs
from ablation.variants import weights as schedule_weights
from zsaa.budget import truncation_for
from zsaa.data.batching import pad
from zsaa.evaluation.controls import cut
from zsaa.families import find_decoder
from zsaa.finetune import window


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


class _Weights:
    """What is trained, and its optimizer, which keeps weights in float32 where the model computes in bfloat16."""

    def __init__(self, model: nn.Module, probe: nn.Module | None, training: Training, device: torch.device):
        self.of_model = self.exact = [p for p in model.parameters() if p.requires_grad]
        if device.type == "cuda" or training.half:
            self.exact = [p.detach().float().clone() for p in self.of_model]
            model.to(torch.bfloat16)
        groups = [{"params": self.exact, "lr": training.learning_rate}]
        groups += [] if probe is None else probe.groups()
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=device.type == "cuda")
        self.rates = [group["lr"] for group in groups]
        self.merged = Merged(model) if training.lora and not training.dropout else None

    def begin(self, warm: float, left: float) -> None:
        """Before a step at these shares of the rates."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * warm * left
        if self.merged:
            self.merged.merge()

    def learn(self) -> Tensor:
        """One step, by the gradients that are there, clipped to a length of 1; how long they were (no copy to the CPU,
        which would wait for them)."""
        if self.merged:
            self.merged.split()
        apart = self.exact is not self.of_model
        for p, low in zip(self.exact, self.of_model) if apart else ():
            p.grad, low.grad = None if low.grad is None else low.grad.float(), None
        length = nn.utils.clip_grad_norm_(self.exact, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if apart:
            with torch.no_grad():
                torch._foreach_copy_(self.of_model, self.exact)
        return length


def train(
    model: nn.Module, samples: Sequence, labels: Sequence[int], variant: Variant, training: Training, progress=True,
    verdicts: Tensor | None = None,
) -> tuple[Probe | Evidence | Words | None, dict]:  # fmt: skip
    """Fine-tune `model` (a sequence classifier, float32 weights) in place on samples (lists of token ids). verdicts
    [samples, classes]: the teacher's, as probabilities. On a GPU it is computed, and left, in bfloat16, while the
    optimizer keeps its weights in float32. Returns the trained probe, if there is one, and a log: steps, samples
    seen, MACs spent in units of one epoch at alpha = 1, loss per 1/20 of the training, the longest gradient of each
    (before it is clipped), seconds."""
    torch.manual_seed(training.seed)
    decoder, _ = find_decoder(model)
    config, device = decoder.config, next(model.parameters()).device
    for module in decoder.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = training.dropout
    probe = make(training.probe, config, variant, max(labels) + 1, samples, labels)
    probe = probe if probe is None else probe.to(device)
    weights = _Weights(model, probe, training, device)
    lengths = [len(s) for s in samples]
    epoch = total_macs(config, Counter(lengths), 1.0, variant)
    draw, crop = (random.Random(f"ablation {what} {training.seed}") for what in ("draws", "crops"))
    bend = Bend(schedule_weights(variant.schedule, config.num_hidden_layers), training.seed) if training.bends else None
    seen, spent, step, losses, pulls, started = 0, 0, 0, [], [], time.perf_counter()
    if training.ahead:
        _votes_alone(model, probe, samples, labels, variant, training, weights.optimizer, progress)
    model.train()
    bar = tqdm(total=100, disable=not progress, mininterval=5, unit="%")
    for batch in _batches(lengths, training.batch_size, training.seed):
        shares = [seen / len(samples) / training.epochs] if training.epochs else []
        shares += [spent / epoch / training.compute] if training.compute else []
        shares += [(time.perf_counter() - started) / training.seconds] if training.seconds else []
        done = max(shares, default=1.0)  # no epochs at all: the scorer alone
        if done >= 1:
            break
        weights.begin(min(1.0, (step + 1) / 20, done / training.warmup + 0.05), 1 - done)
        texts, wanted = [samples[i] for i in batch], torch.tensor([labels[i] for i in batch], device=device)
        texts = [window(text, crop) if crop.random() < training.crops else text for text in texts]
        taught = None if verdicts is None else verdicts[batch].to(device)
        loss, cost = _step(
            model, probe, texts, wanted, variant, training, draw, bend, warm=done < training.warm, taught=taught
        )
        pulls.append(weights.learn())
        losses.append((done, loss))
        seen, spent, step = seen + len(batch), spent + cost, step + 1
        bar.n = round(100 * done)
        bar.set_postfix_str(f"loss {sum(v for _, v in losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
        bar.update(0)
    bar.close()
    if weights.merged:
        weights.merged.release()
    model.eval()
    if probe is not None:
        probe.eval()
    if device.type == "cuda":
        torch.cuda.synchronize()
    curve = [[v for share, v in losses if int(20 * share) == part] for part in range(20)]
    pulls = torch.stack(pulls).tolist() if pulls else []
    steepest = [[p for (share, _), p in zip(losses, pulls) if int(20 * share) == part] for part in range(20)]
    return probe, {
        "steps": step,
        "samples": seen,
        "epochs_of_compute": round(spent / epoch, 4),
        "loss": [round(sum(part) / len(part), 4) if part else None for part in curve],
        "gradient": [round(max(part), 3) if part else None for part in steepest],
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
    first, parts = 0.0, -(-len(texts) * max(lengths) // training.rows)
    for part in range(parts):  # one after another, for the memory's sake
        chosen = slice(part * len(texts) // parts, (part + 1) * len(texts) // parts)
        share = len(lengths[chosen]) / len(lengths)
        some, verdicts = [view[chosen] for view in views], None if taught is None else taught[chosen]
        loss, divergences = _passes(
            model, probe, some, wanted[chosen], alphas, variant, training, share, verdicts, draw
        )
        first += share * loss
        for alpha, divergence in zip(alphas[1:], divergences if bend else ()):
            cost = (total_macs(config, Counter(lengths[chosen]), a, variant) for a in (1.0, alpha))
            bend.learn(tried, next(cost) / next(cost), divergence.item())
    return first, sum(total_macs(config, Counter(map(len, v)), a, variant) for v, a in zip(views, alphas))


def _passes(
    model,
    probe,
    views,
    wanted,
    alphas,
    variant,
    training,
    share: float,
    verdicts: Tensor | None = None,
    draw: random.Random | None = None,
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
        every = training.deep or bool(training.exits)
        if entered is not None or every:
            more["entered"] = passed = _Retaining(entered, taught, every)
        if training.skips and alpha == 1.0:
            more["skipped"] = exits.skipped(training.skips, config.num_hidden_layers, draw)
        logits, state, trail = logits_of(model, ids, lengths, alpha, variant, **more)
        states = [*(last_states(passed, trail) if training.deep else ()), state]
        loss = F.cross_entropy(logits, wanted)
        if teacher is not None and training.distill:
            soft = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean")
            loss = (1 - training.distill) * loss + training.distill * soft
            divergences.append(soft.detach())
        whole = loss
        if training.exits:
            depths = exits.drawn(training.exits, config.num_hidden_layers, draw)
            said = exits.answers(model, passed, trail, depths)
            example_of = logits.detach().softmax(-1) if teacher is None else teacher
            early = exits.loss(said, wanted, example_of, training.distill)
            whole = (1 - training.exit_share) * loss + training.exit_share * early
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
