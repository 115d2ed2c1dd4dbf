"""Candidates of a benchmark: a network in a variant, run by a runtime in a precision."""
import difflib
import itertools
import re
from dataclasses import dataclass, replace
from typing import List, Optional, Sequence, Tuple

import torch

from ..deploy.export import MIN_SIZE
from ..deploy.runtimes import PRECISIONS
from ..engine.configs import read_config
from ..models import ARCHS, ARCHS_V2
from ..utils.config import find_scope
from .exported import FILES, HALF, require_packages

TIMM = 'timm:'
# A model of timm, the config of a whole model or an arch, and options
SPEC = re.compile(rf'({TIMM}[^:]*|.+\.py|[^:]*)(?::(.*))?')
RUNTIMES = {
    'pytorch': 'eager',
    'compile': 'torch.compile',  # on a GPU, captured in a CUDA graph
    'cuda-graphs': 'eager, captured in a CUDA graph',
    'onnx': 'ONNX Runtime',
    'openvino': 'OpenVINO',
    'executorch': 'ExecuTorch',
    'coreml': 'Core ML',
    'tensorrt': 'TensorRT',
}
# Precisions of torch: tf32 is fp32 whose products a GPU rounds to 10 bits. int8 is for files.
DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16,
          'fp16': torch.float16}
INT8 = 'int8'
FILE_DTYPES = {**PRECISIONS, 'tensorrt': ('fp32', 'fp16')}
VARIANTS = {
    'legacy': "bias_mode='legacy': the bias as the authors' dense code computes it",
    'unfused': 'norms and layer scales as separate layers, as in training',
    'nchw': 'memory format NCHW instead of channels_last',
    'plain': "a whole model without this project's fusing, layout and operators for CPUs",
    'with_cp': 'activations recomputed in backward (training)',
}
NOT_FOR_TIMM = {'legacy', 'unfused', 'with_cp'}
NOT_FOR_CONFIGS = {'legacy'}
# Exported files are fused and have their own layout.
TORCH_ONLY = {'unfused', 'nchw', 'plain', 'with_cp'}


@dataclass(frozen=True)
class Setting:
    """Settings that all candidates share.

    Raises:
        ValueError: A value is out of range, or the device is missing.
    """

    shape: Tuple[int, int] = (224, 224)  # H, W of the images in px
    batch: int = 1
    threads: int = 1  # of the CPU
    device: str = 'cpu'  # or 'cuda'
    train: bool = False  # forward and backward instead of inference

    def __post_init__(self):
        if min(self.shape) < MIN_SIZE:
            raise ValueError(f'shape of {self.shape[0]} x {self.shape[1]} px: both must be at '
                             f'least {MIN_SIZE}')
        for name in ('batch', 'threads'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} {getattr(self, name)}: expected 1 or more')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('device cuda: torch finds no GPU here; use --device cpu')

    def for_candidate(self, candidate: 'Candidate') -> 'Setting':
        """Return the setting with the size of a candidate that has one of its own."""
        return replace(self, shape=candidate.shape or self.shape)


@dataclass(frozen=True)
class Candidate:
    """A network to time. ``str()`` gives a spec that :func:`candidates` parses."""

    model: str  # an arch of this project, 'timm:' and a model of timm, or a whole model's config
    runtime: str = 'pytorch'  # one of RUNTIMES
    dtype: str = 'fp32'  # one of DTYPES, or INT8
    variants: Tuple[str, ...] = ()  # from VARIANTS
    shape: Optional[Tuple[int, int]] = None  # H, W of its images in px instead of the setting's

    def __str__(self) -> str:
        options = [*self.variants, *[self.runtime] * (self.runtime != 'pytorch'),
                   *[self.dtype] * (self.dtype != 'fp32'),
                   *[f'{side[0]}x{side[1]}' for side in [self.shape] if side]]
        return self.model + (f':{",".join(options)}' if options else '')

    @property
    def is_timm(self) -> bool:
        return self.model.startswith(TIMM)

    @property
    def is_whole(self) -> bool:
        return self.model.endswith('.py')


def candidates(spec: str, runtimes: Sequence[str] = ('pytorch',), dtype: str = 'fp32',
               setting: Setting = Setting()) -> List[Candidate]:
    """Return the candidates that a spec, ``MODEL`` or ``MODEL:OPTION,OPTION``, describes.

    Options are names from ``VARIANTS``, ``RUNTIMES`` and ``DTYPES``, 'int8', and a size such as
    '640x640' (H, W in px) instead of the setting's.

    Args:
        spec: For example 'l3', 'l3:legacy,nchw', 'timm:resnet50:compile', or a config for a
            whole model, 'configs/detection/maskrcnn_effformer_l1.py:plain' or
            'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'.
        runtimes: Runtimes of a spec that names none. Those that run exported files are left out
            where a variant concerns PyTorch alone.
        dtype: Precision of a spec that names none.

    Raises:
        FileNotFoundError: A config does not exist.
        ValueError: The model or an option is unknown, options exclude each other, or timm is
            needed and not installed.
    """
    model, options = SPEC.fullmatch(spec).groups()
    _check_model(model)
    options = [] if options is None else options.split(',')
    sizes = [option for option in options if re.fullmatch(r'\d+x\d+', option)]
    options = [option for option in options if option not in sizes]
    shape = tuple(map(int, sizes[-1].split('x'))) if sizes else None
    known = (*VARIANTS, *RUNTIMES, *DTYPES, INT8)
    for option in options:
        if option not in known:
            raise ValueError(f'{spec}: option {option!r} is unknown; choose from '
                             f'{", ".join(known)}, or a size such as 640x640')
    variants = tuple(name for name in VARIANTS if name in options)
    named = [name for name in options if name in RUNTIMES]
    dtypes = [name for name in options if name in (*DTYPES, INT8)] or [dtype]
    if not named and dtypes == [INT8]:
        named = ['openvino']
    elif not named and TORCH_ONLY & {*variants}:
        named = [name for name in runtimes if name not in FILES]
        if not named:
            raise ValueError(f'{spec}: {", ".join(variants)} concerns PyTorch, not '
                             f'{" and ".join(runtimes)}')
    found = [Candidate(model, *each, variants, shape)
             for each in itertools.product(named or runtimes, dtypes)]
    for candidate in found:
        _check(candidate, setting.for_candidate(candidate))
    return found


def _check_model(model: str) -> None:
    archs = [*ARCHS, *ARCHS_V2]
    if model in archs:
        return
    if model.endswith('.py'):
        scope = find_scope(read_config(model))
        if scope not in ('mmdet', 'mmseg'):
            raise ValueError(f'{model} is a config with default_scope {scope!r}: expected one '
                             'for mmdet or mmseg')
        return
    if not model.startswith(TIMM):
        raise ValueError(f'model {model!r} is unknown; choose from {", ".join(archs)}, or write '
                         f'{TIMM}NAME for a model of timm, or the config (.py) of a whole '
                         'detector or segmentor')
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'{model} needs the package timm, which is not installed: pip install '
                         'timm') from error
    name = model[len(TIMM):]
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise ValueError(f'timm {timm.__version__} has no model {name!r}'
                         + (f'; it has {", ".join(close)}' if close else ''))


def _check(candidate: Candidate, setting: Setting) -> None:
    variants, runtime = {*candidate.variants}, candidate.runtime
    wrong = None
    if candidate.is_timm and variants & NOT_FOR_TIMM:
        wrong = f'{", ".join(sorted(variants & NOT_FOR_TIMM))}: for models of this project only'
    elif candidate.is_whole and variants & NOT_FOR_CONFIGS:
        wrong = f'{", ".join(sorted(variants & NOT_FOR_CONFIGS))}: set it in the config'
    elif 'plain' in variants and not candidate.is_whole:
        wrong = 'plain: for whole models only, that is configs'
    elif candidate.is_whole and runtime not in ('pytorch', 'compile', 'onnx', 'openvino'):
        wrong = f'{runtime}: for backbones only'
    elif setting.device == 'cpu' and candidate.dtype == 'tf32':
        wrong = 'tf32: for --device cuda only'
    elif (setting.device == 'cpu' and candidate.is_whole and candidate.dtype == 'fp16'
          and runtime not in FILES):
        wrong = 'fp16: for backbones, exported files and --device cuda only; choose fp32 or bf16'
    elif runtime in FILES and variants & TORCH_ONLY:
        wrong = f'{", ".join(sorted(variants & TORCH_ONLY))}: not with {runtime}'
    elif setting.train and runtime not in ('pytorch', 'compile'):
        wrong = f'{runtime}: for inference only; choose pytorch or compile for training'
    elif setting.train and 'unfused' in variants:
        wrong = 'unfused: a network in training always is unfused'
    elif not setting.train and 'with_cp' in variants:
        wrong = 'with_cp: for training only'
    elif runtime == 'cuda-graphs' and setting.device != 'cuda':
        wrong = 'cuda-graphs: for --device cuda only'
    elif runtime in FILES and setting.device != ('cuda' if runtime == 'tensorrt' else 'cpu'):
        wrong = f'{runtime}: for --device {"cuda" if runtime == "tensorrt" else "cpu"} only'
    elif runtime in FILES and candidate.dtype not in FILE_DTYPES[runtime]:
        wrong = f'{runtime}: in {", ".join(FILE_DTYPES[runtime])} only, not {candidate.dtype}'
    elif candidate.dtype == INT8 and runtime not in FILES:
        wrong = 'int8: with onnx, openvino or executorch'
    elif candidate.is_timm and runtime in FILES and not (
            candidate.dtype == 'fp32' or runtime in HALF and candidate.dtype == 'fp16'):
        wrong = f'{runtime} in {candidate.dtype}: for models of this project only'
    elif runtime in FILES and runtime != 'tensorrt' and setting.batch > 1:
        wrong = f'{runtime}: exported files take one image, not a batch of {setting.batch}'
    if wrong:
        raise ValueError(f'{candidate}: {wrong}')
    if runtime in HALF + ('executorch', ):
        require_packages(runtime)
