#!/usr/bin/env bash
# Makes the Python environment that everything here runs in, and prints the path of its interpreter on standard
# output (all else goes to standard error). run_all.sh, the Makefile and .ci/run get their Python from here.
#
#   tools/setup.sh           .venv with the versions of requirements.lock and the models and data of assets.lock
#   tools/setup.sh --light   any Python that can read profiles.yaml; installs PyYAML at most
#   tools/setup.sh --find    any Python that is new enough; installs nothing
#   tools/setup.sh --add X   the first, and the packages X besides
#
# ZSAA_PYTHON=/path/to/python: use that environment (conda, a cluster image) instead of .venv. It keeps what it
# has: the ranges of pyproject.toml decide what is missing, and an installed torch is never replaced. Colab is
# treated in the same way. In .venv, too, a torch that is already there is kept (see "torch" in CONTRIBUTING.md).
# Python is always called with -I, as the runner is: what is installed for one user only, or found by PYTHONPATH, does
# not count, and pip installs into the environment itself.
#
# A stamp in the environment, written last, holds a hash of all inputs: a second call takes a moment, and an
# interrupted one is made good by the next. Exit code 3: the set-up failed, and the message says what to do.
set -euo pipefail
lent="${ZSAA_PYTHON:-}"
case "$lent" in
/*) ;;
*/*) lent="$PWD/$lent" ;; # as the caller sees it
esac
root="$(dirname -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")")"
cd -- "$root"
start=$SECONDS
log="$root/.setup.log"

say() { printf '%s\n' "$*" >&2; }
fail() {
    say "set-up failed: $*"
    exit 3
}

new_enough() { "$1" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null; then
        fail "Python 3.10 or newer is needed, python3 is $(python3 -V 2>&1 || true). Install a newer one, or name" \
            "it: ZSAA_PYTHON=/path/to/python"
    fi
    fail "python3 was not found. Install Python 3.10 or newer (Debian and Ubuntu: apt install python3 python3-venv)."
}

# uv installs the same versions in a third of pip's time. It is told pip's own settings, and compiles nothing: Python does
# that with what it imports. Where uv cannot be had or fails, and in environments that are lent, pip does all.
uv_install() {
    local settings
    [ -z "$lent" ] || return 1
    [ -x "$prefix/bin/uv" ] || "$python" -I -m pip install --disable-pip-version-check --no-input --only-binary :all: \
        "$(sed -nE 's/^(uv==[^ ;]*).*/\1/p' requirements.lock)" >>"$log" 2>&1 || return 1
    settings="$("$python" -I -m pip config list 2>>"$log" | "$python" -I -c 'import shlex, sys
names = {"index-url": "UV_DEFAULT_INDEX", "extra-index-url": "UV_INDEX", "find-links": "UV_FIND_LINKS",
         "constraint": "UV_CONSTRAINT", "trusted-host": "UV_INSECURE_HOST", "cert": "SSL_CERT_FILE"}
for line in sorted(sys.stdin, key=lambda line: line.startswith(":env:")):  # the environment has the last word
    key, _, value = line.strip().partition("=")
    if name := names.get(key.rpartition(".")[2]):
        print(f"export {name}=" + shlex.quote(" ".join(value[1:-1].replace("\\n", " ").split())))')" || return 1
    (
        eval "$settings"
        export UV_NO_PROGRESS=1 UV_INDEX_STRATEGY=unsafe-best-match # of several indexes, as pip
        "$prefix/bin/uv" pip install --no-config --python "$python" "$@" 2>&1 | tee -a "$log" |
            awk '/^(Resolved|Prepared|Installed|Building) / { print "    " $0; fflush() }' >&2
    ) || { say "    uv did not install it; pip does" && return 1; }
}

install() { uv_install "$@" || pip_install "$@"; }

# Runs pip with a line per package; on failure finds the cause in its log.
pip_install() {
    local code=0
    PIP_USER=0 "$python" -I -m pip install --disable-pip-version-check --no-input "$@" 2>&1 | tee -a "$log" |
        awk '/^(Collecting|Installing collected)/ { print "    " substr($0, 1, 90); fflush() }' >&2 || code=$?
    [ "$code" = 0 ] && return
    if grep -q "No space left on device" "$log"; then
        fail "the disk is full. Make room (3 GB) and start again."
    elif grep -qE "NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|Network is unreachable|Temporary failure in name resolution" "$log"; then
        fail "pip cannot reach its package index. Check the network or the proxy and start again. Log: $log"
    elif grep -qE "Permission denied|Read-only file system|externally-managed-environment|No module named pip" "$log"; then
        fail "pip cannot install into $prefix. Make an environment of your own (python3 -m venv ~/zsaa-env) and name" \
            "it: ZSAA_PYTHON=~/zsaa-env/bin/python. Log: $log"
    fi
    tail -n 15 "$log" >&2
    fail "pip could not install what is needed (its last lines are above). Log: $log"
}

if [ -z "$lent" ] && [ -n "${COLAB_RELEASE_TAG:-}" ]; then lent=python3; fi
if [ -n "$lent" ]; then
    python="$(command -v "$lent")" || fail "ZSAA_PYTHON=$lent was not found."
    new_enough "$python" || fail "Python 3.10 or newer is needed, ZSAA_PYTHON is $("$python" -V 2>&1)."
    prefix="$("$python" -I -c 'import sys; print(sys.prefix)')"
else
    base="$(find_python)"
    prefix="$root/.venv"
    python="$prefix/bin/python"
fi

case "${1:-}" in
"" | --add) ;;
--find)
    if [ -x "$python" ]; then echo "$python"; else echo "$base"; fi
    exit
    ;;
--light)
    for candidate in "$python" "${base:-$python}"; do
        if "$candidate" -I -c "import yaml" 2>/dev/null; then
            echo "$candidate"
            exit
        fi
    done
    ;;
*) fail "unknown option $1; there are --light, --find and --add." ;;
esac

trap 'say "set-up interrupted; the same command goes on from here."; exit 130' INT TERM

# One set-up at a time. The lock is held by this shell's file descriptor and ends with it.
exec 9<pyproject.toml
"${base:-$python}" -I -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX)" 2>/dev/null ||
    say "set-up: no locks on this file system; run one set-up at a time"

stamp="$prefix/.zsaa-ready"
needed="papermill torch transformers yaml zsaa"
key() { # of the inputs, and of which needed packages are there
    "$python" -I -c 'import hashlib, sys
from importlib.util import find_spec
digest = hashlib.sha256(repr(sys.argv[1:] + [sys.version]).encode())
for name in ("pyproject.toml", "requirements.lock", "assets.lock", "tools/setup.sh"):
    digest.update(open(name, "rb").read())
print(digest.hexdigest(), *(name for name in sys.argv[2:] if not find_spec(name)))' "$root" $needed
}
finish() { # with the packages that --add names
    if [ "${1:-}" = --add ]; then install "${@:2}" && rm -f "$log"; fi
    echo "$python"
    exit
}
if [ -f "$stamp" ] && [ -x "$python" ] && [ "$(cat "$stamp")" = "$(key 2>/dev/null)" ]; then finish "$@"; fi

: 2>/dev/null >"$log" || fail "cannot write to $root. Make it writable, or clone to another place."
if [ -z "$lent" ] && ! "$python" -I -m pip --version >/dev/null 2>&1; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge 3 ] || fail "$free GB are free on the disk of $root; the set-up needs 3."
    say "set-up: making .venv with $("$base" -V) ($base)"
    "$base" -I -m venv --clear .venv >>"$log" 2>&1 || {
        tail -n 5 "$log" >&2
        fail "'$base -m venv' failed. Debian and Ubuntu: apt install python3-venv"
    }
fi

if [ "${1:-}" = --light ]; then
    grep -i '^pyyaml==' requirements.lock >"$prefix/light.txt"
    pip_install -r "$prefix/light.txt"
    echo "$python"
    exit
fi

torch="$("$python" -I -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)"
[ -z "$torch" ] || say "set-up: keeping torch $torch"
if [ -n "$lent" ]; then
    say "set-up: installing what is missing into $prefix"
    printf '%s\n' ${torch:+"torch==$torch"} >"$root/.setup.constraints"
    install -c "$root/.setup.constraints" -e ".[dev]"
    rm -f "$root/.setup.constraints"
else
    say "set-up: installing requirements.lock into .venv (the first time this takes a few minutes)"
    sed "s/^torch==.*/torch==${torch:-$(sed -n 's/^torch==//p' requirements.lock)}/; /^uv==/d" requirements.lock \
        >"$prefix/lock.txt"
    install -r "$prefix/lock.txt"
    install --no-deps -e .
fi
say "set-up: installing models and data (assets.lock)"
install --no-deps -r assets.lock
if command -v nvidia-smi >/dev/null; then # of the extra gpu; torch's CUDA builds bring the rest of it
    say "set-up: installing nvidia-ml-py, which reads the joules that the GPU uses"
    install "$(sed -n 's/.*"\(nvidia-ml-py[^"]*\)".*/\1/p' pyproject.toml)"
fi

"$python" -I -c "import ${needed// /, }" >>"$log" 2>&1 || {
    tail -n 5 "$log" >&2
    [ -z "$lent" ] || fail "$python -I cannot import what was installed. pip may put it elsewhere (PIP_TARGET, PIP_PREFIX," \
        "pip.conf): name another environment with ZSAA_PYTHON. Log: $log"
    fail "the installed packages cannot be imported. Remove .venv and start again. Log: $log"
}
key >"$stamp.new"
mv "$stamp.new" "$stamp"
rm -f "$log"
say "set-up: ready after $((SECONDS - start)) s"
finish "$@"
