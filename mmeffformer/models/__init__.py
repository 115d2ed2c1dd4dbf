from typing import Type

from .arch import ARCHS, ARCHS_V2, Arch
from .backbone import Backbone
from .efficientformer import EfficientFormer
from .efficientformer_v2 import EfficientFormerV2

__all__ = ['ARCHS', 'ARCHS_V2', 'Arch', 'EfficientFormer', 'EfficientFormerV2', 'backbone_named']


def backbone_named(arch: str) -> Type[Backbone]:
    """Return the backbone which the named arch is one of.

    Raises:
        ValueError: Neither has an arch of that name.
    """
    for kind in (EfficientFormer, EfficientFormerV2):
        if arch in kind.archs:
            return kind
    raise ValueError(f'arch {arch!r} is unknown; choose from {", ".join([*ARCHS, *ARCHS_V2])}')
