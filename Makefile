# make demo      trains and evaluates a Mask R-CNN on drawn shapes, and draws what it found
# make demo-seg  does the same with a Semantic FPN
# make demo-search  trains a supernet, slims it to half its latency here, and trains the result
# make test      runs the tests
# make test-slow runs the tests that take minutes
# make lint      checks the style and the types
# make docs      builds the site of the documentation in site/
# make gpu        checks, trains and measures on a GPU
# make executorch-test  runs the tests that need ExecuTorch, in an environment of their own
# make wheel-test  builds the wheel and the sdist in dist/ and tries each, installed
# Each makes its environment first, in .venv; VENV=folder takes or makes another.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo demo-seg demo-search test test-slow gpu lint docs wheel-test executorch-test env clean

VENV ?= .venv
BASE_PYTHON ?= python3 python3.11 python3.12 python3.10
REQUIREMENTS ?= requirements/onedl.txt
# The environment is rebuilt when the requirements change.
STAMP := $(VENV)/.made-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c1-16)
PYTHON := $(VENV)/bin/python
# The documentation has an environment of its own: it needs neither torch nor this package.
DOCS_STAMP := $(VENV)-docs/.made-$(shell cat requirements/docs.txt | sha256sum | cut -c1-16)

# Sets $$python to the first of BASE_PYTHON that is there and has a supported version.
define FIND_PYTHON
python=$$(for name in $(BASE_PYTHON); do
    "$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
        2>/dev/null && echo "$$name" && break
done) || { echo "Python 3.10, 3.11 or 3.12 is needed, and none is on the PATH" >&2; exit 1; }
endef

# A demo's config, its data as make_shapes.py takes it, the metrics it has to reach, and what
# infer.py draws of it.
demo: CONFIG := configs/demo/maskrcnn_effformer_l1_shapes.py
demo: SHAPES := data/shapes --train 1440 --val 80 --size 192 192
demo: AT_LEAST := coco/bbox_mAP_50=0.7 coco/segm_mAP_50=0.7
demo: IMAGES := data/shapes/val --score-thr 0.6
demo: FOUND := detections

demo-seg: CONFIG := configs/demo/semfpn_effformer_l1_shapes.py
demo-seg: SHAPES := data/shapes_ade20k --layout ade20k --train 1440 --val 80 --size 192 192
demo-seg: AT_LEAST := mIoU=75
demo-seg: IMAGES := data/shapes_ade20k/images/validation
demo-seg: FOUND := segmentations

demo demo-seg: env
	@set -x
	rm -rf work_dirs/$@
	$(PYTHON) tools/make_shapes.py $(SHAPES)
	$(PYTHON) tools/train.py $(CONFIG) --work-dir work_dirs/$@
	checkpoint=$$(cat work_dirs/$@/last_checkpoint)
	$(PYTHON) tools/test.py $(CONFIG) $$checkpoint --work-dir work_dirs/$@/test \
	    --at-least $(AT_LEAST)
	$(PYTHON) tools/analysis_tools/learning_curve.py work_dirs/$@
	$(PYTHON) tools/infer.py $(CONFIG) $$checkpoint $(IMAGES) --limit 16 \
	    --out-dir work_dirs/$@/$(FOUND) --page work_dirs/$@/$(FOUND).png
	set +x
	echo "Look at work_dirs/$@/learning_curve.png and work_dirs/$@/$(FOUND).png"

demo-search: SUPERNET := configs/search/semfpn_super_shapes.py
demo-search: env
	@set -x
	rm -rf work_dirs/$@
	$(PYTHON) tools/make_shapes.py data/shapes_ade20k --layout ade20k --train 1440 --val 80 \
	    --size 192 192
	$(PYTHON) tools/train.py $(SUPERNET) --work-dir work_dirs/$@/supernet
	$(PYTHON) tools/latency_table.py --shape 192 192 --max-widths 48 96 160 256 --check 10 \
	    --out work_dirs/$@/table.json
	$(PYTHON) tools/slim.py $(SUPERNET) $$(cat work_dirs/$@/supernet/last_checkpoint) \
	    --table work_dirs/$@/table.json --target 50% --work-dir work_dirs/$@/slim
	$(PYTHON) tools/train.py work_dirs/$@/slim/slimmed.py --work-dir work_dirs/$@/slimmed \
	    --cfg-options optim_wrapper.optimizer.lr=5e-4
	$(PYTHON) tools/test.py work_dirs/$@/slim/slimmed.py \
	    $$(cat work_dirs/$@/slimmed/last_checkpoint) --work-dir work_dirs/$@/test \
	    --at-least mIoU=75
	set +x
	echo "Look at work_dirs/$@/slim/path.png and work_dirs/$@/slim/slimmed.py"

# Two processes of one thread: small networks gain nothing from more threads. Where one of
# them crashes, another would wait for ever for what it had left to do.
test: env
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --max-worker-restart 0

test-slow: env
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m slow

gpu: env
	$(PYTHON) tools/gpu_check.py

lint: env
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

# Broken links and references are errors.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict
	@echo "Look at site/index.html"

# Makes the environment $(1) with the packages of $(VENV), but without this one.
define ON_TOP
$(PYTHON) -m venv --clear --without-pip $(1)
$(PYTHON) -c 'import sys; print(*(path for path in sys.path if "-packages" in path), sep="\n")' \
    > "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
endef

# The wheel is built out of the sdist, so nothing that it needs is missing there.
wheel-test: env
	rm -rf dist build/installed
	$(PYTHON) -m build --quiet --no-isolation --outdir dist
	for file in dist/*.whl dist/*.tar.gz; do
	    $(call ON_TOP,build/installed)
	    python=$(CURDIR)/build/installed/bin/python
	    $(PYTHON) -m pip --python $$python install -q --no-deps --no-build-isolation \
	        --ignore-installed $$file
	    (cd build/installed && $$python $(CURDIR)/.ci/smoke.py)
	done

# ExecuTorch's dependencies would change those of $(VENV), and are not installed.
executorch-test: env
	$(call ON_TOP,build/executorch)
	$(PYTHON) -m pip --python build/executorch/bin/python install -q --no-deps \
	    -r requirements/executorch.txt
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) build/executorch/bin/python -m pytest \
	    tests/deploy/test_executorch.py tests/latency/test_latency_executorch.py

# The package itself is installed every time: the environment may have served another clone.
env: $(STAMP)
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .

$(DOCS_STAMP):
	@$(FIND_PYTHON)
	"$$python" -m venv --clear $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q -r requirements/docs.txt
	touch $@

$(STAMP):
	@if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ] && ! ls $(VENV)/.made-* >/dev/null 2>&1; then
	    echo "$(VENV) exists and was not made by make: remove it, or name another with VENV=" >&2
	    exit 1
	fi
	$(FIND_PYTHON)
	echo "Making the environment $(VENV) of $(REQUIREMENTS), which takes a few minutes"
	"$$python" -m venv --clear $(VENV)
	touch $(VENV)/.made-half
	$(PYTHON) -m pip install -q -r $(REQUIREMENTS)
	mv $(VENV)/.made-half $@

clean:
	rm -rf .venv .venv-docs build dist site *.egg-info data/shapes data/shapes_ade20k \
	    work_dirs/demo work_dirs/demo-seg work_dirs/demo-search
