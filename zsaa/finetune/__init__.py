"""Alpha-sampled fine-tuning (paper, section 3.4 and Eq. 3), through Hugging Face's Trainer and PEFT.

    model, log = fine_tune(model, tokenizer, dataset, Recipe.named("paper"), "outputs/mine")
    model, tokenizer = load("outputs/mine/model", kind="sequence-classification")

Each optimizer step draws its own alpha ~ U(low, high), so that the model meets every setting of the dial and none last.
The conventional fine-tuning beside it is the same run with alpha fixed at 1. Recipes are files, in recipes/.

Not in the paper, and off unless a recipe says so: "ladder" steps, which see the whole text, a weak and a strong MAC
reduction, the first teaching the others; a score that is learned on the way (zsaa/learned/salience.py); and a schedule
by which lower layers drop less; "exits", by which one model answers at every depth.

Several GPUs: start the same script with torchrun or `accelerate launch`, one process a GPU (DDP, or FSDP when
accelerate is told so). All processes draw the same alpha.
"""

from zsaa.finetune.adapters import add_lora, prepare_quantized
from zsaa.finetune.checkpoints import TRAINING_FILE, differences, last_checkpoint, training_of
from zsaa.finetune.io import SETTINGS_FILE, load, save
from zsaa.finetune.loop import fine_tune, resolve_precision
from zsaa.finetune.losses import chunked
from zsaa.finetune.recipe import RECIPES, Recipe, method_of
from zsaa.finetune.samples import check_samples
from zsaa.finetune.sampling import (
    ALPHA_RANGE,
    DEEP_ALPHA_RANGE,
    LEAST_ALPHA,
    alpha_range,
    crop,
    describe,
    draw_alpha,
    draw_reductions,
    reduced_to,
    window,
)
from zsaa.finetune.teaching import teach
from zsaa.finetune.trainer import AlphaSampler, DivergedError, FiniteTrainer, LadderTrainer

# What the trainers were called while this was one module.
Finite, Passes = FiniteTrainer, LadderTrainer

__all__ = [
    "ALPHA_RANGE",
    "DEEP_ALPHA_RANGE",
    "LEAST_ALPHA",
    "RECIPES",
    "SETTINGS_FILE",
    "TRAINING_FILE",
    "AlphaSampler",
    "DivergedError",
    "Finite",
    "FiniteTrainer",
    "LadderTrainer",
    "Passes",
    "Recipe",
    "add_lora",
    "alpha_range",
    "check_samples",
    "chunked",
    "crop",
    "describe",
    "differences",
    "draw_alpha",
    "draw_reductions",
    "fine_tune",
    "last_checkpoint",
    "load",
    "method_of",
    "prepare_quantized",
    "reduced_to",
    "resolve_precision",
    "save",
    "teach",
    "training_of",
    "window",
]
