#!/bin/sh
# The prepared GPU run: python -m experiments.gpu_run with the interpreter PYTHON (python3 unless
# given) and, where WHEELS names a folder of wheels, with those unpacked beside it, offline.
#
#   PYTHON=... WHEELS=wheels sh tools/gpu_run.sh --phases smoke,attention --out runs/gpu-run
set -eu
python=${PYTHON:-python3}
wheels=${WHEELS:+$(cd "$WHEELS" && pwd)}
cd "$(dirname "$0")/.."
path=$PWD
if [ -n "$wheels" ]; then
    installed=$(mktemp -d)
    trap 'rm -rf "$installed"' EXIT
    trap 'exit 143' TERM
    "$python" -m pip install --quiet --no-index --no-deps --target "$installed" "$wheels"/*.whl
    path=$path:$installed # before the interpreter's own packages
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m experiments.gpu_run "$@"
