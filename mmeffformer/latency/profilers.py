"""What runtimes' own profilers tell of a call: its operators, their times, and their kinds.

Which module an operator belongs to says of what kind it is. PyTorch's are told apart by hooks,
in a call that is not timed; those of exported files by the names of nodes, which begin with the
module's.
"""
import json
import re
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.profiler import ProfilerActivity, profile, record_function

from ..deploy.runtimes import INPUT, require
from .candidates import onnx_session, openvino_model
from .timing import Call

EMBEDDING, CONVOLUTION, LINEAR, NORM, ACTIVATION, POOLING, ATTENTION, RESHAPE, OTHER, BETWEEN = \
    KINDS = ('patch embedding', 'convolution', 'linear', 'norm', 'activation', 'pooling',
             'attention products', 'reshape', 'other', 'between operators')
# Kinds by type of operator, PyTorch's, ONNX's and OpenVINO's, in small letters and without _.
# Of a matrix product, and of arithmetic, which is in no list, the module says the kind.
PRODUCT = 'product'
TYPES = {name: kind for kind, names in {
    CONVOLUTION: 'conv1d conv2d conv3d convolution mkldnnconvolution convolutionpointwise conv '
                 'fusedconv groupconvolution',
    LINEAR: 'linear gemm fullyconnected',
    NORM: 'batchnorm layernorm groupnorm instancenorm batchnormalization layernormalization '
          'skiplayernormalization groupnormalization instancenormalization mvn',
    ACTIVATION: 'relu relu6 gelu silu swish hardtanh hardswish hswish hardsigmoid hsigmoid '
                'sigmoid quickgelu biasgelu fastgelu clip clamp erf',
    POOLING: 'avgpool2d maxpool2d adaptiveavgpool2d averagepool maxpool avgpool pooling '
             'globalaveragepool adaptiveavgpool',
    ATTENTION: 'softmax scaleddotproductattention attention multiheadattention',
    RESHAPE: 'permute transpose t view viewas reshape reshapeas flatten unflatten contiguous '
             'clone copy to tocopy split splitwithsizes variadicsplit chunk unbind select slice '
             'stridedslice index indexselect gather cat concat expand tile broadcast squeeze '
             'unsqueeze reorder reorderinput reorderoutput depthtospace spacetodepth cast convert '
             'identity shape numpyt',
    OTHER: 'resize interpolate upsamplebilinear2d upsamplenearest2d upsamplebicubic2d pad',
    PRODUCT: 'matmul fusedmatmul bmm mm addmm addbmm baddbmm einsum',
}.items() for name in names.split()}
# Of operators within another: what copies is no part of its work.
COPIES = {'aten::copy_', 'aten::clone', 'aten::contiguous', 'aten::to', 'aten::_to_copy'}


class Ran(NamedTuple):
    """An operator that ran: its type, the module it belongs to ('?' if not known), and its ms."""

    type: str
    scope: str
    ms: float


class Sample(NamedTuple):
    """The mean of some calls: its ms, and what runs in it, in the order of time."""

    whole_ms: float
    operators: Sequence[Ran]

    @property
    def between_ms(self) -> float:
        """What operators leave of the whole: dispatch, Python, and the profiler itself."""
        return self.whole_ms - sum(ran.ms for ran in self.operators)


# Modules -------------------------------------------------------------------------------------


class Modules:
    """What the modules of a network say of the operators in them.

    A patch embedding is a convolution with a stride, unless it is a depthwise one within
    attention, with the norm and the activation right after it that are of the same module.

    Args:
        network: Not fused. It is run once, as the order of modules is not known before.
        image: What it is run with.
    """

    def __init__(self, network: nn.Module, image: Tensor):
        self.modules = dict(network.named_modules())
        # timm puts some networks into another module, which calls a method of theirs: exported
        # files do not name them.
        inner = [name for name, _ in network.named_children()]
        self.inner = inner[0] if len(inner) == 1 else ''
        order = self._order(network, image)
        self.followers: Dict[str, List[str]] = {}  # norm and activation after a conv or linear
        for i, name in enumerate(order):
            if self._category(name) not in (CONVOLUTION, LINEAR):
                continue
            taken = self.followers[name] = []
            for after in order[i + 1:]:
                parent = after.rpartition('.')[0]
                if self._category(after) not in (NORM, ACTIVATION) or not (
                        parent in taken or parent == name.rpartition('.')[0]
                        or _within(name, parent)
                        and isinstance(self.modules[parent], nn.Sequential)):
                    break
                taken.append(after)
        self.embeddings = set()
        for name in self.followers:
            if self._embeds(name):
                self.embeddings |= {name, *self.followers[name]}
        # A fused module runs what is inside by itself.
        for name in [name for name in self.embeddings if name in self.followers]:
            parent = name.rpartition('.')[0]
            leaves = {leaf for leaf in order if parent and _within(leaf, parent)}
            if leaves and leaves <= {name, *self.followers[name]}:
                self.embeddings.add(parent)
                self.followers[parent] = self.followers[name]

    def _order(self, network: nn.Module, image: Tensor) -> List[str]:
        """Return the modules without parts, but for identities, in the order they run."""
        order: List[str] = []
        hooks = [module.register_forward_hook(lambda *_, name=name: order.append(name))
                 for name, module in self.modules.items()
                 if name and not isinstance(module, (nn.Identity, nn.Dropout))
                 and (self._category(name) or not any(module.children()))]
        try:
            with torch.no_grad():
                network(image)
        finally:
            for hook in hooks:
                hook.remove()
        # A norm that has its activation inside ends after that.
        for i in range(1, len(order)):
            if self._category(order[i]) == NORM and _within(order[i - 1], order[i]):
                order[i - 1], order[i] = order[i], order[i - 1]
        return order

    def _embeds(self, name: str) -> bool:
        module = self.modules[name]
        if not isinstance(module, nn.Conv2d) or max(module.stride) == 1:
            return False
        parents = name.split('.')[:-1]
        attends = any(self._attends('.'.join(parents[:i + 1])) for i in range(len(parents)))
        return not (attends and module.groups > 1)

    def _attends(self, name: str) -> bool:
        cls = type(self.modules[name]).__name__  # a block holds more than its attention
        return 'Attention' in cls and not cls.endswith('Block')

    def _category(self, name: str) -> Optional[str]:
        module = self.modules[name]
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return CONVOLUTION
        if isinstance(module, nn.Linear):
            return LINEAR
        if isinstance(module, (_NormBase, nn.LayerNorm, nn.GroupNorm)):
            return NORM
        if re.search(r'\.activations?(_me)?$', type(module).__module__) and not isinstance(
                module, (nn.Softmax, nn.MultiheadAttention)):
            return ACTIVATION
        return None

    def find(self, node: str) -> str:
        """Return the module that a node of an exported file is named after, '?' if it is of none.

        Names are as '/stages.0/blocks/blocks.1/conv/Conv': a part may repeat the one before it.
        """
        parts: List[str] = []
        for part in node.strip('/').split('/')[:-1]:
            if parts and part.startswith(f'{parts[-1]}.'):
                parts.pop()
            parts.append(part)
        # Around our networks are others, when they are exported.
        for start in range(len(parts)):
            for end in range(len(parts), start, -1):
                for name in ('.'.join(parts[start:end]), '.'.join([self.inner, *parts[:end]])):
                    if name in self.modules:
                        return name
        return '' if node.startswith('/') and not parts else '?'

    def kinds(self, operators: Sequence[Ran]) -> List[str]:
        """Return the kind of each operator. Those of no known module go with the one before."""
        kinds, scope, before = [], '?', OTHER
        for ran in operators:
            kind = TYPES.get(re.sub('[_ ]', '', ran.type).lower())
            known = ran.scope in self.modules
            category = self._category(ran.scope) if known else None
            after = [self._category(name) for name in self.followers.get(scope, [])]
            if kind == PRODUCT:
                kind = LINEAR if category == LINEAR else ATTENTION
            elif kind is None and known:  # arithmetic
                kind = category or (ATTENTION if self._attends(ran.scope) else OTHER)
            elif kind is None and before == ACTIVATION:  # its factor
                kind = ACTIVATION
            elif kind is None and NORM in after and before in (CONVOLUTION, LINEAR):
                kind = NORM
            elif kind is None:
                kind = ATTENTION if scope in self.modules and self._attends(scope) else OTHER
            if kind in (CONVOLUTION, NORM, ACTIVATION) and (
                    ran.scope in self.embeddings
                    or not known and before == EMBEDDING and kind in after):
                kind = EMBEDDING
            kinds.append(kind)
            if kind != RESHAPE:
                before = kind
            if known:
                scope = ran.scope
        return kinds


def _within(name: str, parent: str) -> bool:
    return not parent or name.startswith(f'{parent}.')


def by_kind(modules: Modules, sample: Sample) -> Dict[str, float]:
    """Return the ms of each of ``KINDS`` in a sample, which sum up to its whole."""
    sums = dict.fromkeys(KINDS, 0.)
    for kind, ran in zip(modules.kinds(sample.operators), sample.operators):
        sums[kind] += ran.ms
    sums[BETWEEN] = sample.between_ms
    return sums


# Profilers -----------------------------------------------------------------------------------


ATTEMPTS = 3  # a call on a busy machine once seemed to have other operators than the rest


class TorchProfiler:
    """PyTorch's profiler.

    Each operator's own time is taken, with that of the operators in it: but copies in it are
    operators by themselves.

    Args:
        network: What is called.
        call: Calls it.
    """

    CALL, SCOPE = 'mmeffformer: call', 'mmeffformer: '

    def __init__(self, network: nn.Module, call: Call):
        self.call, self.samples = call, []
        with self._told(network):
            events = self._events(8)
        self.within = {pair for event in events for pair in _nested(event)}
        tops = min(([*self._tops(event, '')] for event in events), key=len)
        # Module and name of each operator, and whether it copies.
        self.expected = [(scope, each.name, each.name not in COPIES and any(_copies(each)))
                         for scope, each in tops]

    def __call__(self, repeats: int):
        calls = []
        for event, tops in self._as_expected(repeats):
            operators = []
            for (scope, name, copies), top in zip(self.expected, tops):
                copied_ms = sum(map(_ms, _copies(top))) if copies else 0.
                operators.append(Ran(_type(name), scope, _ms(top) - copied_ms))
                operators += [Ran('copy', scope, copied_ms)] * copies
            calls.append(Sample(_ms(event), operators))
        self.samples.append(_mean(calls))

    def collect(self) -> List[Sample]:
        return self.samples

    def _as_expected(self, repeats: int) -> List[Tuple[Any, List]]:
        """Return calls, each with its operators, where all calls have those that are expected."""
        names = [name for _, name, _ in self.expected]
        for _ in range(ATTEMPTS):
            calls = [(event, [each for _, each in self._tops(event, '')])
                     for event in self._events(repeats)]
            if all([each.name for each in tops] == names for _, tops in calls):
                return calls
        raise RuntimeError('the network does not run the same operators in every call, so it is '
                           'not known which module each belongs to')

    def _events(self, repeats: int) -> List:
        """Return an event for each of some calls, after one that does not count."""
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.call()
            for _ in range(repeats):
                with record_function(self.CALL):
                    self.call()
        return [event for event in profiled.events() if event.name == self.CALL]

    @contextmanager
    def _told(self, network: nn.Module) -> Iterator[None]:
        """Let the profiler tell which modules run."""
        open_: List[record_function] = []

        def enter(name: str):
            open_.append(record_function(self.SCOPE + name))
            open_[-1].__enter__()

        hooks = []
        for name, module in network.named_modules():
            hooks += [
                module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
                module.register_forward_hook(lambda *_: open_.pop().__exit__(None, None, None))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _tops(self, event, scope: str) -> Iterator[Tuple[str, Any]]:
        """Yield the operators that are in no other, each with the module it is in.

        Where times are whole microseconds (torch 2.1), a part of an operator may seem to come
        right after it.
        """
        last = None
        for each in event.cpu_children:
            start = each.time_range.start
            if (isinstance(start, int) and last and start <= last.time_range.end + 1
                    and (last.name, each.name) in self.within):
                continue
            last = each
            if each.name.startswith(self.SCOPE):
                yield from self._tops(each, each.name[len(self.SCOPE):])
            else:
                yield scope, each


def _mean(calls: Sequence[Sample]) -> Sample:
    """Return the mean of calls that run the same operators."""
    operators = [Ran(each[0].type, each[0].scope, float(np.mean([ran.ms for ran in each])))
                 for each in zip(*(call.operators for call in calls))]
    return Sample(float(np.mean([call.whole_ms for call in calls])), operators)


def _nested(event) -> Iterator[Tuple[str, str]]:
    for each in event.cpu_children:
        yield event.name, each.name
        yield from _nested(each)


def _ms(event) -> float:
    return event.time_range.elapsed_us() / 1e3


def _type(name: str) -> str:
    return name.rpartition('::')[2].strip('_')


def _copies(event) -> Iterator:
    for each in event.cpu_children:
        if each.name in COPIES:
            yield each
        else:
            yield from _copies(each)


class OnnxProfiler:
    """ONNX Runtime's, which writes a file when it ends."""

    END = '_kernel_time'

    def __init__(self, path: Path, image: Tensor, threads: int, modules: Modules):
        self.session = onnx_session(path, threads, path.with_suffix(''))
        self.inputs, self.modules = {INPUT: image.numpy()}, modules
        self.origins = _Origins(path)
        self.rounds: List[List[float]] = []  # ms of each round's calls

    def __call__(self, repeats: int):
        self.rounds.append([])
        for _ in range(repeats + 1):
            start = time.perf_counter()
            self.session.run(None, self.inputs)
            self.rounds[-1].append(1e3 * (time.perf_counter() - start))

    def collect(self) -> List[Sample]:
        path = Path(self.session.end_profiling())
        events = sorted(json.loads(path.read_text()), key=lambda event: (
            event['ts'], -event['dur']))
        path.unlink()
        calls: List[List[Ran]] = []
        for event in events:  # a call starts before its operators
            if event['name'] == 'model_run':
                calls.append([])
            elif event['cat'] == 'Node' and event['name'].endswith(self.END):
                kind, name = event['args']['op_name'], event['name'][:-len(self.END)]
                calls[-1].append(Ran(kind, self.modules.find(self.origins(name, kind)),
                                     event['dur'] / 1e3))
        if len(calls) != sum(map(len, self.rounds)):
            raise RuntimeError(f'ONNX Runtime tells of {len(calls)} calls of '
                               f'{sum(map(len, self.rounds))}: its profile is full; take fewer '
                               'rounds')
        told = iter(calls)
        samples = ([Sample(ms, next(told)) for ms in each] for each in self.rounds)
        return [_mean(each[1:]) for each in samples]  # the first of a round does not count


class _Origins:
    """Nodes of an ONNX file by what runtimes call them: what is fused takes the last's name."""

    def __init__(self, path: Path):
        graph = require('onnx', 'profiling').load(str(path), load_external_data=False).graph
        self.nodes = {node.name: node for node in graph.node}
        self.makers = {name: node for node in graph.node for name in node.output}

    def __call__(self, name: str, kind: str) -> str:
        """Return the name in the file of a node, of a type; a convolution's own."""
        name = name[:-len('_nchwc')] if name.endswith('_nchwc') else name
        node = found = self.nodes.get(name) or self.makers.get(name)
        if TYPES.get(kind.lower()) == CONVOLUTION:
            while found is not None and found.op_type != 'Conv':
                found = self.makers.get(found.input[0])
        return (found or node).name if found or node else name


class OpenVinoProfiler:
    """OpenVINO's. It tells of the mean of all calls up to now, in whole microseconds; those of a
    round are what it tells after it less what it told before."""

    NONE = ('Parameter', 'Result', 'Constant', 'Input', 'Output')  # compute nothing
    MAIN = re.compile('MatMul|Softmax'), re.compile('H?Swish|HardSwish|Gelu|Relu|Clip|Sigmoid|Erf')

    def __init__(self, path: Path, image: Tensor, threads: int, modules: Modules):
        model = openvino_model(path, threads, PERF_COUNT=True)
        self.request, self.array = model.create_infer_request(), image.numpy()
        self.modules = modules
        self.samples: List[Sample] = []
        self.calls = 0
        # The nodes of the network that each node at run time was made of. It also tells of those
        # that became part of others, which never run.
        self.made_of = {op.get_friendly_name(): [name for name in op.get_rt_info()[
            'originalLayersNames'].astype(str).split(',') if name]
            for op in model.get_runtime_model().get_ops()}
        onnx = path.with_suffix('.onnx')
        self.origins = _Origins(onnx) if onnx.is_file() else lambda name, _: name
        self.named: Dict[Tuple[str, str], Tuple[str, str]] = {}

    def __call__(self, repeats: int):
        self._infer()  # does not count
        before = self._told()
        whole_ms = sum(self._infer() for _ in range(repeats)) / repeats
        self.samples.append(Sample(whole_ms, [
            Ran(*named, (ms - earlier) / repeats)
            for (named, ms), (_, earlier) in zip(self._told(), before)]))

    def _infer(self) -> float:
        start = time.perf_counter()
        self.request.infer([self.array], share_inputs=True)
        self.calls += 1
        return 1e3 * (time.perf_counter() - start)

    def _told(self) -> List[Tuple[Tuple[str, str], float]]:
        """Return type and module of each operator, and its ms in all calls up to now."""
        return [(self._name(node.node_type, node.node_name),
                 1e3 * node.real_time.total_seconds() * self.calls)
                for node in self.request.get_profiling_info()
                if node.node_type not in self.NONE and node.node_name in self.made_of]

    def _name(self, kind: str, name: str) -> Tuple[str, str]:
        """Return type and module of a node, those of its main operator if it is fused."""
        if (kind, name) not in self.named:
            made_of = [name, *self.made_of.get(name, [])]
            # Its first convolution's, else the last node's.
            scopes = [self.modules.find(self.origins(each.replace('/WithoutBiases', ''), kind))
                      for each in made_of]
            scope = next((scope for scope in scopes if scope != '?'), '?')
            if kind in ('Subgraph', 'Eltwise', 'Math'):
                last = ' '.join(each.rpartition('/')[2] for each in made_of)
                kind = ('Softmax' if self.MAIN[0].search(last) else
                        'Gelu' if self.MAIN[1].search(last) else kind)
            self.named[kind, name] = kind, scope
            return kind, scope
        return self.named[kind, name]

    def collect(self) -> List[Sample]:
        return self.samples


PROFILERS = {'onnx': OnnxProfiler, 'openvino': OpenVinoProfiler}
