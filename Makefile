# World2Act. `make demo` and `make test` do all their own set-up.
.PHONY: help demo test containers setup lint bench zoo libero skills experiments proto clean
SHELL := /bin/bash
RUN := .venv/bin/

help:
	@echo "make demo   the main job, live: segment, imagine, roll out, post-train, evaluate; writes report.html"
	@echo "make test   every test: lint, types, unit, conformance, integration with the real processes"
	@echo "make containers  build the images, bring all up in them, break each part (needs a Docker Engine: scripts/engine.sh)"
	@echo "make bench  every rate, one table"
	@echo "make zoo    rebuild every shipped weight from nothing (about 90 minutes on 2 cores)"
	@echo "make libero  weights for libero_object from nothing, then the main job on it (hours; W2A_LIBERO_ASSETS names the meshes)"
	@echo "make skills  skill data sets of Meta-World and LIBERO from our experts, scored, and docs/skills.md (hours; resumable)"
	@echo "make experiments  every experiment at its full size (days on 2 cores; resumable), and docs/results.md"
	@echo "make proto  regenerate the protobuf code"

demo:
	@scripts/setup.sh all
	@$(RUN)world2act demo $(DEMO)

test: lint
	@W2A_CONTAINER_TESTS=$${W2A_CONTAINER_TESTS-$$(docker info >/dev/null 2>&1 && echo 1)} OMP_NUM_THREADS=1 $(RUN)python -m pytest tests $(TEST)

containers: lint
	@W2A_CONTAINER_TESTS=1 OMP_NUM_THREADS=1 $(RUN)python -m pytest tests/containers $(TEST)

lint:
	@scripts/setup.sh dev
	@$(RUN)ruff check .
	@$(RUN)ruff format --check -q .
	@$(RUN)mypy --no-error-summary

bench:
	@scripts/setup.sh all
	@OMP_NUM_THREADS=1 $(RUN)python -m bench $(BENCH)

zoo:
	@scripts/setup.sh all
	@OMP_NUM_THREADS=1 scripts/make_zoo.sh $(ZOO)

libero: export SIMULATOR := libero
libero: export TASKS := libero_object-*
libero: export CAMERA_EVERY := 4
libero: export DEMOS := data/libero_object/demos
libero: export WORLDMODEL_EPISODES ?= 100
libero: export WORLDMODEL_FLAGS ?= --max-horizon 32
libero:
	@scripts/setup.sh all
	@scripts/setup.sh libero
	@OMP_NUM_THREADS=1 scripts/make_zoo.sh data/libero_object/zoo
	@W2A_SIMULATOR_NAME=libero W2A_ZOO=data/libero_object/zoo $(RUN)world2act demo --tasks 'libero_object-*' --out libero.html $(DEMO)
	@OMP_NUM_THREADS=1 $(RUN)python -m experiments.more_cloning --simulator libero --demos $(DEMOS) --zoo data/libero_object/zoo $(CLONING)

skills:
	@scripts/setup.sh all
	@scripts/setup.sh libero
	@OMP_NUM_THREADS=1 scripts/make_skills.sh $(SKILLS)

experiments:
	@scripts/setup.sh all
	@for name in main methods worldmodel objectives adapters scaling cross-task regimes similarity-vs-success; do \
	  $(RUN)world2act experiment $$name $(EXPERIMENT) || exit; done
	@$(RUN)world2act results

proto:
	@scripts/setup.sh dev
	@PATH="$(CURDIR)/.venv/bin:$$PATH" scripts/make_proto.sh

clean:
	rm -rf .world2act report.html .mypy_cache .ruff_cache .pytest_cache
