PY := .venv/bin/python

.PHONY: test demo lint clean
test: .venv/ready
	.venv/bin/ruff check fxq tests
	.venv/bin/mypy --strict fxq
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

demo: .venv/ready
	$(PY) examples/demo.py

lint: .venv/ready
	.venv/bin/ruff check fxq tests
	.venv/bin/mypy --strict fxq

.venv/ready: requirements-dev.lock pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q torch==2.14.1 torchvision==0.29.1
	.venv/bin/pip install -q -r requirements-dev.lock
	.venv/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build out *.egg-info
