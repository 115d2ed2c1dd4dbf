"""Table 2 of the EfficientFormer paper: its figures, how to measure them, and what was measured.

Figures: Li et al., EfficientFormer (https://arxiv.org/abs/2206.01191), Tables 1 and 2; the rows of
EfficientFormerV2: Li et al. (https://arxiv.org/abs/2212.08059).
"""
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from ..utils.complexity import complexity
from ..utils.plots import Mark
from ..utils.registry import MODELS
from .runs import Measurement, Training, differences


@dataclass(frozen=True)
class Task:
    """One half of the table.

    Attributes:
        title: Model and data set.
        config: Path of a row's config, from the project's root.
        metrics: Columns, and what mmdet or mmseg calls them.
        scale: From their unit to percent.
        data: Name of the data set evaluated on, and its number of images.
        shape: H and W in px of a typical input, for the MACs.
    """

    title: str
    config: str
    metrics: Dict[str, str]
    scale: float
    data: Tuple[str, int]
    shape: Tuple[int, int]


TASKS = {
    'det': Task(
        'Mask R-CNN, COCO val2017', 'configs/detection/maskrcnn_{}.py',
        {f'{kind} AP{iou}': f'coco/{name}_mAP{iou and f"_{iou}"}'
         for kind, name in (('box', 'bbox'), ('mask', 'segm')) for iou in ('', '50', '75')},
        100, ('COCO val2017', 5000), (800, 1344)),
    'seg': Task(
        'Semantic FPN, ADE20K validation', 'configs/segmentation/semfpn_{}.py',
        {'mIoU': 'mIoU'}, 1, ('the validation part of ADE20K', 2000), (512, 512)),
}


class Row(NamedTuple):
    """A row as published: figures as printed, those with a '?' not confirmed, '' for none.

    Attributes:
        name: The backbone's.
        config: The part of its configs' names.
        params: Millions of parameters of the ImageNet classifier.
        gmacs: Of the classifier at 224 x 224.
        whole: Millions of parameters of the whole Mask R-CNN.
        det: Box AP, AP50 and AP75, mask AP, AP50 and AP75.
        seg: mIoU.
        released: Whether the authors published the trained detector and segmentor.
    """

    name: str
    config: str
    params: str
    gmacs: str
    whole: str
    det: str
    seg: str
    released: bool = False

    @property
    def family(self) -> str:
        return self.name.rstrip('0123456789').partition('-')[0]


ROWS = (
    Row('ResNet18', 'resnet18', '11.7', '', '31.2',
        '34.0 / 54.0 / 36.7 / 31.2 / 51.0 / 32.7', '32.9'),
    Row('PoolFormer-S12', 'poolformer_s12', '11.9', '', '31.6',
        '37.3 / 59.0 / 40.1 / 34.6 / 55.8 / 36.9', '37.2'),
    Row('EfficientFormer-L1', 'effformer_l1', '12.3', '1.3', '31.5',
        '37.9 / 60.3 / 41.0 / 35.4 / 57.3 / 37.3', '38.9', released=True),
    Row('ResNet50', 'resnet50', '25.5', '', '44.2',
        '38.0 / 58.6 / 41.4 / 34.4 / 55.1 / 36.7', '36.7'),
    Row('PoolFormer-S24', 'poolformer_s24', '21.4', '', '41.0',
        '40.1 / 62.2 / 43.4 / 37.0 / 59.1 / 39.6', '40.3'),
    Row('EfficientFormer-L3', 'effformer_l3', '31.3', '3.9', '',
        '41.4 / 63.9 / 44.7 / 38.1 / 61.0 / 40.4', '43.5', released=True),
    Row('ResNet101', 'resnet101', '44.5 ?', '', '63.2',
        '40.4 / 61.1 / 44.2 / 36.4 / 57.7 / 38.8', '38.8'),
    Row('PoolFormer-S36', 'poolformer_s36', '31.0', '', '50.5',
        '41.0 / 63.1 / 44.8 / 37.7 / 60.1 / 40.0', '42.0'),
    Row('EfficientFormer-L7', 'effformer_l7', '82.1', '10.2', '',
        '42.6 ? / 65.1 ? / 46.1 ? / 39.0 ? / 62.2 ? / 41.7 ?', '45.1', released=True),
    Row('EfficientFormerV2-S0', 'effformerv2_s0', '3.5', '0.40', '', '', ''),
    Row('EfficientFormerV2-S1', 'effformerv2_s1', '6.1', '0.65', '', '', ''),
    Row('EfficientFormerV2-S2', 'effformerv2_s2', '12.6', '1.25', '32.2',
        '43.4 / 65.4 / 47.5 / 39.5 / 62.4 / 42.2', '42.4', released=True),
    Row('EfficientFormerV2-L', 'effformerv2_l', '26.1', '2.56', '',
        '44.7 / 66.3 / 48.8 / 40.4 / 63.5 / 43.2', '45.2', released=True),
)


def config_names(rows: Iterable[Row] = ROWS, tasks: Iterable[str] = tuple(TASKS)) -> Set[str]:
    """Return the names of the rows' configs, without folder and suffix."""
    return {Path(TASKS[task].config.format(row.config)).stem for row in rows for task in tasks}


def find_rows(names: Optional[Sequence[str]]) -> Sequence[Row]:
    """Return the rows of these names, of the backbone or as in the configs; all for None.

    Raises:
        ValueError: There is no such row.
    """
    known = {key.lower(): row for row in ROWS for key in (row.name, row.config)}
    for name in names or ():
        if name.lower() not in known:
            raise ValueError(f'row {name!r} is unknown; choose from '
                             + ', '.join(row.config for row in ROWS))
    return [known[name.lower()] for name in names] if names else ROWS


def published(row: Row, task: str) -> Dict[str, str]:
    """Return the figures of the paper by column, as printed; empty where there are none."""
    figures = getattr(row, task)
    return dict(zip(TASKS[task].metrics, figures.split(' / '))) if figures else {}


def number(figure: str) -> Optional[float]:
    """Return the value of a published figure, None for none."""
    return float(figure.split()[0]) if figure else None


def confirmed(figure: str) -> bool:
    """Whether a published figure could be confirmed."""
    return not figure.endswith('?')


# The plan ------------------------------------------------------------------------------------

# The authors' detectors and segmentors are expected in downloads/, under the configs' names. The
# converted file's name ends in its hash.
CONVERT = """\
# the authors' checkpoint, downloaded to downloads/{name}.pth
python tools/convert_checkpoint.py downloads/{name}.pth --config {config} --out checkpoints
python tools/test.py {config} checkpoints/{name}-*.pth \
--cfg-options model.backbone.bias_mode=legacy --work-dir work_dirs/converted/{name}"""


def plan(root: Path, rows: Iterable[Row] = ROWS, tasks: Iterable[str] = tuple(TASKS),
         gpus: Optional[int] = None) -> Iterator[str]:
    """Yield the lines of a shell script that measures the table.

    Args:
        root: The project's root folder, with its configs.
        gpus: To train and test on; by default as many as the recipe is for. On any
            other number the learning rate is scaled.
    """
    for row in rows:
        for task in tasks:
            path = TASKS[task].config.format(row.config)
            cfg = Config.fromfile(root / path, import_custom_modules=False)
            name, (length, unit) = Path(path).stem, schedule(cfg)
            batch = cfg.train_dataloader.batch_size
            meant = cfg.auto_scale_lr.base_batch_size // batch
            used = gpus or meant
            last = f'work_dirs/{name}/{unit[:-1] if unit == "epochs" else "iter"}_{length}.pth'
            scaled = '' if used == meant else ' --auto-scale-lr'
            yield f'# {row.name}, {TASKS[task].title}'
            yield (f'# trained from ImageNet weights: {length} {unit} of {meant} GPUs x {batch} '
                   'images' + (f', here {used} x {batch}' if scaled else ''))
            if used == 1:
                yield f'python tools/train.py {path}{scaled}'
                yield f'python tools/test.py {path} {last}'
            else:
                yield f'tools/dist_train.sh {path} {used}{scaled}'
                yield f'tools/dist_test.sh {path} {last} {used}'
            if row.released:
                yield from CONVERT.format(name=name, config=path).splitlines()
            yield ''


def schedule(cfg: Config) -> Tuple[int, str]:
    """Return how long a config trains, and the unit, 'epochs' or 'iterations'."""
    loop = cfg['train_cfg']
    return (loop['max_epochs'], 'epochs') if 'max_epochs' in loop else (
        loop['max_iters'], 'iterations')


# The networks --------------------------------------------------------------------------------


class Network(NamedTuple):
    """What this project counts of a row's model.

    Attributes:
        backbone_params: Number of parameters of the backbone, which has no classifier.
        backbone_macs_224: Its multiply-accumulates at 224 x 224.
        params: Number of parameters of the whole model.
        macs: Multiply-accumulates of backbone and neck at the task's typical input.
    """

    backbone_params: int
    backbone_macs_224: int
    params: int
    macs: int


def count(config: Path, shape: Tuple[int, int]) -> Network:
    """Build the model of ``config`` without weights and count it, at H and W in px.

    Raises:
        ImportError: A library that the config needs is missing.
    """
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        model = MODELS.build(cfg.model)
    backbone = complexity(model.backbone, (224, 224))[-1]
    parts = nn.Sequential(OrderedDict(backbone=model.backbone, neck=model.neck))
    return Network(backbone.params, backbone.macs, sum(p.numel() for p in model.parameters()),
                   complexity(parts, shape)[-1].macs)


# What was measured ---------------------------------------------------------------------------

TRAINED, CONVERTED = 'trained here', 'converted checkpoint'
OTHER, NOT_RUN = 'checkpoint of unknown origin', 'not run'

MAX_CAVEATS = 4  # told in the table; the JSON has all of them
TRAINING = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg')
VALIDATION = ('model', 'val_dataloader', 'val_evaluator')
TESTING = ('model', 'test_dataloader', 'test_evaluator')
# What changes no figure, or is compared in a way of its own.
IGNORED = ('init_cfg', 'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor',
           'val_interval', 'train_dataloader.batch_size')


@dataclass
class Result:
    """A measurement that is, or could be taken for, a row's result.

    Attributes:
        source: ``TRAINED``, ``CONVERTED`` or ``OTHER``.
        caveats: In what it is not what the table asks for; empty if in nothing.
        figures: By column, in percent; what was not measured is left out.
    """

    source: str
    caveats: List[str]
    figures: Dict[str, float]
    measurement: Measurement

    def __str__(self):
        told, rest = self.caveats[:MAX_CAVEATS], self.caveats[MAX_CAVEATS:]
        return ', '.join([self.source, *told, *([f'and {len(rest)} more departures'] if rest
                                                else [])])


@dataclass
class Entry:
    """A row and task: what is published, counted and measured.

    Attributes:
        network: None where a library it needs is missing.
        results: One of each source at most, the best there is.
    """

    row: Row
    task: str
    network: Optional[Network] = None
    results: List[Result] = field(default_factory=list)

    @property
    def published(self) -> Dict[str, str]:
        return published(self.row, self.task)


def collect(root: Path, runs: Iterable[Measurement], rows: Iterable[Row] = ROWS,
            tasks: Iterable[str] = tuple(TASKS)) -> Tuple[List[Entry], List[str]]:
    """Return the entries of the table, with the measurements that are theirs.

    Networks are not counted yet.

    Args:
        root: The project's root folder, with its configs.

    Returns:
        Entries, and the measurements left out because they are of other data.
    """
    runs = list(runs)
    entries, left_out = [], []
    for row in rows:
        for task in tasks:
            entries.append(Entry(row, task))
            path = TASKS[task].config.format(row.config)
            mine = [run for run in runs if run.name == Path(path).stem]
            expected = mine and Config.fromfile(
                root / path, import_custom_modules=False).to_dict()
            best: Dict[str, Result] = {}
            for run in mine:
                data, images = TASKS[task].data
                if run.images and not run.images[0] <= images <= run.images[1]:
                    left_out.append(
                        f'{run.folder} is of {about(run.images)}, and {data} has {images} (data '
                        f'in {run.config.get("data_root")})')
                    continue
                result = judge(run, task, expected)
                if not result.figures:
                    left_out.append(f'{run.folder} has none of '
                                    + ', '.join(TASKS[task].metrics.values()))
                elif result.source not in best or rank(result) >= rank(best[result.source]):
                    best[result.source] = result
            entries[-1].results += best.values()
    return entries, left_out


def about(images: Tuple[int, int]) -> str:
    return f'{images[0]} to {images[1]} images' if images[0] < images[1] else f'{images[1]} images'


def rank(result: Result) -> tuple:
    """What makes a result better than another: none missing, longer training, newer."""
    run = result.measurement
    return not result.caveats, max(done or 0 for done in run.trained), run.folder.name


def judge(run: Measurement, task: str, expected: dict) -> Result:
    """Tell where a measurement comes from and in what it departs from the row's config."""
    tested = run.checkpoint is not None
    source = TRAINED
    if 'converted_from' in run.meta:
        source = CONVERTED
    elif tested and not re.fullmatch(rf'{re.escape(run.name)}_\d{{8}}_\d{{6}}',
                                     str(run.meta.get('experiment_name'))):
        source = OTHER
    caveats = []
    if source == TRAINED:
        caveats += unfinished(run, expected) + departures(run.training, expected)
    # A test need not have the bias mode of the training, and that is told by itself.
    keys = TESTING if tested else VALIDATION
    caveats += differences(run.config, expected, keys, (*IGNORED, 'bias_mode'))
    mode, meant = (cfg['model'].get('backbone', {}).get('bias_mode', 'offset')
                   for cfg in (run.config, expected))
    meant = run.meta.get('bias_mode', meant)  # a converted checkpoint says what it is for
    if mode != meant:
        caveats.append(f'bias_mode {mode} instead of {meant}')
    if run.images is None:
        caveats.append(f'on an unknown number of images in {run.config.get("data_root")}')
    figures = {column: round(TASKS[task].scale * run.metrics[name], 4)
               for column, name in TASKS[task].metrics.items() if name in run.metrics}
    return Result(source, list(dict.fromkeys(caveats)), figures, run)


def unfinished(run: Measurement, expected: dict) -> List[str]:
    length, unit = schedule(expected)
    done = run.trained[0 if unit == 'epochs' else 1]
    if done is None:
        return [f'after an unknown number of {unit}']
    return [] if done >= length else [f'{done} of {length} {unit}']


def departures(training: Optional[Training], expected: dict) -> List[str]:
    """In what a training departs from the row's recipe, its length apart."""
    if training is None:
        return ['in an unknown way']
    first = training.configs[0]
    started, meant = (Path(start(cfg) or 'no weights').name for cfg in (first, expected))
    if first.get('resume'):
        caveats = ['started from unknown weights']
    elif first.get('load_from'):
        caveats = [f'started from {first["load_from"]}']
    else:
        caveats = [f'started from {started} instead of {meant}'] if started != meant else []
    batch = expected['auto_scale_lr']['base_batch_size']
    for cfg, gpus in zip(training.configs, training.gpus):
        caveats += differences(cfg, expected, TRAINING, IGNORED)
        images = gpus and gpus * cfg.get('train_dataloader', {}).get('batch_size', 0)
        if images != batch:
            caveats.append(f'batches of {images or "an unknown number of"} images instead of '
                           f'{batch}')
    return caveats


def start(cfg: dict) -> Optional[str]:
    """The checkpoint that a config's backbone starts from."""
    return (cfg['model'].get('backbone', {}).get('init_cfg') or {}).get('checkpoint')


def marks(entries: Sequence[Entry], column: str) -> List[Mark]:
    """Return one mark for each entry that has a figure in ``column``, against GMACs.

    The measured one is of the first result without caveats.
    """
    found = []
    for entry in entries:
        paper = entry.published.get(column, '')
        good = [result.figures[column] for result in entry.results
                if not result.caveats and column in result.figures]
        if entry.network and (paper or good):
            found.append(Mark(
                entry.row.name.removeprefix(entry.row.family).strip('-')
                + ('' if confirmed(paper) else ' ?'),
                entry.row.family, entry.network.backbone_macs_224 / 1e9, number(paper),
                good[0] if good else None))
    return found


# The report ----------------------------------------------------------------------------------

NONE = '–'


def markdown(entries: Sequence[Entry], notes: Sequence[str] = ()) -> str:
    """Return the table of each task, then the networks', then where it all comes from."""
    lines = []
    for key, task in TASKS.items():
        mine = [entry for entry in entries if entry.task == key]
        if mine:
            lines += [f'## {task.title}', '', _cells('backbone', 'figures', *task.metrics),
                      _cells('---', '---', *['---:'] * len(task.metrics))]
            for entry in mine:
                lines += _result_lines(entry)
            lines.append('')
    lines += _network_lines(entries)
    results = [(entry, result) for entry in entries for result in entry.results]
    if results:
        lines += ['Measured here:', '']
        lines += [f'- {entry.row.name}, {TASKS[entry.task].title}: {result}; '
                  f'`{result.measurement.folder}`'
                  + (f', of `{result.measurement.checkpoint}`'
                     if result.measurement.checkpoint else '')
                  for entry, result in results] + ['']
    if notes:
        lines += ['Not used:', ''] + [f'- {note}' for note in notes] + ['']
    lines.append('"?": a figure of the paper that could not be confirmed. '
                 '"difference": measured minus published.')
    return '\n'.join(lines) + '\n'


def _result_lines(entry: Entry) -> Iterator[str]:
    columns, paper = TASKS[entry.task].metrics, entry.published
    figures = 'paper' if paper else 'paper: not published'
    yield _cells(entry.row.name, figures if entry.results else f'{figures}; here: {NOT_RUN}',
                 *(paper.get(column, NONE) for column in columns))
    for result in entry.results:
        yield _cells('', f'here: {result}', *(
            f'{result.figures[column]:.1f}' if column in result.figures else NONE
            for column in columns))
        if paper:
            difference = differing(result, paper)
            yield _cells('', 'difference', *(
                f'{difference[column]:+.1f}' if column in difference else NONE
                for column in columns))


def differing(result: Result, paper: Dict[str, str]) -> Dict[str, float]:
    """Return what was measured minus what is published, by column."""
    return {column: value - number(paper[column])
            for column, value in result.figures.items() if column in paper}


def _network_lines(entries: Sequence[Entry]) -> Iterator[str]:
    det, seg = (TASKS[task].shape for task in ('det', 'seg'))
    yield from (
        '## Networks', '',
        'Paper: the ImageNet classifier, heads included. Here: the backbone (that of the '
        'detector), which has no classifier, and whole models. MACs are those of convolutions '
        'and matrix products for one image.', '',
        _cells('backbone', 'classifier, M params (paper)', 'backbone, M params',
               'Mask R-CNN, M params (paper)', 'Mask R-CNN, M params', 'Semantic FPN, M params',
               'classifier at 224 x 224, GMACs (paper)', 'backbone at 224 x 224, GMACs',
               f'backbone + neck at {det[0]} x {det[1]}, GMACs',
               f'backbone + neck at {seg[0]} x {seg[1]}, GMACs'),
        _cells('---', *['---:'] * 9))
    networks = {(entry.row, entry.task): entry.network for entry in entries}
    for row in dict.fromkeys(entry.row for entry in entries):
        nets = {task: networks.get((row, task)) for task in TASKS}
        any_net = nets['det'] or nets['seg']
        yield _cells(
            row.name, row.params, _millions(any_net, 'backbone_params'), row.whole or NONE,
            _millions(nets['det'], 'params'), _millions(nets['seg'], 'params'), row.gmacs or NONE,
            _billions(any_net, 'backbone_macs_224'), _billions(nets['det'], 'macs', 1),
            _billions(nets['seg'], 'macs', 1))
    yield ''


def _cells(*texts: str) -> str:
    return f'| {" | ".join(texts)} |'


def _millions(network: Optional[Network], name: str) -> str:
    return f'{getattr(network, name) / 1e6:.1f}' if network else NONE


def _billions(network: Optional[Network], name: str, digits: int = 2) -> str:
    return f'{getattr(network, name) / 1e9:.{digits}f}' if network else NONE


def as_json(entries: Sequence[Entry], notes: Sequence[str] = ()) -> dict:
    """Return everything the report says, for programs."""

    def figure(text):
        return dict(value=number(text), confirmed=confirmed(text)) if text else None

    def measured(entry, result):
        run = result.measurement
        return dict(source=result.source, caveats=result.caveats, figures=result.figures,
                    difference=differing(result, entry.published), folder=str(run.folder),
                    checkpoint=run.checkpoint, images=run.images)

    return dict(
        entries=[dict(
            backbone=entry.row.name, task=entry.task,
            config=TASKS[entry.task].config.format(entry.row.config),
            paper=dict(
                classifier_params_m=figure(entry.row.params),
                classifier_gmacs_224=figure(entry.row.gmacs),
                maskrcnn_params_m=figure(entry.row.whole),
                figures={column: figure(text) for column, text in entry.published.items()}),
            network=entry.network and dict(entry.network._asdict(),
                                           macs_shape=TASKS[entry.task].shape),
            measured=[measured(entry, result) for result in entry.results]
            or [dict(source=NOT_RUN)]) for entry in entries],
        not_used=list(notes))
