from zsaa.depth.study import main
from zsaa.studies.command import exit_code

if __name__ == "__main__":
    raise SystemExit(exit_code(main, "zsaa.depth"))
