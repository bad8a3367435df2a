#!/usr/bin/env bash
# Fetch what a GPU machine without a network lacks for benchmarks/gpu.sh into .gpu-wheels, and see that it is small enough to be
# carried there: with the repository's own files at most MAX_MIB (64). PYTHON_VERSION is that machine's (3.12), on x86-64.
#
# The versions are those of constraints.txt. Without their dependencies, which such a machine is expected to have: numpy, pandas,
# pyarrow (55 MB alone), huggingface_hub, tokenizers, safetensors, httpx, pyyaml, rich, psutil, jinja2, xxhash, fsspec, peft.
# transformers is among them because camopd wants 5.19; the demo's model (93 MB) is not, weights are made at random there.
set -euo pipefail
cd "$(dirname "$0")/.."
names="trl transformers datasets dill multiprocess ijson orjson torchao"
max_mib=${MAX_MIB:-64}
wanted=()
for name in $names; do
  wanted+=("$(grep -m1 "^$name==" constraints.txt)")
done
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do
  platforms+=(--platform "manylinux_${glibc}_x86_64")
done
rm -rf .gpu-wheels
"${PYTHON:-python3}" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 --dest .gpu-wheels "${wanted[@]}"
wheels=$(du --apparent-size -sk .gpu-wheels | cut -f1)
own=$(git ls-files -z | du --files0-from=- --apparent-size -ck 2> /dev/null | tail -1 | cut -f1)
echo ".gpu-wheels: $((wheels / 1024)) MiB of ${#wanted[@]} wheels; with the repository's files $(((wheels + own) / 1024)) MiB"
if [ $(((wheels + own) / 1024)) -ge "$max_mib" ]; then
  echo "that is not below $max_mib MiB, which is what can be carried" >&2
  exit 1
fi
