"""The registries, where mmengine looks for those of a package: in its module ``registry``."""
from .utils.registry import HOOKS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPERS, RUNNERS

__all__ = ['HOOKS', 'MODELS', 'MODEL_WRAPPERS', 'OPTIM_WRAPPERS', 'RUNNERS']
