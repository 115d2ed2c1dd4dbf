# make demo   trains and evaluates a Mask R-CNN on drawn shapes, and draws what it found
# make test   runs the tests
# make lint   checks the style
# Each makes its environment first, in .venv; VENV=folder takes or makes another.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: demo test lint env clean

VENV ?= .venv
BASE_PYTHON ?= python3 python3.11 python3.12 python3.10
REQUIREMENTS ?= requirements/onedl.txt
# The environment is made again when what it is made of has changed.
STAMP := $(VENV)/.made-$(shell cat $(REQUIREMENTS) | sha256sum | cut -c1-16)
PYTHON := $(VENV)/bin/python

DEMO_CONFIG := configs/demo/maskrcnn_effformer_l1_shapes.py
DEMO_DIR := work_dirs/demo

demo: env
	@set -x
	rm -rf $(DEMO_DIR)
	$(PYTHON) tools/make_shapes.py data/shapes --train 1440 --val 80 --size 192 192
	$(PYTHON) tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_DIR)
	checkpoint=$$(cat $(DEMO_DIR)/last_checkpoint)
	$(PYTHON) tools/test.py $(DEMO_CONFIG) $$checkpoint --work-dir $(DEMO_DIR)/test \
	    --at-least coco/bbox_mAP_50=0.7 coco/segm_mAP_50=0.7
	$(PYTHON) tools/learning_curve.py $(DEMO_DIR)
	$(PYTHON) tools/infer.py $(DEMO_CONFIG) $$checkpoint data/shapes/val --limit 16 \
	    --score-thr 0.6 --out-dir $(DEMO_DIR)/detections --page $(DEMO_DIR)/detections.png
	set +x
	echo "Look at $(DEMO_DIR)/learning_curve.png and $(DEMO_DIR)/detections.png"

test: env
	$(PYTHON) -m pytest

lint: env
	$(PYTHON) -m ruff check .

# The package itself is installed every time: the environment may have served another clone.
env: $(STAMP)
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .

$(STAMP):
	@if [ -n "$$(ls -A $(VENV) 2>/dev/null)" ] && ! ls $(VENV)/.made-* >/dev/null 2>&1; then
	    echo "$(VENV) exists and was not made by make: remove it, or name another with VENV=" >&2
	    exit 1
	fi
	python=$$(for name in $(BASE_PYTHON); do
	    "$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' \
	        2>/dev/null && echo "$$name" && break
	done) || { echo "Python 3.10, 3.11 or 3.12 is needed, and none is on the PATH" >&2; exit 1; }
	echo "Making the environment $(VENV) of $(REQUIREMENTS), which takes a few minutes"
	"$$python" -m venv --clear $(VENV)
	touch $(VENV)/.made-half
	$(PYTHON) -m pip install -q -r $(REQUIREMENTS)
	mv $(VENV)/.made-half $@

clean:
	rm -rf .venv build *.egg-info data/shapes $(DEMO_DIR)
