#!/usr/bin/env bash
# Install the peers of benchmarks/decode.py into .venv-peers: llama.cpp compiled for this processor, and OpenVINO GenAI.
# Usage: benchmarks/peers/setup.sh. The first run compiles for about 10 minutes on 2 cores; a second run does nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV=.venv-peers
STAMP="$VENV/.trimtab-peers"
# In the order that pip gets them. OpenVINO GenAI agrees with the numpy of gguf, so that one environment serves both.
WANTED="llama-cpp-python==0.3.36 gguf==0.19.0 openvino-genai==2026.4.1.0 numpy"
# llama.cpp's defaults for a build on the machine that runs it, without the parts that the library does not need.
FLAGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON \
-DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
-DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF"

if [ "$(cat "$STAMP" 2>/dev/null)" = "$WANTED $FLAGS" ]; then
    exit 0
fi
test -x "$VENV/bin/python" || { echo "peers: creating $VENV"; "${PYTHON:-python3}" -m venv "$VENV"; }
pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
echo "peers: gguf, numpy, OpenVINO GenAI"
# shellcheck disable=SC2086
pip install ${WANTED#* }
echo "peers: compiling llama.cpp for this processor (about 10 minutes on 2 cores)"
CMAKE_ARGS="$FLAGS" CMAKE_BUILD_PARALLEL_LEVEL="${JOBS:-$(nproc)}" \
    pip install --no-cache-dir --no-binary llama-cpp-python "${WANTED%% *}"
echo "$WANTED $FLAGS" >"$STAMP"
echo "peers: done"
