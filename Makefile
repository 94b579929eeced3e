# `make demo` and `make test` do all their set-up: a .venv, the package, everything pinned by constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
# Threads that wait without spinning: on a busy machine a spinning barrier costs ten times the work.
export OMP_WAIT_POLICY ?= PASSIVE
# Processes that share the tests: a gigabyte or two each; many wait for servers, browsers and children. For -x or --pdb: .venv/bin/python -m pytest.
WORKERS ?= 3

.PHONY: demo test check format docs wheel tiny clean

demo: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/saekit demo

test: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The documentation as a site in site/, which opens from disk. A broken link, or a page that is not in the menu, is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict

wheel: $(READY)
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

# Everything that checkpoints/tiny ships, made again from the model: token shards, SAE, catalog.
tiny: $(READY)
	rm -rf checkpoints/tiny/tokens
	$(BIN)/python -m saekit.training.sample tiny --tokens 2_000_000 --out checkpoints/tiny/tokens
	rm -rf checkpoints/tiny-sae
	$(BIN)/saekit train recipes/tiny_sae.yaml
	rm -rf checkpoints/tiny/sae && cp -r checkpoints/tiny-sae/final checkpoints/tiny/sae
	$(BIN)/saekit catalog build checkpoints/tiny/sae --text tiny --tokens 800_000 --contexts 10 --per-band 2 --sample-rows 64 --out checkpoints/tiny/catalog

clean:
	rm -rf .venv .venv-peers dist site .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "saekit needs Python 3.11 or newer; set PYTHON=…")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,server]'
	@touch $@
