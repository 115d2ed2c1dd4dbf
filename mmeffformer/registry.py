"""Children of mmengine's registries, so that ``mmeffformer.NAME`` resolves in any scope."""
from importlib.metadata import PackageNotFoundError, version

from mmengine import registry as mmengine
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry

SCOPE = 'mmeffformer'


def _child(name: str, parent: Registry, location: str) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE, locations=[f'{SCOPE}.{location}'])


MODELS = _child('model', mmengine.MODELS, 'models')
HOOKS = _child('hook', mmengine.HOOKS, 'hooks')
RUNNERS = _child('runner', mmengine.RUNNERS, 'runner')
OPTIM_WRAPPERS = _child('optim_wrapper', mmengine.OPTIM_WRAPPERS, 'amp')
MODEL_WRAPPERS = _child('model_wrapper', mmengine.MODEL_WRAPPERS, 'parallel')

# ``mmengine.hub.get_config('mmeffformer::...')`` and configs that inherit from
# ``mmeffformer::...`` look up the distribution of a module here.
MODULE2PACKAGE.setdefault(SCOPE, SCOPE)

# So do those of mmseg, whose fork has a distribution of another name: mmengine would not find
# it, and install the original beside it by itself.
try:
    version(MODULE2PACKAGE['mmseg'])
except PackageNotFoundError:
    MODULE2PACKAGE['mmseg'] = 'mmseg'
