"""Fixtures shared by all tests, and a temporary folder that is deleted after them."""
import multiprocessing.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
# One temporary folder for the tests and all their processes, also those that they kill, which
# leave files: sockets of data loader workers, logs of torchrun, compiled models. It is set before
# torch is imported. The workers of pytest-xdist inherit it.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    os.environ['TMPDIR'] = tempfile.mkdtemp(prefix='mmeffformer-')
    # With a priority below that of multiprocessing, which deletes its own folder in it first.
    multiprocessing.util.Finalize(None, shutil.rmtree, (os.environ['TMPDIR'], True),
                                  exitpriority=-200)
tempfile.tempdir = os.environ['TMPDIR']

import torch  # noqa: E402
from torch import nn  # noqa: E402

import mmeffformer  # noqa: E402, F401  offers mmcv.ops


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason='needs a GPU; there, make gpu runs it'))


@pytest.fixture
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def randomize():
    """Return a function that fills a module with random values.

    Weights, statistics, scales and biases have sizes with which activations neither vanish nor
    explode.
    """

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)

        def uniform(tensor, low, high):
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.data.copy_(low + (high - low) * values)

        for name, parameter in module.named_parameters():
            if parameter.dim() == 1 and name.endswith('weight') or 'scale' in name \
                    or 'gamma' in name:
                uniform(parameter, 0.5, 1.5)
            elif parameter.dim() == 1 or 'bias' in name:
                uniform(parameter, -1, 1)
            else:
                bound = 1.7 * parameter[0].numel() ** -0.5
                uniform(parameter, -bound, bound)
        for name, buffer in module.named_buffers():
            if name.endswith('running_mean'):
                uniform(buffer, -0.5, 0.5)
            elif name.endswith('running_var'):
                uniform(buffer, 0.5, 1.5)
        return module

    return fill
