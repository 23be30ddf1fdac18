"""`python -m zsaa.bench`."""

from zsaa.bench.command import main

if __name__ == "__main__":
    raise SystemExit(main())
