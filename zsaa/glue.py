"""`python -m zsaa.glue`: the name that documentation and scripts call; the code is zsaa.evaluation.glue."""

from zsaa.evaluation.glue import main

if __name__ == "__main__":
    raise SystemExit(main())
