"""`python -m zsaa.mmlu`: the command that result files name, and what notebooks call; see zsaa.studies."""

import sys

from zsaa.finetune import Recipe
from zsaa.studies.command import exit_code, measure
from zsaa.studies.command import run as _run
from zsaa.studies.older import mmlu, questions

__all__ = ["main", "run"]


def run(*, source: str = "auto", train: int = 0, recipe: Recipe | None = None, **given) -> dict:
    """Multiple choice, after `train` questions to learn from: keyword arguments are fields of `Job` and `Choice`
    (zsaa.studies.job)."""
    asked = {"output_dir": "outputs/mmlu", "progress": sys.stderr.isatty(), **given}
    return measure(questions(source, train, recipe or Recipe(tuning="lora"), **asked))[0]


def main(arguments: list[str] | None = None) -> int:
    return exit_code(lambda: _run(mmlu, arguments), "zsaa.mmlu")


if __name__ == "__main__":
    raise SystemExit(main())
