"""Child registries of mmengine's, so that ``mmeffformer.NAME`` resolves in any scope."""
from importlib.metadata import PackageNotFoundError, version

from mmengine import registry as mmengine
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

SCOPE = 'mmeffformer'


def _child(name: str, parent: Registry, *modules: str) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE,
                    locations=[f'{SCOPE}.{module}' for module in modules])


MODELS = _child('model', mmengine.MODELS, 'models', 'search.supernet')
HOOKS = _child('hook', mmengine.HOOKS, 'engine.hooks')
RUNNERS = _child('runner', mmengine.RUNNERS, 'engine.runner')
OPTIM_WRAPPERS = _child('optim_wrapper', mmengine.OPTIM_WRAPPERS, 'engine.optim')
VISUALIZERS = _child('visualizer', mmengine.VISUALIZERS, 'apis.visualizer')
MODEL_WRAPPERS = _child('model_wrapper', mmengine.MODEL_WRAPPERS, 'engine.launch')


def register_packages() -> None:
    """Add the distributions of mmeffformer and of mmseg's fork to mmengine's table of packages.

    mmengine reads ``MODULE2PACKAGE`` to resolve configs named ``PACKAGE::PATH``. It does not know
    mmeffformer, and it would install the original mmseg next to the fork.
    """
    MODULE2PACKAGE.setdefault(SCOPE, SCOPE)
    try:
        version(MODULE2PACKAGE['mmseg'])
    except PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'

