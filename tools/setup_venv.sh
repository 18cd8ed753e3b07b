#!/usr/bin/env bash
# Create .venv and install lmscale into it, with the versions of constraints.txt. A second call does nothing and is quick.
#
#   PYTHON               the interpreter to use; default python3
#   LMSCALE_TORCH_INDEX  the package index to take torch from, for example https://download.pytorch.org/whl/cpu
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
stamp=$venv/.lmscale-installed

fail() { echo "error: $*" >&2; exit 2; }

wanted=$(cat pyproject.toml constraints.txt tools/setup_venv.sh | sha256sum | cut -d' ' -f1)
if [[ -x $venv/bin/python && -f $stamp && $(cat "$stamp") == "$wanted $PWD" ]]; then
    exit 0
fi

command -v "$python" >/dev/null || fail "$python: not found; install Python 3.11 or later, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || fail "$("$python" --version): Python 3.11 or later is needed; set PYTHON to one"
"$python" -c 'import venv, ensurepip' 2>/dev/null \
    || fail "$python has no venv module; on Debian and Ubuntu: apt-get install python3-venv"

# Where a GPU is present and the machine's own torch is recent enough, keep that build: it fits the driver.
own_torch=no
if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    if "$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8))' 2>/dev/null; then
        own_torch=yes
    fi
fi

pip_install() { # once more on failure: a download may break off
    "$venv/bin/python" -m pip install --disable-pip-version-check --quiet "$@" && return
    echo "pip failed; trying once more" >&2
    "$venv/bin/python" -m pip install --disable-pip-version-check "$@"
}

if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "creating $venv with $("$python" --version)"
    options=()
    [[ $own_torch == yes ]] && options+=(--system-site-packages)
    "$python" -m venv --clear ${options[@]+"${options[@]}"} "$venv"
fi
rm -f "$stamp"

constraints=constraints.txt
if [[ $own_torch == yes ]]; then
    echo "a GPU and its torch are here: using them"
    # numpy too: the machine's torch and its companions were built together with one.
    constraints=$venv/constraints.txt
    grep -vE '^(torch|numpy|setuptools)==' constraints.txt >"$constraints"
elif [[ -n ${LMSCALE_TORCH_INDEX:-} ]]; then
    echo "installing torch from $LMSCALE_TORCH_INDEX"
    pip_install --index-url "$LMSCALE_TORCH_INDEX" -c constraints.txt torch
else
    echo "installing torch (set LMSCALE_TORCH_INDEX=https://download.pytorch.org/whl/cpu for the small CPU-only build)"
    pip_install -c constraints.txt torch
fi
echo "installing lmscale"
pip_install -c "$constraints" -e '.[test,tasks,lint,docs]'
echo "$wanted $PWD" >"$stamp"
