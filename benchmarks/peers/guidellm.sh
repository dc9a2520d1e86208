#!/usr/bin/env bash
# guidellm, a load generator of the field, against `trimtab serve`: installs it once, then runs a short sweep.
# Usage: benchmarks/peers/guidellm.sh [options of benchmarks/guidellm_sweep.py]. The environment is .venv-guidellm, or the folder that
# TRIMTAB_GUIDELLM names; it holds torch (for processors, about 200 MB) and datasets, so it is kept apart.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

VENV="${TRIMTAB_GUIDELLM:-.venv-guidellm}"
STAMP="$VENV/.trimtab-guidellm"
# torch first and by its version: whatever asks for it later is content.
WANTED="torch==2.13.0 guidellm==0.8.1 transformers gguf"

test -x "$VENV/bin/python" || { echo "guidellm: creating $VENV"; "${PYTHON:-python3}" -m venv "$VENV"; }
if [ "$(cat "$STAMP" 2>/dev/null)" != "$WANTED" ]; then
    pip() { "$VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
    echo "guidellm: installing $WANTED"
    pip install "${WANTED%% *}"
    # shellcheck disable=SC2086
    pip install ${WANTED#* }
    echo "$WANTED" >"$STAMP"
fi
TRIMTAB_GUIDELLM="$VENV" exec "${BIN:-.venv/bin}/python" benchmarks/guidellm_sweep.py "$@"
