"""Fixtures shared by all tests."""
import os
from pathlib import Path

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
import torch  # noqa: E402
from torch import nn  # noqa: E402

import mmeffformer  # noqa: E402, F401  torchvision stands behind mmcv.ops from here on


@pytest.fixture
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def randomize():
    """A function that gives every weight, statistic, scale and bias of a module
    a random value of a size with which activations neither vanish nor explode."""

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
