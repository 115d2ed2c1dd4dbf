"""Operators for an mmcv that was installed without its compiled ones.

``mmcv.ops`` imports the extension module ``mmcv._ext``. mmdet cannot be imported with an mmcv that
lacks it (mmcv-lite, or a wheel built where torch was not installed). :func:`install` adds a finder
at the end of ``sys.meta_path``: if no other finder provides ``mmcv._ext``, ``extension.py`` is
loaded under that name, as a package of the modules in its folder. A compiled extension is found
earlier and always used. With the folder :data:`STARTUP` at the front of ``PYTHONPATH`` each new
interpreter calls :func:`install` as it starts.
"""
import sys
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Iterator, Optional, Tuple

__all__ = ['STARTUP', 'diagnose', 'install', 'torchvision_only']

_EXTENSION = 'mmcv._ext'
_FOLDER = Path(__file__).parent
_FILE = str(_FOLDER / 'extension.py')
STARTUP = str(_FOLDER / 'startup')


class _FallbackFinder(MetaPathFinder):

    def find_spec(self, fullname: str, path: Any = None,
                  target: Any = None) -> Optional[ModuleSpec]:
        if fullname != _EXTENSION:
            return None
        # A package, so that its modules are found while mmeffformer itself is not imported.
        return spec_from_file_location(fullname, _FILE, submodule_search_locations=[str(_FOLDER)])


def install() -> None:
    """Provide ``mmcv._ext`` where mmcv lacks it. Idempotent; imports neither mmcv nor torch."""
    if not any(isinstance(finder, _FallbackFinder) for finder in sys.meta_path):
        sys.meta_path.append(_FallbackFinder())


def diagnose() -> Tuple[str, str]:
    """Import the operators of ``mmcv.ops``.

    Returns:
        ``'compiled'`` (mmcv's) or ``'torchvision'`` (this package's) and the file in use;
        ``'broken'`` and the error on import; or ``'absent'`` (there is no mmcv) and ''.
    """
    if 'mmcv' not in sys.modules and find_spec('mmcv') is None:
        return 'absent', ''
    try:
        extension = import_module(_EXTENSION)
    except Exception as error:  # a binary built for another torch fails in many ways
        return 'broken', f'{type(error).__name__}: {error}'
    file = str(getattr(extension, '__file__', None))
    return 'torchvision' if file == _FILE else 'compiled', file


@contextmanager
def torchvision_only() -> Iterator[None]:
    """Context manager: use torchvision's operators where this package has faster ones on CPUs.

    Benchmarks compare with them. Compiled operators of mmcv stay in use.
    """
    if diagnose()[0] != 'torchvision':
        yield
        return
    common = import_module(f'{_EXTENSION}.common')
    common.FASTER = False
    try:
        yield
    finally:
        common.FASTER = True
