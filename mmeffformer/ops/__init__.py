"""Stand-ins for mmcv's compiled operators where mmcv was installed without them.

``mmcv.ops`` imports the extension module ``mmcv._ext``. An mmcv without it (mmcv-lite, or a wheel
built where torch was out of sight) cannot even be imported by mmdet. :func:`install` adds a last
resort to Python's import system: if nothing else provides ``mmcv._ext``, the functions in
``mmcv_ext.py``, built on torchvision, take its place. A compiled extension always wins, because
the finder stands at the end of ``sys.meta_path`` and is not asked when an earlier one answers.
"""
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

__all__ = ['install', 'source', 'diagnose']

_EXTENSION = 'mmcv._ext'
_KERNELS = str(Path(__file__).with_name('mmcv_ext.py'))


class _LastResort(MetaPathFinder):

    def find_spec(self, fullname, path=None, target=None):
        return spec_from_file_location(fullname, _KERNELS) if fullname == _EXTENSION else None


def install():
    """Let torchvision stand in for ``mmcv._ext`` where nothing else provides it.

    Imports neither mmcv nor torch. Calling it again changes nothing.
    """
    if not any(isinstance(finder, _LastResort) for finder in sys.meta_path):
        sys.meta_path.append(_LastResort())


def diagnose():
    """Find out which operators stand behind ``mmcv.ops``, importing them to be sure.

    Returns:
        tuple[str, str]: :func:`source`'s answer, and the reason for it: the file in use, or for
            ``'broken'`` the error met on import, or for ``'absent'`` an empty string.
    """
    if 'mmcv' not in sys.modules and find_spec('mmcv') is None:
        return 'absent', ''
    try:
        extension = import_module(_EXTENSION)
    except Exception as error:  # a binary for another torch fails in many ways
        return 'broken', f'{type(error).__name__}: {error}'
    used = str(getattr(extension, '__file__', None))
    return 'torchvision' if used == _KERNELS else 'compiled', used


def source():
    """Name the operators behind ``mmcv.ops``.

    Returns:
        str: ``'compiled'`` (mmcv's own), ``'torchvision'`` (this package's stand-ins),
            ``'broken'`` (an extension is there and fails on import; :func:`diagnose` says why)
            or ``'absent'`` (mmcv is not installed).
    """
    return diagnose()[0]
