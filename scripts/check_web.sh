#!/usr/bin/env bash
# The committed page of the explorer is what its sources build to. Needs node and npm (web/package.json says which version);
# without them it says so and passes, for users need neither.
#
# `make web` writes the page; this builds it again beside, from the locked packages, and compares byte for byte.
set -euo pipefail
cd "$(dirname "$0")/../web"
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
  echo "check_web: no node and npm here; the page in src/trimtab/ui/web was not compared with its sources"
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
npm ci --silent
npm run --silent types
npm run --silent check
npx --no-install vite build --logLevel error --outDir "$out" --emptyOutDir
if ! diff -rq "$out" ../src/trimtab/ui/web; then
  echo "check_web: src/trimtab/ui/web is not what web/ builds to. Run make web and commit it." >&2
  exit 1
fi
echo "check_web: src/trimtab/ui/web is what web/ builds to"
