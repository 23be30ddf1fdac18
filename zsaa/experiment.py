"""`python -m zsaa.experiment`: the command that result files name, and what notebooks call; see zsaa.studies."""

from zsaa.measure import write_json
from zsaa.studies.calls import job
from zsaa.studies.command import exit_code, measure
from zsaa.studies.command import run as _run
from zsaa.studies.older import experiment
from zsaa.studies.records import model_record, task_record

__all__ = ["latency", "lengths", "main", "model_record", "run", "run_adapter", "task_record", "write_json"]
OUTPUT = {"output_dir": "outputs/experiments"}


def run(recipe, **given) -> dict:
    """Fine-tune by a Recipe and evaluate: keyword arguments are fields of `Job` and `Accuracy` (zsaa.studies.job)."""
    return measure(job("accuracy", recipe=recipe, **{**OUTPUT, **given}))[0]


def run_adapter(adapter: str, **given) -> dict:
    """Evaluate a committed adapter (a folder of results/adapters) here, without training; otherwise as `run`."""
    return measure(job("accuracy", model=adapter, **{**OUTPUT, **given}))[0]


def latency(**given) -> dict:
    return measure(job("latency", **{**OUTPUT, **given}))[0]


def lengths(**given) -> dict:
    return measure(job("lengths", **{**OUTPUT, **given}))[0]


def main(arguments: list[str] | None = None) -> int:
    return _run(experiment, arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.experiment"))
