#!/usr/bin/env bash
# What camopd does on a GPU, in one command of ten minutes: benchmarks/gpu.sh [--report FILE] [--only PART ...] [--dry-run]
#
# For a machine with one GPU, a python3 with torch, transformers, accelerate, pandas, pyarrow and pytest, and no network. What
# it lacks, benchmarks/gpu_wheels.sh puts into .gpu-wheels beforehand, elsewhere; installed here into a temporary folder that
# goes before what the machine has. WHEELS names another folder, or none (WHEELS=); PYTHON another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS-.gpu-wheels}
site=
if [ -n "$wheels" ] && compgen -G "$wheels/*.whl" > /dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
export PYTHONPATH="$PWD${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}"
"$python" benchmarks/gpu.py "$@"
