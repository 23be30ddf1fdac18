"""Recipes: how a model is fine-tuned. The defaults are the paper's; recipes/ holds it and others as files."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml

from zsaa.measure.checks import check_flag, check_number, check_whole
from zsaa.rule import LEARNED, TAU, check_alpha, check_schedule, check_score, check_tau

FOLDER = Path(__file__).parent / "recipes"
CHOICES = {
    "sampling": ("alpha", "ladder", "exits"),
    "method": ("alpha-sampled", "conventional"),
    "tuning": ("full", "lora"),
    "precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
}
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


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters; the defaults are the paper's (section 4.2). What the paper leaves open, or has not, is marked.
    `Recipe.named` and `Recipe.from_file` have others.

    method: "alpha-sampled" (Eq. 3) or "conventional" (alpha = 1 throughout).
    tuning: "full", or "lora" on all linear layers of the decoder (the head is trained in full; a quantized model needs
        "lora", which is then QLoRA, as in section 4.3).
    alpha_range: (low, high) of the uniform draw; None takes the paper's range for the model family.
    tau, score, schedule: of the dial, as in `zsaa.enable`. The score "salience" is learned on the way, from the
        gradients of the alpha = 1 pass of a ladder step; "asked" is taught before, by `zsaa.finetune.teach`.
    sampling (not the paper's): what an optimizer step sees. "alpha": one alpha (Eq. 3). "ladder": three passes in turn,
        alpha = 1, and two MAC reductions drawn log-uniformly, from 1 to the root of `strongest` and from there to
        `strongest`; alpha is solved for the lengths of each batch. "exits": one pass at alpha = 1. Classifiers; and
        ladders for language models that answer questions, see `fine_tune`.
    exits (not the paper's): depths below all, drawn in each pass of a ladder or of sampling="exits", behind which the
        model is taught to answer, too: half of the loss. At or above their number all of them, from a tenth of the
        layers on: the depth dial's range.
    distill (not the paper's): of the loss of the pruned passes of a ladder step, and of exits, the share that is the
        divergence from what the alpha = 1 pass says behind all layers; the rest is the labels'.
    crops (not the paper's): of the texts of such a step, the share of which it reads a part only, successive tokens,
        half of them or more, another part in each epoch: the same texts are not learned by heart (LoRA, five epochs).
    batch_size: samples a process and pass; a step sees batch_size x gradient_accumulation x processes of them.
    dropout: attention dropout and, for LoRA, adapter dropout.
    precision (open): "auto" (bf16 where the GPU has it, else fp16; fp32 on a CPU), "fp32", "tf32", "bf16" or "fp16".
    group_by_length (open): batches of similar lengths, which saves padding; the order stays random otherwise.

    file: {"name", "sha256", "fields"} of the file that it was made from, None without one. It is no field: two recipes
        with the same fields are equal, wherever they come from.
    """

    method: str = "alpha-sampled"
    tuning: str = "full"
    alpha_range: tuple[float, float] | None = None
    tau: int = TAU
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
    exits: int = 0

    file: ClassVar[dict | None] = None

    @classmethod
    def named(cls, name: str = "paper", kind: str | None = None, **changes) -> Recipe:
        """The recipe recipes/NAME.yaml: "paper" (the defaults), "conventional", "depth", "zsaa+" or "zsaa+-lora",
        which "zsaa+" with tuning="lora" is, too. kind: of the model, as `load_model` has it: for "causal-lm" "zsaa+" is
        "zsaa+-causal-lm", which answers questions about documents. Keyword arguments change single fields. A name that
        ends in .yaml is a path, as in `from_file`."""
        if Path(name).suffix in (".yaml", ".yml"):
            return cls.from_file(name, **changes)
        if name not in RECIPES:
            raise ValueError(
                f"there is no recipe {name!r}. Available: {', '.join(RECIPES)}; or give a file's path, which ends in "
                ".yaml."
            )
        name = f"{name}-{kind}" if f"{name}-{kind}" in RECIPES else name
        if changes.get("tuning") == "lora" and f"{name}-lora" in RECIPES:
            name = f"{name}-lora"
        return cls.from_file(_packaged(name), **changes)

    @classmethod
    def from_file(cls, path: str | Path, **changes) -> Recipe:
        """The recipe in a YAML file, which gives fields and their values; the paper's stand for the rest. Keyword
        arguments change single fields. FileNotFoundError without the file, ValueError for what is no recipe."""
        path = Path(path)
        fields, digest = _read(path)
        try:
            recipe = cls(**fields)
        except (TypeError, ValueError) as error:  # TypeError: of values that are lists or mappings
            raise ValueError(f"{path}: {error}") from None
        object.__setattr__(recipe, "file", {"name": path.name, "sha256": digest, "fields": fields})
        return recipe.changed(**changes)

    def changed(self, **changes) -> Recipe:
        """This recipe with other values of single fields; unlike dataclasses.replace, it remembers the file."""
        recipe = dataclasses.replace(self, **changes)
        object.__setattr__(recipe, "file", self.file)
        return recipe

    def __post_init__(self):
        check_score(self.score), check_schedule(self.schedule)
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        self._check_numbers()
        if self.sampling != "alpha" and (self.method == "conventional" or self.alpha_range is not None):
            draws = "MAC reductions up to `strongest`" if self.sampling == "ladder" else "depths"
            raise ValueError(
                f"sampling={self.sampling!r} draws {draws}: it goes neither with method='conventional' nor with an "
                "alpha_range. Use sampling='alpha' for those."
            )
        if (self.sampling == "exits") > bool(self.exits) or (self.exits and self.sampling == "alpha"):
            raise ValueError(
                f"exits={self.exits} and sampling={self.sampling!r}: depths are taught by sampling='exits', or by "
                "'ladder' for both dials, with exits above 0."
            )
        if self.sampling == "alpha" and self.crops:
            raise ValueError(f"crops={self.crops} is of ladder steps: use sampling='ladder', or crops=0.")
        if (self.sampling == "alpha" and self.distill) or (self.sampling != "ladder" and self.score == LEARNED):
            what = f"distill={self.distill}" if self.distill else f"score={self.score!r}"
            raise ValueError(f"{what} needs the alpha = 1 pass of sampling='ladder', which teaches it.")

    def _check_numbers(self) -> None:
        """And NumPy's scalars become Python's, which can be written to a file."""
        fits = {name: check_number(name, getattr(self, name), interval) for name, interval in NUMBERS.items()}
        fits |= {name: check_whole(name, getattr(self, name)) for name in WHOLE}
        fits |= {name: check_flag(name, getattr(self, name)) for name in FLAGS}
        fits["exits"] = check_whole("exits", self.exits, least=0)
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


def _packaged(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def _read(path: Path) -> tuple[dict, str]:
    """The fields that a recipe file gives, and the SHA-256 (hex) of the file."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe file {path}. Packaged recipes go by name: {', '.join(RECIPES)}.")
    content = path.read_bytes()
    try:
        fields = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}. Write one field a line, as in `epochs: 5.0`.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {fields!r}, not fields of a recipe. Write one a line, as in `epochs: 5.0`.")
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in fields:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            raise ValueError(f"{path}: a recipe has no field {name!r}. {meant}These are known: {', '.join(known)}.")
    return fields, hashlib.sha256(content).hexdigest()


def method_of(sampling: str, otherwise: str) -> str:
    """What a result file calls a method: "zsaa+" where steps are ladders, so that nobody takes it for the paper's,
    "exits" where they teach depths alone, else `otherwise`."""
    return {"ladder": "zsaa+", "exits": "exits"}.get(sampling, otherwise)


# The packaged recipes by name, and the fields that their files give.
RECIPES: dict[str, dict] = {}
RECIPES |= {path.stem: _read(path)[0] for path in sorted(FOLDER.glob("[!.]*.yaml"))}
