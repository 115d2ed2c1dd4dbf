"""Devices on which the operators are tested."""
import pytest
from support.operators import COMPILED

GPU = pytest.param('cuda', marks=pytest.mark.gpu)


@pytest.fixture(params=['cpu', GPU])
def device(request) -> str:
    return request.param


@pytest.fixture(params=[GPU] if COMPILED else ['cpu', GPU])
def cuda_op_device(request) -> str:
    """A device for an operator which mmcv compiles for CUDA alone."""
    return request.param
