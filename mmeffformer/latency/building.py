"""Networks of the candidates, built and ready to be timed."""
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from ..deploy.export import export
from ..deploy.runtimes import SUFFIXES
from ..models import backbone_named
from ..utils.complexity import complexity
from ..utils.modules import compile_blocks
from ..utils.stopwatch import Stopwatch
from .candidates import DTYPES, INT8, TIMM, Candidate, Setting
from .exported import FILES, open_file, suffix, write_module
from .timing import Call, kept_bytes, peak_bytes

# 1/32 grid of the stored bias tables, as in the detectors' configs.
BIAS_GRID = 25


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
    if candidate.runtime == 'cuda-graphs' or (
            candidate.runtime == 'compile' and setting.device == 'cuda' and not setting.train):
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
    if not (setting.train or 'unfused' in candidate.variants):
        network = deployed(network, candidate)
    layout = torch.contiguous_format if 'nchw' in candidate.variants else torch.channels_last
    # On a GPU, kernels that cast weights and activations would take longer than small layers.
    dtype = (DTYPES[candidate.dtype] if setting.device == 'cuda' and not setting.train
             else torch.float32)
    network.to(setting.device, dtype, memory_format=layout)
    image = image.to(setting.device, dtype, memory_format=layout)
    run = compiled(network) if candidate.runtime == 'compile' else network
    return in_precision(lambda: run(image), candidate, setting)


def deployed(network: nn.Module, candidate: Candidate) -> nn.Module:
    """Return a network of :func:`make` as it is meant to be deployed.

    This project's are fused; of timm's, those with branches for training only lose these.
    """
    if not candidate.is_timm:
        return network.switch_to_deploy()
    from timm.utils import reparameterize_model
    return reparameterize_model(network.eval())


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


def in_precision(forward: Call, candidate: Candidate, setting: Setting) -> Call:
    """Return ``forward`` in the candidate's precision, by autocast where its weights are fp32."""
    if setting.device == 'cuda':
        forward = set_tf32(forward, candidate.dtype)
        if not setting.train:
            return forward
    dtype = DTYPES[candidate.dtype]
    return forward if dtype == torch.float32 else torch.autocast(setting.device, dtype)(forward)


def set_tf32(call: Call, dtype: str) -> Call:
    """Return ``call`` that lets a GPU use TF32 only if ``dtype`` is 'tf32'."""

    def with_setting() -> Any:
        # Not restored: every call in a benchmark sets it.
        torch.backends.cuda.matmul.allow_tf32 = dtype == 'tf32'
        torch.backends.cudnn.allow_tf32 = dtype == 'tf32'
        return call()

    return with_setting


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
    """Capture ``call`` in a CUDA graph; return its replay, which keeps what ``call`` needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capturing requires a warm-up on a side stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay(call: Call = call) -> Any:  # the graph reads the memory of the weights
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
        network = deployed(network, candidate)
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
