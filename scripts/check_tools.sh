#!/usr/bin/env bash
# Checks what `make setup` needs before it starts, with one sentence for whatever is missing.
set -euo pipefail
python="${PYTHON:-python3}"

fail() { echo "setup: $1" >&2; exit 1; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "Python 3.11 or newer is needed ('$python' is $("$python" --version 2>&1 || true)). Install it, then: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "Python's venv module is missing. Debian and Ubuntu: apt-get install python3-venv"
command -v "${CXX:-c++}" >/dev/null ||
    fail "A C++17 compiler is needed and '${CXX:-c++}' was not found. Debian and Ubuntu: apt-get install g++"
command -v cmake >/dev/null ||
    fail "CMake 3.18 or newer is needed and was not found. Debian and Ubuntu: apt-get install cmake"
version="$(cmake --version | sed -n '1s/[^0-9]*\([0-9.]*\).*/\1/p')"
[ "$(printf '%s\n' 3.18 "$version" | sort -V | head -n 1)" = 3.18 ] ||
    fail "CMake 3.18 or newer is needed and version $version was found. Install a newer one, for example: pip install cmake"
