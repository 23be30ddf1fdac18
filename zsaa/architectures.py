"""python -m zsaa.architectures, as result files name it: zsaa.kit.architectures."""

from zsaa.kit.architectures import main

if __name__ == "__main__":
    raise SystemExit(main())
