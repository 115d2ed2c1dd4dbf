"""What can be timed: a network, in a variant, run by a runtime in a precision."""
import difflib
import itertools
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..deploy.export import MIN_SIZE, OPSET, export
from ..deploy.runtimes import INPUT, SUFFIXES, openvino_core, require
from ..models import ARCHS, ARCHS_V2, backbone_named
from ..utils.complexity import complexity
from .timing import Call, kept_bytes, peak_bytes

TIMM = 'timm:'
RUNTIMES = {
    'pytorch': 'eager',
    'compile': 'torch.compile',
    'cuda-graphs': 'eager, captured in a CUDA graph',
    'onnx': 'ONNX Runtime',
    'openvino': 'OpenVINO',
}
FILES = ('onnx', 'openvino')  # run exported files
# Precisions that torch computes in; and int8, of OpenVINO's files.
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
INT8 = 'int8'
VARIANTS = {
    'legacy': "bias_mode='legacy': the bias as the authors' dense code computes it, and what "
              'their formulas keep kept for backward',
    'unfused': 'norms and layer scales by themselves, as in training',
    'nchw': 'memory format NCHW instead of channels_last',
    'with_cp': 'activations recomputed in backward (training)',
}
OURS_ONLY = {'legacy', 'unfused', 'with_cp'}
TORCH_ONLY = {'unfused', 'nchw', 'with_cp'}  # an exported file is fused, and has its own layout
# Of the 1/32 grid that the bias tables are stored for, as in the detectors' configs.
BIAS_GRID = 25


@dataclass(frozen=True)
class Setting:
    """What all candidates have in common.

    Attributes:
        shape: H, W of the images in px.
        batch: Number of images.
        threads: Of the CPU.
        device: 'cpu' or 'cuda'.
        train: Time forward and backward instead of inference.

    Raises:
        ValueError: A value is out of range, or there is no such device.
    """

    shape: Tuple[int, int] = (224, 224)
    batch: int = 1
    threads: int = 1
    device: str = 'cpu'
    train: bool = False

    def __post_init__(self):
        if min(self.shape) < MIN_SIZE:
            raise ValueError(f'shape of {self.shape[0]} x {self.shape[1]} px: both must be at '
                             f'least {MIN_SIZE}')
        for name in ('batch', 'threads'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} {getattr(self, name)}: expected 1 or more')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('device cuda: torch finds no GPU here; use --device cpu')


@dataclass(frozen=True)
class Candidate:
    """One thing to time. ``str()`` of it is a spec that :func:`candidates` reads.

    Attributes:
        model: One of ours, or 'timm:' and a name of timm's.
        runtime: One of ``RUNTIMES``.
        dtype: One of ``DTYPES``, other than fp32 through autocast; or 'int8'.
        variants: Some of ``VARIANTS``.
    """

    model: str
    runtime: str = 'pytorch'
    dtype: str = 'fp32'
    variants: Tuple[str, ...] = ()

    def __str__(self) -> str:
        options = [*self.variants, *[self.runtime] * (self.runtime != 'pytorch'),
                   *[self.dtype] * (self.dtype != 'fp32')]
        return self.model + (f':{",".join(options)}' if options else '')

    @property
    def ours(self) -> bool:
        return not self.model.startswith(TIMM)


def candidates(spec: str, runtimes: Sequence[str] = ('pytorch',), dtype: str = 'fp32',
               setting: Setting = Setting()) -> List[Candidate]:
    """Return the candidates that a spec, ``MODEL`` or ``MODEL:OPTION,OPTION``, stands for.

    Options are names out of ``VARIANTS``, ``RUNTIMES`` and ``DTYPES``, and 'int8'.

    Args:
        spec: As 'l3', 'l3:legacy,nchw', 'timm:resnet50' or 'timm:resnet50:compile'.
        runtimes: What to run it with where it does not say so. Of these, a variant that
            concerns PyTorch alone leaves out those which run exported files.
        dtype: Its precision where it does not say so.

    Raises:
        ValueError: The model or an option is unknown, or does not go with another, or
            timm is needed and not installed.
    """
    head, colon, options = spec[len(TIMM):].partition(':') if spec.startswith(TIMM) \
        else spec.partition(':')
    model = TIMM + head if spec.startswith(TIMM) else head
    options, known = options.split(',') if colon else [], (*VARIANTS, *RUNTIMES, *DTYPES, INT8)
    for option in options:
        if option not in known:
            raise ValueError(f'{spec}: option {option!r} is unknown; choose from '
                             f'{", ".join(known)}')
    _check_model(model)
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
    found = [Candidate(model, *each, variants)
             for each in itertools.product(named or runtimes, dtypes)]
    for candidate in found:
        _check(candidate, setting)
    return found


def _check_model(model: str):
    ours = [*ARCHS, *ARCHS_V2]
    if not model.startswith(TIMM):
        if model in ours:
            return
        raise ValueError(f'model {model!r} is unknown; choose from {", ".join(ours)}, or write '
                         f'{TIMM}NAME for a model of timm, as {TIMM}'
                         f'{model if model in _timm_names() else "resnet50"}')
    try:
        import timm
    except ImportError as error:
        raise ValueError(f'{model} needs the package timm, which is not installed: pip install '
                         'timm') from error
    name = model[len(TIMM):]
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, _timm_names(), 3)
        raise ValueError(f'timm {timm.__version__} has no model {name!r}'
                         + (f'; it has {", ".join(close)}' if close else ''))


@lru_cache
def _timm_names() -> List[str]:
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()


def _check(candidate: Candidate, setting: Setting):
    variants, runtime = {*candidate.variants}, candidate.runtime
    wrong = None
    if not candidate.ours and variants & OURS_ONLY:
        wrong = f'{", ".join(sorted(variants & OURS_ONLY))}: for models of this project only'
    elif runtime in FILES and variants & TORCH_ONLY:
        wrong = f'{", ".join(sorted(variants & TORCH_ONLY))}: not with {runtime}'
    elif setting.train and runtime not in ('pytorch', 'compile'):
        wrong = f'{runtime}: for inference only; training takes pytorch and compile'
    elif setting.train and 'unfused' in variants:
        wrong = 'unfused: a network in training always is'
    elif not setting.train and 'with_cp' in variants:
        wrong = 'with_cp: for training only'
    elif runtime == 'cuda-graphs' and setting.device != 'cuda':
        wrong = 'cuda-graphs: for --device cuda only'
    elif runtime in FILES and setting.device != 'cpu':
        wrong = f'{runtime}: for --device cpu only'
    elif candidate.dtype == INT8 and not (candidate.ours and runtime == 'openvino'):
        wrong = 'int8: for models of this project, with openvino'
    elif runtime in FILES and candidate.dtype not in ('fp32', INT8):
        wrong = f'{runtime}: in fp32 only, not {candidate.dtype}'
    elif runtime in FILES and setting.batch > 1:
        wrong = f'{runtime}: exported files take one image, not a batch of {setting.batch}'
    if wrong:
        raise ValueError(f'{candidate}: {wrong}')


class Built(NamedTuple):
    """A candidate ready to be timed.

    Attributes:
        call: Runs it once.
        params: Number of parameters, before fusing.
        macs: Multiply-accumulates for one image; None if they cannot be counted.
        peak_bytes: See :func:`mmeffformer.latency.timing.peak_bytes`; None if not known.
        kept_bytes: What a forward in training keeps for the backward.
        remark: What else there is to say of it.
    """

    call: Call
    params: int
    macs: Optional[int]
    peak_bytes: Optional[int] = None
    kept_bytes: Optional[int] = None
    remark: str = ''


def build(candidate: Candidate, setting: Setting, folder: Path) -> Built:
    """Build a candidate, with random weights, and run it.

    Args:
        folder: Where exported files go, which may be deleted when nothing runs any more.

    Raises:
        Exception: Anything that a network, a compiler or a runtime fails with.
    """
    torch.set_num_threads(setting.threads)
    network, remark = make(candidate, setting.shape)
    params = sum(p.numel() for p in network.parameters())
    macs = count_macs(candidate.model, setting.shape)
    network.train(setting.train)  # a timm network returns itself, ours too, others need not
    torch.manual_seed(0)
    image = torch.randn(setting.batch, 3, *setting.shape)
    if candidate.runtime in FILES:
        path = folder / f'{len([*folder.iterdir()])}{SUFFIXES[candidate.runtime]}'
        write_file(network, candidate, setting.shape, path)
        call = OPEN[candidate.runtime](path, image, setting.threads)
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
    """Fuse and lay out a network of :func:`make` for PyTorch; return its forward of ``image``."""
    if candidate.ours and not setting.train and 'unfused' not in candidate.variants:
        network.switch_to_deploy()
    layout = torch.contiguous_format if 'nchw' in candidate.variants else torch.channels_last
    network.to(setting.device, memory_format=layout)
    image = image.to(setting.device, memory_format=layout)
    run = compiled(network) if candidate.runtime == 'compile' else network
    return autocast(lambda: run(image), candidate, setting)


def make(candidate: Candidate, shape: Tuple[int, int]) -> Tuple[nn.Module, str]:
    """Return the network as a backbone, and a remark on it."""
    torch.manual_seed(0)
    if candidate.ours:
        return backbone_named(candidate.model)(
            candidate.model, bias_grid=BIAS_GRID, out_norm_cfg=None,
            bias_mode='legacy' if 'legacy' in candidate.variants else 'offset',
            with_cp='with_cp' in candidate.variants), ''
    import timm
    # A network of one size takes it as img_size, which others do not know.
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
        return network, 'forward_features, the last features alone'
    raise failure


@lru_cache
def count_macs(model: str, shape: Tuple[int, int]) -> Optional[int]:
    """Return the multiply-accumulates of a model for one image, None if they cannot be counted."""
    try:
        return complexity(make(Candidate(model), shape)[0], shape)[-1].macs
    except Exception:  # any operator may lack an implementation without data
        return None


def autocast(forward: Call, candidate: Candidate, setting: Setting) -> Call:
    if candidate.dtype == 'fp32':
        return forward
    # A graph must not hold weights that a cache cast and then forgot.
    return torch.autocast(setting.device, DTYPES[candidate.dtype],
                          cache_enabled=candidate.runtime != 'cuda-graphs')(forward)


def step(network: nn.Module, forward: Call) -> Call:
    """Return forward and backward of the sum of the outputs' means."""

    def call():
        network.zero_grad(set_to_none=True)
        outputs = forward()
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        sum(output.float().mean() for output in outputs).backward()

    return call


def compiled(network: nn.Module) -> Callable[[Tensor], Any]:
    # Each network of a class counts as a recompilation of it, and from the eighth on dynamo
    # would run eagerly without a word.
    config = torch._dynamo.config
    for limit in ('cache_size_limit', 'accumulated_cache_size_limit'):
        if hasattr(config, limit):  # torch 2.1 has not both
            setattr(config, limit, max(getattr(config, limit), 4096))
    # Weights that stay as they are may be laid out for the operators beforehand.
    options = {} if network.training else dict(freezing=True)
    return torch.compile(network, dynamic=False, options=options)


def graphed(call: Call) -> Call:
    """Return the replay of what ``call`` does on the GPU."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warmed up aside, as capturing demands
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


def write_file(network: nn.Module, candidate: Candidate, shape: Tuple[int, int], path: Path):
    """Export to ``path``: ours fused and compared with PyTorch, timm's as they are."""
    to = candidate.runtime
    if candidate.ours:
        int8 = {}
        if candidate.dtype == INT8:  # what is rounded changes no time, so noise will do
            int8 = dict(images=[torch.randn(1, 3, *shape)],
                        calibration=[torch.randn(1, 3, *shape) for _ in range(2)])
        export(network, path, to, 'backbone', shape, **int8)
        return
    write_graph(network, torch.zeros(1, 3, *shape), to, path)


def write_graph(module: nn.Module, image: Tensor, to: str, path: Path):
    """Export a module as it is, for inputs like ``image``, and compare nothing.

    To 'openvino' goes by way of an ONNX file beside.
    """
    require('onnx', to)
    onnx = path.with_suffix('.onnx')
    new = {} if torch.__version__ < '2.5' else dict(dynamo=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # what the tracer says of shapes, and of its own age
        torch.onnx.export(module, (image, ), str(onnx), input_names=[INPUT],
                          opset_version=OPSET, **new)
    if to == 'openvino':
        openvino = require('openvino', to)
        openvino.save_model(openvino.convert_model(str(onnx)), str(path), compress_to_fp16=False)


def onnx_session(path: Path, threads: int, profiled: Optional[Path] = None):
    """Open a session.

    Args:
        profiled: What the name of its profile begins with, a file that it writes in the end.
    """
    runtime = require('onnxruntime', 'onnx')
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # Else its threads go on turning after a call, in the way of who is timed next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    if profiled:
        options.enable_profiling, options.profile_file_prefix = True, str(profiled)
    return runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def open_onnx(path: Path, image: Tensor, threads: int) -> Call:
    session, inputs = onnx_session(path, threads), {INPUT: image.numpy()}
    return lambda: session.run(None, inputs)


def openvino_model(path: Path, threads: int, **properties: Any):
    """Compile a file, with properties of OpenVINO's besides ours."""
    return openvino_core().compile_model(str(path), 'CPU', {
        'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads,
        'PERFORMANCE_HINT': 'LATENCY', **properties})


def open_openvino(path: Path, image: Tensor, threads: int) -> Call:
    request, array = openvino_model(path, threads).create_infer_request(), image.numpy()
    return lambda: request.infer([array], share_inputs=True)


OPEN = {'onnx': open_onnx, 'openvino': open_openvino}
