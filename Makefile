# make demo: train a character-level GPT on tiny Shakespeare and let it write. make test: everything that must hold.
# make faults: kills, full disks, flipped bits, a soak of half an hour, as often as RESULTS.md says; an hour.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
REFERENCE ?= yes# torch and transformers, the oracle of public weights; empty: without them, their tests are skipped

PYTEST = $(BIN)/python -m pytest -n $(or $(WORKERS),$(shell nproc 2>/dev/null || echo 2))

.PHONY: demo test check docs faults shuffled figures clean

demo: $(VENV)/.demo
	$(BIN)/python train.py gpt-shakespeare --run-dir runs/demo
	$(BIN)/python sample.py runs/demo --max-new-tokens 1500
	@echo
	@echo 'Next:'
	@echo '  source $(BIN)/activate'
	@echo '  python sample.py runs/demo --prompt "ROMEO:" --stream'
	@echo '  python train.py gpt-shakespeare --data.path YOUR_TEXT.txt --run-dir runs/mine'
	@echo '  python train.py gpt-shakespeare --help'

test: $(VENV)/.test $(if $(REFERENCE),$(VENV)/.reference)
	$(PYTEST)

faults: $(VENV)/.test
	FAULTS=full $(PYTEST) tests/test_saver.py tests/test_edges.py tests/scripts/test_faults.py tests/scripts/test_resume.py \
		-k 'not second_start'
	FAULTS=full $(BIN)/python -m pytest -s tests/scripts/test_faults.py -k second_start # in 3 s: alone
	FAULTS=full $(BIN)/python -m pytest -s tests/scripts/test_soak.py

shuffled: $(VENV)/.test # in another order each time; VENV=… for another stack
	for seed in 1 2 3 4 5; do SHUFFLE=$$seed $(PYTEST) || exit; done

check: $(VENV)/.test $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(MAKE) test

# The site, into site/; with EXECUTE=1 notebooks are run, which takes minutes. --quiet would hide warnings from --strict.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/tools/links.py site

figures: $(VENV)/.demo # of the README; for the last one a translator is trained, unless runs/es is there
	$(BIN)/python -m tx_jax.inspect figures
	$(BIN)/python benchmarks/growth.py --rounds 2
	$(BIN)/python -m pip install --quiet -e '.[translate]'
	$(BIN)/python train.py translate-en-es --run-dir runs/es
	$(BIN)/python sample.py runs/es --source 'Where did you buy that red car?' --show-attention figures/attention.svg

$(VENV)/.demo $(VENV)/.test $(VENV)/.check $(VENV)/.docs $(VENV)/.reference: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: $(PYTHON) is older than Python 3.11; run make PYTHON=/path/to/a/newer/python'; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(subst demo,plots,$(patsubst .%,%,$(@F)))]' || \
		{ [ $(@F) = .reference ] && echo 'without torch and transformers: the tests against them are skipped'; }
	@touch $@

clean:
	rm -rf $(VENV)
