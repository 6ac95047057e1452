#!/usr/bin/env bash
# Build one virtual environment per peer, then the models and request bodies they share.
#   bash setup.sh            everything
#   bash setup.sh mlserver   only the named environments
# Needs a Python of 3.11 or 3.12 with venv (PYTHON=...), wrk and h2load (Debian: wrk, nghttp2-client) and a C compiler. Uses uv where there is one (UV= for plain pip).
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
UV=${UV-$(command -v uv || ls ../../.venv/bin/uv 2>/dev/null || true)}

# The same libraries compute the models everywhere.
MODELS="xgboost-cpu==3.2.0 scikit-learn==1.9.1 onnxruntime==1.31.1"
declare -A WANT=(
  [base]="$MODELS onnx onnxmltools skl2onnx psutil grpcio tritonclient[grpc]"
  [fastapi]="$MODELS fastapi==0.165.0 uvicorn[standard]==0.54.0"
  [mlserver]="${MODELS/-cpu/} mlserver==1.7.1 mlserver-xgboost==1.7.1 uvloop<0.22"
  [bentoml]="$MODELS bentoml==1.4.39"
  [litserve]="$MODELS litserve==0.2.19"
  [ray]="$MODELS ray[serve]==2.60.0"
  [pytriton]="$MODELS nvidia-pytriton==0.7.0"
  [kserve]="$MODELS kserve==0.21.0"
)
for tool in wrk h2load cc; do
  command -v $tool >/dev/null || { echo "$tool is not installed (Debian: apt-get install wrk nghttp2-client gcc)" >&2; exit 1; }
done
for name in ${*:-base fastapi mlserver bentoml litserve ray pytriton kserve}; do
  python=envs/$name/bin/python
  if [ -n "$UV" ]; then
    [ -x $python ] || "$UV" venv -q -p "$PYTHON" "envs/$name"
    "$UV" pip install -q -p $python ${WANT[$name]}
  else
    [ -x $python ] || "$PYTHON" -m venv "envs/$name"
    $python -m pip install -q ${WANT[$name]}
  fi
done
[ -f envs/base/bin/python ] || exit 0
[ envs/paced -nt paced.c ] || cc -O2 -Wall -o envs/paced paced.c -lm
[ -d models/repository ] || { envs/base/bin/python train.py && envs/base/bin/python repository.py; }
[ -d payloads ] || envs/base/bin/python payloads.py
