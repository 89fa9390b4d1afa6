# `make help` lists the targets; CI and contributors call the same ones.
SHELL := /bin/bash
PYTHON ?= $(firstword $(foreach v,python3 python3.13 python3.12 python3.11,$(shell $(v) -c 'import sys; sys.exit(not (3,11) <= sys.version_info[:2] <= (3,13))' 2>/dev/null && echo $(v))) python3)
VENV ?= .venv
# what is installed stays, unless asked for otherwise
ACCEL ?= $(if $(wildcard $(VENV)/.ready-cuda),cuda,cpu)
BIN := $(VENV)/bin
INPUTS := pyproject.toml deploy/constraints.txt deploy/set_up.py
PROTOS := $(wildcard protos/infermesh/v1/*.proto)

.PHONY: help setup run test lint type protos check-protos verify sanitize-kernels bench bench-peers bench-gpu-engine demo-model chart-files freeze-previous metrics-table supported-table clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready-$(ACCEL): $(INPUTS)
	@$(PYTHON) deploy/set_up.py --venv $(VENV) --accel $(ACCEL)
	@rm -f $(VENV)/.ready-* && touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-$(ACCEL)
	@$(PYTHON) deploy/set_up.py --venv $(VENV) --accel $(ACCEL) --dev
	@touch $@

setup: $(VENV)/.ready-$(ACCEL) ## make .venv with pinned dependencies (ACCEL=cpu or cuda)

run: setup ## start the mesh with the demo model, ask it a question, serve until Ctrl-C
	@up() { $(BIN)/infermesh up --ask "What is the capital of France?"; }; \
	if [ -t 0 ]; then set -m; up & fg >/dev/null; else up; fi # in a terminal Ctrl-C must not reach make, which would exit 130

test: $(VENV)/.ready-dev ## every test but the slow ones
	@$(BIN)/python -m pytest -m "not slow and not gpu" tests/unit tests/contract tests/deploy -n 2 --dist loadfile
	@$(BIN)/python -m pytest -m "not slow and not gpu" tests/e2e # meshes want the machine for themselves

lint: $(VENV)/.ready-dev check-protos type ## formatting, lint, types, imports, protos
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/buf lint protos
	@$(BIN)/buf format --diff --exit-code protos
	@old=$$(mktemp -d) && trap 'rm -rf "$$old"' EXIT && $(BIN)/python -m tests.skew.freeze --unpack "$$old" \
	  && $(BIN)/buf breaking protos --against "$$old/protos"

type: $(VENV)/.ready-dev ## mypy in strict mode
	@$(BIN)/mypy -p infermesh -p gateway -p services

GENERATE = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

protos: $(VENV)/.ready-dev ## regenerate infermesh/v1 from protos/
	@$(call GENERATE,.)

check-protos: $(VENV)/.ready-dev ## fail where infermesh/v1 is not what protos/ generate
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(call GENERATE,$$out) \
	  && diff -r -x __init__.py -x __pycache__ "$$out/infermesh/v1" infermesh/v1 \
	  && echo "generated code is current"

verify: $(VENV)/.ready-dev ## what takes longer than make test allows
	@$(BIN)/python -m pytest -m "slow and not gpu"

sanitize-kernels: $(VENV)/.ready-dev ## the C++ kernels' tests under AddressSanitizer and UBSan (needs g++)
	@for kind in 8 16 "8 bytes" "16 bytes"; do library=$$($(BIN)/python -m tests.sanitized_kernels $$kind) \
	  && INFERMESH_TEST_KERNELS=$$library ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -s tests/unit/shard/kernels || exit; done # -s: the report goes to standard error

bench: $(VENV)/.ready-dev ## the figures of the README; JSON goes to benchmarks/results
	@$(BIN)/python -m benchmarks.readme

bench-peers: $(VENV)/.ready-dev ## the same beside other servers, which it sets up: 15 GB, hours
	@$(BIN)/python -m benchmarks.readme --peers

bench-gpu-engine: ## parity and speed of the engine on CUDA (needs grpcio, protobuf, numpy, torch, transformers)
	@$(or $(GPU_PYTHON),python3) benchmarks/gpu_engine.py --device cuda --out $(or $(OUT),benchmarks/results/gpu_engine.json)

demo-model: $(VENV)/.ready-dev ## train the demo model anew and print its accuracy
	@$(BIN)/python -m demo.train

chart-files: $(VENV)/.ready-dev ## write the chart's schema, its dashboards and the snapshots of its examples anew
	@$(BIN)/python -m deploy.helm.make_schema
	@$(BIN)/python -m deploy.helm.make_dashboards
	@$(BIN)/python -m tests.deploy.golden

freeze-previous: $(VENV)/.ready-dev ## keep REV, a release, as the version that the next one is tested beside
	@$(BIN)/python -m tests.skew.freeze $(REV)

metrics-table: $(VENV)/.ready-dev ## write docs/metrics.md anew from the services' registries
	@$(BIN)/python -m tests.metrics_table

supported-table: $(VENV)/.ready-dev ## print README.md's table of models anew from the tests
	@$(BIN)/python -m tests.supported_table --write

clean: ## remove what the targets made
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
