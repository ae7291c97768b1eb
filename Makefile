# Two commands set everything up on a fresh machine: `make demo` and `make test`.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test fuzz torture exports mutation coverage zoo bench bench-accuracy check lint venv clean
export HF_HUB_OFFLINE := 1

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)        ## train, plan, distill, export and measure on real digits; about two minutes
	rm -rf kdsurgeon-demo
	$(BIN)/kdsurgeon demo

test: lint            ## everything that decides whether a change is sound
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings

fuzz: $(STAMP)        ## 10,000 random classifiers: what must hold of every cut and stone
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --count 10000 --jobs 2

torture: $(STAMP)     ## runs that are killed, refused, cut off from power, damaged: nothing is lost
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture all --jobs 2
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.resuming "$$(mktemp -d)" --updates 60

exports: $(STAMP)     ## 300 random classifiers as ONNX at six batch sizes, and 26 seeded faults
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.exports --count 300
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.exports --faults

mutation: $(STAMP)    ## 60 small changes in each of four guarding parts: the tests notice them; an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation --jobs 2

coverage: $(STAMP)    ## which lines and branches the tests reach; half an hour
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

zoo: $(STAMP)         ## every model that has a name, into docs/zoo.md; hours
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.zoo.run capture modes others pairs trained decoder export report

bench: $(STAMP)       ## seconds of a training step, and the forecast against them; an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.step_time
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.forecast
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.int8
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.signals

bench-accuracy: $(STAMP)  ## methods compared: digits, and Fashion-MNIST in the folder DATA; hours
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.digits
	$(if $(DATA),OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fashion --data $(DATA))

check: test

clean:
	rm -rf $(VENV) kdsurgeon-demo .pytest_cache .ruff_cache .hypothesis
