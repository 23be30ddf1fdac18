"""Questions that a model writes, to teach scorers more: CoQA has 354 training stories, and a scorer soon knows them.

Tuned to write CoQA's turns behind its stories, the model writes turns behind other passages. Whether its answers are
right matters little: what heads look at while they are written is what the scorer is taught.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from ablation.answers.data import LONGEST_ANSWER, LONGEST_HEAD, Data, Sample
from ablation.answers.descent import descend, rounds
from ablation.answers.judge import lots
from ablation.answers.model import adapt
from ablation.answers.reader import answer, at_answers, batch, read
from ablation.answers.teach import mixed

TURNS, TOKENS, TEMPERATURE = 3, 100, 0.8  # of what is written behind a passage
LONGEST_QUESTION = 40  # tokens


def story(data: Data, number: int) -> tuple[int, ...]:
    return (*data.pre, *data.stories[number], *data.sep)


def learn(lm, data: Data, device, log: Callable, steps: int = 250, size: int = 32, rate: float = 5e-4) -> None:
    """Tune the model, by adapters, to write the turns of CoQA's training stories, all of their tokens."""
    torch.manual_seed(0)
    trained, taken = adapt(lm, rank=16), rounds(data.questions("train"), size, random.Random(0))

    def gradients(step: int) -> float:
        take = [data.turns[i] for i in next(taken)]
        said = [(*t["older"], *t["last"], *t["line"], *t["answer"]) for t in take]
        samples = [Sample(story(data, t["story"]), (), (), (), s, None, ()) for t, s in zip(take, said)]
        samples.sort(key=lambda s: len(s.body))
        tokens, loss = sum(map(len, said)), 0.0
        for part in (samples[: size // 2], samples[size // 2 :]):
            b = batch(part, device)
            with mixed(device):
                logs, gold, _ = at_answers(lm, read(lm, b), b)
            mine = F.nll_loss(logs, gold, reduction="sum") / tokens
            mine.backward()
            loss += mine.item()
        return loss

    descend(trained, steps, gradients, rate, log=log)
    lm.eval()


def write(lm, data: Data, stories: list[int], device, seed: int = 0) -> list[dict]:
    """Turns as Data has them, of the stories; drawn at TEMPERATURE."""
    torch.manual_seed(seed)
    begin = tuple(data.own_question)
    samples = [Sample(story(data, i), (), (), begin, (), None, ()) for i in stories]
    found: list[dict] = []
    for lot in lots(samples, 120_000, 512):
        b = batch([samples[i] for i in lot], device, answers=False)
        with mixed(device):
            said = answer(lm, b, -1, limit=TOKENS, temperature=TEMPERATURE)
        for i, ids in zip(lot, said):
            found += turns(data, stories[i], [*begin, *ids])
    return found


def turns(data: Data, number: int, ids: list[int]) -> Iterator[dict]:
    """What was written, turn by turn, up to the first line that is none."""
    lines, line = [], []
    for token in ids:
        line.append(token)
        if token == data.newline:
            lines.append(line)
            line = []
    older: list[int] = []
    last: list[int] = []
    for asks, says in zip(lines[::2][:TURNS], lines[1::2]):
        begins = len(data.own_answer)
        if asks[: len(data.own_question)] != data.own_question or says[:begins] != data.own_answer:
            return
        question, said = [*asks, *data.own_answer], says[begins:]
        fits = len(asks) <= LONGEST_QUESTION and 2 <= len(said) <= LONGEST_ANSWER
        if not fits or len(older) + len(last) + len(question) > LONGEST_HEAD:
            return
        own, bare = data.stories[number], said[:-1]
        places = [i for i in range(len(own) - len(bare) + 1) if own[i : i + len(bare)] == bare]
        at = places[0] if len(places) == 1 else None
        parts = {"older": older, "last": last, "line": question, "answer": said}
        yield {"story": number, **parts, "at": at, "span": len(bare), "references": [data.text(bare)]}
        older, last = last, [*asks, *says]
