"""The latency lookup table: what each part of an EfficientFormer takes, by its width.

The paper slims by the latency of the network that is left, and reads it from a table of MB4D
and MB3D over widths in multiples of 16 (https://arxiv.org/abs/2206.01191, section 4.2). A
prediction is the sum over a network's parts, so an entry has to be what the part takes within a
network, not alone:

- Weights come from memory, as those of a whole network do not stay in the caches, while
  activations come from the layer before. So a chain of blocks with weights of their own is
  timed, and divided by their number; of embeddings and stems, which change the grid, copies
  beside each other.
- What a call costs beyond its parts (its start, buffers that no layer before it has used, the
  outputs) is an entry of its own, 'overhead': the time of shallow networks less their parts.
- The machine's speed drifts. A reference network is timed in every round beside the parts, and
  an entry is the median over rounds of its time by the reference's, times the header's
  ``reference_ms``, which is the reference's when the machine was fastest. What is measured at
  another hour is brought to the same speed by it.

Embeddings have two widths, and are measured on a lattice of them, about six values an axis with
both ends; between, the table interpolates bilinearly. All other parts are measured at all widths.

Units: ms; widths in channels, shapes H, W in px, grids rows, columns.
"""
import copy
import datetime
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..deploy.export import export
from ..deploy.runtimes import SUFFIXES
from ..models.arch import ARCHS, STAGES, Arch, get_arch
from ..models.attention import AttentionBias
from ..models.backbone import STRIDES
from ..models.efficientformer import EfficientFormer
from ..utils.files import atomic_write
from . import benchmark
from .candidates import BIAS_GRID, OPEN, Setting, write_graph
from .timing import Call, Spread, Timer, interleave, spread

RUNTIMES = ('pytorch', 'onnx', 'openvino')
PACKAGES = {'pytorch': (), 'onnx': ('onnxruntime', ), 'openvino': ('openvino', )}
EXPANSION = 4
BLOCKS, EMBEDDING, STEM, OVERHEAD = ('MB4D', 'MB3D'), 'embedding', 'stem', 'overhead'
ATTENTION_STAGES = (2, 3)  # where MB3D is measured, as in the paper's supernet
LATTICE = 6
WARM_UPS = 2
REFERENCE = Arch((32, 64, 160, 256), (2, 2, 4, 3), (0, 0, 0, 1))
# Beyond what the last caches of common CPUs hold for one process.
WEIGHT_BYTES = 64 * 2 ** 20
COPIES = (2, 12)  # at least and at most
GROUP, GROUP_BYTES = 8, 3 * 2 ** 30  # parts timed in turns, and what they may hold
UNSTEADY, TRIES = .25, 3  # quartiles so far apart, by the median, say that something disturbed
MAX_MB3D = 6  # of a network of the check
NOT_SETTINGS = ('date', 'reference_ms')
# Of a header, what is needed to use a table.
SETTINGS = ('device', 'cores', 'runtime', 'versions', 'threads', 'shape', 'rounds', 'expansion',
            'max_widths', 'step', 'reference', 'reference_ms')

Size = Tuple[int, int]
Report = benchmark.Report


@dataclass(frozen=True)
class Part:
    """What has an entry. ``str()`` of it is the entry's key.

    Attributes:
        kind: 'MB4D', 'MB3D', 'embedding', 'stem' or 'overhead'.
        stage: From 0; an embedding is of the stage that it leads to.
        widths: The width, of an embedding that of the stage before and its own.
    """

    kind: str
    stage: int = 0
    widths: Tuple[int, ...] = ()

    def __str__(self) -> str:
        if self.kind == OVERHEAD:
            return self.kind
        stage = '' if self.kind == STEM else f' stage{self.stage + 1}'
        return f'{self.kind}{stage} {"-".join(map(str, self.widths))}'


def parts(arch: Arch) -> Iterator[Part]:
    """Yield the parts of a network in order; of the same part, one for each time it is there."""
    yield Part(STEM, 0, arch.widths[:1])
    for stage in range(STAGES):
        if stage:
            yield Part(EMBEDDING, stage, arch.widths[stage - 1:stage + 1])
        for block in range(arch.depths[stage]):
            yield Part(BLOCKS[arch.attends(stage, block)], stage, (arch.widths[stage], ))
    yield Part(OVERHEAD)


def lattice(widths: Sequence[int]) -> List[int]:
    """Return about ``LATTICE`` of the widths, evenly spread, both ends among them."""
    return sorted({widths[round(i)] for i in np.linspace(0, len(widths) - 1, LATTICE)})


def widths_of(header: Mapping) -> List[List[int]]:
    """Return the widths that a table with this header has of each stage."""
    return [[*range(header['step'], widest + 1, header['step'])]
            for widest in header['max_widths']]


def parts_of(header: Mapping) -> List[Part]:
    """Return all parts that a whole table with this header has, the overhead last."""
    widths = widths_of(header)
    found = [Part(STEM, 0, (width, )) for width in widths[0]]
    for kind, stages in zip(BLOCKS, (range(STAGES), ATTENTION_STAGES)):
        found += [Part(kind, stage, (width, )) for stage in stages for width in widths[stage]]
    found += [Part(EMBEDDING, stage, (before, width)) for stage in range(1, STAGES)
              for before in lattice(widths[stage - 1]) for width in lattice(widths[stage])]
    return [*found, Part(OVERHEAD)]


def title(header: Mapping) -> str:
    """Return on what a table was measured, for people."""
    return (f'{header["runtime"]}, {header["shape"][0]} x {header["shape"][1]} px, '
            f'{header["device"]}, threads: {header["threads"]} of {header["cores"]}')


class LatencyTable:
    """ms of the parts of an EfficientFormer, and their sums.

    Attributes:
        header: On what and how it was measured, see :func:`new_header`.
        entries: Key (``str`` of a :class:`Part`): a dict with ``ms``, its quartiles ``q1`` and
            ``q3`` over rounds, ``kind``, ``stage`` (1 to 4), ``widths`` and ``grid``.
        check: What :func:`check` returned, if it was run.
    """

    def __init__(self, header: Mapping, entries: Optional[Mapping] = None,
                 check: Optional[Mapping] = None):
        self.header, self.entries = dict(header), dict(entries or {})
        self.check = dict(check) if check else None

    @classmethod
    def load(cls, path) -> 'LatencyTable':
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is something else, or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f'latency table {str(path)!r} does not exist; '
                                    'tools/latency_table.py makes one')
        try:
            read = json.loads(path.read_text())
            table = cls(read['header'], read['entries'], read['check'])
            missing = {*SETTINGS} - {*table.header}
            if missing:
                raise KeyError(*sorted(missing))
            return table
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is no latency table, or a damaged one '
                             f'({type(error).__name__}: {error}): delete it, or name another '
                             'file') from error

    def save(self, path):
        """Write JSON, whole or not at all."""
        with atomic_write(path) as tmp_path:
            tmp_path.write_text(json.dumps(dict(header=self.header, entries=self.entries,
                                            check=self.check), indent=1))

    def predict(self, arch) -> float:
        """Return the ms of a whole backbone, without norms on its outputs.

        Args:
            arch: An :class:`Arch`, or 'l1', 'l3', 'l7', or a dict of its fields.

        Raises:
            ValueError: The table has no entry for a part, or is of another expansion.
        """
        arch = get_arch(arch, ARCHS)
        for stage, width in enumerate(arch.widths):
            wrong = {*arch.hidden(stage)} - {round(width * self.header['expansion'])}
            if wrong:
                raise ValueError(
                    f'arch expansion={arch.expansion}: the table is of blocks with expansion '
                    f'{self.header["expansion"]}, stage {stage + 1} of width {width} has hidden '
                    f'channels {", ".join(map(str, sorted(wrong)))}')
        return sum(self.part_ms(part) for part in parts(arch))

    def block_ms(self, kind: str, stage: int, width: int) -> float:
        """Return the ms of one block.

        Args:
            kind: 'MB4D' or 'MB3D'.
            stage: 0 to 3.

        Raises:
            ValueError: There is no entry for it.
        """
        if kind not in BLOCKS or stage not in range(STAGES):
            raise ValueError(f'block {kind!r} of stage {stage!r}: expected {" or ".join(BLOCKS)}, '
                             f'and a stage from 0 to {STAGES - 1}')
        return self.part_ms(Part(kind, stage, (width, )))

    def part_ms(self, part: Part) -> float:
        """Return the ms of a part, an embedding's interpolated.

        Raises:
            ValueError: There is no entry for it.
        """
        if str(part) in self.entries:
            return self.entries[str(part)]['ms']
        if part.kind != EMBEDDING:
            raise ValueError(self._missing(part))
        axes = [lattice(widths) for widths in widths_of(self.header)[part.stage - 1:][:2]]
        around = [_neighbours(axis, width) for axis, width in zip(axes, part.widths)]
        if any(None in pair for pair in around):
            raise ValueError(self._missing(part))
        total = 0.
        for before in {*around[0]}:
            for after in {*around[1]}:
                corner = Part(EMBEDDING, part.stage, (before, after))
                share = 1.
                for (low, high), at, width in zip(around, corner.widths, part.widths):
                    if high > low:
                        share *= 1 - abs(width - at) / (high - low)
                if str(corner) not in self.entries:
                    raise ValueError(self._missing(part))
                total += share * self.entries[str(corner)]['ms']
        return total

    def _missing(self, part: Part) -> str:
        what = f'the latency table has no {part}'
        alike = sorted({tuple(entry['widths']) for entry in self.entries.values()
                        if (entry['kind'], entry['stage']) == (part.kind, part.stage + 1)})
        if not alike:
            measured = sorted({f'{entry["kind"]} stage{entry["stage"]}'
                               for entry in self.entries.values() if entry['kind'] != OVERHEAD})
            remedy = ('run tools/latency_table.py again with the same arguments, it goes on '
                      'where it was stopped' if part in parts_of(self.header)
                      else 'let the network do without')
            return (f'{what}: there is none of any width, but {", ".join(measured) or "nothing"}; '
                    f'{remedy}')
        near = []
        for axis, width in enumerate(part.widths):
            pair = _neighbours(sorted({widths[axis] for widths in alike}), width)
            near.append(' and '.join(str(n) for n in dict.fromkeys(pair) if n is not None))
        widest = self.header['max_widths'][part.stage + 1 - len(part.widths):part.stage + 1]
        if part in parts_of(self.header):
            remedy = ('run tools/latency_table.py again with the same arguments, it goes on '
                      'where it was stopped')
        else:
            remedy = (f'choose a multiple of {self.header["step"]} up to '
                      f'{" to ".join(map(str, widest))}, or make a table with other --max-widths '
                      'or --step')
        return f'{what}: measured nearest to it {" to ".join(near)}; {remedy}'

    def missing(self) -> List[Part]:
        """Return the parts that are still to be measured."""
        return [part for part in parts_of(self.header) if str(part) not in self.entries]


def _neighbours(axis: Sequence[int], width: int) -> Tuple[Optional[int], Optional[int]]:
    """The nearest of the axis at or below, and at or above."""
    return (max((n for n in axis if n <= width), default=None),
            min((n for n in axis if n >= width), default=None))


# Measuring -----------------------------------------------------------------------------------


def new_header(runtime: str = 'pytorch', shape: Size = (224, 224), threads: int = 1,
               max_widths: Sequence[int] = ARCHS['l3'].widths, step: int = 16, rounds: int = 7
               ) -> Dict[str, Any]:
    """Return the header of a table that is to be measured here.

    Raises:
        ValueError: An argument is out of range.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime {runtime!r}: expected one of {", ".join(RUNTIMES)}')
    if rounds < 1:
        raise ValueError(f'rounds {rounds}: expected 1 or more')
    if step < 2 or step % 2:
        raise ValueError(f'step {step}: expected an even number, as the stem starts with half '
                         'of the first width')
    max_widths = list(max_widths)
    if len(max_widths) != STAGES or any(n < step or n % step for n in max_widths):
        raise ValueError(f'max-widths {" ".join(map(str, max_widths))}: expected {STAGES} '
                         f'multiples of {step}')
    told = benchmark.header(Setting(tuple(shape), 1, threads), rounds, 0)
    packages = ('Python', 'torch', *PACKAGES[runtime], 'mmeffformer')
    return dict(
        unit='ms', device=told['cpu'], cores=told['cores'], runtime=runtime,
        versions={name: told['versions'][name] for name in packages}, precision='fp32',
        threads=threads, batch=1, shape=list(shape), warm_ups=WARM_UPS, rounds=rounds,
        expansion=EXPANSION, bias_grid=BIAS_GRID, max_widths=max_widths, step=step,
        reference=[list(REFERENCE.widths), list(REFERENCE.depths),
                   list(REFERENCE.attention_blocks)],
        reference_ms=None,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'))


def differences(old: Mapping, new: Mapping) -> List[str]:
    """Return in what two headers differ so that their figures do not mix."""
    return [f'{name} {old.get(name)} there, {new.get(name)} here'
            for name in dict.fromkeys([*old, *new])
            if name not in NOT_SETTINGS and old.get(name) != new.get(name)]


def measure(table: LatencyTable, path, progress: Report = lambda *_: None):
    """Measure what the table lacks, and save it after every group of parts.

    When it is stopped, the group at hand is lost; called again it goes on.

    Args:
        table: A new one (``LatencyTable(header)``), or one that :func:`resumed` returned.
        path: Where it is saved.
        progress: Is told what is done now, the parts done and all parts.
    """
    count = len(parts_of(table.header))
    todo = [part for part in table.missing() if part.kind != OVERHEAD]
    if not table.missing():
        return
    table.check = None  # it was of other entries
    with tempfile.TemporaryDirectory() as folder:
        progress('reference', count - len(table.missing()), count)
        reference = reference_timer(table.header, Path(folder))
        calibrate(table, reference)
        for group in _groups(todo, table.header['shape']):
            progress(f'{group[0]} to {group[-1]}', count - len(table.missing()), count)
            table.entries.update(measure_parts(group, table.header, reference))
            calibrate(table, reference)
            table.save(path)
        if table.missing():
            progress(OVERHEAD, count - 1, count)
            table.entries[OVERHEAD] = measure_overhead(table, reference)
            table.save(path)
        del reference  # before its file is deleted
    progress('measured', count, count)


def calibrate(table: LatencyTable, reference: Callable[[], float]):
    """Bring the table to the fastest speed at which the machine was seen.

    What else runs at first would otherwise be in every entry.
    """
    ms, old = (spread([reference() for _ in range(table.header['rounds'])]).median,
               table.header['reference_ms'])
    if old is None or ms < old:
        table.header['reference_ms'] = ms
        for found in table.entries.values():
            found.update({name: found[name] * ms / old for name in ('ms', 'q1', 'q3')})


def resumed(path, header: Mapping) -> LatencyTable:
    """Return the table to go on with: that in ``path``, a new one if there is none.

    Raises:
        ValueError: What is there was measured otherwise, or is no latency table.
    """
    if not Path(path).exists():
        return LatencyTable(header)
    table = LatencyTable.load(path)
    found = differences(table.header, header)
    if found:
        raise ValueError(f'{path} was measured otherwise: {"; ".join(found)}. Write to another '
                         '--out, or give the arguments of that one')
    return table


def _groups(todo: Sequence[Part], shape: Size) -> Iterator[List[Part]]:
    group: List[Part] = []
    for part in todo:
        held = sum(copies(each, shape) * part_bytes(each, shape) for each in [*group, part])
        if group and (len(group) == GROUP or held > GROUP_BYTES
                      or (part.kind, part.stage) != (group[0].kind, group[0].stage)):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def grid(stage: int, shape: Size) -> Size:
    """Return rows and columns of a stage (from 0)."""
    return tuple(-(-size // STRIDES[stage]) for size in shape)


def part_bytes(part: Part, shape: Size) -> int:
    """Return about how much a part reads besides activations: weights, and bias of attention."""
    width, rows_cols = part.widths[-1], grid(part.stage, shape)
    numbers = {'MB4D': 2 * EXPANSION * width ** 2,
               'MB3D': (2 * EXPANSION * width + 2560) * width
               + 8 * (rows_cols[0] * rows_cols[1]) ** 2,
               EMBEDDING: 9 * part.widths[0] * width, STEM: 5 * width ** 2}[part.kind]
    return 4 * numbers


def copies(part: Part, shape: Size) -> int:
    """Return how many of a part are timed together: more than stay in a cache."""
    least, most = COPIES
    return min(max(least, -(-WEIGHT_BYTES // part_bytes(part, shape))), most)


class Beside(nn.Module):
    """Copies of a layer, with weights of their own, on the same input."""

    def __init__(self, layer: nn.Module, count: int):
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
        for parameter in self.parameters():  # of equal layers a runtime computes one
            nn.init.normal_(parameter, std=.02)

    def forward(self, x: Tensor):
        if torch.jit.is_tracing():
            # In a graph without outputs there would be nothing to do. A mean is a small one, and
            # can be had of a map in any layout, where outputs would be changed to NCHW.
            return tuple(F.adaptive_avg_pool2d(layer(x), 1) for layer in self.layers)
        for layer in self.layers:
            out = layer(x)
        return out


def build_part(part: Part, count: int, shape: Size) -> Tuple[nn.Module, Tensor]:
    """Return ``count`` fused copies of a part, taken out of networks, and their input.

    Blocks are a chain, in which MB3D have the change from (B, C, H, W) to tokens before the
    first; a stem's and an embedding's copies are beside each other.
    """
    widths, depths, attention = [16] * STAGES, [1] * STAGES, [0] * STAGES
    widths[part.stage] = part.widths[-1]
    if part.kind == EMBEDDING:
        widths[part.stage - 1] = part.widths[0]
    elif part.kind in BLOCKS:
        depths[part.stage] = count
        attention[part.stage] = count if part.kind == 'MB3D' else 0
    network = build_network(Arch(tuple(widths), tuple(depths), tuple(attention)))
    network = network.switch_to_deploy()
    if part.kind == STEM:
        return Beside(network.stem, count), torch.randn(1, 3, *shape)
    stage = network.stages[part.stage]
    if part.kind == EMBEDDING:
        image = torch.randn(1, part.widths[0], *grid(part.stage - 1, shape))
        return Beside(stage.downsample, count), image
    stage.downsample = nn.Identity()
    return stage, torch.randn(1, part.widths[0], *grid(part.stage, shape))


def build_network(arch: Arch) -> EfficientFormer:
    network = EfficientFormer(arch, bias_grid=BIAS_GRID, out_norm_cfg=None).eval()
    for module in network.modules():
        if isinstance(module, AttentionBias):  # of equal ones an exporter stores one
            nn.init.normal_(module.table, std=.02)
    return network


def open_part(part: Part, header: Mapping, folder: Path) -> Tuple[Call, int]:
    """Return a call that runs copies of a part, and their number."""
    count = copies(part, header['shape'])
    module, image = build_part(part, count, header['shape'])
    if header['runtime'] == 'pytorch':
        return _eager(module, image), count
    # OpenVINO reads it too, and so spares the conversion, which starts processes that report it.
    path = folder / f'{str(part).replace(" ", "_")}{SUFFIXES["onnx"]}'
    write_graph(module, image, 'onnx', path)
    return OPEN[header['runtime']](path, image, header['threads']), count


def open_network(arch: Arch, header: Mapping, folder: Path) -> Call:
    """Return a call that runs a whole backbone; an exported one is compared with PyTorch."""
    network = build_network(arch)
    image = torch.randn(1, 3, *header['shape'])
    if header['runtime'] == 'pytorch':
        return _eager(network.switch_to_deploy(), image)
    path = folder / f'{len([*folder.iterdir()])}{SUFFIXES[header["runtime"]]}'
    export(network, path, header['runtime'], 'backbone', tuple(header['shape']))
    return OPEN[header['runtime']](path, image, header['threads'])


def _eager(module: nn.Module, image: Tensor) -> Call:
    module = module.to(memory_format=torch.channels_last)
    image = image.to(memory_format=torch.channels_last)
    return torch.no_grad()(lambda: module(image))


def timer(call: Call) -> Callable[[], float]:
    return Timer(call, warm_ups=WARM_UPS)


def reference_timer(header: Mapping, folder: Path) -> Callable[[], float]:
    torch.set_num_threads(header['threads'])
    widths, depths, attention = header['reference']
    return timer(open_network(Arch(widths, depths, attention), header, folder))


def in_turns(timers: Mapping[str, Callable[[], float]], reference: Callable[[], float],
             header: Mapping, rounds: int, progress: Report = lambda *_: None
             ) -> Dict[str, Spread]:
    """Return the ms of each timer, at the machine's speed of the table.

    What was disturbed, as its quartiles tell, is timed again; the steadiest counts.
    """
    best: Dict[str, Spread] = {}
    pending = list(timers)
    for attempt in range(TRIES):
        everyone = {**{name: timers[name] for name in pending}, 'reference': reference}
        samples: Dict[str, List[float]] = {name: [] for name in everyone}
        for i, sample in enumerate(interleave(everyone, rounds)):
            again = f', again ({attempt})' if attempt else ''
            progress(f'round {sample.round + 1}{again}: {sample.name}', i, rounds * len(everyone))
            samples[sample.name].append(sample.ms)
        factors = np.divide(header['reference_ms'], samples['reference'])
        for name in pending:
            found = spread(factors * samples[name])
            if name not in best or unsteadiness(found) < unsteadiness(best[name]):
                best[name] = found
        pending = [name for name in pending if unsteadiness(best[name]) > UNSTEADY]
        if not pending:
            break
    return best


def unsteadiness(found: Spread) -> float:
    return (found.q3 - found.q1) / found.median


def measure_parts(group: Sequence[Part], header: Mapping, reference: Callable[[], float]
                  ) -> Dict[str, Dict[str, Any]]:
    """Return the entries of some parts, timed in turns with each other and the reference."""
    with tempfile.TemporaryDirectory() as folder:
        timers, counts = {}, {}
        for part in group:
            call, counts[str(part)] = open_part(part, header, Path(folder))
            timers[str(part)] = timer(call)
        found = in_turns(timers, reference, header, header['rounds'])
        timers.clear()  # before the files are deleted
        del call
    return {str(part): entry(part, found[str(part)], header['shape'], counts[str(part)])
            for part in group}


def entry(part: Part, found: Spread, shape: Size, count: int = 1) -> Dict[str, Any]:
    """Return an entry, of a part of which ``count`` copies were timed together."""
    return dict(kind=part.kind, stage=part.stage + 1, widths=list(part.widths),
                grid=list(grid(part.stage, shape)), copies=count,
                **{name: ms / count for name, ms in zip(('ms', 'q1', 'q3'), found)})


def overhead_archs(header: Mapping) -> List[Arch]:
    """Return networks of one block a stage, narrow to wide."""
    return [Arch(tuple(widths[round(share * (len(widths) - 1))] for widths in widths_of(header)),
                 (1, ) * STAGES, (0, 0, 0, 1)) for share in (.25, .5, .75)]


def measure_overhead(table: LatencyTable, reference: Callable[[], float]) -> Dict[str, Any]:
    """Return the entry of what a whole network takes beyond its parts: the median of a few."""
    header, archs = table.header, overhead_archs(table.header)
    with tempfile.TemporaryDirectory() as folder:
        timers = {str(i): timer(open_network(arch, header, Path(folder)))
                  for i, arch in enumerate(archs)}
        found = in_turns(timers, reference, header, header['rounds'])
        timers.clear()
    beyond = [found[str(i)].median
              - sum(table.part_ms(part) for part in parts(arch) if part.kind != OVERHEAD)
              for i, arch in enumerate(archs)]
    return entry(Part(OVERHEAD), spread(beyond), header['shape'])


def measured(archs: Mapping[str, Arch], header: Mapping, rounds: int,
             progress: Report = lambda *_: None) -> Dict[str, Spread]:
    """Time whole backbones in turns, at the machine's speed of a table: ms by name.

    Args:
        archs: By name, of any widths.
        header: The table's.
        rounds: Samples of each.
        progress: Is told what is done now, the steps done and all steps.

    Raises:
        ValueError: The table is of another machine, or of other versions.
    """
    here = new_header(header['runtime'], header['shape'], header['threads'],
                      header['max_widths'], header['step'], header['rounds'])
    other = differences(header, here)
    if other:
        raise ValueError(f'the table was measured otherwise: {"; ".join(other)}. What is '
                         'measured here cannot be compared with it; make a table here')
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as folder:
            reference = reference_timer(header, Path(folder))
            timers = {}
            for i, (name, arch) in enumerate(archs.items()):
                progress(f'building {name}', i, len(archs))
                timers[name] = timer(open_network(arch, header, Path(folder)))
            found = in_turns(timers, reference, header, rounds, progress)
            timers.clear()
            del reference
    finally:
        torch.set_num_threads(threads)
    return found


# Checking ------------------------------------------------------------------------------------


def random_archs(count: int, header: Mapping, seed: int = 0,
                 depths: Sequence[int] = ARCHS['l3'].depths) -> List[Arch]:
    """Return networks within the table, up to these depths and ``MAX_MB3D`` MB3D.

    As in the paper's search there is one change from MB4D to MB3D: the third stage has MB3D
    only where the whole of the fourth is of them.
    """
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        widths = tuple(draw.choice(of_stage) for of_stage in widths_of(header))
        depth = tuple(draw.randint(1, most) for most in depths)
        attention = draw.randint(0, MAX_MB3D)
        last = min(attention, depth[3])
        found.append(Arch(widths, depth, (0, 0, min(attention - last, depth[2]), last)))
    return found


def check(table: LatencyTable, count: int = 20, seed: int = 0,
          progress: Report = lambda *_: None) -> Dict[str, Any]:
    """Compare predictions with measured whole networks, none of which the table was made with.

    Args:
        count: Random networks; L1 and L3 besides, if the table has their widths.

    Returns:
        dict: ``networks``, each with name, arch, ``predicted_ms``, ``measured_ms`` and its
        quartiles; ``median_error``, the median of |predicted / measured - 1|; ``spearman``,
        the rank correlation of the two; ``count`` and ``seed``.
    """
    archs = {}
    for name in ('l1', 'l3'):
        try:
            table.predict(ARCHS[name])
        except ValueError:
            continue
        archs[name] = ARCHS[name]
    archs.update({f'random{i}': arch
                  for i, arch in enumerate(random_archs(count, table.header, seed))})
    found = measured(archs, table.header, table.header['rounds'], progress)
    networks = [dict(name=name, widths=list(arch.widths), depths=list(arch.depths),
                     attention_blocks=list(arch.attention_blocks),
                     predicted_ms=table.predict(arch), measured_ms=found[name].median,
                     q1=found[name].q1, q3=found[name].q3) for name, arch in archs.items()]
    predicted, actual = ([each[name] for each in networks]
                         for name in ('predicted_ms', 'measured_ms'))
    return dict(count=count, seed=seed, networks=networks,
                median_error=float(np.median(np.abs(np.divide(predicted, actual) - 1))),
                spearman=spearman(predicted, actual))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the rank correlation of two series; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]
