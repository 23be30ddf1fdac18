#!/usr/bin/env bash
# Runs the notebooks of a profile and writes tables, figures and an index page; see ./run_all.sh --help.
# The first call sets up all that is needed in .venv. All arguments go to zsaa/runner.py (zsaa/kit/runner).
set -euo pipefail
root="$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" # through symbolic links; no cd, which would heed CDPATH

setup=()
for argument in "$@"; do
    case "$argument" in
    -h | --help)
        setup=(--find)
        break
        ;;
    --list | --dry-run) setup=(--light) ;;
    esac
done
python="$("$root/tools/setup.sh" ${setup[@]+"${setup[@]}"})"

# The runner is started by its path, so that --help and --list do not import the package (and torch with it).
# -I: nothing from the caller's PYTHONPATH or user packages.
exec "$python" -I "$root/zsaa/runner.py" "$@"
