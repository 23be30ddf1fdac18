"""A job: what is measured, of which model, on which data, trained how, and where the result goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from zsaa.data import choice
from zsaa.evaluation.controls import CONTROLS, TARGETS
from zsaa.finetune import Recipe
from zsaa.kit import paper
from zsaa.measure.checks import check_number, check_whole
from zsaa.rule import PLAIN, TAU, check_schedule, check_tau

Control = Literal["alpha", "first", "last", "ends", "random"]
Schedule = Literal["geometric", "rising", "entry"]
# For Figure 2 B and C, which cost no forward pass.
FINE_TARGETS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9, 10, 11)


class Settings:
    """How an objective measures. All have `targets`, the MAC reductions; `WHOLE` says of which fields a whole number is
    expected: the least one, and what None means, where it means something."""

    WHOLE: ClassVar[dict[str, tuple[int, str | None]]] = {}
    KNOWN: ClassVar = CONTROLS

    def __post_init__(self):
        reductions = [check_number("a target, which is a MAC reduction,", t, "[1, inf)") for t in self.targets]
        object.__setattr__(self, "targets", tuple(int(t) if t == int(t) else t for t in reductions))
        for name, (least, none) in self.WHOLE.items():
            check_whole(name, getattr(self, name), least, also={None: none} if none else None)
        for name, check in (("tau", check_tau), ("schedule", check_schedule)):
            if getattr(self, name, None) is not None:
                check(getattr(self, name))
        for name, known in (("control", self.KNOWN), ("score", PLAIN)):
            given = tuple(getattr(self, f"{name}s", ()))
            if unknown := [value for value in given if value not in known]:
                raise ValueError(f"unknown {name} {unknown[0]!r}; these are known: {', '.join(known)}")
            if given:
                object.__setattr__(self, f"{name}s", given)


@dataclass(frozen=True)
class Accuracy(Settings):
    """Accuracy (or F1) of a classifier along the dial, beside its controls (Table 1).

    Args:
        targets: MAC reductions.
        controls: which curves to evaluate.
        max_length: tokens of a sample; null takes those of the training.
        batch_size: samples of a batch; null takes 8, on a GPU 64.
        latency_batch: samples of the batch that is timed.
        latency_repeats: timed rounds; 0 leaves the clock out, as several processes do.
    """

    WHOLE: ClassVar = {"max_length": (1, "that of the training"), "batch_size": (1, "8, on a GPU 64"),
             "latency_batch": (1, None), "latency_repeats": (0, None)}  # fmt: skip

    targets: tuple[float, ...] = TARGETS
    controls: tuple[Control, ...] = CONTROLS
    max_length: int | None = None
    batch_size: int | None = None
    latency_batch: int = 8
    latency_repeats: int = 15


@dataclass(frozen=True)
class Perplexity(Settings):
    """Perplexity of a language model along the dial (Table 2); `zsaa.evaluation.language` defines the protocols.

    Args:
        targets: MAC reductions.
        controls: which curves to evaluate.
        scores: of the dial's curve, one each.
        protocol: how a pruned model is scored; of last words, prefix means last-word.
        prefix: tokens of a window that are pruned.
        continuation: tokens of a window that are scored.
        stride: tokens from window to window; null takes prefix + continuation.
        tau: least number of tokens that a layer keeps; null takes the recipe's, or what the model was saved with.
        schedule: likewise.
        batch_size: windows of a batch.
        precision: of the evaluation.
        latency_repeats: timed rounds; 0 leaves the clock out.
    """

    WHOLE: ClassVar = {"batch_size": (1, None), "latency_repeats": (0, None)}

    targets: tuple[float, ...] = (1, 2, 3)
    controls: tuple[Control, ...] = CONTROLS
    scores: tuple[Literal["column_sum", "column_mean", "random"], ...] = ("column_sum", "column_mean")
    protocol: Literal["prefix", "last-word", "carry-through"] = "prefix"
    prefix: int = 224
    continuation: int = 32
    stride: int | None = None
    tau: int | None = None
    schedule: Schedule | None = None
    batch_size: int = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    latency_repeats: int = 15


@dataclass(frozen=True)
class Choice(Settings):
    """The score of a multiple-choice test along the dial (Table 3).

    Args:
        targets: MAC reductions.
        controls: which curves to evaluate; printed takes the alphas that the paper prints, whatever they give.
        quantization: of the weights.
        form: lm-eval's two, the likelihood of A to D, or of the answers' own words.
        shots: solved questions before each one.
        subjects: which ones; null takes all.
        words: length of the passages of the substitute, reviews.
        batch_size: questions of a batch.
    """

    WHOLE: ClassVar = {"batch_size": (1, None), "words": (1, None)}
    KNOWN: ClassVar = ("printed", *CONTROLS)

    targets: tuple[float, ...] = tuple(paper.TABLE_3["LLaMA-3-8B-4bit"])
    controls: tuple[Literal["alpha", "printed", "first", "last", "ends", "random"], ...] = (
        *("alpha", "printed", "last", "random"),
    )
    quantization: Literal["nf4", "int8"] | None = None
    form: Literal["letters", "text"] = "letters"
    shots: int = 5
    subjects: tuple[str, ...] | None = None
    words: int = choice.WORDS
    batch_size: int = 8


@dataclass(frozen=True)
class Latency(Settings):
    """The clock of a classifier along the dial and of cut inputs; time does not depend on the weights.

    Args:
        targets: MAC reductions.
        batches: samples of each batch that is timed.
        repeats: timed rounds.
        max_length: tokens of a sample.
        tau: least number of tokens that a layer keeps.
        schedule: how drops are spread over the layers.
        settings_of: a result file of this objective, timed again on random tokens and weights of the same shapes.
    """

    WHOLE: ClassVar = {"repeats": (1, None), "max_length": (1, None)}

    targets: tuple[float, ...] = TARGETS
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 15
    max_length: int = 512
    tau: int = TAU
    schedule: Schedule = "geometric"
    settings_of: str | None = None

    def __post_init__(self):
        super().__post_init__()
        for batch in self.batches:
            check_whole("a batch to time", batch)


@dataclass(frozen=True)
class Lengths(Settings):
    """What the lengths of a data set's samples say alone (Figure 2 B and C): nothing is run.

    Args:
        targets: MAC reductions.
        max_length: tokens of a sample.
        tau: least number of tokens that a layer keeps.
        schedule: how drops are spread over the layers.
        shape: gpt2 counts GPT-2's 12 layers, the paper's; null the model's own.
    """

    WHOLE: ClassVar = {"max_length": (1, None)}

    targets: tuple[float, ...] = FINE_TARGETS
    max_length: int = 512
    tau: int = TAU
    schedule: Schedule = "geometric"
    shape: Literal["gpt2"] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.shape not in (None, "gpt2"):
            raise ValueError(f"shape must be 'gpt2' or None (the model's own), got {self.shape!r}.")


@dataclass(frozen=True)
class Answers(Settings):
    """Answers to questions about documents along the dial, beside its rivals, on rows of your own.

    Args:
        targets: MAC reductions.
        controls: which curves to evaluate; bm25 and last cut the document to as much.
        held_out: share of the documents that is tested on.
        scorer_steps: of teaching the scorer, before a recipe's training.
        chunk: tokens that stay or leave together, of a scorer that is taught.
        new_tokens: of an answer at most.
        batch_size: questions of a batch; null takes 8, on a GPU 64.
    """

    WHOLE: ClassVar = {"scorer_steps": (1, None), "chunk": (1, None), "new_tokens": (1, None),
             "batch_size": (1, "8, on a GPU 64")}  # fmt: skip
    KNOWN: ClassVar = ("alpha", "bm25", "last")

    targets: tuple[float, ...] = (1, 2, 3, 5)
    controls: tuple[Literal["alpha", "bm25", "last"], ...] = ("alpha", "bm25", "last")
    held_out: float = 0.2
    scorer_steps: int = 1000
    chunk: int = 16
    new_tokens: int = 32
    batch_size: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_number("held_out", self.held_out, "(0, 1)")


SETTINGS = {
    "accuracy": Accuracy,
    "perplexity": Perplexity,
    "choice": Choice,
    "latency": Latency,
    "lengths": Lengths,
    "answers": Answers,
}
DATA = {"perplexity": "wikitext-103", "choice": "mmlu", "answers": "questions.jsonl"}  # of the others IMDB


@dataclass(frozen=True)
class Job:
    """One study, with a result file for each seed.

    Args:
        objective: what is measured.
        model: a packaged model, a hub id or a folder; of accuracy without a recipe, an adapter of results/adapters.
        data: a task, a corpus, mmlu (reviews is its substitute), or of answers a file of rows, squad or hotpotqa;
            null takes the objective's of the paper.
        source: auto, packaged, hub, or a folder in the hub's layout.
        train: training samples; null takes all.
        test: held-out samples, windows, or questions per subject at most; null takes all.
        recipe: how the model is trained first; None leaves it as it is.
        seeds: of training and draws; one result file each.
        settings: of the objective; None takes its defaults.
        output: folder; the result file is output/results/NAME.json.
        name: of the result file; null makes one.
        suffix: of the name, given or made.
        save_steps: steps between checkpoints of the training; null makes none.
        progress: whether to show bars.
        command: how the job was asked for, for the result file.
    """

    objective: Literal["accuracy", "perplexity", "choice", "latency", "lengths", "answers"] = "accuracy"
    model: str = "smollm2-135m"
    data: str | None = None
    source: str = "auto"
    train: int | None = None
    test: int | None = None
    recipe: Recipe | None = None
    seeds: tuple[int, ...] = (0,)
    settings: Settings | None = None
    output: str | Path = "outputs/run"
    name: str | None = None
    suffix: str = ""
    save_steps: int | None = 500
    progress: bool = True
    command: str | None = None

    def __post_init__(self):
        if self.objective not in SETTINGS:
            raise ValueError(f"objective must be one of {', '.join(SETTINGS)}, got {self.objective!r}.")
        own = SETTINGS[self.objective]
        settings = own() if self.settings is None else self.settings
        if not isinstance(settings, own):
            raise ValueError(
                f"settings of the objective {self.objective!r} must be {own.__name__}, got {type(settings).__name__}."
            )
        object.__setattr__(self, "settings", settings)
        if self.data is None:
            object.__setattr__(self, "data", DATA.get(self.objective, "imdb"))
        for name, none in (("train", "all"), ("test", "all"), ("save_steps", "never")):
            check_whole(name, getattr(self, name), also={None: none})
        if not self.seeds:
            raise ValueError("seeds is empty: give one or more, (0,) for example.")
        for seed in self.seeds:
            check_whole("a seed", seed, least=0, most=2**32 - 1)
        if self.recipe is not None and self.objective in ("latency", "lengths"):
            raise ValueError(f"recipe must be None, as the objective {self.objective!r} trains nothing: leave it out.")

    @property
    def seed(self) -> int:
        """Of a job with one seed, as `each` gives them."""
        return self.seeds[0]

    def named(self, otherwise: str) -> str:
        """The name of the result file: the one that was given, or `otherwise`, and the suffix."""
        name = self.name or otherwise
        return name if name.endswith(self.suffix) else name + self.suffix

    def each(self) -> Iterator[Job]:
        """A job for each seed: the recipe has it, and where there are several, the name says it."""
        for seed in self.seeds:
            recipe = None if self.recipe is None else self.recipe.changed(seed=seed)
            suffix = f"-seed{seed}" if len(self.seeds) > 1 else self.suffix
            yield replace(self, recipe=recipe, seeds=(seed,), suffix=suffix)
