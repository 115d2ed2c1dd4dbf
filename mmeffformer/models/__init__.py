from .arch import ARCHS, ARCHS_V2, Arch
from .efficientformer import EfficientFormer
from .efficientformer_v2 import EfficientFormerV2

__all__ = ['ARCHS', 'ARCHS_V2', 'Arch', 'EfficientFormer', 'EfficientFormerV2']
