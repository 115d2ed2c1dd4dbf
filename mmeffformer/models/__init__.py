from .arch import ARCHS, Arch
from .efficientformer import EfficientFormer

__all__ = ['ARCHS', 'Arch', 'EfficientFormer']
