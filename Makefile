VENV := .venv
BIN := $(VENV)/bin
DATA := ../shared/data/colonoscopy

.PHONY: help install quickstart colonoscopy benchmark benchmark-scores traces manifests test cluster cluster-all soak lint format clean

help:  ## Show what there is to make
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "%-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: pyproject.toml
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Medsynth needs Python 3.11 or newer")'
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

install: $(VENV)/installed  ## Make .venv with everything in it

quickstart: install  ## Train a small MSDM on phantom pictures, on the CPU
	$(BIN)/python -m jobs.quickstart

colonoscopy: install  ## Train MSDM on real pictures, DATA=FOLDER in MEDVQA-GI's layout, on the CPU, in about 30 minutes
	$(BIN)/medsynth train configs/colonoscopy_cpu_vae.yaml data.root=$(DATA)
	$(BIN)/medsynth encode configs/colonoscopy_cpu.yaml data.root=$(DATA) --variants 3 --out runs/colonoscopy_cpu_latents
	$(BIN)/medsynth train configs/colonoscopy_cpu.yaml data.root=$(DATA)

benchmark: install  ## Time the training step of each method beside a plain loop, on the GPU if there is one
	$(BIN)/python -m benchmarks.train_step

benchmark-scores: install  ## Time the parts of a score beside torchmetrics, on one thread
	$(BIN)/python -m benchmarks.scores

traces: install  ## Write the golden traces anew, after a change that is meant to change what is learned
	$(BIN)/python -m tests.traces

manifests: install  ## Write k8s/ anew from the configs
	$(BIN)/python -m jobs.study.manifests

# Three for two cores, since many tests wait, for a server or a signal.
test: install lint  ## Lint and run every test but those on a real Slurm
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal --ignore=tests/cluster

cluster: install  ## Test on a real Slurm of two nodes on this machine; as root, it installs slurm-wlm and munge
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal tests/cluster

cluster-all: install  ## As cluster, with every disturbance by sbatch and by medsynth submit
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --all tests/cluster

soak: install  ## Kill a run of two processes 100 times, and compare it with an undisturbed one; in about 10 minutes
	$(BIN)/python -m tests.soak

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: install  ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what quickstart made; runs and .venv stay
	rm -rf quickstart
