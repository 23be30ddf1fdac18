"""What a scorer of chunks is taught, and the teaching: the model stands still, so thousands of steps take a minute.

A target is a distribution over the chunks of a prompt: what the model's best retrieval heads look at while they read
the question ("line") or write the answer ("answer"), or how much the answer's loss hangs on each chunk ("gradient").
Where an answer is found in one place of the passages only, that place is a label too ("gold").
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ablation.answers.data import Data, Sample
from ablation.answers.reader import SINKS, Batch, at_answers, batch, read
from zsaa.learned.asked import Scorer, Shape

HEADS = 8  # retrieval heads, chosen on the training split
TARGETS = ("line", "answer", "gradient")
FACTORS = (2, 3, 5, 7, 11)
FINE = 16  # tokens of a chunk in targets; a scorer's chunks are multiples of it


def build(data: Data, states: int, width: int, chunk: int, device) -> Scorer:
    idf = torch.full((len(data.pieces),), 5.0)
    for word, value in data.idf.items():
        idf[word] = value
    return Scorer(Shape(states, width, chunk=chunk), torch.tensor(data.canon), idf).to(device)


def look(scorer: Scorer, x: Tensor, b: Batch) -> Tensor:
    """Scores of the region's chunks, from the states before some layer of a pass that has lost no token."""
    width = int(b.region.max())
    asks = x.gather(1, b.head[..., None].expand(-1, -1, x.shape[-1]))
    with torch.autocast(x.device.type, enabled=False):
        return scorer(x[:, :width].float(), b.ids[:, :width], b.region, asks.float(), b.ids.gather(1, b.head), b.part)


def units(scorer: Scorer, b: Batch) -> Tensor:
    """Which of its chunks each token of the region is of [batch, widest region]."""
    ids = b.ids[:, : int(b.region.max())]
    return scorer.units(ids, torch.arange(ids.shape[1], device=ids.device) < b.region[:, None])


@dataclass
class Lesson:
    sample: Sample
    target: Tensor  # [chunks of FINE tokens], a distribution


def gold_chunks(sample: Sample, size: int) -> range:
    return range(sample.gold[0] // size, sample.gold[1] // size + 1) if sample.gold else range(0)


def per_chunk(tokens: Tensor, b: Batch) -> Tensor:
    """Sums over the region's chunks of FINE tokens [..., chunks] of [batch, ..., tokens], sinks left out."""
    width = int(b.region.max())
    return F.pad((tokens * mine(tokens, b))[..., :width], (0, -width % FINE)).unflatten(-1, (-1, FINE)).sum(-1)


def mine(tokens: Tensor, b: Batch) -> Tensor:
    """Which of the tokens [batch, ..., tokens] are the region's, sinks left out."""
    i = torch.arange(tokens.shape[-1], device=tokens.device)
    found = (i >= SINKS) & (i < b.region[:, None])
    return found.view(len(found), *[1] * (tokens.dim() - 2), -1)


class Watch:
    """Collects what heads look at: [batch, heads of the layer, chunks], by layer."""

    def __init__(self, b: Batch, kind: str, heads: dict[int, list[int]], by_token: bool = False):
        self.b, self.heads, self.seen, self.by_token = b, heads, {}, by_token
        if kind == "line":
            self.rows, self.asks = b.head, b.part == 3
        else:
            n = int((b.total - b.prompt).max())
            self.rows = (b.prompt[:, None] - 1 + torch.arange(n, device=b.ids.device)).clamp(max=b.ids.shape[1] - 1)
            self.asks = self.rows < b.total[:, None] - 1

    def __call__(self, layer: int, q: Tensor, k: Tensor) -> None:
        if layer not in self.heads:
            return
        heads = torch.tensor(self.heads[layer], device=q.device)
        groups = q.shape[1] // k.shape[1]
        index = self.rows[:, None, :, None].expand(-1, len(heads), -1, q.shape[-1])
        asks, keys = q[:, heads].gather(2, index), k[:, heads // groups]
        scores = (asks @ keys.transpose(2, 3)).float() / q.shape[-1] ** 0.5
        place = torch.arange(k.shape[2], device=q.device)
        p = scores.masked_fill(place > self.rows[:, None, :, None], float("-inf")).softmax(-1)
        said = (p * self.asks[:, None, :, None]).sum(2)
        self.seen[layer] = said * mine(said, self.b) if self.by_token else per_chunk(said, self.b)

    def mean(self) -> Tensor:
        """[batch, chunks or tokens]: the heads' shares on average."""
        shares = [s / s.sum(-1, keepdim=True).clamp(min=1e-9) for s in self.seen.values()]
        return torch.cat(shares, 1).mean(1)


@torch.no_grad()
def find_heads(lm, data: Data, kind: str, device, questions: int = 256, size: int = 16) -> dict[int, list[int]]:
    """The heads that have the answer's chunk among the best third, fifth and eleventh most often."""
    rng, config = random.Random(3), lm.config
    pool = [i for i in data.questions("train") if data.turns[i]["at"] is not None]
    samples = [data.sample(i, 3, rng) for i in rng.sample(pool, questions)]
    everyone = {layer: list(range(config.num_attention_heads)) for layer in range(config.num_hidden_layers)}
    hits = torch.zeros(config.num_hidden_layers, config.num_attention_heads)
    for j in range(0, questions, size):
        b = batch(samples[j : j + size], device)
        watch = Watch(b, kind, everyone)
        with mixed(device):
            read(lm, b, watch=watch)
        seen = torch.stack([watch.seen[layer] for layer in everyone], 1).cpu()  # [batch, layers, heads, chunks]
        for s, sample in zip(seen, samples[j : j + size]):
            best = s[..., list(gold_chunks(sample, FINE))].amax(-1, keepdim=True)
            rank, chunks = (s > best).sum(-1), -(-len(sample.body) // FINE)
            hits += sum((rank < max(1, chunks / f)).float() for f in (3, 5, 11)) / 3
    best = (hits / questions).flatten().topk(HEADS)
    heads: dict[int, list[int]] = {}
    for i in best.indices.tolist():
        heads.setdefault(i // config.num_attention_heads, []).append(i % config.num_attention_heads)
    print("heads", kind, heads, [round(v, 3) for v in best.values.tolist()], flush=True)
    return heads


def mixed(device):
    return torch.autocast(str(device), dtype=torch.bfloat16, enabled=str(device) == "cuda")


def lessons(lm, data: Data, kind: str, turns: list[int], passages: int, seed: int, device, heads, size: int = 32):
    """The turns' samples with their targets; passages drawn by the seed."""
    samples = [data.sample(i, passages, random.Random(f"{seed}-{i}")) for i in turns]
    samples.sort(key=lambda s: len(s.body))
    out = []
    for j in range(0, len(samples), size):
        part = samples[j : j + size]
        b = batch(part, device)
        share = gradient_shares(lm, b, device) if kind == "gradient" else attention_shares(lm, b, kind, device, heads)
        for row, sample in zip(share.half().cpu(), part):
            out.append(Lesson(sample, row[: -(-(len(sample.body + sample.older + sample.last)) // FINE)]))
    return out


@torch.no_grad()
def attention_shares(lm, b: Batch, kind: str, device, heads) -> Tensor:
    watch = Watch(b, kind, heads)
    with mixed(device):
        read(lm, b, watch=watch, layers=max(heads) + 1)
    return watch.mean()


def gradient_shares(lm, b: Batch, device) -> Tensor:
    """Of |state x gradient of the answer's loss| at the embeddings."""
    held: list[Tensor] = []

    def catch(module, args, out):
        held.append(out.detach().requires_grad_())
        return held[0]

    hook = lm.model.embed_tokens.register_forward_hook(catch)
    try:
        with torch.enable_grad(), mixed(device):
            logs, gold, _ = at_answers(lm, read(lm, b), b)
            pull = torch.autograd.grad(F.nll_loss(logs, gold, reduction="sum"), held[0])[0]
    finally:
        hook.remove()
    share = per_chunk((held[0].detach().float() * pull.float()).sum(-1).abs(), b)
    return share / share.sum(-1, keepdim=True).clamp(min=1e-20)


def teach(scorer: Scorer, lm, depth: int, pupils: list[Lesson], steps: int, device, log, gold: float = 1.0,
          told: float = 1.0, judged=None, size: int = 64, rate: float = 1e-3) -> None:  # fmt: skip
    """Listwise: cross entropy with the targets (weight `told`) and with the answer's place where it is known. Ends on
    the weights that `judged` (higher is better), asked now and then, liked best."""
    opt = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.05)
    rng, mean, order, best = random.Random(0), {}, [], (-1.0, None)
    chunk = scorer.shape.chunk
    scorer.train()
    for step in range(steps):
        for group in opt.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
        if len(order) < size:
            order = rng.sample(pupils, len(pupils))
        part, order = order[:size], order[size:]
        b = batch([p.sample for p in part], device, answers=False)
        with torch.no_grad(), mixed(device):
            x = read(lm, b, layers=depth).x
        logs = look(scorer, x, b).log_softmax(1)
        target = torch.zeros_like(logs)
        right = torch.zeros_like(logs, dtype=torch.bool)
        for i, p in enumerate(part):
            share = F.pad(p.target, (0, -len(p.target) % (chunk // FINE))).unflatten(0, (-1, chunk // FINE)).sum(1)
            target[i, : len(share)] = share.to(logs)
            right[i, list(gold_chunks(p.sample, chunk))] = True
        known = right.any(1)
        listwise = -(target * logs.clamp(min=-30)).sum(1).mean()
        place = -logs.masked_fill(~right, -1e4).logsumexp(1)[known].sum() / len(part)
        opt.zero_grad(set_to_none=True)
        (told * listwise + gold * place).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.step()
        for name, value in (("listwise", listwise), ("gold", place)):
            mean[name] = 0.98 * mean.get(name, value.item()) + 0.02 * value.item()
        if step % 100 == 99 or step == steps - 1:
            log(step=step + 1, **{k: round(v, 4) for k, v in mean.items()})
        if judged is not None and (step % 250 == 249 or step == steps - 1):
            worth = judged(scorer.eval())
            if worth > best[0]:
                best = worth, {k: v.clone() for k, v in scorer.state_dict().items()}
            log(step=step + 1, judged=round(worth, 2))
            scorer.train()
    if best[1] is not None:
        scorer.load_state_dict(best[1])
    scorer.eval()


@torch.no_grad()
def recall(scorer, lm, depth: int, data: Data, split: str, passages: int, device, limit: int = 400) -> dict:
    """How often the answer's chunk is among the best 1/f of the passages' chunks, in per cent, by f."""
    rng = random.Random(7)
    turns = [i for i in data.questions(split) if data.turns[i]["at"] is not None]
    turns = [i for i in turns if data.idf.get(data.canon[data.turns[i]["answer"][0]], 9.0) > 0.7]
    samples = [data.sample(i, passages, rng) for i in rng.sample(turns, min(limit, len(turns)))]
    hits = dict.fromkeys(FACTORS, 0)
    for j in range(0, len(samples), 32):
        part = samples[j : j + 32]
        b = batch(part, device, answers=False)
        with mixed(device):
            scores = look(scorer, read(lm, b, layers=depth).x, b).cpu()
        for s, sample in zip(scores, part):
            chunks = -(-len(sample.body) // scorer.shape.chunk)
            rank = int((s[:chunks] > s[list(gold_chunks(sample, scorer.shape.chunk))].max()).sum())
            for f in FACTORS:
                hits[f] += rank < max(1, chunks / f)
    return {"n": len(samples), **{str(f): round(100 * h / len(samples), 1) for f, h in hits.items()}}
