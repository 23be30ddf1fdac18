"""`python -m zsaa.run`: one study by the command line; zsaa.studies.command says how."""

from zsaa.studies.command import main, measure
from zsaa.studies.job import Job

__all__ = ["Job", "main", "measure"]

if __name__ == "__main__":
    raise SystemExit(main())
