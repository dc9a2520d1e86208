#!/usr/bin/env bash
# The committed page of the explorer is what its sources build to. Needs node and npm (web/package.json says which version);
# without them it says so and passes, for users need neither.
#
# `make web` writes the page; this builds it again from the locked packages, in a folder of its own, and compares byte for byte.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
  echo "check_web: no node and npm here; the page in src/trimtab/ui/web was not compared with its sources"
  exit 0
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r web/package.json web/package-lock.json web/.npmrc web/index.html web/openapi.json web/tsconfig.json web/vite.config.js web/src "$copy"
rm -f "$copy/src/schema.d.ts"
(
  cd "$copy"
  npm ci --silent
  npm run --silent types >/dev/null
  npm run --silent check
  npx --no-install vite build --logLevel error --outDir "$copy/built"
)
if ! diff -rq "$copy/built" src/trimtab/ui/web; then
  echo "check_web: src/trimtab/ui/web is not what web/ builds to. Run make web and commit it." >&2
  exit 1
fi
echo "check_web: src/trimtab/ui/web is what web/ builds to"
