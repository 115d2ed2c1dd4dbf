"""Candidates of a benchmark: a network in a variant, run by a runtime in a precision."""
import difflib
import itertools
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..deploy.export import MIN_SIZE, export
from ..deploy.runtimes import PRECISIONS, SUFFIXES
from ..engine.configs import read_config
from ..models import ARCHS, ARCHS_V2, backbone_named
from ..utils.complexity import complexity
from ..utils.config import find_scope
from ..utils.modules import compile_blocks
from ..utils.stopwatch import Stopwatch
from .exported import FILES, HALF, open_file, require_packages, suffix, write_module
from .timing import Call, kept_bytes, peak_bytes

TIMM = 'timm:'
# A model of timm, the config of a whole model or an arch, and options
SPEC = re.compile(rf'({TIMM}[^:]*|.+\.py|[^:]*)(?::(.*))?')
RUNTIMES = {
    'pytorch': 'eager',
    'compile': 'torch.compile',
    'cuda-graphs': 'eager, captured in a CUDA graph',
    'onnx': 'ONNX Runtime',
    'openvino': 'OpenVINO',
    'executorch': 'ExecuTorch',
    'coreml': 'Core ML',
    'tensorrt': 'TensorRT',
}
# Precisions of torch; int8 is for exported files.
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
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
NOT_FOR_CONFIGS = {'legacy', 'with_cp'}
# Exported files are fused and have their own layout.
TORCH_ONLY = {'unfused', 'nchw', 'plain', 'with_cp'}
# 1/32 grid of the stored bias tables, as in the detectors' configs.
BIAS_GRID = 25


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
    dtype: str = 'fp32'  # one of DTYPES, other than fp32 through autocast; or INT8
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
    elif candidate.is_whole and candidate.dtype == 'fp16' and runtime not in FILES:
        wrong = 'fp16: for backbones and exported files only; choose fp32 or bf16'
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


class Built(NamedTuple):
    """A candidate ready to be timed."""

    call: Call  # runs the candidate once
    params: int  # before fusing
    macs: Optional[int]  # multiply-accumulates for one image, None if they cannot be counted
    peak_bytes: Optional[int] = None  # see timing.peak_bytes; None if unknown
    kept_bytes: Optional[int] = None  # what a forward in training keeps for the backward
    remark: str = ''  # a note for the table
    stopwatch: Optional[Stopwatch] = None  # of a whole model's parts


def build(candidate: Candidate, setting: Setting, folder: Path) -> Built:
    """Build a candidate with random weights, and run it once.

    Args:
        folder: Receives exported files; keep it as long as the candidate runs.

    Raises:
        Exception: Any error of the network, the compiler or the runtime.
    """
    torch.set_num_threads(setting.threads)
    network, remark = make(candidate, setting.shape)
    params = sum(p.numel() for p in network.parameters())
    macs = count_macs(candidate.model, setting.shape)
    network.train(setting.train)
    torch.manual_seed(0)
    image = torch.randn(setting.batch, 3, *setting.shape)
    if candidate.runtime in FILES:
        path = write_file(network, candidate, setting.shape, folder, setting.batch)
        call = open_file(candidate.runtime, path, image, setting.threads, candidate.dtype)
        call()
        return Built(call, params, macs, remark=remark)

    forward = prepare(network, candidate, setting, image)
    if setting.train:
        call = step(network, forward)
    else:
        call = torch.no_grad()(forward)
    if candidate.runtime == 'cuda-graphs':
        return Built(graphed(call), params, macs, remark=remark)
    call()  # compiles, and fills caches
    network.zero_grad(set_to_none=True)
    peak = peak_bytes(call, setting.device)
    kept = None
    if setting.train and candidate.runtime == 'pytorch':
        kept = kept_bytes(forward, [*network.parameters(), *network.buffers()])
    return Built(call, params, macs, peak, kept, remark)


def prepare(network: nn.Module, candidate: Candidate, setting: Setting, image: Tensor) -> Call:
    """Fuse a network of :func:`make`, set its memory format; return its forward of ``image``."""
    if not (candidate.is_timm or setting.train or 'unfused' in candidate.variants):
        network.switch_to_deploy()
    layout = torch.contiguous_format if 'nchw' in candidate.variants else torch.channels_last
    network.to(setting.device, memory_format=layout)
    image = image.to(setting.device, memory_format=layout)
    run = compiled(network) if candidate.runtime == 'compile' else network
    return autocast(lambda: run(image), candidate, setting)


def make(candidate: Candidate, shape: Tuple[int, int]) -> Tuple[nn.Module, str]:
    """Return the network as a backbone, and a note for the table.

    Raises:
        Exception: timm cannot build the network.
    """
    torch.manual_seed(0)
    if not candidate.is_timm:
        return backbone_named(candidate.model)(
            candidate.model, bias_grid=BIAS_GRID, out_norm_cfg=None,
            bias_mode='legacy' if 'legacy' in candidate.variants else 'offset',
            with_cp='with_cp' in candidate.variants), ''
    import timm
    # Networks for one input size need img_size; others reject it.
    name, size = candidate.model[len(TIMM):], dict(img_size=shape)
    for options in (dict(features_only=True, **size), dict(features_only=True), size, {}):
        try:
            network = timm.create_model(name, **options)
        except (TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            failure = error
            continue
        if 'features_only' in options:
            return network, ''
        network.forward = network.forward_features
        return network, 'forward_features: last features only'
    raise failure


@lru_cache
def count_macs(model: str, shape: Tuple[int, int]) -> Optional[int]:
    """Return the multiply-accumulates for one image, None if they cannot be counted."""
    try:
        return complexity(make(Candidate(model), shape)[0], shape)[-1].macs
    except Exception:  # operators may have no implementation for the meta device
        return None


def autocast(forward: Call, candidate: Candidate, setting: Setting) -> Call:
    """Return ``forward`` in the candidate's precision."""
    if candidate.dtype == 'fp32':
        return forward
    # A CUDA graph must not refer to casts of weights that the cache has freed.
    return torch.autocast(setting.device, DTYPES[candidate.dtype],
                          cache_enabled=candidate.runtime != 'cuda-graphs')(forward)


def step(network: nn.Module, forward: Call) -> Call:
    """Return forward and backward of half the sum of the outputs' squares."""

    def call():
        network.zero_grad(set_to_none=True)
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        # In the memory format of the outputs, as from a neck. The gradient of a mean is in none:
        # half of the backward of channels_last would run in NCHW.
        torch.autograd.backward(outputs, [output.detach() for output in outputs])

    return call


def compiled(network: nn.Module) -> Callable[[Tensor], Any]:
    """Return the network under torch.compile, for inputs of one size; in training, its blocks."""
    # dynamo counts each network of a class as a recompilation, and silently runs eagerly after
    # the eighth.
    config = torch._dynamo.config
    for limit in ('cache_size_limit', 'accumulated_cache_size_limit'):
        if hasattr(config, limit):  # torch 2.1 lacks one of them
            setattr(config, limit, max(getattr(config, limit), 4096))
    if network.training:  # as a whole, forward and backward take many minutes to compile
        compile_blocks(network, dynamic=False)
        return network
    # In inference, weights are constant and can be laid out for the operators in advance.
    return torch.compile(network, dynamic=False, options=dict(freezing=True))


def graphed(call: Call) -> Call:
    """Capture ``call`` in a CUDA graph; return its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing requires a warm-up on a side stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    return replay


def write_file(network: nn.Module, candidate: Candidate, shape: Tuple[int, int], folder: Path,
               batch: int = 1) -> Path:
    """Export a candidate into ``folder`` and return the path.

    Networks of this project are fused and compared with PyTorch, those of timm and files for
    TensorRT are not compared.
    """
    name, runtime = len([*folder.iterdir()]), candidate.runtime
    if candidate.is_timm or runtime == 'tensorrt':
        network = network if candidate.is_timm else network.switch_to_deploy()
        # OpenVINO reads ONNX as well.
        path = folder / f'{name}{suffix(runtime).replace(".xml", ".onnx")}'
        write_module(network, torch.zeros(batch, 3, *shape), path, runtime, candidate.dtype)
        return path
    path, options = folder / f'{name}{SUFFIXES[runtime]}', {}
    if candidate.dtype == INT8:  # rounding changes no time, so noise is enough
        options = dict(images=[torch.randn(1, 3, *shape)],
                       calibration=[torch.randn(1, 3, *shape) for _ in range(2)])
    else:
        options = dict(precision=candidate.dtype)
    export(network, path, runtime, 'backbone', shape, **options)
    return path
