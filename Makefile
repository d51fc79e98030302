# `make demo` shows the whole thing on a laptop; `make test` runs the tests. Both set up .venv first.
PYTHON ?= python3
PY := .venv/bin/python
# Warnings of the libraries' own making, and hub look-ups that nothing here needs, stay out of the demo's output.
DEMO := HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error $(PY)

.PHONY: demo test lint clean

demo: artifacts/rl/final/model.safetensors
	$(DEMO) generate.py --prompts prompts/fresh.txt --model artifacts/rl/final --temperature 0.85
	@echo
	@echo "data      artifacts/data        sft.parquet, prompts.parquet, idf.npz, calibration.json, manifest.json"
	@echo "models    artifacts/oneshot, artifacts/zeroshot, artifacts/rl/final"
	@echo "the run   artifacts/rl          metrics.jsonl, samples.jsonl; open report.html in a browser"
	@echo "more      $(PY) generate.py \"Your own prompt.\""

# Two files at a time, for most of a test's time is a script's start; one thread each, or they would wait for one another.
test: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "story-gen needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q -c constraints.txt -e '.[test]'
	touch $@

# Each stage is made once: a demo that was interrupted goes on where it was.
artifacts/data/manifest.json: | .venv/installed
	$(DEMO) data_prep.py --preset demo --out artifacts/data

artifacts/oneshot/model.safetensors: artifacts/data/manifest.json
	$(DEMO) pattern_learning.py --mode oneshot --data artifacts/data --out artifacts/oneshot

artifacts/zeroshot/model.safetensors: artifacts/oneshot/model.safetensors
	$(DEMO) pattern_learning.py --mode zeroshot --data artifacts/data --out artifacts/zeroshot --model artifacts/oneshot

artifacts/rl/final/model.safetensors: artifacts/zeroshot/model.safetensors
	$(DEMO) rl_train.py --data artifacts/data --model artifacts/zeroshot --out artifacts/rl --resume

clean:
	rm -rf artifacts
