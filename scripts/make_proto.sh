#!/usr/bin/env bash
# Regenerates services/runtime/generated/ from proto/. Run by `make proto`; a test checks that it is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-services/runtime/generated}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python -m grpc_tools.protoc -I proto --python_out="$tmp" --pyi_out="$tmp" --grpc_python_out="$tmp" proto/world2act/v1/*.proto
mkdir -p "$out"
for f in "$tmp"/world2act/v1/*; do
  # The proto package is world2act.v1, which is not the Python package world2act: keep the code among the services.
  sed -e 's/^from world2act\.v1 import/from services.runtime.generated import/' "$f" > "$out/$(basename "$f")"
done
echo '"""Generated from proto/ by `make proto`. Do not edit."""' > "$out/__init__.py"
