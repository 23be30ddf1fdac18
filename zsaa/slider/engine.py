"""One model at one setting of the dial: what each layer keeps, what the model says, how long it took.

No threads and no widget in here. The worker thread is the only one that calls `Engine.point` and `Engine.race`.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import zsaa
from zsaa.cost import kv_bytes, macs
from zsaa.dial import settings, trained_for
from zsaa.dials.settings import current_settings
from zsaa.families import find_decoder, only_last_logits
from zsaa.finetune.questions import ASKS, BODY, parts_of, written
from zsaa.kit.labels import schedule_of
from zsaa.kit.store import RESULTS
from zsaa.rule import SINKS, Rule, check_alpha

STOCK = "stock"  # the key of every setting that drops nothing
TAUS = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80, 128)
TOP = 5  # next words that are listed, of this setting and of alpha = 1 each


class Interrupted(Exception):
    """The pass was given up between two layers, because something newer is wanted."""


def twin(model: nn.Module) -> nn.Module:
    """A second module tree over the very same parameters and buffers, in eval mode: no memory to speak of, and a dial,
    hooks and mode of its own, so that whatever is done to it leaves `model` as it is."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def default_alphas(low: float, num_layers: int) -> list[float]:
    """Stops of the slider from `low` up to 1: round numbers, closest where alpha compounds over the layers the most."""
    fine = 5 if num_layers > 16 else 10  # thousandths
    steps = [*range(1000, 1000 - 10 * fine, -fine), *range(1000 - 10 * fine, 1000 - 40 * fine, -2 * fine)]
    steps += range(1000 - 40 * fine, 0, -4 * fine)
    return sorted({check_alpha(low), *(step / 1000 for step in steps if step / 1000 > low)})


def pieces(tokenizer: Any, text: str, ids: list[int], offsets: list[tuple[int, int]] | None) -> list[str]:
    """One string per token; joined, they give the text. A token that only completes a character of the one before it
    gets "", one that is not in the text (BOS) its name."""
    if offsets is None:  # a slow tokenizer: each token on its own, which cannot show a split character
        return [tokenizer.decode([i]) for i in ids]
    special, found, end = set(tokenizer.all_special_ids), [], 0
    for i, (start, stop) in zip(ids, offsets):
        in_text = stop > start or i not in special
        found.append(text[end:stop] if in_text else tokenizer.convert_ids_to_tokens(i))
        end = max(end, stop)
    return found


@dataclass(frozen=True)
class Text:
    """A tokenized text. cut: tokens of it that were left out at the end because it was too long. part: of a prompt that
    asks about a document, what each token is (zsaa.finetune.questions)."""

    ids: list[int]
    pieces: list[str]
    cut: int
    part: list[int] | None = None

    @property
    def exempt(self) -> int | None:
        """How many tokens never leave; None where the score itself says so."""
        if self.part is None:
            return None
        last = len(self.ids) - 1
        return sum(kind != BODY or i < SINKS or i == last for i, kind in enumerate(self.part))

    def masks(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What a call of the model is told beside the ids."""
        if self.part is None:
            return {}
        part = torch.tensor([self.part], device=device)
        return {"question": part == ASKS, "exempt": part != BODY}


class Engine:
    """A model and its tokenizer, ready to be asked for points.

    kind: "classify" (class probabilities), "generate" (next words, continuations), or "none" (no head that the slider
    knows: what is kept and what it costs, no answer).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        labels: list[str] | None = None,
        max_tokens: int | None = None,
    ):
        self.model, self.tokenizer = twin(model), tokenizer
        zsaa.enable(self.model)
        self.dial = settings(self.model)  # where the dial of `model` is, or was saved
        trained_for(self.model, None)  # below the range it was trained for the view says so, and no warning is needed
        self.decoder, family = find_decoder(self.model)
        self.config = self.decoder.config
        self.num_layers = self.config.num_hidden_layers
        self.device = next(self.decoder.parameters()).device
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        head = type(inner).__name__
        num_labels = getattr(inner.config, "num_labels", 0)
        if head.endswith("ForSequenceClassification") and num_labels > 1:
            self.kind = "classify"
        else:
            self.kind = "generate" if inner.get_output_embeddings() is not None else "none"
        self.last = only_last_logits(self.model)
        names = [str(inner.config.id2label.get(i, i)) for i in range(num_labels)] if self.kind == "classify" else []
        if labels is not None and len(labels) != len(names):
            raise ValueError(
                f"labels has {len(labels)} names, but this {head} answers with {len(names)} classes. Give one name per "
                "class, in the order of the model's outputs, or leave labels out."
            )
        self.labels = list(labels) if labels is not None else names
        positions = getattr(self.config, "max_position_embeddings", None) or 1024
        if max_tokens is not None and not 1 <= max_tokens <= positions:
            raise ValueError(f"max_tokens must be in [1, {positions}] for this model, got {max_tokens}.")
        self.max_tokens = max_tokens or min(positions, 1024)
        self._warm = False
        self._stop: Callable[[], bool] | None = None
        for layer in getattr(self.decoder, family.layers):
            layer.register_forward_pre_hook(self._between_layers)

    def _between_layers(self, *_: Any) -> None:
        if self._stop is not None and self._stop():
            raise Interrupted

    def encode(self, text: str) -> Text:
        """`text` as the model reads it, cut to max_tokens. ValueError if there is nothing to read."""
        fast = getattr(self.tokenizer, "is_fast", False)
        batch = self.tokenizer(text, verbose=False, **({"return_offsets_mapping": True} if fast else {}))
        ids, offsets = list(batch["input_ids"]), batch["offset_mapping"] if fast else None
        if not text.strip() or not ids:
            raise ValueError("the text is empty. Type or paste at least one word.")
        strings = pieces(self.tokenizer, text, ids, offsets)
        return Text(ids[: self.max_tokens], strings[: self.max_tokens], max(0, len(ids) - self.max_tokens))

    def ask(self, document: str, question: str) -> Text:
        """A prompt that asks `question` about `document`. ValueError for one that is empty, or too long: cut, it would
        lose its question."""
        if not document.strip():
            raise ValueError("the text is empty. Type or paste at least one word.")
        text, special = written(self.tokenizer, document.strip(), question.strip())
        fast = getattr(self.tokenizer, "is_fast", False)
        options = {"add_special_tokens": special, **({"return_offsets_mapping": True} if fast else {})}
        batch = self.tokenizer(text, verbose=False, **options)
        ids = list(batch["input_ids"])
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"the document and its question are {len(ids)} tokens, and this slider reads {self.max_tokens}: give a "
                "shorter document, or a larger max_tokens."
            )
        strings = pieces(self.tokenizer, text, ids, batch["offset_mapping"] if fast else None)
        return Text(ids, strings, 0, parts_of(self.tokenizer, ids, document.strip(), question.strip()))

    def counts(self, text: Text, alpha: float, tau: int, score: str) -> list[int]:
        """Tokens of a text that each layer keeps."""
        return Rule(tau, score, self.dial["schedule"]).counts(len(text.ids), alpha, self.num_layers, text.exempt)

    def costs(self, text: Text, alphas: list[float], taus: list[int]) -> dict:
        """What every setting costs for a text, before the model has run.

        Settings that keep the same number of tokens in every layer are one and the same: they share a slot (slot 0
        keeps everything). "slot": tau -> slot per alpha. Per slot: "top" (tokens the last layer passes on), "share" (of
        token-layers), "macs", "kv" (bytes). "predicted": milliseconds per alpha, where zsaa.calibrate has timed this
        very length, tau and score on this machine; else None.
        """
        n = len(text.ids)
        slots = {(n,) * self.num_layers: 0}
        per_slot: dict[str, list] = {"top": [], "share": [], "macs": [], "kv": []}
        of_tau: dict[str, list[int]] = {}
        itemsize, chosen = self.decoder.dtype.itemsize, {name: self.dial[name] for name in ("score", "schedule")}
        for tau in taus:
            of_tau[str(tau)] = row = [0] * len(alphas)
            for i in reversed(range(len(alphas))):
                counts = tuple(self.counts(text, alphas[i], tau, chosen["score"]))
                row[i] = slots.setdefault(counts, len(slots))
                if row[i] == len(per_slot["top"]):
                    per_slot["top"].append(counts[-1])
                    per_slot["share"].append(sum(counts) / (n * self.num_layers))
                    if text.part is None:
                        per_slot["macs"].append(macs(self.config, n, alphas[i], tau, **chosen))
                        held = kv_bytes(self.config, n, alphas[i], tau, itemsize=itemsize, **chosen)
                    else:  # all that stays enters the first layer, and goes through all
                        asking = text.part.count(ASKS)
                        scoring = self.decoder.asked.macs(n - asking, asking) if counts[-1] < n else 0
                        per_slot["macs"].append(macs(self.config, counts[-1]) + scoring)
                        held = kv_bytes(self.config, counts[-1], itemsize=itemsize)
                    per_slot["kv"].append(held)
        return {"slot": of_tau, **per_slot, "predicted": None if text.part else self._calibrated(n, alphas)}

    def _calibrated(self, n: int, alphas: list[float]) -> dict | None:
        zsaa.enable(self.model, alpha=1.0, tau=self.dial["tau"], score=self.dial["score"])
        if zsaa.report(self.model, n, [1.0])["predicted ms"].isna().any():
            return None
        predicted = zsaa.report(self.model, n, alphas)["predicted ms"].tolist()
        return {"tau": self.dial["tau"], "score": self.dial["score"], "ms": predicted}

    @contextmanager
    def _set(self, alpha: float, tau: int, score: str, stop: Callable[[], bool] | None = None) -> Iterator[None]:
        zsaa.enable(self.model, alpha=alpha, tau=tau, score=score)
        self._stop = stop
        try:
            with torch.inference_mode():
                yield
        finally:
            self._stop = None

    def _timed(self, **inputs: Any) -> tuple[Any, float]:
        """The model's output, and the milliseconds that it took."""
        self._wait()
        started = time.perf_counter()
        output = self.model(**inputs)
        self._wait()
        return output, 1000 * (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def point(
        self,
        text: Text,
        alpha: float,
        tau: int,
        score: str,
        stock: torch.Tensor | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[dict, torch.Tensor | None]:
        """The text at one setting, as JSON, and the probabilities [classes or words] (float32, CPU) behind it.

        "depth": base64 of one byte per token, the number of layers that passed it on (removal is for good, so this says
        what every layer keeps). "p": probability per class, or "words": [word, probability, probability at alpha = 1],
        for which `stock`, the probabilities at alpha = 1, is needed. "ms": wall-clock milliseconds of the pass.
        `stop` is asked before every layer; where it says True the pass ends with Interrupted.
        """
        n = len(text.ids)
        depth = bytearray([self.num_layers] * n)
        inputs = {"input_ids": torch.tensor([text.ids], device=self.device), "use_cache": self.kind == "generate"}
        pruned = self.counts(text, alpha, tau, score)[-1] < n
        with self._set(alpha if pruned else 1.0, tau, score, stop):
            if not self._warm:  # the first pass of all reads the weights from disk
                self.model(input_ids=inputs["input_ids"][:, :8], use_cache=False)
                self._warm = True
            with zsaa.trace(self.model) if pruned else nullcontext() as trace:
                output, ms = self._timed(**inputs, **self.last, **text.masks(self.device))
            if pruned:
                depth = bytearray(n)
                for layer, kept in enumerate(trace.kept, start=1):
                    for position in kept[0].tolist():
                        depth[position] = layer
            probabilities = self._probabilities(output)
        found = {"depth": base64.b64encode(depth).decode(), "ms": round(ms, 2)}
        if self.kind == "classify":
            found["p"] = [round(p, 6) for p in probabilities.tolist()]
        elif self.kind == "generate":
            found["words"] = self._words(probabilities, probabilities if stock is None else stock)
        return found, probabilities

    def _probabilities(self, output: Any) -> torch.Tensor | None:
        if self.kind == "none":
            return None
        logits = (output.logits[0] if self.kind == "classify" else output.logits[0, -1]).float()
        if not logits.isfinite().all():
            raise FloatingPointError(
                f"the model's outputs are not finite in {self.decoder.dtype}. Load it in float32 or bfloat16."
            )
        return logits.softmax(-1).cpu()

    def _words(self, now: torch.Tensor, stock: torch.Tensor) -> list[list]:
        """The likeliest next words of both settings: this one's first, then those that only alpha = 1 had on top."""
        ours, theirs = now.topk(min(TOP, len(now))).indices.tolist(), stock.topk(min(TOP, len(now))).indices.tolist()
        listed = [*ours, *(i for i in theirs if i not in ours)]
        return [[self.tokenizer.decode([i]), round(float(now[i]), 6), round(float(stock[i]), 6)] for i in listed]

    def race(
        self,
        text: Text,
        alpha: float,
        tau: int,
        score: str,
        new_tokens: int,
        stop: Callable[[], bool] | None = None,
    ) -> Iterator[dict]:
        """Two greedy continuations, alpha = 1 and `alpha`, token by token: {"side": 0 or 1, "token": int, "piece",
        "ms": since the side's own start, "end": whether it is the side's last}.

        The sides take turns on one device, each with a clock that runs only while it computes; the side that is behind
        goes next, so tokens come in the order in which two equal machines would bring them.
        """
        eos, ids = self._eos(), text.ids
        last = self.tokenizer.decode(ids[-1:])  # decoded along, as some tokenizers drop a text's leading space
        sides = [{"alpha": a, "ids": [], "text": "", "ms": 0.0, "cache": None} for a in (1.0, alpha)]
        racing = list(sides)
        while racing:
            side = min(racing, key=lambda s: s["ms"])
            fresh = not side["ids"]
            new = ids if fresh else side["ids"][-1:]
            with self._set(side["alpha"], tau, score, stop):
                tokens = torch.tensor([new], device=self.device)
                more = {"past_key_values": side["cache"], **(text.masks(self.device) if fresh else {})}
                output, ms = self._timed(input_ids=tokens, use_cache=True, **more, **self.last)
                token = int(output.logits[0, -1].argmax())
            side["ids"].append(token)
            side["ms"] += ms
            side["cache"] = output.past_key_values
            said = self.tokenizer.decode([*ids[-1:], *side["ids"]], skip_special_tokens=True)[len(last) :]
            # A character can take several tokens; until it is whole it shows as one replacement sign.
            whole = said[: -1 if said.endswith("�") else None]
            end = token in eos or len(side["ids"]) >= new_tokens
            piece = (said if end else whole)[len(side["text"]) :]
            side["text"] += piece
            if end:
                racing.remove(side)
            yield {"side": sides.index(side), "token": token, "piece": piece, "ms": round(side["ms"], 2), "end": end}

    def _eos(self) -> set[int]:
        generation = getattr(self.model, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return set(eos) if isinstance(eos, (list, tuple)) else {eos}


# -------------------------------------------------------------------------------------- accuracy, where it was measured


def accuracy_curve(model: nn.Module, which: str | Path | dict | None = "auto") -> dict | None:
    """The measured accuracy along alpha: {"points": [[alpha, accuracy in percent, low, high]], "n", "task", "tau",
    "score", "source"}; None where there is none for this very model, under the schedule of its dial.

    which: a result file of kind "curve" (its content, its path, or its name in results/accuracy); None for no curve;
    "auto" looks for a committed adapter whose trained head is, bit for bit, this model's head.
    """
    if which == "auto":
        which = _committed_head(model)
    if which is None:
        return None
    if not isinstance(which, dict):
        path = Path(which) if Path(which).suffix == ".json" else RESULTS / "accuracy" / f"{which}.json"
        if not path.is_file():
            raise FileNotFoundError(f"no result file {path}. Give the path of one, or accuracy=None to show none.")
        which = json.loads(path.read_text())
    if which.get("kind") != "curve":
        raise ValueError(f"accuracy must be a result of kind 'curve', got {which.get('kind')!r}.")
    if schedule_of(which) != current_settings(find_decoder(model)[0])["schedule"]:
        return None  # an alpha means something else there
    rows = sorted((row for row in which["rows"] if row["control"] == "alpha"), key=lambda row: row["alpha"])
    return {
        "points": [[row["alpha"], row["accuracy"], *row["ci95"]] for row in rows],
        "n": rows[0]["n"],
        "task": which["task"]["name"],
        "tau": which["recipe"]["tau"],
        "score": which["recipe"]["score"],
        "source": which["name"],
    }


def _committed_head(model: nn.Module) -> str | None:
    from safetensors import safe_open

    heads = [p for name, p in model.named_parameters() if "score." in name and "original_module" not in name]
    for file in sorted(RESULTS.glob("adapters/*/adapter_model.safetensors")) if heads else ():
        with safe_open(file, framework="pt") as weights:
            names = [name for name in weights.keys() if name.endswith("score.weight")]  # noqa: SIM118
            saved = [weights.get_tensor(name) for name in names]
        same = (s.shape == h.shape and torch.equal(s.to(h.dtype), h.detach().cpu()) for s in saved for h in heads)
        if any(same) and (RESULTS / "accuracy" / f"{file.parent.name}.json").is_file():
            return file.parent.name
    return None
