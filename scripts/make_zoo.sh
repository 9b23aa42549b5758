#!/usr/bin/env bash
# Rebuilds every shipped weight from nothing and prints the time of each part: experts -> demonstrations -> skills ->
# VAE and world model -> base -> Stage 1. Usage: scripts/make_zoo.sh [OUT] (default: zoo; demonstrations go to data/demos)
# Another simulator: SIMULATOR, TASKS (patterns) and CAMERA_EVERY, as `make libero` does.
# THREADS=1 where something else runs beside it: two threads that wait for a busy core are slower than one.
# A small trial of the same path: BASE_EPISODES=4 WORLDMODEL_EPISODES=4 VALIDATION_EPISODES=4 BASE_FLAGS="--steps 5" \
#   WORLDMODEL_FLAGS="--vae.steps 5 --transformer.steps 5" STAGE1_FLAGS="--steps 20" DEMOS=/tmp/demos scripts/make_zoo.sh /tmp/zoo
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-zoo}
demos=${DEMOS:-data/demos}
python=.venv/bin/python
mkdir -p "$out" "$demos"
begun=$SECONDS
part() { # part NAME COMMAND...
  local name=$1 started=$SECONDS; shift
  echo "== $name"; "$@"; echo "== $name: $((SECONDS - started)) s"
}
collect() {
  "$python" -m services.simulator.collect --simulator "${SIMULATOR:-metaworld}" ${TASKS:+--tasks $TASKS} --camera-every "${CAMERA_EVERY:-1}" \
    --out "$demos" --split "$1" --episodes "$2" --perturbed-share "$3" --workers 2 --resume
}
part "demonstrations of the base" collect base "${BASE_EPISODES:-10}" 0
part "demonstrations of world model and Stage 1" collect worldmodel "${WORLDMODEL_EPISODES:-300}" 0.5
part "held-out demonstrations" collect validation "${VALIDATION_EPISODES:-20}" 0.5
# The base and the world model do not depend on each other.
base() { "$python" -m world2act.behaviour_cloning --demos "$demos" --out "$out/base.safetensors" ${BASE_FLAGS:-} > "$demos/base.log" 2>&1; }
base & base_pid=$!
part "world model" "$python" -m world2act.worldmodel_training --demos "$demos" --out "$out/worldmodel.safetensors" --threads "${THREADS:-2}" ${WORLDMODEL_FLAGS:-}
part "base policy (beside the world model)" wait "$base_pid"
part "Stage 1" "$python" -m world2act.stage1 --demos "$demos" --worldmodel "$out/worldmodel.safetensors" --out "$out/adapters.safetensors" --threads "${THREADS:-2}" ${STAGE1_FLAGS:-}
echo "== all: $((SECONDS - begun)) s"
ls -l "$out"
