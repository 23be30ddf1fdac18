"""`teach`: a scorer for questions, taught on rows of question, document and answer while the model stands still.

It learns two things at once: where the answer is, if it stands in the document word for word; and what the model's best
retrieval heads look at while they write it. Which heads these are is found on the rows themselves. The scorer sees what
enters the first layer alone, so a step costs next to nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zsaa.attention import rotate
from zsaa.families import find_decoder
from zsaa.finetune.loop import resolve_precision
from zsaa.finetune.questions import ASKS, BODY
from zsaa.heads.texts import find
from zsaa.learned import asked, salience
from zsaa.learned.asked import Scorer
from zsaa.measure.checks import check_whole
from zsaa.measure.mode import evaluating

HEADS = 8  # retrieval heads whose looks are taught
FACTORS = (2, 3, 5, 11)  # of the chunks the best 1/f: is the answer's among them?


@dataclass
class Lesson:
    """One row. ids, part: of its prompt; look: of each prompt token, what the heads gave it, or None; place: of its
    tokens those that are the answer, where it stands there word for word."""

    ids: list[int]
    part: list[int]
    place: range | None
    look: Tensor | None = None


def teach(
    model: nn.Module,
    tokenizer: Any,
    samples: Sequence[dict],
    *,
    steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    chunk: int = 16,
    sentences: bool = False,
    width: int = 128,
    held_out: float = 0.1,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Scorer, dict]:
    """Teach a scorer for `model` on `samples` (of `zsaa.finetune.questions.encode`), and put it on the model.

    chunk: tokens that stay or leave together; or, with `sentences`, those of the longest piece of one (in the study
    better at strong settings, worse at mild ones). held_out: the share of samples that is judged on and not learned
    from; the weights that were best there are kept. Returns the scorer and a log: {"samples", "held_out", "placed"
    (rows whose answer stands in the document), "heads", "recall": [(step, {f: per cent})]}, the recall being how often
    the answer's chunk is among the best 1/f. ValueError where no answer stands in its document: nothing could be
    judged.
    """
    check_whole("steps", steps), check_whole("batch_size", batch_size), check_whole("chunk", chunk)
    pupils = [_lesson(tokenizer, sample) for sample in samples]
    random.Random(seed).shuffle(order := list(range(len(pupils))))
    apart = order[: max(1, round(held_out * len(order)))] if held_out else []
    judged = [pupils[i] for i in apart if pupils[i].place]
    if not any(pupil.place for pupil in pupils) or (held_out and not judged):
        raise ValueError(
            f"of {len(pupils)} rows, {len(apart)} of them held out, none that could be judged on has an answer that "
            "stands in its document word for word: give more rows, or such answers."
        )
    decoder, _ = find_decoder(model)
    texts = [tokenizer.decode([i for i, p in zip(s["input_ids"], s["part"]) if p == BODY]) for s in samples]
    device = next(decoder.parameters()).device
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus), evaluating(model):  # the caller's draws and mode stay as they were
        torch.manual_seed(seed)
        scorer = asked.fresh(model, tokenizer, dict.fromkeys(texts), chunk, width, sentences)
        scorer.to(device)
        taught = [i for i in order if i not in {*apart}] or order
        heads = _heads(model, [samples[i] for i in taught], [pupils[i] for i in taught], batch_size)
        log: dict = {"samples": len(taught), "held_out": len(apart), "heads": heads, "recall": []}
        log["placed"] = sum(pupil.place is not None for pupil in pupils)
        best: tuple[float, dict] = (-1.0, {})
        for step in _steps(
            model, scorer, [pupils[i] for i in taught], steps, batch_size, learning_rate, seed, progress
        ):
            if step % 250 and step != steps:
                continue
            found = recall(model, scorer, judged or pupils, batch_size)
            log["recall"].append((step, found))
            if (worth := sum(found.values())) > best[0]:
                best = worth, {name: x.clone() for name, x in scorer.state_dict().items()}
    scorer.load_state_dict(best[1])
    salience.detach(model)
    return salience.attach(model, scorer.requires_grad_(False).eval()), log


def _lesson(tokenizer: Any, sample: dict) -> Lesson:
    n = sum(label == -100 for label in sample["labels"])
    ids, part = sample["input_ids"][:n], sample["part"][:n]
    body = [i for i in range(n) if part[i] == BODY]
    answer = tokenizer.decode(sample["input_ids"][n:], skip_special_tokens=True).strip()
    place = find(tokenizer, ids[body[0] : body[-1] + 1], answer) if body else None
    return Lesson(ids, part, None if place is None else range(body[0] + place.start, body[0] + place.stop))


# ------------------------------------------------------------------------------------------------- what heads look at


@contextmanager
def _watched(model: nn.Module, rows: Tensor, real: Tensor, heads: dict[int, list[int]]) -> Iterator[dict[int, Tensor]]:
    """Notes in a stock pass what `heads` of each layer give to every column [batch, heads, columns], summed over the
    queries at `rows` [batch, queries], of which those that are negative do not count."""
    decoder, family = find_decoder(model)
    seen: dict[int, Tensor] = {}

    def look(attention: Any, args: tuple, kwargs: dict) -> None:
        layer = attention.layer_idx
        q, k, _ = family.qkv(attention, args[0] if args else kwargs["hidden_states"])
        if (tables := kwargs.get("position_embeddings")) is not None:
            q, k = rotate(q, k, *tables)
        mine = torch.tensor(heads[layer], device=q.device)
        index = rows.clamp(min=0)[:, None, :, None].expand(-1, len(mine), -1, q.shape[-1])
        asks, keys = q[:, mine].gather(2, index), k[:, mine // (q.shape[1] // k.shape[1])]
        scores = (asks @ keys.transpose(2, 3)).float() * attention.scaling
        column = torch.arange(k.shape[2], device=q.device)
        hidden = (column > rows[:, :, None]) | ~real[:, None]
        p = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        seen[layer] = p.masked_fill((rows < 0)[:, None, :, None], 0).sum(2)

    hooks = [
        getattr(layer, family.attention).register_forward_pre_hook(look, with_kwargs=True)
        for number, layer in enumerate(getattr(decoder, family.layers))
        if number in heads
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _fast(device: torch.device):
    """On a GPU 16 bits: these passes read all rows, and of what they tell only ranks and shares count."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = kinds.get(resolve_precision()) if device.type == "cuda" else None
    return torch.autocast(device.type, kind) if kind else nullcontext()


@torch.no_grad()
def _looks(model: nn.Module, samples: Sequence[dict], heads: dict[int, list[int]]) -> list[Tensor]:
    """Of each sample [heads, prompt tokens]: what the heads give to the document while the answer is written."""
    device = next(model.parameters()).device
    widths = [sum(label == -100 for label in s["labels"]) for s in samples]
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.tensor([s["input_ids"] + [0] * (longest - len(s["input_ids"])) for s in samples], device=device)
    real = torch.tensor([[i < len(s["input_ids"]) for i in range(longest)] for s in samples], device=device)
    said = max(len(s["input_ids"]) - n for s, n in zip(samples, widths))
    rows = [[n - 1 + i if n + i < len(s["input_ids"]) else -1 for i in range(said)] for s, n in zip(samples, widths)]
    with _fast(device), _watched(model, torch.tensor(rows, device=device), real, heads) as seen:
        model(input_ids=ids, attention_mask=real.long(), use_cache=False, logits_to_keep=1)
    given = torch.cat([seen[layer] for layer in sorted(heads)], dim=1)
    body = torch.tensor([[p == BODY for p in s["part"]] + [False] * (longest - len(s["part"])) for s in samples])
    given = given * body[:, None].to(device)
    return [x[:, :n].cpu() for x, n in zip(given, widths)]


def _heads(model: nn.Module, samples: list[dict], pupils: list[Lesson], size: int, most: int = 128) -> list[list[int]]:
    """The [layer, head] pairs whose looks find the answer most often, on at most so many samples; and each pupil gets
    what these look at."""
    decoder, family = find_decoder(model)
    count, layers = decoder.config.num_attention_heads, family.num_layers(decoder)
    everyone = {layer: list(range(count)) for layer in range(layers)}
    hits = torch.zeros(layers * count)
    placed = [i for i, pupil in enumerate(pupils) if pupil.place][:most]
    for start in range(0, len(placed), size):
        numbers = placed[start : start + size]
        for i, look in zip(numbers, _looks(model, [samples[i] for i in numbers], everyone)):
            place = pupils[i].place
            assert place is not None
            best = look[:, place.start : place.stop].amax(1, keepdim=True)
            higher, tokens = (look > best).sum(1), sum(p == BODY for p in pupils[i].part)
            hits += torch.stack([higher < tokens / f for f in FACTORS]).float().mean(0)
    chosen = sorted(divmod(i, count) for i in hits.topk(min(HEADS, len(hits))).indices.tolist())
    mine: dict[int, list[int]] = {}
    for layer, head in chosen:
        mine.setdefault(layer, []).append(head)
    for start in range(0, len(samples), size):
        for pupil, look in zip(pupils[start:], _looks(model, samples[start : start + size], mine)):
            share = look / look.sum(1, keepdim=True).clamp(min=1e-9)
            pupil.look = share.mean(0)
    return [list(pair) for pair in chosen]


# --------------------------------------------------------------------------------------------------------- the lesson


class _Entered(Exception):
    """No error: what enters the first layer is there, and the rest is not wanted."""

    def __init__(self, states: Tensor):
        self.states = states


@torch.no_grad()
def entering(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What enters the first layer [batch, tokens, width] of a prompt, as the scorer will get it."""
    decoder, family = find_decoder(model)

    def stop(layer: Any, args: tuple, kwargs: dict) -> None:
        raise _Entered(args[0] if args else kwargs["hidden_states"])

    hook = getattr(decoder, family.layers)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        decoder(input_ids=ids, attention_mask=mask, use_cache=False)
    except _Entered as entered:
        return entered.states
    finally:
        hook.remove()
    raise RuntimeError(f"{type(decoder).__name__} has run no layer.")


def _asked(model: nn.Module, scorer: Scorer, part: Sequence[Lesson]) -> tuple[Tensor, list[list[int]]]:
    """Scores of the chunks of each lesson [batch, chunks], as `Scorer.rank` asks for them, and the chunk that each of
    its body's tokens is in."""
    device = next(model.parameters()).device
    longest = max(len(lesson.ids) for lesson in part)

    def padded(lists: list[list[int]], width: int) -> Tensor:
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in lists], device=device)

    ids, real = padded([p.ids for p in part], longest), padded([[1] * len(p.ids) for p in part], longest)
    states = entering(model, ids, real)
    bodies = [[i for i, kind in enumerate(p.part) if kind != ASKS] for p in part]
    heads = [[i for i, kind in enumerate(p.part) if kind == ASKS] for p in part]
    body, head = padded(bodies, max(map(len, bodies))), padded(heads, max(map(len, heads)))
    sizes = torch.tensor([len(row) for row in bodies], device=device)
    asks = padded([[ASKS] * len(row) for row in heads], head.shape[1])

    def at(index: Tensor) -> tuple[Tensor, Tensor]:
        return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1])).float(), ids.gather(1, index)

    (b, b_ids), (h, h_ids) = at(body), at(head)
    scores = scorer(b, b_ids, sizes, h, h_ids, asks)
    units = scorer.units(b_ids, torch.arange(body.shape[1], device=device) < sizes[:, None]).tolist()
    return scores, [row[: len(mine)] for row, mine in zip(units, bodies)]


def _told(part: Sequence[Lesson], units: list[list[int]], chunks: int) -> tuple[Tensor, Tensor]:
    """Of each lesson's chunks [batch, chunks] what the heads look at, and whether the answer stands there. Made on the
    CPU: a hundred small steps a batch, which a GPU would wait for."""
    look, right = torch.zeros(len(part), chunks), torch.zeros(len(part), chunks, dtype=torch.bool)
    for i, (lesson, mine) in enumerate(zip(part, units)):
        body = [at for at, kind in enumerate(lesson.part) if kind != ASKS]
        assert lesson.look is not None
        look[i].index_add_(0, torch.tensor(mine), lesson.look[body].float())
        if lesson.place:
            right[i, [unit for at, unit in zip(body, mine) if at in lesson.place]] = True
    return look, right


def _steps(model, scorer, pupils: list[Lesson], steps: int, size: int, rate: float, seed: int, progress: bool):
    """Train the scorer; yields the number of each step that was made."""
    from tqdm import tqdm

    opt = torch.optim.AdamW(scorer.parameters(), lr=rate, weight_decay=0.05)
    draw, order = random.Random(seed), []
    for step in tqdm(range(1, steps + 1), "teaching the scorer", disable=not progress, leave=False):
        for group in opt.param_groups:
            group["lr"] = rate * min(1, step / 50) * max(0.02, 1 - step / steps)
        if len(order) < size:
            order += draw.sample(pupils, len(pupils))
        part, order = order[:size], order[size:]
        scorer.train()
        scores, units = _asked(model, scorer, part)
        logs = scores.log_softmax(1)
        look, right = (told.to(logs.device) for told in _told(part, units, logs.shape[1]))
        known = right.any(1)
        listwise = -(look * logs.clamp(min=-30)).sum(1).mean()
        place = -logs.masked_fill(~right, -1e4).logsumexp(1)[known].sum() / len(part)
        opt.zero_grad(set_to_none=True)
        (listwise + place).backward()
        torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
        opt.step()
        yield step


@torch.no_grad()
def recall(model: nn.Module, scorer: Scorer, pupils: Sequence[Lesson], size: int = 32) -> dict[int, float]:
    """How often, in per cent, the answer's chunk is among the best 1/f of a prompt's, by f."""
    hits, placed = dict.fromkeys(FACTORS, 0), [pupil for pupil in pupils if pupil.place]
    scorer.eval()
    for start in range(0, len(placed), size):
        part = placed[start : start + size]
        scores, units = _asked(model, scorer, part)
        for row, lesson, mine in zip(scores, part, units):
            body = [at for at, kind in enumerate(lesson.part) if kind != ASKS]
            right = {unit for at, unit in zip(body, mine) if at in lesson.place}
            order, chunks = row.argsort(descending=True, stable=True).tolist(), max(mine) + 1
            rank = min(order.index(unit) for unit in right)
            for f in FACTORS:
                hits[f] += rank < max(1, chunks / f)
    return {f: round(100 * count / max(1, len(placed)), 1) for f, count in hits.items()}
