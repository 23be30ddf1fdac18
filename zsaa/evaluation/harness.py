"""lm-evaluation-harness on a model with the dial: lm-eval's own command, with one more kind of model.

    zsaa-eval --model zsaa --model_args pretrained=smollm2-135m,alpha=0.9 --tasks mmlu --batch_size 8

Scores at alpha < 1 are causal. A request's context is pruned at prefill, and its last token, always kept, predicts the
first of the continuation, whose tokens then pass all layers over the pruned caches. So what is kept never depends on
the continuation: pruning both at once would let a score read the answer. Requests with the same context, like the four
answers of an MMLU question, share one prefill. Generation prunes the prompt in the same way. At alpha = 1 everything is
lm-eval's, by its own code.

lm-eval (0.4.10 to 0.4.13) looks for no plug-ins, so its own command does not know `--model zsaa`. Importing this module
makes it known, to `lm_eval.simple_evaluate` too.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import zsaa
from zsaa import models
from zsaa.data.batching import pad, positions
from zsaa.dial import settings, trained_for
from zsaa.dials.settings import with_schedule
from zsaa.finetune import SETTINGS_FILE
from zsaa.rule import check_alpha, check_schedule, check_score, check_tau

try:
    from lm_eval.api.registry import MODEL_REGISTRY, register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(
        f"zsaa.evaluation.harness needs lm-evaluation-harness 0.4.10 or newer ({error}). "
        "Get it with: pip install -U 'zsaa[harness]'"
    ) from error

log = logging.getLogger(__name__)


class ZsaaLM(HFLM):
    """lm-eval's Hugging Face model with the dial on; every argument of `HFLM` is one here too, in --model_args.

    pretrained: a packaged model ("smollm2-135m"), a hub id, a folder (of a model, or of a PEFT adapter that names its
        base), a GGUF file, or a model object, given with tokenizer=. An adapter can also be given in lm-eval's way, by
        peft=.
    alpha: share of tokens that each layer keeps, in (0, 1].
    tau, score, schedule: as in `zsaa.enable`; None takes what zsaa.finetune saved with the model, else the paper's.
    rolling_prefix: for perplexity tasks only, see `loglikelihood_rolling`.
    device: None takes a GPU if there is one.

    Raises TypeError or ValueError for settings out of range, UnsupportedModelError for a model family without a dial,
    AssetError for a model that the hub does not give.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        alpha: float = 1.0,
        tau: int | None = None,
        score: str | None = None,
        schedule: str | None = None,
        rolling_prefix: int | None = None,
        device: str | None = None,
        **kwargs,
    ):
        alpha = check_alpha(alpha)  # before the weights are loaded, which can take minutes
        checks = (tau, check_tau), (score, check_score), (schedule, check_schedule)
        tau, score, schedule = (given if given is None else check(given) for given, check in checks)
        for name in ("parallelize", "tp_plan"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name}={kwargs[name]} spreads the layers of one model over devices, which the dial cannot prune "
                    "across. Use one device, or one copy on each (accelerate launch)."
                )
        self.source = pretrained if isinstance(pretrained, str) else None
        if self.source and self.source.lower().endswith(".gguf") and Path(self.source).expanduser().is_file():
            file = Path(self.source).expanduser()
            pretrained, kwargs = str(file.parent), {**kwargs, "gguf_file": file.name}
        pretrained, adapter = _locate(pretrained) if isinstance(pretrained, str) else (pretrained, None)
        if adapter and kwargs.get("peft"):
            raise ValueError(
                f"pretrained={self.source} is an adapter itself; peft={kwargs['peft']} would be a second one."
            )
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            super().__init__(pretrained, device=device, **kwargs)
        except OSError as error:  # of transformers, which names neither the model nor what fetches it
            if self.source is None or Path(pretrained).expanduser().exists():
                raise
            raise models.hub_error(error, pretrained) from error
        if adapter:  # as it was trained: lm-eval's peft= would first cut the embeddings to the tokenizer's size
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self.model, adapter).eval()
        _check_scores_text(self.model)
        # A model's own settings lie in its config, where enable finds them; an adapter's lie beside it.
        file = Path(self.peft or adapter or "").expanduser() / SETTINGS_FILE
        saved = with_schedule(json.loads(file.read_text())) if (self.peft or adapter) and file.is_file() else {}
        tau, score, schedule = tau or saved.get("tau"), score or saved.get("score"), schedule or saved.get("schedule")
        zsaa.enable(self.model, 1.0, tau, score, schedule=schedule)
        if saved.get("alpha_range"):
            trained_for(self.model, saved["alpha_range"])
        zsaa.set_alpha(self.model, alpha)  # warns below the range that the model was fine-tuned for
        most = (self.max_length + 1) // 2
        if rolling_prefix is not None and (type(rolling_prefix) is not int or not 1 <= rolling_prefix <= most):
            raise ValueError(
                f"rolling_prefix must be a whole number of tokens from 1 to {most}, half of what the model can read "
                f"({self.max_length}), got {rolling_prefix!r}."
            )
        self.rolling_prefix = rolling_prefix

    def get_model_info(self) -> dict:
        """What lm-eval writes into the "config" of its result file: also the dial's settings."""
        info = super().get_model_info() | settings(self.model)
        info |= {"rolling_prefix": self.rolling_prefix, "zsaa_version": zsaa.__version__}
        if self.source in models.PACKAGED:
            info["model_sha"] = models.resolve(self.source)["sha256"]
        return info

    def set_cache_hook(self, cache_hook) -> None:
        """lm-eval's --use_cache knows a request but not the model's settings: refuse scores of other settings."""
        super().set_cache_hook(cache_hook)
        answers, mine = cache_hook.dbdict, [self.source, self.peft, self.rolling_prefix, settings(self.model)]
        mine = json.loads(json.dumps(mine))
        if answers is not None:
            if not answers:
                answers["zsaa"] = mine
            if answers.get("zsaa") != mine:
                raise ValueError(
                    f"--use_cache holds answers of {answers.get('zsaa', 'another kind of model')}, and this is {mine}: "
                    "they would be taken for this model's. Give each model and each alpha a cache of its own."
                )

    def _loglikelihood_tokens(
        self, requests: Sequence, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, would greedy decoding give it?) of each request (key, context tokens, continuation tokens).

        A context that is too long loses its beginning, exactly as in HFLM.
        """
        if settings(self.model)["alpha"] == 1:
            return _numbers(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs))
        asking = defaultdict(list)  # context: indices of the requests that continue it
        cut = 0
        for index, (key, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)  # the last token is predicted, never read
            if not context or not continuation or room < 1:
                raise ValueError(
                    f"request {index} ({key!r}) has {len(context)} tokens of context and {len(continuation)} of "
                    f"continuation: each must have at least 1, a continuation at most {self.max_length} (max_length)."
                )
            cut += len(context) > room
            asking[tuple(context[-room:])].append(index)
        if cut:
            log.warning("%d of %d contexts are too long and lose their beginning.", cut, len(requests))
        contexts = sorted(asking, key=len, reverse=True)  # the largest batch first: it is the one that may not fit

        batch_size = override_bs or self.batch_size
        if batch_size == "auto":
            batch_size = self._detect_batch_size([(None, list(contexts[0]), [0])]) if contexts else 1
        answers: list = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="log-likelihoods") as bar:
            for batch in _batches(contexts, batch_size):
                asked = [(row, index) for row, context in enumerate(batch) for index in asking[context]]
                asked.sort(key=lambda pair: -len(requests[pair[1]][2]))
                continuations = [requests[index][2] for _, index in asked]
                scores = self._continue(batch, [row for row, _ in asked], continuations, batch_size)
                for (_, index), answer in zip(asked, scores, strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:  # a window of loglikelihood_rolling has no key
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    bar.update()
        return _numbers(answers)

    def _continue(
        self, contexts: list, rows: list[int], continuations: list, batch_size: int
    ) -> Iterator[tuple[float, bool]]:
        """Scores of continuations[i] (token lists) after contexts[rows[i]]: one prefill, then decoding in batches."""
        ids, mask = pad(contexts, 0, self.device, "left")
        longer = max(map(len, continuations)) > 1
        prefill = self._forward(ids, mask, use_cache=longer, logits_to_keep=1)  # left padding: -1 is the last token
        rows = torch.tensor(rows, device=self.device)
        for row, batch in zip(rows.split(batch_size), _batches(continuations, batch_size), strict=True):
            logits = prefill.logits[row]
            read, read_mask = pad([tokens[:-1] for tokens in batch], 0, self.device)
            if read.shape[1]:
                cache = _select(prefill.past_key_values, row)
                read_mask = torch.cat([mask[row], read_mask], dim=1)
                logits = torch.cat([logits, self._forward(read, read_mask, past_key_values=cache).logits], dim=1)
            logprobs = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            for tokens, scores in zip(batch, logprobs, strict=True):
                scores, target = scores[: len(tokens)], torch.tensor(tokens, device=self.device)
                likelihood = scores.gather(1, target[:, None]).sum()
                yield float(likelihood), bool((scores.argmax(dim=1) == target).all())

    def _forward(self, ids: Tensor, mask: Tensor, **kwargs):
        """The model on new tokens `ids` [batch, new], with `mask` [batch, cached + new]; 1 is a real token."""
        half = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=half, enabled=half is not None):
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask, ids.shape[1]), **kwargs)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, for perplexity.

        With rolling_prefix = N, a text is cut into pieces of N tokens, and each is scored after the N tokens before it,
        which are pruned (the first piece: after the one prefix token of lm-eval). A BOS that the tokenizer itself puts
        before a text is that prefix token; it then begins each context, as one of the N, and is never scored. Every
        other token is scored once, causally.
        Use it at alpha = 1 as well: lm-eval's own windows, taken without rolling_prefix, are other windows, and have
        one token of context, so that there is nothing to prune; at alpha < 1 they are refused.
        """
        if self.rolling_prefix is None:
            if settings(self.model)["alpha"] == 1:
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            raise ValueError(
                "this task scores whole texts, and lm-eval's windows have one token of context: nothing would be "
                "pruned, whatever alpha is. Add rolling_prefix=N to --model_args (at alpha = 1 too, to compare): each "
                "piece of N tokens is then scored after the N tokens before it, pruned."
            )
        windows, owner, step = [], [], self.rolling_prefix
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            bos = tokens[:1] if tokens[:1] == [self.prefix_token_id] else []
            tokens = tokens[len(bos) :]
            for start in range(0, len(tokens), step):
                prefix = bos or [self.prefix_token_id] * (start == 0)
                before = tokens[max(0, start - step + len(bos)) : start]
                windows.append((None, prefix + before, tokens[start : start + step]))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals


# Where a future lm-eval has found the entry point, it knows the name already.
if "zsaa" not in MODEL_REGISTRY:
    register_model("zsaa")(ZsaaLM)


def _locate(name: str) -> tuple[str, str | None]:
    """(what transformers can load, adapter folder or None) for a packaged model, a folder or a hub id."""
    if name in models.PACKAGED:
        return str(models.convert(name)), None
    file = Path(name).expanduser() / "adapter_config.json"
    if file.is_file():
        return _locate(json.loads(file.read_text())["base_model_name_or_path"])[0], str(file.parent)
    return name, None


def _check_scores_text(model: PreTrainedModel) -> None:
    """Refuse what would load as a language model, and give numbers, but is not one that can be scored."""
    if any(name.endswith("ForSequenceClassification") for name in model.config.architectures or []):
        raise ValueError(
            f"{model.config.architectures[0]} is a classifier, and lm-eval scores the next token. Measure it with "
            "zsaa.evaluation.accuracy, or name a language model."
        )
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.task_type not in (None, "CAUSAL_LM") or adapter.is_prompt_learning:
            raise ValueError(
                f"an adapter of type {adapter.peft_type.value} for the task {adapter.task_type} cannot be scored with "
                "the dial: it must be for CAUSAL_LM, and add no virtual tokens (as LoRA does not)."
            )


def _numbers(answers: list[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """`answers`, unless one is NaN: lm-eval would take it for the likeliest of its question, and report a score."""
    spoilt = [number for number, (likelihood, _) in enumerate(answers) if math.isnan(likelihood)]
    if spoilt:
        raise ValueError(
            f"the log-likelihood of {len(spoilt)} of {len(answers)} requests is NaN: the model's weights are spoilt, "
            "or too large for its dtype. Train or load it anew, or add dtype=float32 to --model_args."
        )
    return answers


def _batches(items: Sequence, size: int) -> Iterator:
    return (items[start : start + size] for start in range(0, len(items), size))


def _select(cache, rows: Tensor):
    """A cache of its own for samples `rows` (any, also repeated) of `cache`, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def main() -> None:
    """The command zsaa-eval: lm-eval's command line, in which `--model zsaa` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
