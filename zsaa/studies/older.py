"""The flags of `python -m zsaa.experiment`, `zsaa.perplexity` and `zsaa.mmlu`, which result files name, as jobs."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from zsaa.data import choice
from zsaa.data.corpora import CORPORA
from zsaa.evaluation.controls import CONTROLS
from zsaa.finetune import RECIPES, Recipe
from zsaa.measure.checks import check_number, check_whole
from zsaa.measure.distributed import place
from zsaa.rule import PLAIN
from zsaa.studies.calls import job
from zsaa.studies.job import Choice, Job, Perplexity


def experiment(arguments: Sequence[str]) -> Job:
    """What `python -m zsaa.experiment` with these arguments asks for: the objective accuracy, latency or lengths."""
    parser = argparse.ArgumentParser(
        prog="python -m zsaa.experiment", description="The older command of zsaa.run's accuracy, latency and lengths."
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="imdb")
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, or a folder in the hub's layout")
    parser.add_argument("--train", type=int, help="number of training samples (default: all)")
    parser.add_argument("--test", type=int, help="number of held-out samples (default: all)")
    parser.add_argument("--targets", nargs="+", type=float, help="MAC reductions (default: the paper's speed-ups)")
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS, help="curves to evaluate")
    parser.add_argument("--seeds", nargs="+", type=int, help="one experiment, and one result file, for each seed")
    parser.add_argument("--adapter", help="no training: evaluate a committed adapter, a folder of results/adapters")
    parser.add_argument("--latency-only", action="store_true", help="no training: only time the dial")
    parser.add_argument("--latency-batches", type=int, nargs="+", default=[1, 8, 32], help="for --latency-only")
    parser.add_argument("--latency-repeats", type=int, default=15, help="0 leaves latency out, as torchrun does")
    parser.add_argument("--settings-of", help="for --latency-only: time the settings of this result file again, with "
                        "random weights and tokens")  # fmt: skip
    parser.add_argument("--lengths-only", action="store_true", help="no training: what the lengths say (Figure 2 B, C)")
    parser.add_argument("--shape", choices=["gpt2"], help="for --lengths-only: count GPT-2's layers, not the model's")
    parser.add_argument("--eval-batch-size", type=int, help="default: 8, on a GPU 64")
    parser.add_argument("--save-steps", type=int, default=500, help="steps between checkpoints; 0 leaves them out")
    _add_shared(parser, "outputs/experiments")
    add_recipe(parser)
    chosen, recipe, asked = _parsed(parser, arguments, "zsaa.experiment")
    asked |= _of(chosen, "task", "test")
    dial = {"tau": recipe.tau, "schedule": recipe.schedule, "max_length": recipe.max_length}
    if chosen.lengths_only:
        return job("lengths", **asked, **dial, shape=chosen.shape)
    if chosen.latency_only:
        again = {"batches": chosen.latency_batches, "repeats": chosen.latency_repeats}
        return job("latency", **asked, **dial, **again, settings_of=chosen.settings_of)
    asked |= _of(chosen, "controls", "eval_batch_size", "latency_repeats", "progress")
    if chosen.adapter:
        return job("accuracy", **{**asked, "model": chosen.adapter})
    seeds = chosen.seeds or [recipe.seed]
    suffix = f"-seed{seeds[0]}" if chosen.name and chosen.seeds else ""  # of several, each has its own
    asked |= {"train": chosen.train, "save_steps": chosen.save_steps or None, "seeds": tuple(seeds), "suffix": suffix}
    return job("accuracy", **asked, recipe=recipe)


def perplexity(arguments: Sequence[str]) -> Job:
    """What `python -m zsaa.perplexity` with these arguments asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m zsaa.perplexity", description="The older command of zsaa.run's perplexity."
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--corpus", default="wikitext-103", choices=CORPORA)
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, or a folder in the hub's layout")
    parser.add_argument("--protocol", default="prefix", choices=("prefix", "last-word", "carry-through"))
    parser.add_argument("--prefix", type=int, default=Perplexity.prefix, help="tokens that are pruned")
    parser.add_argument("--continuation", type=int, default=Perplexity.continuation, help="tokens that are scored")
    parser.add_argument("--stride", type=int, help="tokens from window to window (default: prefix + continuation)")
    parser.add_argument("--windows", dest="count", type=int, help="number of windows at most (default: all)")
    parser.add_argument("--targets", type=float, nargs="+", help="MAC reductions (default: 1 2 3)")
    parser.add_argument("--scores", nargs="+", default=list(Perplexity.scores), choices=PLAIN)
    parser.add_argument("--controls", nargs="+", default=list(CONTROLS), choices=CONTROLS)
    parser.add_argument("--fine-tune", action="store_true", help="first, by the recipe below")
    parser.add_argument("--train", type=int, default=2000, help="rows of the train split, for --fine-tune")
    parser.add_argument("--eval-batch-size", type=int, default=Perplexity.batch_size)
    parser.add_argument("--eval-precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--latency-repeats", type=int, default=15, help="0 leaves the clock out")
    _add_shared(parser, "outputs/perplexity")
    add_recipe(parser)
    chosen, recipe, asked = _parsed(parser, arguments, "zsaa.perplexity")
    asked |= _of(chosen, "corpus", "protocol", "prefix", "continuation", "stride", "count", "scores", "controls")
    asked |= _of(chosen, "eval_batch_size", "eval_precision", "latency_repeats", "progress")
    asked |= {name: getattr(chosen, name) for name in ("tau", "schedule") if hasattr(chosen, name)}
    if chosen.fine_tune:
        asked |= {"recipe": recipe, "train": chosen.train}
    return job("perplexity", **asked, seed=recipe.seed)


def mmlu(arguments: Sequence[str]) -> Job:
    """What `python -m zsaa.mmlu` with these arguments asks for."""
    parser = argparse.ArgumentParser(prog="python -m zsaa.mmlu", description="The older command of zsaa.run's choice.")
    parser.add_argument("--model", default="smollm2-135m", help="a packaged model, a hub id, a folder, or an adapter")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--source", default="auto", help="auto, packaged, hub, a folder, or reviews (a substitute)")
    parser.add_argument("--form", choices=("letters", "text"), default="letters")
    parser.add_argument("--shots", type=int, default=Choice.shots)
    parser.add_argument("--subjects", "--tasks", nargs="+", help="default: all")
    parser.add_argument("--limit", type=int, help="questions per subject (default: all; of reviews 500)")
    parser.add_argument("--targets", nargs="+", type=float, help="MAC reductions (default: Table 3's)")
    parser.add_argument("--controls", nargs="+", choices=Choice.KNOWN, default=list(Choice.controls))
    parser.add_argument("--train", type=int, default=0, help="questions to fine-tune on first")
    parser.add_argument("--method", default="alpha-sampled", choices=("alpha-sampled", "conventional"))
    parser.add_argument("--epochs", type=float, default=Recipe.epochs)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate)
    parser.add_argument("--train-batch-size", type=int, default=Recipe.batch_size)
    parser.add_argument("--gradient-accumulation", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--max-length", type=int, default=Recipe.max_length, help="tokens of a training question")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run and one result file each")
    parser.add_argument("--words", type=int, default=choice.WORDS, help="length of the substitute's passages")
    parser.add_argument("--batch-size", type=int, default=Choice.batch_size)
    _add_shared(parser, "outputs/mmlu")
    chosen = parser.parse_args(arguments)
    fields = ("method", "epochs", "max_steps", "learning_rate", "gradient_accumulation", "gradient_checkpointing")
    recipe = {**_of(chosen, *fields, "max_length"), "tuning": "lora", "batch_size": chosen.train_batch_size}
    asked = _of(chosen, "quantization", "form", "shots", "subjects", "limit", "controls", "words", "batch_size")
    asked |= _shared(chosen, parser, arguments, "zsaa.mmlu")
    asked |= {"seeds": tuple(chosen.seeds), "progress": chosen.progress and sys.stderr.isatty()}
    return questions(asked.pop("source"), chosen.train, Recipe(**recipe), **asked)


def questions(source: str, train: int, recipe: Recipe, **asked) -> Job:
    """A job of multiple choice, whose substitute was a source once, and no training a number of questions, 0."""
    check_whole("train", train, least=0)
    data = {"data": "reviews", "source": "auto"} if source == "reviews" else {"data": "mmlu", "source": source}
    learns = {"train": train, "recipe": recipe} if train else {}
    return job("choice", **{"seeds": (recipe.seed,), **asked, **data, **learns})


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """An option for each field of a Recipe, and --recipe, whose fields they change."""
    named = f"{', '.join(RECIPES)}: the fields that the options below change"
    parser.add_argument("--recipe", default="paper", metavar="NAME", help=named)
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS)
        elif field.name == "alpha_range":
            parser.add_argument(flag, type=float, nargs=2, metavar=("LOW", "HIGH"), default=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, type=type(field.default), default=argparse.SUPPRESS)


def recipe_of(chosen: argparse.Namespace, parser: argparse.ArgumentParser) -> Recipe:
    """The Recipe in parsed arguments; one that there cannot be ends the program, as other wrong arguments do."""
    given = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(Recipe) if hasattr(chosen, f.name)}
    try:
        return Recipe.named(chosen.recipe, **given)
    except (TypeError, ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def command_of(module: str, arguments: Sequence[str]) -> str:
    """The command line for a result file."""
    given = list(arguments)
    if "--output-dir" in given:  # a path of one machine, and no part of how
        found = given.index("--output-dir")
        del given[found : found + 2]
    launcher = "python" if place()[1] == 1 else f"torchrun --nproc-per-node {place()[1]}"
    return " ".join([f"{launcher} -m {module}", *given])


def _add_shared(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("--output-dir", default=output)
    parser.add_argument("--name")
    parser.add_argument("--no-progress", dest="progress", action="store_false")


def _shared(chosen: argparse.Namespace, parser: argparse.ArgumentParser, arguments, module: str) -> dict:
    """What the jobs of all three commands have."""
    asked = {**_of(chosen, "model", "source", "output_dir", "name"), "command": command_of(module, arguments)}
    if chosen.targets:
        try:
            asked["targets"] = tuple(check_number("--targets", target, "[1, inf)") for target in chosen.targets)
        except ValueError as error:
            parser.error(str(error))
    return asked


def _parsed(parser: argparse.ArgumentParser, arguments, module: str) -> tuple[argparse.Namespace, Recipe, dict]:
    chosen = parser.parse_args(arguments)
    return chosen, recipe_of(chosen, parser), _shared(chosen, parser, arguments, module)


def _of(chosen: argparse.Namespace, *names: str) -> dict:
    return {name: getattr(chosen, name) for name in names}
