"""Trainers that turn the dial: before each optimizer step (Eq. 3), or between the passes of a step that teaches itself:
the three of a ladder, the one that has exits."""

from __future__ import annotations

import contextlib
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

import zsaa
from zsaa.families import find_decoder
from zsaa.finetune import exits, losses
from zsaa.finetune.recipe import Recipe
from zsaa.finetune.sampling import crop, draw_alpha, draw_reductions, reduced_to
from zsaa.learned import salience
from zsaa.measure.distributed import gather
from zsaa.rule import LEARNED


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


class FiniteTrainer(Trainer):
    """A Trainer that stops where a loss or a weight is no number, before anything of it is saved. (transformers itself
    leaves such losses out of its log, and goes on.) chunked_loss: of a language head, as `fine_tune` has it."""

    chunked_loss = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with losses.chunked(self.model) if self.chunked_loss else contextlib.nullcontext():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

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


def classifier_head(model: nn.Module) -> nn.Module:
    """A classifier's head, also inside PEFT."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).score


class LadderTrainer(FiniteTrainer):
    """A Trainer of ladder steps: three passes, one after another, for the memory's sake, the first of which teaches the
    others and a learned score; and of exits, which every pass may have. model: the one with the dial."""

    def __init__(self, model: nn.Module, recipe: Recipe, **kwargs):
        super().__init__(model=model, **kwargs)
        self.dialed, self.recipe = model, recipe
        self.scorer = salience.scorer_of(model) if recipe.score == LEARNED else None
        self.share, self.teacher = 1.0, None
        self.lesson: list[tuple[Tensor, Tensor]] = []  # the scorer's weights, and what this step adds to their gradient

    def alphas(self, inputs: dict) -> list[float]:
        """Of the passes over this batch. Draws are per optimizer step, the same in all processes."""
        recipe, lengths = self.recipe, inputs["attention_mask"].sum(dim=1).tolist()
        if recipe.sampling == "exits":
            return [1.0]
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
        wanted = inputs.get("labels")
        inputs = {**inputs, "output_hidden_states": True} if self.recipe.exits else inputs
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        distill, first = self.recipe.distill, self.teacher is None
        if first:
            self.teacher = outputs["logits"].detach().float().softmax(-1)
        elif distill:
            said = outputs["logits"].float().log_softmax(-1)
            loss = (1 - distill) * loss + distill * F.kl_div(said, self.teacher, reduction="batchmean")
        if self.recipe.exits:
            loss = (loss + self._exits(outputs["hidden_states"], inputs["attention_mask"], wanted)) / 2
        loss = self.share * loss
        for weight, gradient in self.lesson:  # zero, with this gradient: it goes where those of the model go
            loss = loss + ((weight - weight.detach()) * gradient).sum()
        return (loss, outputs) if return_outputs else loss

    def _exits(self, states: tuple[Tensor, ...], mask: Tensor, wanted: Tensor) -> Tensor:
        """The loss of the depths that this pass teaches; drawn per optimizer step, the same in all processes."""
        recipe, layers = self.recipe, len(states) - 1
        draw = random.Random(f"zsaa exits {recipe.seed} {self.state.global_step}")
        depths = exits.drawn(recipe.exits, layers, draw)
        said = exits.answers(self.dialed, classifier_head(self.dialed), states, mask, depths)
        return exits.loss(said, wanted, self.teacher, recipe.distill)

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
