#!/usr/bin/env bash
# Build one virtual environment per peer, under envs/.
#   bash setup.sh            everything that is missing
#   bash setup.sh litellm    only the named environments
# Needs Python 3.11 or newer with venv (PYTHON=...). Uses uv where there is one (UV= for plain pip). Fairlead and the load generator run
# in the project's .venv, or where FAIRLEAD_PYTHON points.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
UV=${UV-$(command -v uv || ls ../../.venv/bin/uv 2>/dev/null || true)}

declare -A WANT=(
  [litellm]="litellm[proxy]==1.106.2 httptools"  # with httptools uvicorn parses faster than as LiteLLM installs it
)
mkdir -p envs
for name in ${*:-litellm}; do
  python=envs/$name/bin/python
  [ -f "envs/$name/.installed" ] && continue
  if [ -n "$UV" ]; then
    [ -x $python ] || "$UV" venv -q -p "$PYTHON" "envs/$name"
    "$UV" pip install -q -p $python --compile-bytecode ${WANT[$name]}
  else
    [ -x $python ] || "$PYTHON" -m venv "envs/$name"
    $python -m pip install -q ${WANT[$name]}
  fi
  touch "envs/$name/.installed"
done
