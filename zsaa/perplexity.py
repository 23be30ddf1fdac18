"""`python -m zsaa.perplexity`: the command that result files name, and what notebooks call; see zsaa.studies."""

from zsaa.studies.calls import job
from zsaa.studies.command import exit_code, measure
from zsaa.studies.command import run as _run
from zsaa.studies.older import perplexity

__all__ = ["main", "run"]


def run(**given) -> dict:
    """One model on one corpus: keyword arguments are fields of `Job` and `Perplexity` (zsaa.studies.job)."""
    return measure(job("perplexity", **{"output_dir": "outputs/perplexity", **given}))[0]


def main(arguments: list[str] | None = None) -> int:
    return _run(perplexity, arguments)


if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.perplexity"))
