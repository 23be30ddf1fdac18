"""Caches times pruning, on a stream that repeats itself: a small table in the terms of Table 1 of the paper on
optimization strategies (docs/related_work.md).

    python -m ablation.answers.data outputs/answers.json.gz
    python -m ablation.caches --data outputs/answers.json.gz --output outputs/caches

CoQA's conversations ask several questions of one passage. Each question is answered by every cache at every alpha
before the next one comes, so what else the machine does falls on all alike. "dynamic" gives the answer to a near
question of the same passage (zsaa.reuse.near, unsafe) and reads nothing; it has no perplexity. It needs MiniLM; for a
machine that has none, --vectors FILE writes what MiniLM says of the questions, and reads it there.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import random
import shlex
import string
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import BertConfig, BertModel, DynamicCache
from transformers.cache_utils import QuantizedCache

import zsaa
from zsaa import finetune
from zsaa.measure import output_folder, provenance, stats, write_json
from zsaa.reuse import near

ADAPTER = Path(__file__).resolve().parent.parent / "results/adapters/coqa-asked"
WAYS = ("none", "static", "dynamic", "hqq8", "hqq4")
NEW = 16
NEAR = 0.9  # similarity of two questions of one passage that are taken for the same by "dynamic", if their facts agree


def f1(answer: str, references: list[str]) -> float:
    """The best overlap of words, as SQuAD counts it."""

    def words(text: str) -> list[str]:
        plain = "".join(c for c in text.lower() if c not in string.punctuation)
        return [word for word in plain.split() if word not in ("a", "an", "the")]

    def one(reference: str) -> float:
        a, b = words(answer), words(reference)
        same = sum((Counter(a) & Counter(b)).values())
        return float(a == b) if not (a and b) else 2 * same / (len(a) + len(b))

    return max(map(one, references))


class Told:
    """What MiniLM says of these questions, from a file; a model of its shape, of drawn weights, takes its time."""

    def __init__(self, path: Path, device: str):
        with np.load(path) as held:
            self.vectors = dict(zip(held["texts"].tolist(), held["vectors"]))
            self.lengths = dict(zip(held["texts"].tolist(), held["lengths"].tolist()))
        shape = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        self.model = BertModel(shape).eval().to(device)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        longest = max(self.lengths[text] for text in texts)
        ids = torch.zeros(len(texts), longest, dtype=torch.long, device=self.model.device)
        self.model(ids).last_hidden_state.mean(1).cpu()
        return np.stack([self.vectors[text] for text in texts])

    @staticmethod
    def write(path: Path, texts: Sequence[str]) -> None:
        mini = near.MiniLM()
        texts, lengths = sorted(set(texts)), [len(mini.tokenizer(text)["input_ids"]) for text in sorted(set(texts))]
        np.savez_compressed(path, texts=np.array(texts), vectors=mini(texts), lengths=np.array(lengths))


class Reader:
    """One model, and each way in which it may remember. vectors: see `Told`; None: MiniLM is here."""

    def __init__(self, data: dict, ways: Sequence[str] = WAYS, device: str = "cpu", vectors: str | Path | None = None):
        model, self.tokenizer = finetune.load(ADAPTER, kind="causal-lm", device=device)
        self.device = torch.device(device)
        self.near, self.embed = {}, None
        if "dynamic" in ways:
            self.embed = near.MiniLM() if vectors is None else Told(Path(vectors), device)
        self.model = zsaa.enable(model.merge_and_unload().eval())
        self.forget()
        self.data, self.end = data, data["newline"]

    def forget(self) -> None:
        """All that was answered so far."""
        self.near.clear()
        self.prompts = {alpha: zsaa.Prompts(self.model) for alpha in (1.0, 0.5)}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prompt(self, turn: dict) -> tuple[torch.Tensor, int]:
        """ids [1, tokens], and how many of them are the passage's."""
        body = self.data["pre"] + self.data["stories"][turn["story"]] + self.data["sep"]
        return torch.tensor([body + turn["line"]], device=self.device), len(body)

    def cache(self, way: str):
        if not way.startswith("hqq"):
            return DynamicCache(config=self.model.config)
        bits = int(way.removeprefix("hqq"))
        return QuantizedCache("hqq", self.model.config, nbits=bits, axis_key=1, axis_value=1)

    def path(self, way: str):
        """A trace takes alpha = 1 through the pruned layers, too: transformers' own fail in 4 bits where the number of
        groups is odd, as with three heads."""
        return zsaa.trace(self.model) if way.startswith("hqq") else nullcontext()

    def _asks(self, ids: torch.Tensor, body: int) -> torch.Tensor:
        return torch.arange(ids.shape[1], device=self.device)[None] >= body

    @torch.inference_mode()
    def answer(self, turn: dict, way: str, alpha: float) -> dict:
        """Greedy, to the end of the line: what it says, in how many seconds."""
        ids, body = self.prompt(turn)
        options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=self.end, pad_token_id=self.end)
        said = self.tokenizer.decode(turn["line"])
        held = hit = None
        if way == "dynamic":  # one store for each passage and alpha
            held = self.near.setdefault((turn["story"], alpha), near.Near(self.embed, NEAR, unsafe=True))
        self.wait()
        begun = time.perf_counter()
        if held is not None and (hit := held.get(said)) is not None:
            found = hit.answer
        elif way == "static":
            found = self.prompts[alpha].generate(ids, prefix=body, alpha=alpha, **options)[0, ids.shape[1] :]
        else:
            masks = {} if alpha == 1 else {"question": self._asks(ids, body)}
            with self.path(way):
                found = self.model.generate(ids, alpha=alpha, past_key_values=self.cache(way), **masks, **options)
            found = found[0, ids.shape[1] :]
        if held is not None and hit is None:
            held.put(said, found)
        self.wait()
        seconds, new = time.perf_counter() - begun, found
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        score = f1(text, turn["references"])
        return {
            "seconds": seconds,
            "f1": score,
            "tokens": ids.shape[1] + len(new),
            "new": len(new),
            "hit": hit is not None,
        }

    @torch.inference_mode()
    def nll(self, turn: dict, way: str, alpha: float) -> tuple[float, int]:
        """Of the reference answer's tokens, read through the cache that the prompt left; and how many they are."""
        ids, body = self.prompt(turn)
        answer = torch.tensor([turn["answer"]], device=self.device)
        if way == "static":
            with self.prompts[alpha]:
                cache = self.model(ids[:, :body], alpha=alpha, use_cache=True).past_key_values
            output = self.model(ids[:, body:], past_key_values=cache, alpha=1.0)
        else:
            masks = {} if alpha == 1 else {"question": self._asks(ids, body)}
            with self.path(way):
                output = self.model(ids, alpha=alpha, past_key_values=self.cache(way), **masks)
        first = output.logits[:, -1:]
        rest = self.model(answer[:, :-1], past_key_values=output.past_key_values, alpha=1.0).logits
        said = torch.cat([first, rest], dim=1).double().log_softmax(-1)
        return -float(said.gather(2, answer[..., None]).sum()), answer.numel()


def turns_of(data: dict, stories: int, each: int, seed: int) -> list[dict]:
    """So many questions of each of so many held-out stories, in the order in which they were asked."""
    by: dict[int, list[dict]] = {}
    for turn in data["turns"]:
        if data["split"][turn["story"]] == "validation":
            by.setdefault(turn["story"], []).append(turn)
    chosen = random.Random(seed).sample(sorted(s for s in by if len(by[s]) >= each), stories)
    return [turn for story in chosen for turn in by[story][:each]]


def row_of(way: str, alpha: float, found: list[dict], plain: list[dict]) -> dict:
    """plain: what no cache took at alpha = 1, question by question."""
    by = {story: [r for r in found if r["story"] == story] for story in dict.fromkeys(r["story"] for r in found)}
    before = {story: sum(r["seconds"] for r in plain if r["story"] == story) for story in by}
    ratios = [sum(r["seconds"] for r in rows) / before[story] for story, rows in by.items()]
    seconds, scores = [r["seconds"] for r in found], [[100 * r["f1"] for r in rows] for rows in by.values()]
    means = [fmean(rows) for rows in scores]
    of_ratio, of_score = stats.half_width(ratios), stats.half_width(means)
    tokens = sum(r["answer_tokens"] for r in found)
    row = {
        "cache": way,
        "alpha": alpha,
        "n": len(found),
        **({"hits": sum(r["hit"] for r in found)} if way == "dynamic" else {}),
        **({"perplexity": math.exp(sum(r["nll"] for r in found) / tokens)} if tokens else {}),
        "f1": fmean(means),
        "latency_ms": 1000 * fmean(seconds),
        "tokens_per_s": sum(r["tokens"] for r in found) / sum(seconds),
        "latency_ratio": fmean(ratios),
        "latency_ratio_ci95": [fmean(ratios) - of_ratio, fmean(ratios) + of_ratio],
        "ci95": [fmean(means) - of_score, fmean(means) + of_score],
    }
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m ablation.caches", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--data", required=True, help="written by ablation.answers.data")
    add("--output", default="outputs/caches")
    add("--stories", type=int, default=6)
    add("--each", type=int, default=5, help="questions of each story")
    add("--seed", type=int, default=0)
    add("--ways", type=lambda text: text.split(","), default=list(WAYS), help=f"of {', '.join(WAYS)}")
    add("--vectors", help="a file of MiniLM's vectors; written, and nothing else, where there is none of this name")
    add("--device", default="cpu")
    chosen, begun = made.parse_args(), time.monotonic()
    with gzip.open(chosen.data, "rt") as file:
        data = json.load(file)
    turns = turns_of(data, chosen.stories, chosen.each, chosen.seed)
    if chosen.vectors and not Path(chosen.vectors).is_file():
        tokenizer = finetune.load(ADAPTER, kind="causal-lm")[1]
        Told.write(Path(chosen.vectors), [tokenizer.decode(turn["line"]) for turn in turns])
        return print(chosen.vectors)
    reader, found = Reader(data, chosen.ways, chosen.device, chosen.vectors), {}
    path = output_folder(chosen.output) / "results" / "caches.json"
    for alpha, way in itertools.product((1.0, 0.5), chosen.ways if chosen.device != "cpu" else ()):
        reader.answer(turns[0], way, alpha)  # a GPU's first passes compile and allocate
    reader.forget()
    for number, turn in enumerate(turns):
        for alpha in (1.0, 0.5):
            for way in chosen.ways:
                said = reader.answer(turn, way, alpha)
                nll, tokens = (0.0, 0) if way == "dynamic" else reader.nll(turn, way, alpha)
                row = {**said, "nll": nll, "answer_tokens": tokens, "story": turn["story"]}
                found.setdefault((way, alpha), []).append(row)
        print(f"{number + 1} of {len(turns)}, {time.monotonic() - begun:.0f} s", flush=True)
        told = number + 1
        if told % chosen.each == 0 and told > chosen.each:  # whole stories, two at least, for an interval
            rows = [row_of(way, alpha, rows, found["none", 1.0]) for (way, alpha), rows in found.items()]
            write_json(path, content_of(reader, rows, told // chosen.each, chosen.seed, time.monotonic() - begun))
    print(path)


def content_of(reader: Reader, rows: list[dict], stories: int, seed: int, seconds: float) -> dict:
    return {
        "kind": "caches",
        "command": shlex.join(["python", "-m", "ablation.caches", *sys.argv[1:]]),
        "model": {"name": "smollm2-135m", "adapter": "results/adapters/coqa-asked"},
        "rule": zsaa.settings(reader.model) | {"depth_range": None},
        "stories": stories,
        "vectors": "held" if isinstance(reader.embed, Told) else None,
        "hits": {str(alpha): prompts.counts for alpha, prompts in reader.prompts.items()},
        "rows": rows,
        "provenance": provenance(reader.device, seed=seed, seconds=round(seconds, 1)),
    }


if __name__ == "__main__":
    main()
