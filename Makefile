# Every target makes the virtual environment it needs; nothing has to be installed by hand.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Idle OpenMP threads sleep instead of spinning, so that a busy machine does not slow the runs down further.
export OMP_WAIT_POLICY = passive
# Files and output are UTF-8, whatever the locale says.
export PYTHONUTF8 = 1
TORCH = torch==2.13.0
# The baselines' networks; --no-deps, because what they ask for replaces a CPU build of torch by gigabytes of CUDA packages.
NETWORKS = dynamic-network-architectures==0.4.4 medim==0.1.2

.PHONY: demo test test-avx2 test-device test-label test-docs lint format gate release bench-env clean

# Waiting threads spin for a moment here: without bfloat16 it computes on two, which wait for each other all the time.
demo: $(VENV)/run
	env -u OMP_WAIT_POLICY OMP_NUM_THREADS=1 $(BIN)/python -m tsfm demo --output_dir demo_output

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n 2 --dist worksteal -q

# The tests that run a network, as on a processor that has neither AVX-512 nor bfloat16 arithmetic.
test-avx2: $(VENV)/dev
	OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
		$(BIN)/python -m pytest tests -m convolutions -n 2 --dist worksteal -q

# Training, transfer and inference on a device that, like a GPU, refuses the processor's tensors (tests/device/strict.cpp).
test-device: $(VENV)/dev
	OMP_NUM_THREADS=1 TSFM_DEVICE=1 $(BIN)/python -m pytest tests/device -q -rs

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and pinned: without a pin, or behind another package, pip takes gigabytes of CUDA packages.
$(VENV)/run: requirements.txt custom/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev: requirements-dev.txt requirements-dicom.txt $(VENV)/run
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(NETWORKS)
	touch $@

# MONAI Label in an environment of its own (3 GB, minutes to build), driven by the tests of the usual one.
VENV_LABEL ?= .venv-label

test-label: $(VENV)/dev $(VENV_LABEL)/done
	OMP_NUM_THREADS=1 TSFM_LABEL_PYTHON=$(abspath $(VENV_LABEL))/bin/python $(BIN)/python -m pytest tests/test_monai_label.py -q

# Every command of every page, those that build environments, run the demo and serve included, and every row of the paper's
# tables on phantoms.
test-docs: $(VENV)/dev $(VENV_LABEL)/done
	OMP_NUM_THREADS=1 TSFM_DOCS=all TSFM_LABEL_PYTHON=$(abspath $(VENV_LABEL))/bin/python \
		$(BIN)/python -m pytest tests/test_docs_run.py tests/test_paper_tables.py -q

$(VENV_LABEL)/done: requirements-label.txt
	$(PYTHON) -m venv $(VENV_LABEL)
	$(VENV_LABEL)/bin/pip install --quiet --disable-pip-version-check --prefer-binary torch==2.13.0 'numpy<2'
	$(VENV_LABEL)/bin/pip install --quiet --disable-pip-version-check --prefer-binary -r requirements-label.txt
	$(VENV_LABEL)/bin/pip install --quiet --disable-pip-version-check --no-deps monailabel==0.8.5 $(NETWORKS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV_LABEL) demo_output build dist

# The Model Zoo's checks and MONAI Label, on bundles staged around the weights in WEIGHTS_PRETRAIN and WEIGHTS_FINETUNE.
WEIGHTS_PRETRAIN ?= demo_output/pretrain/model.pt
WEIGHTS_FINETUNE ?= demo_output/transfer/cells/pretrained-4epochs-seed0/model.pt
TRAINED_ON ?= phantoms that make demo draws, in the layouts of real data sets; an example, of no use on real images

release: $(VENV)/run
	$(BIN)/python -m tsfm release --bundle_dir bundles/tsfm_pretrain --checkpoint $(WEIGHTS_PRETRAIN) --output_dir dist \
		--trained_on "$(TRAINED_ON)"
	$(BIN)/python -m tsfm release --bundle_dir bundles/tsfm_finetune --checkpoint $(WEIGHTS_FINETUNE) --output_dir dist \
		--trained_on "$(TRAINED_ON)"

gate: $(VENV)/dev
	$(BIN)/python -m tsfm gate --bundle_dir bundles/tsfm_pretrain
	$(BIN)/python -m tsfm gate --bundle_dir bundles/tsfm_finetune

# nnU-Net 2.8.1 and 1.7.1, the other side of benchmarks/ and the source of tests/fixtures/nnunet_*; no test needs it.
VENV_BENCH ?= .venv-bench

bench-env: $(VENV_BENCH)/done

$(VENV_BENCH)/done:
	$(PYTHON) -m venv $(VENV_BENCH)
	$(VENV_BENCH)/bin/pip install --quiet $(TORCH)
	$(VENV_BENCH)/bin/pip install --quiet --no-deps nnunetv2==2.8.1 nnunet==1.7.1 medpy==0.5.2 \
		batchgenerators batchgeneratorsv2==0.3.6 acvl_utils==0.2.6 dynamic_network_architectures==0.4.4 \
		fft-conv-pytorch timm==1.0.22
	$(VENV_BENCH)/bin/pip install --quiet simpleitk blosc2 scipy scikit-image scikit-learn pandas tqdm nibabel einops \
		tifffile connected-components-3d matplotlib seaborn pyyaml requests
	touch $@
