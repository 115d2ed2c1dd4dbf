"""Children of mmengine's registries, so that ``mmeffformer.NAME`` resolves in any scope."""
from importlib.metadata import PackageNotFoundError, version

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

SCOPE = 'mmeffformer'

MODELS = Registry('model', parent=MMENGINE_MODELS, scope=SCOPE, locations=['mmeffformer.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmeffformer.hooks'])

# ``mmengine.hub.get_config('mmeffformer::...')`` and configs that inherit from
# ``mmeffformer::...`` look up the distribution of a module here.
MODULE2PACKAGE.setdefault(SCOPE, SCOPE)

# So do those of mmseg, whose fork has a distribution of another name: mmengine would not find
# it, and install the original beside it by itself.
try:
    version(MODULE2PACKAGE['mmseg'])
except PackageNotFoundError:
    MODULE2PACKAGE['mmseg'] = 'mmseg'
