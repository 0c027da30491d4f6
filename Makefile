PY := .venv/bin/python
LINTED := fxq tests benchmarks examples

.PHONY: test demo lint clean browser
test: lint browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2

demo: .venv/ready
	$(PY) examples/demo.py

lint: .venv/ready
	.venv/bin/ruff check $(LINTED)
	.venv/bin/mypy --strict fxq

# The tests of the HTML report open it in Debian's Chromium.
browser:
	@test -n "$$FXQ_CHROMIUM" || command -v chromium >/dev/null || \
	  { become=$$(test "$$(id -u)" = 0 || echo sudo); $$become apt-get update -q && $$become apt-get install -qy --no-install-recommends chromium; } || \
	  { echo "Chromium is missing and could not be installed: apt-get install chromium (as root), or set FXQ_CHROMIUM to a Chromium program"; exit 1; }

.venv/ready: requirements-dev.lock pyproject.toml
	python3 -m venv .venv
	.venv/bin/pip install -q -r requirements-dev.lock
	.venv/bin/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info
