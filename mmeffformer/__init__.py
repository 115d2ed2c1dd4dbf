"""EfficientFormer for dense prediction with mmdet and mmseg.

Importing this package registers everything in scope ``mmeffformer``:
``type='mmeffformer.EfficientFormer'`` then works in any OpenMMLab config.
"""
from importlib.util import find_spec

if find_spec('mmengine') is None:
    raise ImportError(
        'mmeffformer needs mmengine, which is not installed. Install the OpenMMLab libraries '
        'with `pip install mmeffformer[onedl]` (maintained forks) or '
        '`pip install mmeffformer[openmmlab]` (the originals), one of the two in an environment.')

from . import ops

ops.install()

from .models import EfficientFormer  # noqa: E402
from .version import __version__  # noqa: E402
from .weights import load_weights  # noqa: E402

__all__ = ['EfficientFormer', 'load_weights', '__version__']
