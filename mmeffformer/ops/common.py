"""Functions shared by the families of operators."""
from typing import Tuple

import torch
from torch import Tensor

FASTER = True  # False: torchvision's operators wherever they can be used


def widen(*tensors: Tensor) -> Tuple[Tensor, ...]:
    """Cast integers and half precision to float32, and all tensors to float64 if one has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def missing_operator(name: str) -> NotImplementedError:
    """Return the error for an operator that only a compiled mmcv has."""
    return NotImplementedError(
        f'The operator {name!r} needs mmcv with compiled operators; mmeffformer provides only the '
        'common ones, built on torchvision. Install torch and a C++ compiler (for CUDA also nvcc; '
        'FORCE_CUDA=1 compiles for it where no GPU is visible). Then build the maintained fork '
        'with `pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation '
        '--no-binary onedl-mmcv onedl-mmcv`, or the original with `pip uninstall mmcv-lite` and '
        '`MMCV_WITH_OPS=1 pip install --no-cache-dir --no-build-isolation --no-binary mmcv '
        '"mmcv<2.2"` (setuptools before 81).')
