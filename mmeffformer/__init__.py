"""EfficientFormer for dense prediction with mmdet and mmseg.

Importing this package registers everything in scope ``mmeffformer``:
``type='mmeffformer.EfficientFormer'`` and ``EfficientFormerV2`` then work in any
OpenMMLab config. It offers the operators that mmcv lacks, asks torch to use huge pages (Linux),
drops the message ``Could not import OneDL`` of the libraries' forks, and changes nothing else;
:func:`patch_mmengine` does, for this project's Runner and tools.
"""
import os
from importlib.util import find_spec

if find_spec('mmengine') is None:
    raise ImportError(
        'mmeffformer needs mmengine, which is not installed. Install the OpenMMLab libraries '
        'with `pip install mmeffformer[onedl]` (maintained forks) or '
        '`pip install mmeffformer[openmmlab]` (the originals), one of the two in an environment.')

# Linux maps new memory for each large tensor, page by page. In pages of 2 MiB that takes a part
# of the time. torch reads this at its first tensor; 0 in the environment prevents it.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    raise ImportError(f'torchvision does not fit torch ({error}). Install the two together, in '
                      'one command: pip install torch==... torchvision==...') from error

from . import deploy, ops

ops.install()

from .apis.swap import swap_backbone
from .engine.mmengine_internals import patch_mmengine
from .models import EfficientFormer, EfficientFormerV2
from .search.supernet import SuperEfficientFormer
from .utils.console import drop_onedl_messages
from .version import __version__
from .weights import load_weights

drop_onedl_messages()

__all__ = ['EfficientFormer', 'EfficientFormerV2', 'SuperEfficientFormer', 'deploy',
           'load_weights', 'patch_mmengine', 'swap_backbone', '__version__']
