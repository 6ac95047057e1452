#!/usr/bin/env bash
# Build one virtual environment per peer, then the models and request bodies they share.
#   bash setup.sh            everything
#   bash setup.sh mlserver   only the named environments
# Needs Python 3.11 with venv (PYTHON=...), wrk and h2load (Debian: wrk, nghttp2-client) and a C compiler. Uses uv where there is one (UV= for plain pip).
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3.11}
UV=${UV-$(command -v uv || ls ../../.venv/bin/uv 2>/dev/null || true)}

declare -A WANT=(
  [base]="numpy scikit-learn xgboost-cpu onnx onnxruntime onnxmltools skl2onnx psutil grpcio tritonclient[grpc]"
  [fastapi]="numpy xgboost-cpu scikit-learn onnxruntime fastapi uvicorn[standard]"
  [mlserver]="mlserver==1.7.1 mlserver-xgboost==1.7.1 uvloop<0.22 onnxruntime"
  [bentoml]="bentoml<1.4.40 xgboost-cpu scikit-learn onnxruntime"
  [litserve]="litserve==0.2.19 xgboost-cpu scikit-learn onnxruntime"
  [ray]="ray[serve]==2.60.0 xgboost-cpu scikit-learn onnxruntime"
  [pytriton]="nvidia-pytriton==0.7.0 xgboost-cpu scikit-learn onnxruntime"
  [kserve]="kserve==0.21.0 xgboost-cpu scikit-learn onnxruntime"
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
