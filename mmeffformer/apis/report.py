"""Published and measured figures side by side. '42.6 ?' is an unconfirmed figure."""
import json
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn

from ..engine.configs import find_config
from ..utils.complexity import complexity
from ..utils.markdown import markdown_table
from ..utils.plots import read_scalars
from ..utils.registry import MODELS
from ..weights.compatibility import read_model

ROOT = Path(__file__).resolve().parents[1] / '.mim'  # where setup.py puts configs and metafiles
RECORD = 'evaluation.json'
NONE = '–'
# Metrics of mmdet, mmseg and mmpretrain: the metafiles' names, and the factors to percent.
METRICS = {
    **{f'coco/{name}_mAP{iou and f"_{iou}"}': (f'{kind} AP{iou}', 100)
       for kind, name in (('box', 'bbox'), ('mask', 'segm')) for iou in ('', '50', '75')},
    'mIoU': ('mIoU', 1), 'accuracy/top1': ('Top 1 Accuracy', 1),
}
# Images in the validation split; H and W of a typical input, px.
DATA = {'COCO 2017': (5000, (800, 1344)), 'ADE20K': (2000, (512, 512)),
        'ImageNet-1k': (50000, (224, 224))}
# Columns of Table 2 of EfficientFormer, and the figures in each.
TABLE2 = {
    'params, M': ('Classifier Params (M)',),
    'box AP / 50 / 75': ('box AP', 'box AP50', 'box AP75'),
    'mask AP / 50 / 75': ('mask AP', 'mask AP50', 'mask AP75'), 'mIoU': ('mIoU',),
}


@dataclass(frozen=True)
class Model:
    """An entry of a metafile. Its name is the stem of its config, a path below ``ROOT``.

    ``published`` holds figures as printed: metrics, 'Params (M)' of the whole model, 'GMACs'.
    """

    name: str
    config: str
    data: str
    metadata: Dict[str, str]
    published: Mapping[str, str]


@dataclass(frozen=True)
class Measurement:
    """Figures of one model: metrics in percent, 'Params (M)', 'GMACs'.

    ``source`` names the checkpoint or validation, the progress of the training and the number
    of images; ``path`` is the folder or config that the figures come from.
    """

    model: str
    figures: Mapping[str, float]
    source: str
    path: Path


def read_models() -> Dict[str, Model]:
    """Return all models of the metafiles by name.

    Raises:
        FileNotFoundError: mmeffformer is not installed, so its metafiles are not found.
    """

    def load(path: str) -> dict:
        return yaml.load((ROOT / path).read_text(encoding='utf-8'), yaml.BaseLoader)

    models = {}
    for path in load('model-index.yml')['Import']:
        for entry in load(path)['Models']:
            metadata = entry['Metadata']
            figures = {key: metadata[key] for key in ('Params (M)', 'GMACs') if key in metadata}
            for result in entry.get('Results', ()):
                figures.update(result['Metrics'])
            models[entry['Name']] = Model(entry['Name'], entry['Config'],
                                          metadata['Training Data'], metadata, figures)
    return models


def read_published() -> Dict[str, Mapping[str, str]]:
    """Return the published figures, as printed, by model and metric."""
    return {name: model.published for name, model in read_models().items()}


def read_library_published(config: str) -> Mapping[str, str]:
    """Return the figures that mmdet or mmseg publishes for one of its configs.

    Args:
        config: ``LIBRARY::PATH``. The metafile next to it has the figures; there may be none.
    """
    path = Path(find_config(config))
    figures: Dict[str, str] = {}
    for metafile in path.parent.glob('metafile.y*ml'):
        for entry in yaml.load(metafile.read_text(encoding='utf-8'), yaml.BaseLoader)['Models']:
            if Path(entry['Config']).name == path.name:
                results = entry.get('Results') or []
                for result in results if isinstance(results, list) else [results]:
                    figures.update(result['Metrics'])
    return figures


def read_peers(metric: str) -> Dict[str, float]:
    """Return the figures of configs/peers.yml for a metric, by network: not measured here."""
    peers = yaml.safe_load((ROOT / 'configs/peers.yml').read_text(encoding='utf-8'))
    return {peer['Name']: peer['Metrics'][metric] for peer in peers if metric in peer['Metrics']}


def published_table(models: Iterable[Model],
                    columns: Mapping[str, Sequence[str]] = TABLE2) -> str:
    """Return a Markdown table of published figures, one row for all models of a backbone.

    ``columns`` names the figures, or keys of metadata, in each column. Models of another recipe
    than the paper's are left out.
    """

    def cell(figures: Sequence[str]) -> str:
        text = ' / '.join(figures).replace(' ?', '') + ' (?)' * ('?' in ''.join(figures))
        return text if any(figures) else NONE

    rows: Dict[str, Dict[str, str]] = {}
    for model in models:
        if 'Recipe' in model.metadata:
            continue
        name = model.name.removeprefix('maskrcnn_').removeprefix('semfpn_')
        rows.setdefault(model.metadata['Backbone'], {}).update(
            model.metadata, NAME=f'`{name}`', **model.published)
    return markdown_table(['backbone', *columns, 'NAME'], (
        [name, *(cell([row.get(key, '') for key in keys]) for keys in columns.values()),
         row['NAME']] for name, row in rows.items()))


def record_evaluation(runner: Runner, config: str, checkpoint: str,
                      metrics: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json`` into the log folder of a test, and return its path.

    The file holds the paths of config and checkpoint, how the checkpoint was made, the number of
    images, and the ``metrics`` that ``runner.test()`` returned.
    """
    meta = read_model(checkpoint).get('meta') or {}
    path = Path(runner.log_dir) / RECORD
    record = dict(
        config=str(config), checkpoint=str(checkpoint),
        meta={key: meta[key] for key in ('epoch', 'iter', 'converted_from')
              if isinstance(meta.get(key), (str, int))},
        images=len(runner.test_dataloader.dataset),
        metrics={key: float(value) for key, value in metrics.items() if isinstance(value, Real)})
    path.write_text(json.dumps(record, indent=1))
    return path


def read_measurements(work_dirs: Path,
                      models: Mapping[str, Model]) -> Tuple[List[Measurement], List[str]]:
    """Return the figures measured of ``models``, and a message for each unusable result.

    Args:
        work_dirs: Folder that holds work dirs of tools/train.py and tools/test.py, at any depth.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not work_dirs.is_dir():
        raise FileNotFoundError(f'{work_dirs} is not a folder: expected one that holds work dirs '
                                'of tools/train.py and tools/test.py')
    trained = sorted({path.parents[2] for path in work_dirs.rglob('vis_data/scalars.json')})
    measurements, problems = [], []
    for path in [*sorted(work_dirs.rglob(RECORD)), *trained]:
        read = _evaluation if path.name == RECORD else _validation
        try:
            measurements.extend(list(read(path, models)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f'{path} cannot be used: {error!r}')
    return measurements, problems


def _evaluation(path: Path, models: Mapping[str, Model]) -> Iterator[Measurement]:
    """The evaluation in a record of :func:`record_evaluation`."""
    record = json.loads(path.read_text())
    model, meta = models.get(Path(record['config']).stem), record['meta']
    if model:
        made = (f'converted from {meta["converted_from"]}' if 'converted_from' in meta
                else _progress(model, meta.get('epoch'), meta.get('iter')))
        source = (f'{Path(record["checkpoint"]).name}, {made}, '
                  f'{record["images"]} of {DATA[model.data][0]} images')
        yield Measurement(model.name, _figures(record['metrics']), source, path.parent)


def _validation(work_dir: Path, models: Mapping[str, Model]) -> Iterator[Measurement]:
    """The last validation of the training run in a work dir, if any."""
    names = sorted(path.stem for path in work_dir.glob('*.py'))
    if not models.keys() & {*names}:
        return
    if len(names) > 1:
        raise ValueError(f'it holds the configs of {", ".join(names)}; give each training its '
                         'own --work-dir')
    try:
        scalars = read_scalars(work_dir)
    except FileNotFoundError:  # only evaluations
        return
    step = max((step for curve in scalars.metrics.values() for step in curve), default=None)
    if step is None:
        raise ValueError('the training has not been validated yet')
    figures = {key: curve[step] for key, curve in scalars.metrics.items() if step in curve}
    done = (step, None) if scalars.metric_unit == 'epoch' else (None, step)
    source = f'validation, {_progress(models[names[0]], *done)}, unknown number of images'
    yield Measurement(names[0], _figures(figures), source, work_dir)


def _figures(metrics: Mapping[str, float]) -> Dict[str, float]:
    return {METRICS[name][0]: METRICS[name][1] * value
            for name, value in metrics.items() if name in METRICS}


def _progress(model: Model, epoch: Optional[int], iteration: Optional[int]) -> str:
    unit, done = ('epoch', epoch) if 'Epochs' in model.metadata else ('iteration', iteration)
    length = model.metadata[f'{unit.capitalize()}s']
    return f'{unit} {done} of {length}' if done is not None else 'unknown training'


def count(model: Model) -> Measurement:
    """Count the parameters of a model and the MACs of its backbone and neck, without weights.

    Raises:
        ImportError: A library that the config needs is not installed.
    """
    cfg, (height, width) = Config.fromfile(ROOT / model.config), DATA[model.data][1]
    with DefaultScope.overwrite_default_scope('mmeffformer'), torch.device('meta'):
        network = MODELS.build(cfg.model)
    parts = [getattr(network, name) for name in ('backbone', 'neck') if hasattr(network, name)]
    macs = complexity(nn.Sequential(*parts or [network]), (height, width))[-1].macs
    params = sum(parameter.numel() for parameter in network.parameters())
    return Measurement(model.name, {'Params (M)': params / 1e6, 'GMACs': macs / 1e9},
                       f'GMACs without heads at {height} x {width} px', Path(model.config))


def markdown_report(models: Iterable[Model], measurements: Sequence[Measurement],
                    problems: Sequence[str] = ()) -> str:
    """Return a Markdown table for each data set, then the problems."""
    models, parts = list(models), []
    for data in dict.fromkeys(model.data for model in models):
        group = {model.name: model for model in models if model.data == data}
        figures = [*(model.published for model in group.values()),
                   *(each.figures for each in measurements if each.model in group)]
        metrics = list(dict.fromkeys(metric for each in figures for metric in each))
        parts += [f'## {data}', markdown_table(['model', 'figures', *metrics], (
            row for model in group.values() for row in _rows(model, metrics, measurements)))]
    if problems:
        parts += ['Not used:', '\n'.join(f'- {problem}' for problem in problems)]
    return '\n\n'.join([*parts, '"?": unconfirmed. In brackets: measured minus published.']) + '\n'


def _rows(model: Model, metrics: Sequence[str],
          measurements: Iterable[Measurement]) -> Iterator[List[str]]:
    """The row of a model's published figures, and one for each measurement of the model."""
    yield [model.name, 'published' if model.published else 'not published',
           *(model.published.get(metric, NONE) for metric in metrics)]
    for each in (each for each in measurements if each.model == model.name):
        cells = []
        for metric in metrics:
            value, paper = each.figures.get(metric), model.published.get(metric)
            digits = 2 if metric == 'GMACs' else 1
            cells.append(NONE if value is None else f'{value:.{digits}f}' + (
                f' ({value - float(paper.removesuffix(" ?")):+.{digits}f})' if paper else ''))
        yield ['', f'measured: {each.source}; `{each.path}`', *cells]
