"""python -m zsaa.audit, as result files name it: zsaa.kit.audit."""

from zsaa.kit.audit import main

if __name__ == "__main__":
    raise SystemExit(main())
