#!/usr/bin/env bash
# Runs the tests with the oldest versions that pyproject.toml allows: tools/compat.sh [PYTEST OPTIONS]
# Without options: of `make test`, the files whose subject is what another library does: transformers' classes, generate and
# Trainer, PEFT, datasets, lm-eval, bitsandbytes, hqq, the widget, jsonargparse, pandas, SciPy.
# The throwaway environment has packages of its own, chosen by uv, except for torch, the packaged models and the data:
# those are links into the usual environment (tools/setup.sh). KEEP=/path/to/folder makes the environment there and
# leaves it; a second call with the same folder skips the installation.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
base="$(tools/setup.sh)"
work="${KEEP:-$(mktemp -d)}"
[ -n "${KEEP:-}" ] || trap 'rm -rf "$work"' EXIT
python="$work/venv/bin/python"
export SSL_CERT_FILE="${SSL_CERT_FILE:-${PIP_CERT:-}}" UV_NO_PROGRESS=1
[ -n "$SSL_CERT_FILE" ] || unset SSL_CERT_FILE
[ -z "${PIP_INDEX_URL:-}" ] || export UV_DEFAULT_INDEX="$PIP_INDEX_URL"

if [ ! -e "$work/ready" ]; then
    echo "compat: installing the oldest versions that pyproject.toml allows"
    "$base" -I -m uv venv --quiet --python "$base" "$work/venv"
    "$base" -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' \
        >"$work/constraints.txt"
    # Oldest means oldest with a wheel for this Python: nothing of these is compiled.
    wheels=(--only-binary numpy --only-binary pandas --only-binary matplotlib --only-binary pyyaml)
    "$base" -I -m uv pip compile pyproject.toml --extra dev --resolution lowest-direct --python "$python" \
        "${wheels[@]}" --constraint "$work/constraints.txt" --no-header --no-annotate --quiet \
        --output-file "$work/lowest.txt"
    grep -vE '^(torch|triton|nvidia-|cuda-)' "$work/lowest.txt" >"$work/packages.txt"
    "$base" -I -m uv pip install --quiet --no-deps --python "$python" --requirement "$work/packages.txt"
    "$base" - "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" assets.lock <<'PY'
import re, sys
from importlib.metadata import distributions
from pathlib import Path

target, assets = Path(sys.argv[1]), re.findall(r"(?m)^([\w-]+)==", Path(sys.argv[2]).read_text())
for found in distributions():
    if re.match(r"(torch|triton|nvidia-.*|cuda-.*)$", found.name) or found.name in assets:
        for name in {file.parts[0] for file in found.files if file.parts[0] not in ("..", "__pycache__", "bin")}:
            link = target / name
            if not link.exists():
                link.symlink_to(Path(found.locate_file(name)))
PY
    "$base" -I -m uv pip install --quiet --no-deps --python "$python" --editable .
    touch "$work/ready"
fi
"$python" -c 'import accelerate, datasets, peft, torch, transformers as t
others = (f"{m.__name__} {m.__version__}" for m in (datasets, peft, accelerate, torch))
print("compat: transformers", t.__version__, *others, sep=", ")'
if [ "$#" = 0 ]; then
    set -- -m "not full"
    for subject in dial exactness exempt finetune folders generation harness jobs models own peft public_reports \
        public_reports_code public_reports_training quantization quantized_cache reporting slider stats table2 \
        transformers; do
        set -- "$@" "tests/test_$subject.py"
    done
fi
OMP_NUM_THREADS=1 "$python" -m pytest -q -n "${JOBS:-2}" --dist loadscope "$@"
