#!/usr/bin/env bash
# Remakes requirements.lock from pyproject.toml: exact versions for Python 3.10 and newer on every platform.
# The resolver (uv) lives in a temporary environment. TORCH pins the one package whose build matters.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
TORCH="${TORCH:-2.13.0}"
python="$(tools/setup.sh --find)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$python" -I -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
# Of lm-eval's own needs, typepy refuses python-dateutil 3 and later in all but its oldest releases.
printf '%s\n' "torch==$TORCH" "python-dateutil<3" >"$work/constraints.txt"
SSL_CERT_FILE="${SSL_CERT_FILE:-${PIP_CERT:-}}" "$work/venv/bin/uv" pip compile pyproject.toml --extra dev --extra docs \
    --universal --python-version 3.10 --constraint "$work/constraints.txt" --upgrade \
    --no-annotate --no-header --no-emit-index-url --quiet --output-file "$work/lock.txt"
{
    echo "# Exact versions of everything but torch's own GPU libraries. Made by 'make lock' (tools/lock.sh) from"
    echo "# pyproject.toml with its extras 'dev' and 'docs'; never edited by hand. Markers choose the newest release for each Python."
    echo "# torch's GPU libraries are left out: a CUDA build of torch names the exact ones that it needs, and a CPU"
    echo "# build needs none."
    grep -vE '^(nvidia-|cuda-|triton==)' "$work/lock.txt"
} >requirements.lock.new
mv requirements.lock.new requirements.lock
echo "requirements.lock: $(grep -c '==' requirements.lock) packages, torch $TORCH"
