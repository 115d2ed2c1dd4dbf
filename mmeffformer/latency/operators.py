"""Time of a network by kind of operator, from the profilers of the runtimes.

Section 3 of the EfficientFormer paper (https://arxiv.org/abs/2206.01191) does this on a phone. The
time of a call outside of its operators is a kind as well, so the kinds add up to the call. A
profiler costs time: each round also times the network without it, and the table has the ratio.
"""
import json
import re
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ..deploy.runtimes import INPUT
from .building import make, prepare, write_file
from .candidates import Candidate, Setting
from .exported import FILES, onnx_session, open_file, openvino_model
from .results import Results, TimerEntry, build_all, header, time_rounds
from .timing import Call, Progress, Timer, no_progress

RUNTIMES = ('pytorch', 'onnx', 'openvino')
EMBEDDING, CONVOLUTION, LINEAR, ATTENTION, OTHER, BETWEEN = (
    'patch embedding', 'convolution', 'linear', 'attention products', 'other',
    'between operators')
# Operators of PyTorch, ONNX Runtime and OpenVINO by kind: the first pattern that the type, in
# lower case without underscores, contains. Two kinds are refined by shapes: a convolution with a
# smaller output grid is a patch embedding, a product with a weight is a linear layer.
OPERATORS = {
    CONVOLUTION: r'conv(?!ert)',
    LINEAR: r'(?<!bi)linear|gemm|fullyconnected',
    'norm': r'norm|mvn',
    'activation': r'relu|gelu|silu|swish|sigmoid|hardtanh|clip|clamp|erf',
    'pooling': r'pool',
    ATTENTION: r'softmax|attention|matmul|mm$|einsum',
    'reshape': r'permute|transpose|view|reshape|flatten|contiguous|clone|copy|split|chunk|unbind'
               r'|select|slice|strided|gather|cat|expand|tile|squeeze|reorder|cast|convert|^t$',
}
KINDS = (EMBEDDING, *OPERATORS, OTHER, BETWEEN)
TOLERANCE = .1  # of the sum of all kinds, relative to the time without a profiler
MIN_MS = 100.  # of a sample, in which calls are repeated
CALL = 'mmeffformer: call'
LEGEND = ('ms and share of the sum, medians over rounds. whole: timed without a profiler. !: the '
          'sum differs from it by more than 10 %. Fused operators count as the main one.')
Kinds = Dict[str, float]  # ms by kind


def kind_of(operator: str) -> str:
    """Return the kind of a type of operator, before shapes are known."""
    name = re.sub('[_ ]', '', operator.rpartition('::')[2]).lower()
    return next((kind for kind, pattern in OPERATORS.items() if re.search(pattern, name)), OTHER)


def convolution_kind(shape_in: Sequence[int], shape_out: Sequence[int]) -> str:
    """Return the kind of a convolution from (B, C, H, W) to (B, C, H, W)."""
    return EMBEDDING if min(shape_out[2:]) < min(shape_in[2:]) else CONVOLUTION


def kinds_by_shape(network: nn.Module, image: Tensor) -> Dict[str, str]:
    """Return ``EMBEDDING`` by input and weight shape, ``LINEAR`` by (in, out), shapes as text."""
    found: Dict[str, str] = {}

    def note(module: nn.Module, inputs: Tuple[Tensor, ...], output: Tensor):
        if isinstance(module, nn.Linear):
            found[str([*module.weight.t().shape])] = LINEAR
        elif convolution_kind(inputs[0].shape, output.shape) == EMBEDDING:
            found[str([[*inputs[0].shape], [*module.weight.shape]])] = EMBEDDING

    hooks = [module.register_forward_hook(note) for module in network.modules()
             if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def profile_torch(call: Call, by_shape: Mapping[str, str], device: str, repeats: int) -> Kinds:
    """Return the mean of some calls by PyTorch's profiler, each operator without those inside.

    On a GPU, the time of an operator is that of its kernels, and ``BETWEEN`` is the time without
    a kernel, in calls without the profiler.
    """
    call()
    on_gpu = device == 'cuda'
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(repeats):
            with record_function(CALL):
                call()
        if on_gpu:
            torch.cuda.synchronize()
    kinds = dict.fromkeys(KINDS, 0.)
    for each in profiled.key_averages(group_by_input_shape=True):
        if on_gpu and (each.device_type != DeviceType.CPU or each.key == CALL):
            continue  # a kernel, whose time its operator has
        kind = BETWEEN if each.key == CALL else kind_of(each.key)
        if kind == CONVOLUTION:
            kind = by_shape.get(str(each.input_shapes[:2]), kind)
        elif kind == ATTENTION and any(str(shape) in by_shape for shape in each.input_shapes):
            kind = LINEAR
        us = each.self_device_time_total if on_gpu else each.self_cpu_time_total
        kinds[kind] += us / 1e3 / repeats
    if on_gpu:
        kinds[BETWEEN] = Timer(call, device)() - sum(kinds.values())
    return kinds


def profile_onnx(path: Path, image: Tensor, threads: int, repeats: int) -> Kinds:
    """Return the mean of some calls by the profile that ONNX Runtime writes."""
    session, array = onnx_session(path, threads, path.with_suffix('')), image.numpy()
    calls_ms = _times_ms(lambda: session.run(None, {INPUT: array}), repeats + 1)
    file = Path(session.end_profiling())
    events = sorted(json.loads(file.read_text()), key=lambda event: event['ts'])
    file.unlink()
    starts = [event['ts'] for event in events if event['name'] == 'model_run']
    kinds = dict.fromkeys(KINDS, 0.)
    for event in events:  # those of the first call are a warm-up
        if event['name'].endswith('_kernel_time') and event['ts'] >= starts[1]:
            kind = kind_of(event['args']['op_name'])
            shapes, outputs = ([next(iter(each.values()), []) for each in event['args'][name]]
                               for name in ('input_type_shape', 'output_type_shape'))
            if kind == CONVOLUTION:
                kind = convolution_kind(shapes[0], outputs[0])
            elif kind == ATTENTION and 'mul' in event['args']['op_name'].lower():
                # The runtime does not list a weight that it has packed.
                kind = ATTENTION if sum(len(shape) > 2 for shape in shapes) > 1 else LINEAR
            kinds[kind] += event['dur'] / 1e3 / repeats
    kinds[BETWEEN] = float(np.mean(calls_ms[1:])) - sum(kinds.values())
    return kinds


def profile_openvino(path: Path, image: Tensor, threads: int, repeats: int) -> Kinds:
    """Return the mean of some calls by OpenVINO's profiling info."""
    model = openvino_model(path, threads, PERF_COUNT=True)
    request, array = model.create_infer_request(), image.numpy()
    operators = {op.get_friendly_name(): op for op in model.get_runtime_model().get_ops()}
    totals: List[Dict[str, float]] = []  # ms by operator: the info is the mean of all calls
    for calls in (2, repeats):  # the first two are a warm-up
        calls_ms = _times_ms(lambda: request.infer([array], share_inputs=True), calls)
        info, done = request.get_profiling_info(), 2 + len(totals) * repeats
        totals.append({each.node_name: 1e3 * each.real_time.total_seconds() * done
                       for each in info})
    kinds = dict.fromkeys(KINDS, 0.)
    for node in info:
        operator = operators.get(node.node_name)
        if operator is None or not operator.inputs():  # fused into another one, or an input
            continue
        kind = kind_of(node.node_type)
        if kind == CONVOLUTION:
            kind = convolution_kind(operator.get_input_shape(0), operator.get_output_shape(0))
        elif node.node_type == 'Subgraph':  # arithmetic, or attention fused into one operator
            layers = operator.get_rt_info()['originalLayersNames'].astype(str)
            kind = ATTENTION if re.search('MatMul|Softmax', layers) else OTHER
        kinds[kind] += (totals[1][node.node_name] - totals[0][node.node_name]) / repeats
    kinds[BETWEEN] = float(np.mean(calls_ms)) - sum(kinds.values())
    return kinds


def _times_ms(call: Call, count: int) -> List[float]:
    stamps = [time.perf_counter()]
    for _ in range(count):
        call()
        stamps.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in zip(stamps, stamps[1:])]


def profiler(network: nn.Module, candidate: Candidate, setting: Setting, folder: Path
             ) -> Tuple[Call, Callable[[int], Kinds]]:
    """Return a call of a network of :func:`make`, and a profiler of N such calls."""
    torch.set_num_threads(setting.threads)
    network.eval()
    torch.manual_seed(0)
    image = torch.randn(setting.batch, 3, *setting.shape)
    if candidate.runtime not in FILES:
        by_shape = kinds_by_shape(network, image)
        call = torch.no_grad()(prepare(network, candidate, setting, image))
        return call, partial(profile_torch, call, by_shape, setting.device)
    path = write_file(network, candidate, setting.shape, folder)
    run_profile = profile_onnx if candidate.runtime == 'onnx' else profile_openvino
    return (open_file(candidate.runtime, path, image, setting.threads),
            partial(run_profile, path, image, setting.threads))


def run(chosen: Sequence[Candidate], setting: Setting, rounds: int, seed: int, out: Path,
        progress: Progress = no_progress) -> Results:
    """Profile all candidates in rounds; return the results, see :func:`.benchmark.run`."""
    results = dict(header=header(setting, rounds, seed), candidates=[], observations=[])
    timers: List[TimerEntry] = []
    with tempfile.TemporaryDirectory() as folder:

        def add(candidate: Candidate, entry: Dict[str, Any]):
            network, _ = make(candidate, setting.shape)
            call, profiled = profiler(network, candidate, setting, Path(folder))
            timer, name, entry['kinds'] = (Timer(call, setting.device, min_ms=MIN_MS),
                                           entry['name'], [])
            timers.append((name, timer, entry['samples_ms']))
            timers.append((f'{name}, profiled', partial(profiled, timer.repeats), entry['kinds']))

        build_all(results, list(dict.fromkeys(chosen)), add, progress)
        time_rounds(results, timers, out, progress)
        timers.clear()  # before the exported files are deleted
    return results


def medians(entry: Mapping[str, Any]) -> Kinds:
    """Return the ms of each kind, the median over rounds."""
    return {kind: float(np.median([kinds[kind] for kinds in entry['kinds']])) for kind in KINDS}


def table(results: Results) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and one row of texts per candidate, sorted by runtime."""
    columns = ['model', *KINDS, 'sum', 'whole', 'ratio']
    rows = []
    for entry in sorted(results['candidates'], key=lambda entry: RUNTIMES.index(entry['runtime'])):
        if not entry['samples_ms']:
            why = ' '.join((entry['error'] or 'no round was finished').split())[:160]
            rows.append([entry['name'], f'failed: {why}', *[''] * (len(columns) - 2)])
            continue
        kinds, total = medians(entry), sum(medians(entry).values())
        ratio = np.median([sum(each.values()) / whole
                           for each, whole in zip(entry['kinds'], entry['samples_ms'])])
        rows.append([
            entry['name'], *(f'{ms:.2f} ({ms / total:.0%})' if abs(ms) >= .005 else '–'
                             for ms in kinds.values()),
            f'{total:.1f}', f'{np.median(entry["samples_ms"]):.1f}',
            f'{ratio:.2f}{" !" if abs(ratio - 1) > TOLERANCE else ""}'])
    return columns, rows


def bars(results: Results, runtime: str) -> Dict[str, Tuple[Kinds, float]]:
    """Return the ms of each kind and the ms without a profiler, by model."""
    return {entry['name'].replace(f':{runtime}', ''):
            (medians(entry), float(np.median(entry['samples_ms'])))
            for entry in results['candidates']
            if entry['runtime'] == runtime and entry['samples_ms']}
