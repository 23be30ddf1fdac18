"""`python -m zsaa.glue`: the name that documentation and scripts call; the code is zsaa.evaluation.glue."""

from zsaa.evaluation.glue import FILES, main, pack, write_predictions
from zsaa.studies.command import exit_code

__all__ = ["FILES", "main", "pack", "write_predictions"]

if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.glue"))
