"""Offers the operators at the start of an interpreter. Python imports this module by its name.

The package around it is not imported: it imports torch, which most processes do not need. The
interpreter may even be that of an environment without mmeffformer.
"""
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_folder = Path(__file__).parent
_spec = spec_from_file_location('mmeffformer_ops', _folder.with_name('__init__.py'))
_ops = module_from_spec(_spec)
_spec.loader.exec_module(_ops)
_ops.install()

# The environment's own sitecustomize, which this one hides.
sys.path[:] = [entry for entry in sys.path if Path(entry) != _folder]
_spec = PathFinder.find_spec(__name__)
if _spec:
    sys.modules[__name__] = module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[__name__])
