PY := .venv/bin/python
LINTED := fxq tests benchmarks examples

.PHONY: test demo lint clean
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

demo: .venv/ready
	$(PY) examples/demo.py

lint: .venv/ready
	.venv/bin/ruff check $(LINTED)
	.venv/bin/mypy --strict fxq

.venv/ready: requirements-dev.lock pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -r requirements-dev.lock
	.venv/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
