"""`fine_tune`: a recipe, a model and samples in; the model that learned, and a log, out."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainingArguments, set_seed

import zsaa
from zsaa.dial import captured, trained_for
from zsaa.families import find_decoder
from zsaa.finetune.adapters import add_lora, prepare_quantized, set_dropout
from zsaa.finetune.checkpoints import last_checkpoint, note, refuse_another, training_of
from zsaa.finetune.exits import shallowest
from zsaa.finetune.io import save
from zsaa.finetune.losses import head_of
from zsaa.finetune.questions import AnswerTrainer, collate
from zsaa.finetune.recipe import Recipe
from zsaa.finetune.samples import check_samples
from zsaa.finetune.sampling import alpha_range, rule_of
from zsaa.finetune.trainer import AlphaSampler, DivergedError, FiniteTrainer, LadderTrainer
from zsaa.learned import salience
from zsaa.learned.asked import Scorer
from zsaa.measure.checks import check_whole
from zsaa.measure.distributed import on_first, place, start
from zsaa.rule import ASKED, LEARNED


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
    graphs: bool = False,
    chunked_loss: bool = False,
) -> tuple[nn.Module, dict]:
    """Fine-tune `model` (float32 weights, or quantized ones under LoRA: QLoRA) on `train_dataset` (columns input_ids,
    attention_mask, labels: the class, or for a language model the token ids again; a dropped token is then scored on
    the state in which it left). With a column part, too (`zsaa.finetune.questions.encode`), a language model learns to
    answer: the document in its prompt is shortened, and the answer alone has a loss.

    Checkpoints go to output_dir/checkpoints every `save_steps` optimizer steps (None: never); with `resume`, an
    interrupted run continues from the newest one and ends with the same weights as an uninterrupted one. Those of
    another training (recipe, data or model) raise ValueError; resume=False begins anew. The result is
    saved in output_dir/model (see `save`), and returned with alpha = 1 and a log: {"loss": [(step, loss)], "seconds",
    "steps", "alpha_range", "precision", "processes", "sharded"}. graphs: on a GPU, passes below alpha = 1 as CUDA
    graphs (zsaa/fast/training.py): sooner where launching is most of a step; the log then has "replays", too.
    chunked_loss: of a language model, so that all its logits are never there at once (zsaa/finetune/losses.py); sums
    run in another order.

    Of several processes each calls it alike, with a folder that all can see; the first one writes, all return. Under
    FSDP the model returned stays sharded: call it in all processes together, or `load` it from the folder.
    """
    start()
    _check_request(model, train_dataset, recipe, save_steps, log_steps)
    if chunked_loss:
        _check_chunked(model, train_dataset)
    checkpoints, learned = Path(output_dir) / "checkpoints", Path(output_dir) / "model"
    # Before anything is added to the model; the note is needed only where there are checkpoints, or will be.
    noted = save_steps is not None or (resume and checkpoints.is_dir())
    training = training_of(model, train_dataset, recipe) if noted and place()[0] == 0 else None
    latest = last_checkpoint(checkpoints) if resume else None
    refuse_another(latest, training)
    lengths = [len(row["input_ids"]) for row in train_dataset] if recipe.sampling == "ladder" else None
    drawn_from = alpha_range(recipe, model, lengths)
    model = _with_dial(model, recipe, graphs)
    arguments = _arguments(recipe, checkpoints, save_steps, log_steps, progress)
    arguments.remove_unused_columns = not _answers(train_dataset)
    trainer = _trainer(model, tokenizer, train_dataset, recipe, drawn_from, arguments)
    trainer.chunked_loss = chunked_loss
    started = time.perf_counter()
    if save_steps is not None:
        on_first(partial(note, checkpoints, training, keep=latest is not None))
    _train(trainer, model, latest, checkpoints)
    seconds = time.perf_counter() - started
    replays = {}
    if graphs:
        replays["replays"] = sum(row["replays"] for row in captured(model)["training"])
        zsaa.enable(model, graphs="auto")  # frees them
    model, weights = _learned(trainer, model, recipe)
    layers = find_decoder(model)[0].config.num_hidden_layers
    # A scorer that is asked knows every alpha, though the model was tuned at 1.
    whole = recipe.score == ASKED and recipe.method == "conventional"
    trained_for(model, None if whole else drawn_from, (shallowest(layers), layers) if recipe.exits else None)

    def finish():
        save(trainer.accelerator.unwrap_model(model), tokenizer, learned, weights)
        shutil.rmtree(checkpoints, ignore_errors=True)

    on_first(finish)
    return model, {
        "loss": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "seconds": round(seconds, 1),
        "steps": trainer.state.global_step,
        "alpha_range": list(drawn_from),
        "precision": resolve_precision(recipe.precision),
        "processes": place()[1],
        "sharded": trainer.is_fsdp_enabled,
        **replays,
    }


def resolve_precision(precision: str = "auto") -> str:
    """ "auto" is "bf16" where the GPU computes in it, "fp16" on older ones (T4), "fp32" on a CPU."""
    if precision != "auto":
        return precision
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def _check_request(model: nn.Module, train_dataset, recipe: Recipe, save_steps: int | None, log_steps: int) -> None:
    check_samples(model, train_dataset)
    answers = _answers(train_dataset)
    if not hasattr(model, "score") and (recipe.score == LEARNED or (recipe.sampling != "alpha" and not answers)):
        raise ValueError(
            f"sampling={recipe.sampling!r} with score={recipe.score!r} needs a classifier: its passes teach one "
            f"another about class labels, which a {type(model).__name__} has not. To answer questions, give samples of "
            "zsaa.finetune.questions.encode and Recipe.named('zsaa+', kind='causal-lm'); else Recipe.named('paper')."
        )
    if answers:
        _check_answers(model, recipe)
    check_whole("save_steps", save_steps, also={None: "never"})
    check_whole("log_steps", log_steps)


def _check_chunked(model: nn.Module, train_dataset) -> None:
    if hasattr(model, "score") or _answers(train_dataset):
        raise ValueError(
            "chunked_loss=True is for language models that learn all their tokens: classes are few, and of an answer "
            "to a question few logits are computed anyway. Leave chunked_loss=False."
        )
    head_of(model)


def _answers(train_dataset) -> bool:
    """Are the samples questions about documents?"""
    return hasattr(train_dataset, "__len__") and "part" in train_dataset[0]


def _check_answers(model: nn.Module, recipe: Recipe) -> None:
    if recipe.score == ASKED and not any(isinstance(scorer, Scorer) for scorer in salience.scorers_of(model)):
        raise ValueError(
            "score='asked' needs a scorer that the model has not: teach one first, with zsaa.finetune.teach(model, "
            "tokenizer, samples), or put one on that goes by words, zsaa.asked.by_words(model, tokenizer)."
        )
    wrong = {
        "crops": recipe.crops,
        "exits": recipe.exits,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "processes": place()[1] - 1,
    }
    if name := next((name for name, value in wrong.items() if value), None):
        raise ValueError(
            f"{name} is not for answers to questions: a step reads the prompt, then the answer on its cache, in one "
            "process. Set crops=0 and gradient_checkpointing=False; a smaller batch_size with gradient_accumulation "
            "saves memory."
        )


def _with_dial(model: nn.Module, recipe: Recipe, graphs: bool) -> nn.Module:
    """`model` ready to learn: adapters, dropout, a score to be learned, and the dial at alpha = 1."""
    if getattr(model, "is_quantized", False):
        model = prepare_quantized(model, recipe)
    if recipe.tuning == "lora" and not hasattr(model, "peft_config"):
        model = add_lora(model, recipe)
    set_dropout(model, recipe.dropout)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.score == LEARNED:
        if salience.scorer_of(model) is None:
            set_seed(recipe.seed)
            salience.attach(model, salience.fresh(model))
        salience.scorer_of(model).requires_grad_(True)
    model = zsaa.enable(model, alpha=1.0, graphs=True if graphs else None, **rule_of(recipe))
    if recipe.score == ASKED:  # its scorer was taught on these embeddings, and stands still
        decoder, _ = find_decoder(model)
        decoder.get_input_embeddings().requires_grad_(False)
        decoder.asked.requires_grad_(False)
    return model


def _arguments(
    recipe: Recipe, checkpoints: Path, save_steps: int | None, log_steps: int, progress: bool
) -> TrainingArguments:
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
        logging_nan_inf_filter=False,  # see FiniteTrainer
        disable_tqdm=not progress,
        report_to="none",
        ddp_find_unused_parameters=False,  # at every alpha each weight has its part in the loss
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer splits each batch over all GPUs it sees, in one process
    return arguments


def _trainer(
    model: nn.Module, tokenizer, train_dataset, recipe: Recipe, drawn_from: tuple, arguments: TrainingArguments
) -> FiniteTrainer:
    classifies, ladder = hasattr(model, "score"), recipe.sampling != "alpha"
    if _answers(train_dataset):
        options = {"model": model, "args": arguments, "train_dataset": train_dataset, "data_collator": collate}
        trainer = AnswerTrainer(recipe=recipe, drawn_from=drawn_from, **options)
        trainer.model_accepts_loss_kwargs = False  # the loss is the mean over a batch's answers
        return trainer
    make = partial(LadderTrainer, recipe=recipe) if ladder else FiniteTrainer
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        data_collator=(DataCollatorWithPadding if classifies else DataCollatorForSeq2Seq)(tokenizer),
        callbacks=None if ladder else [AlphaSampler(model, *drawn_from, recipe.seed)],
    )
    # Trainer takes a classifier that accepts keyword arguments for a model that divides its loss by the samples of the
    # whole step, and would multiply loss and gradients by processes and accumulated batches.
    trainer.model_accepts_loss_kwargs &= not classifies
    if trainer.is_deepspeed_enabled:
        raise NotImplementedError("zsaa does not train under DeepSpeed. Shard the model with FSDP instead.")
    if trainer.is_fsdp_enabled and ladder:
        raise NotImplementedError(
            "ladder steps and the learned score are not made for FSDP. Use DDP, or Recipe.named('paper')."
        )
    return trainer


def _train(trainer: FiniteTrainer, model: nn.Module, latest: str | None, checkpoints: Path) -> None:
    """To the end, from the checkpoint `latest` if there is one. Whatever ends it early leaves the dial at 1."""
    try:
        trainer.train(resume_from_checkpoint=latest)
        trainer.check_weights()
    except BaseException as error:
        zsaa.set_alpha(model, 1.0)
        if isinstance(error, DivergedError) and place()[0] == 0:  # not together: the others may not have come here
            shutil.rmtree(checkpoints, ignore_errors=True)  # to go on from there would diverge again
        raise


def _learned(trainer: FiniteTrainer, model: nn.Module, recipe: Recipe) -> tuple[nn.Module, dict | None]:
    """The trained model at alpha = 1, as it is evaluated; and under FSDP, where it is sharded, its whole state dict."""
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_disable()
    weights = None
    if trainer.is_fsdp_enabled:
        model, weights = trainer.model_wrapped, trainer.accelerator.get_state_dict(trainer.model_wrapped)
        for tied in getattr(model, "all_tied_weights_keys", None) or ():  # gathered twice, saved once
            weights.pop(tied, None)
    model.eval()
    if isinstance(trainer, LadderTrainer):  # else AlphaSampler has done so
        zsaa.set_alpha(model, 1.0)
    return model, weights
