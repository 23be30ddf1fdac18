"""Alpha-sampled fine-tuning (paper, section 3.4 and Eq. 3), through Hugging Face's Trainer and PEFT.

Each optimizer step draws its own alpha ~ U(low, high), so that the model meets every setting of the dial and none last.
The conventional fine-tuning beside it is the same run with alpha fixed at 1.

Not in the paper, and off unless a recipe says so: "ladder" steps, which see the whole text, a weak and a strong MAC
reduction, the first teaching the others; a score that is learned on the way (zsaa/salience.py); and a schedule by which
lower layers drop less.

Several GPUs: start the same script with torchrun or `accelerate launch`, one process a GPU (DDP, or FSDP when
accelerate is told so). All processes draw the same alpha.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

import zsaa
from zsaa import asked, salience
from zsaa.data.batching import own_seeds, pad
from zsaa.dial import settings, trained_for, with_schedule
from zsaa.families import find_decoder
from zsaa.measure import hash_of, write_json
from zsaa.measure.checks import check_flag, check_number, check_whole
from zsaa.measure.distributed import gather, on_first, place, start
from zsaa.rule import LEARNED, RULE, check_alpha, check_schedule, check_score, check_tau

SETTINGS_FILE = "zsaa.json"
# Section 4.2: GPT-2 (12 layers) is trained from 0.02 on, the deeper LLaMA 3 and Gemma 2 from 0.5 on.
ALPHA_RANGE = {"gpt2": (0.02, 1.0)}
DEEP_ALPHA_RANGE = (0.5, 1.0)
LORA_FIELDS = (("rank", "r"), ("alpha", "lora_alpha"))  # of a recipe, and what PEFT calls them
# What fields of a recipe may be, but for names and what the dial checks itself.
NUMBERS = {
    "learning_rate": "(0, inf)",
    "epochs": "(0, inf)",
    "dropout": "[0, 1)",
    "lora_alpha": "(0, inf)",
    "distill": "[0, 1]",
    "crops": "[0, 1]",
    "strongest": "[1, inf)",
}
WHOLE = ("batch_size", "gradient_accumulation", "max_length", "lora_rank")
FLAGS = ("group_by_length", "gradient_checkpointing")
LEAST_ALPHA = 1e-4  # stands in for a MAC reduction that texts are too short for: as far as tau lets them
# What a name changes of the defaults, which are the paper's. Each ingredient can be taken out again by its default.
RECIPES: dict[str, dict] = {
    "paper": {},
    "zsaa+": {
        "score": LEARNED, "tau": 2, "sampling": "ladder", "distill": 0.5, "learning_rate": 2e-4, "batch_size": 32,
        "epochs": 1.0,
    },
}  # fmt: skip
LORA = {  # and more, by adapters
    "zsaa+": {
        "schedule": "rising",
        "distill": 1.0,
        "crops": 0.5,
        "learning_rate": 1e-3,
        "lora_rank": 16,
        "lora_alpha": 32,
        "epochs": 5.0,
        "dropout": 0.0,
    },
}


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are the paper's (section 4.2). What the paper leaves open, or has not, is marked.
    `Recipe.named` has others.

    method: "alpha-sampled" (Eq. 3) or "conventional" (alpha = 1 throughout).
    tuning: "full", or "lora" on all linear layers of the decoder (the head is trained in full; a quantized model needs
        "lora", which is then QLoRA, as in section 4.3).
    alpha_range: (low, high) of the uniform draw; None takes the paper's range for the model family.
    tau, score, schedule: of the dial, as in `zsaa.enable`. The score "salience" is learned on the way, from the
        gradients of the alpha = 1 pass of a ladder step.
    sampling (not the paper's): what an optimizer step sees. "alpha": one alpha (Eq. 3). "ladder": three passes in turn,
        alpha = 1, and two MAC reductions drawn log-uniformly, from 1 to the root of `strongest` and from there to
        `strongest`; alpha is solved for the lengths of each batch. Classifiers only.
    distill (not the paper's): of the loss of the pruned passes of a ladder step, the share that is the divergence from
        what its alpha = 1 pass says; the rest is the labels'.
    crops (not the paper's): of the texts of a ladder step, the share of which it reads a part only, successive tokens,
        half of them or more, another part in each epoch: the same texts are not learned by heart (LoRA, five epochs).
    batch_size: samples a process and pass; a step sees batch_size x gradient_accumulation x processes of them.
    dropout: attention dropout and, for LoRA, adapter dropout.
    precision (open): "auto" (bf16 where the GPU has it, else fp16; fp32 on a CPU), "fp32", "tf32", "bf16" or "fp16".
    group_by_length (open): batches of similar lengths, which saves padding; the order stays random otherwise.
    """

    method: str = "alpha-sampled"
    tuning: str = "full"
    alpha_range: tuple[float, float] | None = None
    tau: int = 5
    score: str = "column_sum"
    schedule: str = "geometric"
    learning_rate: float = 4e-5
    batch_size: int = 8
    epochs: float = 5.0
    max_steps: int = -1
    dropout: float = 0.1
    seed: int = 0
    max_length: int = 512  # open
    lora_rank: int = 8  # open
    lora_alpha: int = 16  # open
    precision: str = "auto"
    group_by_length: bool = False
    gradient_checkpointing: bool = False
    gradient_accumulation: int = 1
    sampling: str = "alpha"  # this and what follows: not the paper's
    distill: float = 0.0
    crops: float = 0.0
    strongest: float = 12.0

    @classmethod
    def named(cls, name: str = "paper", **changes) -> Recipe:
        """ "paper": the defaults. "zsaa+": a learned score, salience, in ladder steps with distillation, at
        learning rates that have the lower layers learn to read; with tuning="lora", those of adapters, the rising
        schedule in place of Eq. 2, and texts that are read in part. Keyword arguments change single fields."""
        if name not in RECIPES:
            raise ValueError(f"there is no recipe {name!r}. Available: {', '.join(RECIPES)}.")
        adapters = LORA.get(name, {}) if changes.get("tuning") == "lora" else {}
        return cls(**{**RECIPES[name], **adapters, **changes})

    def __post_init__(self):
        check_score(self.score), check_schedule(self.schedule)
        choices = {
            "sampling": ("alpha", "ladder"),
            "method": ("alpha-sampled", "conventional"),
            "tuning": ("full", "lora"),
            "precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        self._check_numbers()
        if self.sampling == "ladder" and (self.method == "conventional" or self.alpha_range is not None):
            raise ValueError(
                "sampling='ladder' draws MAC reductions up to `strongest`: it goes neither with method='conventional'"
                " nor with an alpha_range. Use sampling='alpha' for those."
            )
        if self.sampling != "ladder" and self.crops:
            raise ValueError(f"crops={self.crops} is of ladder steps: use sampling='ladder', or crops=0.")
        if self.sampling != "ladder" and (self.distill or self.score == LEARNED):
            what = f"distill={self.distill}" if self.distill else f"score={self.score!r}"
            raise ValueError(f"{what} needs the alpha = 1 pass of sampling='ladder', which teaches it.")

    def _check_numbers(self) -> None:
        """And NumPy's scalars become Python's, which can be written to a file."""
        fits = {name: check_number(name, getattr(self, name), interval) for name, interval in NUMBERS.items()}
        fits |= {name: check_whole(name, getattr(self, name)) for name in WHOLE}
        fits |= {name: check_flag(name, getattr(self, name)) for name in FLAGS}
        fits["seed"] = check_whole("seed", self.seed, least=0, most=2**32 - 1)
        fits["max_steps"] = check_whole("max_steps", self.max_steps, also={-1: "none, epochs decide"})
        fits["tau"] = check_tau(self.tau)
        if self.alpha_range is not None:
            if not isinstance(self.alpha_range, (tuple, list)) or len(self.alpha_range) != 2:
                raise ValueError(f"alpha_range must be (low, high) or None, got {self.alpha_range!r}.")
            low, high = map(check_alpha, self.alpha_range)
            if low > high:
                raise ValueError(f"alpha_range must be (low, high) with low <= high, got {self.alpha_range}.")
            fits["alpha_range"] = low, high
        for name, value in fits.items():
            object.__setattr__(self, name, value)


def alpha_range(
    recipe: Recipe, model: nn.Module, lengths: Sequence[int] | None = None
) -> tuple[float, float] | tuple[None, None]:
    """The range that `recipe` draws alpha from on `model`. Of a ladder, which draws MAC reductions: down to the alpha
    that divides the MACs of samples of these `lengths`, taken together, by `strongest`; (None, None) without lengths.
    """
    if recipe.method == "conventional":
        return 1.0, 1.0
    if recipe.sampling == "ladder":
        return (None, None) if lengths is None else (reduced_to(recipe.strongest, recipe, model, lengths), 1.0)
    return tuple(recipe.alpha_range or ALPHA_RANGE.get(find_decoder(model)[0].config.model_type, DEEP_ALPHA_RANGE))


def draw_alpha(low: float, high: float, seed: int, step: int) -> float:
    """Eq. 3 for one optimizer step: a function of seed and step alone, so that a resumed run and every process of a
    distributed one draw the same."""
    return random.Random(f"zsaa {seed} {step}").uniform(low, high)


def draw_reductions(strongest: float, seed: int, step: int) -> tuple[float, float]:
    """The MAC reductions of one ladder step, each log-uniform: from 1 to the root of `strongest`, and from there to
    `strongest`; of seed and step alone, too."""
    draw, middle = random.Random(f"zsaa ladder {seed} {step}"), math.sqrt(strongest)
    return middle ** draw.random(), middle ** (1 + draw.random())


def window(text: Sequence[int], draw: random.Random) -> list[int]:
    """Successive tokens of a text, half of them or more."""
    size = min(len(text), max(1, round(len(text) * draw.uniform(0.5, 1))))  # an empty one has none
    start = draw.randint(0, len(text) - size)
    return list(text[start : start + size])


def crop(inputs: dict, recipe: Recipe, step: int, bos: int | None) -> dict:
    """A batch of a classifier with `recipe.crops` of its texts cut to a part, padded on the side it was: input_ids,
    attention_mask int64 [batch, longest]. What becomes of a text depends on seed, step and the text alone. A leading
    `bos` stays."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    texts, before = [row[mask].tolist() for row, mask in zip(ids, real)], bool((~real[:, 0]).any())
    for i, (text, own) in enumerate(zip(texts, own_seeds(texts))):
        draw = random.Random(f"zsaa crops {recipe.seed} {step} {own}")
        if draw.random() < recipe.crops:
            first = text[: int(text[:1] == [bos])]
            texts[i] = first + window(text[len(first) :], draw)
    ids, mask = pad(texts, int(ids[~real][0]) if (~real).any() else 0, ids.device, "left" if before else "right")
    return {**inputs, "input_ids": ids, "attention_mask": mask}


def _rule(recipe: Recipe) -> dict:
    return {name: getattr(recipe, name) for name in RULE}


def reduced_to(mac_reduction: float, recipe: Recipe, model: nn.Module, lengths: Sequence[int]) -> float:
    """The alpha that divides the MACs of a batch of these lengths so, or comes as close as tau lets it."""
    try:
        return zsaa.alpha_for(find_decoder(model)[0].config, lengths, mac_reduction, **_rule(recipe))
    except ValueError:
        return LEAST_ALPHA


class AlphaSampler(TrainerCallback):
    """Turns the dial before each optimizer step, and back to 1 at the end."""

    def __init__(self, model: nn.Module, low: float, high: float, seed: int):
        self.model, self.low, self.high, self.seed = model, low, high, seed

    def on_step_begin(self, args, state, control, **kwargs):
        zsaa.set_alpha(self.model, draw_alpha(self.low, self.high, self.seed, state.global_step))

    def on_train_end(self, args, state, control, **kwargs):
        zsaa.set_alpha(self.model, 1.0)


class DivergedError(ValueError):
    """A training whose loss or weights are no numbers any more."""


class Finite(Trainer):
    """A Trainer that stops where a loss or a weight is no number, before anything of it is saved. (transformers itself
    leaves such losses out of its log, and goes on.)"""

    def diverged(self, what: str) -> DivergedError:
        precision = "fp16" if self.args.fp16 else "bf16" if self.args.bf16 else "fp32"
        return DivergedError(
            f"{what} in step {self.state.global_step}: the training has diverged, and nothing of it was kept. Choose a "
            f"learning_rate below {self.args.learning_rate:g} (any number in (0, inf))"
            + (f', or precision="fp32" (now {precision}).' if precision != "fp32" else ".")
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self.diverged(f"the loss is {loss.item()}")
        return loss

    def check_weights(self) -> None:
        """Raises, in all processes alike, unless all trained weights are numbers: the last update may have spoilt them
        unseen."""
        trained = [(n, p.to_local() if hasattr(p, "to_local") else p) for n, p in self.model.named_parameters()]
        bad = next((name for name, p in trained if p.requires_grad and not torch.isfinite(p).all()), None)
        if found := [name for name in gather(bad) if name]:
            raise self.diverged(f"the weights {found[0]} are not finite")

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.check_weights()
        super()._save_checkpoint(*args, **kwargs)


class Passes(Finite):
    """A Trainer of ladder steps: three passes, one after another, for the memory's sake, the first of which teaches the
    others and a learned score. model: the one with the dial."""

    def __init__(self, model: nn.Module, recipe: Recipe, **kwargs):
        super().__init__(model=model, **kwargs)
        self.dialed, self.recipe = model, recipe
        self.scorer = salience.scorer_of(model) if recipe.score == LEARNED else None
        self.share, self.teacher = 1.0, None
        self.lesson: list[tuple[Tensor, Tensor]] = []  # the scorer's weights, and what this step adds to their gradient

    def alphas(self, inputs: dict) -> list[float]:
        """Of the passes over this batch. Draws are per optimizer step, the same in all processes."""
        recipe, lengths = self.recipe, inputs["attention_mask"].sum(dim=1).tolist()
        drawn = draw_reductions(recipe.strongest, recipe.seed, self.state.global_step)
        return [1.0, *(reduced_to(times, recipe, self.dialed, lengths) for times in drawn)]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if self.recipe.crops:
            bos = find_decoder(self.dialed)[0].config.bos_token_id
            inputs = crop(inputs, self.recipe, self.state.global_step, bos)
        alphas, loss, lesson = self.alphas(inputs), 0.0, []
        self.share, self.teacher, self.lesson = 1 / len(alphas), None, []
        apart = getattr(model, "no_sync", contextlib.nullcontext)  # under DDP
        for number, alpha in enumerate(alphas, start=1):
            zsaa.set_alpha(self.dialed, alpha)
            with contextlib.ExitStack() as around:
                if number < len(alphas):
                    around.enter_context(apart())
                else:  # gradients add up; several processes exchange them now
                    self.lesson = lesson
                watched = self.scorer is not None and number == 1
                entered = around.enter_context(salience.watch(self.dialed, self.scorer)) if watched else None
                loss = loss + super().training_step(model, inputs, num_items_in_batch)
            if watched:
                weights = list(self.scorer.parameters())
                taught = self.scorer.loss(entered, inputs["attention_mask"].bool().to(loss.device))
                lesson = list(zip(weights, torch.autograd.grad(taught, weights)))
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        distill = self.recipe.distill
        if distill and self.teacher is None:
            self.teacher = outputs["logits"].detach().float().softmax(-1)
        elif distill:
            said = outputs["logits"].float().log_softmax(-1)
            loss = (1 - distill) * loss + distill * F.kl_div(said, self.teacher, reduction="batchmean")
        loss = self.share * loss
        for weight, gradient in self.lesson:  # zero, with this gradient: it goes where those of the model go
            loss = loss + ((weight - weight.detach()) * gradient).sum()
        return (loss, outputs) if return_outputs else loss

    def _clip_grad_norm(self, model):
        """The model's gradients: a scorer's are larger, and would decide how far the model goes."""
        learned = set() if self.scorer is None else {id(p) for p in self.scorer.parameters()}
        weights = [p for p in model.parameters() if id(p) not in learned]
        return self.accelerator.clip_grad_norm_(weights, self.args.max_grad_norm)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        apart = [] if self.scorer is None else self.scorer.groups()
        learned = {id(p) for group in apart for p in group["params"]}
        if learned & {id(p) for group in optimizer.param_groups[:2] for p in group["params"]}:  # made just now
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in learned]
            for group in apart:
                optimizer.add_param_group(group)
        return optimizer

    def _save(self, output_dir=None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.scorer is not None and self.args.should_save:
            salience.save(self.scorer, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.scorer is not None:
            config = find_decoder(self.dialed)[0].config
            self.scorer.load_state_dict(salience.read(config, resume_from_checkpoint).state_dict())


def add_lora(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`model` with fresh LoRA adapters on every linear layer of the decoder, and its task head trainable."""
    from peft import LoraConfig, TaskType, get_peft_model

    classifier = hasattr(model, "score")
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM,
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.dropout,
        target_modules="all-linear",
        fan_in_fan_out=model.config.model_type == "gpt2",  # GPT-2 stores its linear layers transposed (Conv1D)
    )
    set_seed(recipe.seed)
    return get_peft_model(model, config)


def prepare_quantized(model: nn.Module, recipe: Recipe) -> nn.Module:
    """`model` (bitsandbytes, see `zsaa.models.load_model`) ready for adapters: frozen, and all that is not quantized in
    float32, so that norms are exact and gradients can be scaled. Adapters that it has already stay trainable."""
    from peft import prepare_model_for_kbit_training

    from zsaa.models import never_repack

    adapted = hasattr(model, "peft_config")
    if recipe.tuning == "full" and not adapted:
        raise ValueError(
            "tuning='full' cannot train a quantized model, whose weights take no gradient. Use tuning='lora' (QLoRA), "
            "or load the model without quantization=."
        )
    if never_repack(model):
        raise ValueError(
            "bitsandbytes has repacked this model's weights for evaluation on this CPU, and they pass no gradient any "
            "more. Load it anew, with zsaa.models.load_model."
        )
    trainable = [p for p in model.parameters() if p.requires_grad] if adapted else []
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    for parameter in trainable:
        parameter.requires_grad = True
    return model


def _set_dropout(model: nn.Module, p: float) -> None:
    """LLaMA-like models have attention dropout only; GPT-2 has its own dropout modules."""
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = p
    decoder, _ = find_decoder(model)
    if decoder.config.model_type == "gpt2":
        for module in decoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = p


def resolve_precision(precision: str = "auto") -> str:
    """ "auto" is "bf16" where the GPU computes in it, "fp16" on older ones (T4), "fp32" on a CPU."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in `folder`, as the first process sees it. A run killed while it saved leaves one
    without its state, which is written last: taken up, it would begin again at step 0 with trained weights."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / TRAINER_STATE_NAME).is_file()]
    newest = max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)
    newest, wrote = gather((newest, newest and len(list(newest.glob("rng_state*.pth")))))[0]
    if newest is None:
        return None
    processes = place()[1]
    if wrote != processes:
        raise ValueError(
            f"{newest} holds the state of {wrote} process(es), but {processes} resume it. Launch {wrote}, or pass "
            "resume=False to begin anew."
        )
    return str(newest)


TRAINING_FILE = "training.json"  # beside the checkpoints: which training they are of


def training_of(model: nn.Module, train_dataset, recipe: Recipe) -> dict:
    """What a training is, for telling whose checkpoints lie in a folder: recipe, data and model. Of the weights it
    looks at the embeddings alone: a new head may be another one each time, and the checkpoint brings its own."""
    decoder = find_decoder(model)[0]
    config, weights = decoder.config, decoder.get_input_embeddings().weight
    name = Path(getattr(config, "_name_or_path", None) or "").name  # folders may move
    shape = {"family": config.model_type, "layers": config.num_hidden_layers, "width": config.hidden_size}
    # Without a name it was made on the spot, and may have other random weights when a killed run is started again.
    start_of = hash_of(weights[:64].detach().float().cpu().tolist()) if name else None
    shape["bits"] = next((bits for bits in (4, 8) if getattr(model, f"is_loaded_in_{bits}bit", False)), None)
    digest = hashlib.sha256()
    for row in train_dataset if hasattr(train_dataset, "__len__") else ():  # a stream is not read twice
        columns = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in row.items()}
        digest.update(f"{sorted(columns.items())}\n".encode("utf-8", "surrogatepass"))
    return {
        "recipe": json.loads(json.dumps(asdict(recipe))),
        "data": digest.hexdigest(),
        "model": {"name": name, **shape, "embeddings": start_of},
    }


def differences(checkpoint: Path, training: dict) -> list[str]:
    """In what `checkpoint` is of another training than `training`, in words; nothing if it can go on from there."""
    note, recipe = checkpoint.parent / TRAINING_FILE, training["recipe"]
    if note.is_file():
        there = json.loads(note.read_text(encoding="utf-8"))
        defaults = json.loads(json.dumps(asdict(Recipe())))  # of fields that are newer than the checkpoint
        pairs = [(f"recipe: {k}", {**defaults, **there["recipe"]}.get(k), v) for k, v in recipe.items()]
        pairs += [(f"model: {k}", there["model"].get(k), v) for k, v in training["model"].items()]
        pairs += [("data", there["data"][:8], training["data"][:8])]
    else:  # earlier versions left no note, but the checkpoint itself tells this much
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        pairs = [("recipe: batch_size", state.get("train_batch_size"), recipe["batch_size"])]
        if recipe["max_steps"] > 0:
            pairs += [("recipe: max_steps", state.get("max_steps"), recipe["max_steps"])]
        else:
            pairs += [("recipe: epochs, rounded up", state.get("num_train_epochs"), math.ceil(recipe["epochs"]))]
        adapter, config = checkpoint / "adapter_config.json", checkpoint / "config.json"
        if adapter.is_file() and recipe["tuning"] == "lora":
            noted = json.loads(adapter.read_text(encoding="utf-8"))
            pairs += [(f"recipe: lora_{k}", noted.get(name), recipe[f"lora_{k}"]) for k, name in LORA_FIELDS]
        elif config.is_file():
            noted = json.loads(config.read_text(encoding="utf-8"))
            rule = with_schedule(noted["zsaa"]) if "zsaa" in noted else {}
            pairs += [(f"recipe: {k}", v, recipe[k]) for k, v in rule.items() if k in RULE]
            pairs += [("model: family", noted.get("model_type"), training["model"]["family"])]
    return [f"{name} {there!r} there, {here!r} here" for name, there, here in pairs if there != here]


def _note(folder: Path, training: dict, keep: bool) -> None:
    """Write down whose checkpoints `folder` will hold. keep=False: the training begins anew, and what others left there
    goes, lest it be taken for this one's."""
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / TRAINING_FILE, training)


def _refuse_another(checkpoint: str | None, training: dict) -> None:
    """ValueError, in all processes, if `checkpoint` is of another training."""
    wrong = gather(differences(Path(checkpoint), training) if checkpoint and place()[0] == 0 else None)[0]
    if wrong:
        raise ValueError(
            f"{checkpoint} is of another training ({'; '.join(wrong)}). Give this one a folder of its own, remove "
            f"{Path(checkpoint).parent}, or pass resume=False, which begins anew."
        )


def check_samples(model: nn.Module, train_dataset) -> None:
    """ValueError for samples that `model` cannot learn from: none at all, no label, one that is no class of a
    classifier, one that is no token of a language model, or none to predict. A stream, read once, is not looked at."""
    if not hasattr(train_dataset, "__len__"):
        return
    if not len(train_dataset):
        raise ValueError("the training set is empty: give one sample or more.")
    named = "label" if "label" in train_dataset[0] else "labels"  # transformers takes both
    if absent := {"input_ids", named} - set(train_dataset[0]):
        raise ValueError(
            f"the training set has no column {min(absent)!r}: samples are input_ids, attention_mask and labels."
        )
    if isinstance(train_dataset, Dataset):
        train_dataset = train_dataset.with_format("numpy", ["input_ids", named])
    for row, sample in enumerate(train_dataset):
        try:
            _check_sample(model, np.asarray(sample["input_ids"]), np.asarray(sample[named]))
        except ValueError as error:
            raise ValueError(f"sample {row} of the training set {error}. Mend or remove it.") from None


def _check_sample(model: nn.Module, ids: np.ndarray, labels: np.ndarray) -> None:
    """ValueError, to be continued from "sample ...", for one sample that `model` cannot learn from."""

    def within(values: np.ndarray, count: int) -> bool:
        return values.dtype.kind in "iu" and bool(values.size) and values.min() >= 0 and values.max() < count

    tokens = find_decoder(model)[0].config.vocab_size
    if not within(ids, tokens):
        raise ValueError(
            f"has the input_ids {_short(ids)}; they must be whole numbers from 0 to {tokens - 1}, 1 or more"
        )
    if hasattr(model, "score"):
        classes, problem = model.config.num_labels, model.config.problem_type
        if (
            classes > 1
            and problem in (None, "single_label_classification")
            and (labels.ndim or not within(labels, classes))
        ):
            raise ValueError(f"has the label {_short(labels)}; it must be a whole number from 0 to {classes - 1}")
    elif labels.shape != ids.shape or not within(labels[labels != -100], tokens):
        raise ValueError(
            f"has the labels {_short(labels)}; they must be whole numbers, one for each token, from 0 to {tokens - 1}, "
            "or -100 where none counts, but not everywhere"
        )


def _short(values: np.ndarray) -> str:
    text = repr(values.tolist())
    return text if len(text) < 80 else f"{text[:80]} ..."


def fine_tune(
    model: nn.Module,
    tokenizer,
    train_dataset,
    recipe: Recipe,
    output_dir: str | Path,
    *,
    resume: bool = True,
    save_steps: int | None = None,
    log_steps: int = 50,
    progress: bool = True,
) -> tuple[nn.Module, dict]:
    """Fine-tune `model` (float32 weights, or quantized ones under LoRA: QLoRA) on `train_dataset` (columns input_ids,
    attention_mask, labels: the class, or for a language model the token ids again; a dropped token is then scored on
    the state in which it left).

    Checkpoints go to output_dir/checkpoints every `save_steps` optimizer steps (None: never); with `resume`, an
    interrupted run continues from the newest one and ends with the same weights as an uninterrupted one. Those of
    another training (recipe, data or model) raise ValueError; resume=False begins anew. The result is
    saved in output_dir/model (see `save`), and returned with alpha = 1 and a log: {"loss": [(step, loss)], "seconds",
    "steps", "alpha_range", "precision", "processes", "sharded"}.

    Of several processes each calls it alike, with a folder that all can see; the first one writes, all return. Under
    FSDP the model returned stays sharded: call it in all processes together, or `load` it from the folder.
    """
    start()
    output_dir = Path(output_dir)
    classifies = hasattr(model, "score")
    plain = recipe.sampling == "alpha"
    if not classifies and not plain:
        raise ValueError(
            f"sampling={recipe.sampling!r} needs a classifier: its passes teach one another about class labels, which "
            f"a {type(model).__name__} has not. Use sampling='alpha' and a score that is not learned, as "
            "Recipe.named('paper') does."
        )
    check_samples(model, train_dataset)
    check_whole("save_steps", save_steps, also={None: "never"})
    check_whole("log_steps", log_steps)
    checkpoints = output_dir / "checkpoints"
    # Before anything is added to the model; the note is needed only where there are checkpoints, or will be.
    noted = save_steps is not None or (resume and checkpoints.is_dir())
    training = training_of(model, train_dataset, recipe) if noted and place()[0] == 0 else None
    latest = last_checkpoint(checkpoints) if resume else None
    _refuse_another(latest, training)
    lengths = None if plain else [len(row["input_ids"]) for row in train_dataset]
    low, high = alpha_range(recipe, model, lengths)
    if getattr(model, "is_quantized", False):
        model = prepare_quantized(model, recipe)
    if recipe.tuning == "lora" and not hasattr(model, "peft_config"):
        model = add_lora(model, recipe)
    _set_dropout(model, recipe.dropout)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.score == LEARNED:
        if salience.scorer_of(model) is None:
            set_seed(recipe.seed)
            salience.attach(model, salience.fresh(model))
        salience.scorer_of(model).requires_grad_(True)
    zsaa.enable(model, alpha=1.0, **_rule(recipe))
    precision = resolve_precision(recipe.precision)
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        learning_rate=recipe.learning_rate,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps,
        seed=recipe.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=True if precision == "tf32" else None,
        use_cpu=not torch.cuda.is_available(),
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        save_strategy="no" if save_steps is None else "steps",
        save_steps=save_steps or 500,
        save_total_limit=1,
        logging_steps=log_steps,
        logging_nan_inf_filter=False,  # see Finite
        disable_tqdm=not progress,
        report_to="none",
        ddp_find_unused_parameters=False,  # at every alpha each weight has its part in the loss
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer splits each batch over all GPUs it sees, in one process
    make = Finite if plain else partial(Passes, recipe=recipe)
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        data_collator=(DataCollatorWithPadding if classifies else DataCollatorForSeq2Seq)(tokenizer),
        callbacks=[AlphaSampler(model, low, high, recipe.seed)] if plain else None,
    )
    # Trainer takes a classifier that accepts keyword arguments for a model that divides its loss by the samples of the
    # whole step, and would multiply loss and gradients by processes and accumulated batches.
    trainer.model_accepts_loss_kwargs &= not classifies
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError("zsaa does not train under DeepSpeed. Shard the model with FSDP instead.")
    if trainer.is_fsdp_enabled and not plain:
        raise NotImplementedError(
            "ladder steps and the learned score are not made for FSDP. Use DDP, or Recipe.named('paper')."
        )
    started = time.perf_counter()
    if save_steps is not None:
        on_first(partial(_note, checkpoints, training, keep=latest is not None))
    try:
        trainer.train(resume_from_checkpoint=latest)
        trainer.check_weights()
    except BaseException as error:
        zsaa.set_alpha(model, 1.0)
        if isinstance(error, DivergedError) and place()[0] == 0:  # not together: the others may not have come here
            shutil.rmtree(checkpoints, ignore_errors=True)  # to go on from there would diverge again
        raise
    seconds = time.perf_counter() - started
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    whole = None
    if trainer.is_fsdp_enabled:
        model, whole = trainer.model_wrapped, trainer.accelerator.get_state_dict(trainer.model_wrapped)
        for tied in getattr(model, "all_tied_weights_keys", None) or ():  # gathered twice, saved once
            whole.pop(tied, None)
    model.eval()
    if not plain:
        zsaa.set_alpha(model, 1.0)
    trained_for(model, (low, high))

    def finish():
        save(trainer.accelerator.unwrap_model(model), tokenizer, output_dir / "model", whole)
        shutil.rmtree(checkpoints, ignore_errors=True)

    on_first(finish)
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    log = {
        "loss": losses,
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "alpha_range": [low, high],
        "precision": precision,
        "processes": place()[1],
        "sharded": trainer.is_fsdp_enabled,
    }
    return model, log


def save(model: nn.Module, tokenizer, folder: str | Path, weights: dict | None = None) -> None:
    """Write model (or adapter), tokenizer and the dial's settings to `folder`, all at once: a crash or a full disk
    leaves what was there before. weights: the state dict, where the model holds only a shard of it. The settings lie in
    the model's config.json; an adapter has none, and gets zsaa.json. A learned score gets a file of its own."""
    folder = Path(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.save_pretrained(draft, state_dict=weights)
        tokenizer.save_pretrained(draft)
        if hasattr(model, "peft_config"):
            (draft / SETTINGS_FILE).write_text(json.dumps(settings(model), indent=2) + "\n")
        for scorer in salience.scorers_of(model):
            salience.save(scorer, draft)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save the model to {folder}: {error.strerror}. Free some space, or choose another folder.",
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: str | Path, **kwargs) -> tuple[nn.Module, object]:
    """A model (or adapter, on its base model) saved by `save`, with its tokenizer and the dial ready at alpha = 1.

    The dial knows the range of alpha that the model was trained for, and warns once when it is turned beyond it.
    Keyword arguments go to `zsaa.models.load_model`.
    """
    from zsaa.models import load_model

    adapter, config = Path(folder) / SETTINGS_FILE, Path(folder) / "config.json"
    saved = json.loads(adapter.read_text()) if adapter.is_file() else None
    if saved is None and config.is_file():
        saved = json.loads(config.read_text()).get("zsaa")
    if saved is None:
        raise FileNotFoundError(
            f"{folder} holds neither {SETTINGS_FILE} (an adapter) nor a config.json with zsaa's settings: it was not "
            "saved with the dial on. Load it with load_model and call zsaa.enable."
        )
    saved = with_schedule(saved)  # before the weights are loaded, which can take minutes
    model, tokenizer = load_model(str(folder), **kwargs)
    for learned in (salience, asked):
        if (Path(folder) / learned.FILE).is_file():
            salience.attach(model, learned.read(find_decoder(model)[0].config, folder))
    zsaa.enable(model, alpha=1.0, **{name: saved[name] for name in RULE})
    trained_for(model, saved["alpha_range"])
    return model, tokenizer


def method_of(sampling: str, otherwise: str) -> str:
    """What a result file calls a method: "zsaa+" where steps are ladders, so that nobody takes it for the paper's, else
    `otherwise`."""
    return "zsaa+" if sampling == "ladder" else otherwise


def describe(recipe: Recipe, model: nn.Module) -> dict:
    """The recipe as a dict for a result file, with the range that alpha was really drawn from (None of a ladder,
    whose draws depend on the lengths; the training's log has it), and the method as `method_of` names it."""
    drawn_from = alpha_range(recipe, model)
    method = method_of(recipe.sampling, recipe.method)
    return {**asdict(recipe), "method": method, "alpha_range": None if drawn_from[0] is None else list(drawn_from)}
