# The two commands of the README. Both make .venv and install what they need into it, nothing else.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
EMOJI := examples/emoji

.PHONY: demo test
demo: .venv/demo.stamp
	mkdir -p demo
	$(BIN)/sdrt build --checkpoint $(EMOJI)/emoji.safetensors --output demo/flat.sdrt --force
	$(BIN)/sdrt build --checkpoint $(EMOJI)/emoji.safetensors --lora $(EMOJI)/blindbox.safetensors --output demo/blindbox.sdrt --force
	$(BIN)/sdrt generate demo/blindbox.sdrt "teddy bear" --cfg 3 --seed 2 --count 4 --output demo/teddy.png
	$(BIN)/python $(EMOJI)/compare.py demo/flat-and-blindbox.png demo/flat.sdrt demo/blindbox.sdrt
	@echo "The pictures are in demo/: teddy-2.png to teddy-5.png, and flat-and-blindbox.png with and without the LoRA."

test: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile

.venv/demo.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[cpu]'
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[cpu,build,dev]'
	touch $@ .venv/demo.stamp
