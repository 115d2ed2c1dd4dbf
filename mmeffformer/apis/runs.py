"""What ``tools/train.py`` and ``tools/test.py`` leave in a work dir, read back as measurements.

A training leaves mmengine's ``TIMESTAMP/vis_data/scalars.json``, an evaluation the
``TIMESTAMP/evaluation.json`` of :func:`record_evaluation`; both leave their config and log.
"""
import ast
import json
import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Container, Dict, Iterator, List, Optional, Tuple

from mmengine.runner import Runner

from ..utils.plots import read_scalars
from ..weights.safe_loading import read_model

RECORD = 'evaluation.json'
# Of a checkpoint's meta: how far it was trained and by which run, as mmengine saves it, or from
# which file it was converted, as tools/convert_checkpoint.py does.
META = ('epoch', 'iter', 'experiment_name', 'time', 'cfg', 'converted_from', 'sha256', 'bias_mode')


def record_evaluation(runner: Runner, config: str, checkpoint: str, metrics: dict) -> Path:
    """Write what ``runner.test()`` has measured, of what and on how much, beside its log.

    Args:
        config: Path of the config.
        checkpoint: Path of the checkpoint evaluated.
        metrics: What ``runner.test()`` returned.

    Returns:
        The file written, ``evaluation.json``.
    """
    meta = read_model(checkpoint).get('meta') or {}
    record = dict(
        config=str(config), checkpoint=str(checkpoint),
        meta={key: meta[key] for key in META if isinstance(meta.get(key), (str, int))},
        images=len(runner.test_dataloader.dataset),
        metrics={key: float(value) for key, value in metrics.items()
                 if isinstance(value, Real)})
    path = Path(runner.log_dir) / RECORD
    path.write_text(json.dumps(record, indent=1))
    return path


@dataclass
class Training:
    """A training, resumed or not.

    Attributes:
        configs: Of its parts, in order.
        gpus: Number of processes in its parts, None where a log does not say.
    """

    configs: List[dict] = field(default_factory=list)
    gpus: List[Optional[int]] = field(default_factory=list)


@dataclass
class Measurement:
    """One evaluation of one network.

    Attributes:
        name: The config's, without folder and suffix.
        metrics: As mmdet and mmseg name and scale them.
        images: Number of images evaluated, at least and at most; None if unknown.
        config: That of the evaluation.
        folder: What it was read from.
        checkpoint: Path of the file evaluated, None for the validation of a training.
        meta: Of that file, ``META`` or less of it.
        trained: Epochs and iterations behind it, either None if unknown.
        training: What is known of how it was trained.
    """

    name: str
    metrics: Dict[str, float]
    images: Optional[Tuple[int, int]]
    config: dict
    folder: Path
    checkpoint: Optional[str] = None
    meta: dict = field(default_factory=dict)
    trained: Tuple[Optional[int], Optional[int]] = (None, None)
    training: Optional[Training] = None


def read_runs(work_dirs: Path, names: Container[str]) -> Tuple[List[Measurement], List[str]]:
    """Return the measurements below ``work_dirs``, and what could not be used and why.

    Nothing in the files is run: configs are read as data (:func:`parse_config`).

    Args:
        names: Of the configs to look for, without folder and suffix.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    work_dirs = Path(work_dirs)
    if not work_dirs.is_dir():
        raise FileNotFoundError(f'{work_dirs} is no folder: expected the one that the work dirs '
                                'of tools/train.py and tools/test.py are in')
    found, problems, trainings = [], [], {}
    folders: Dict[Path, List[Path]] = {}  # work dir -> its runs
    for path in sorted(work_dirs.rglob('vis_data/config.py')):
        run, work_dir = path.parents[1:3]
        if any(dumped.stem in names for dumped in work_dir.glob('*.py')):
            folders.setdefault(work_dir, []).append(run)

    def tried(read, *args):
        try:
            found.extend(read(*args))
        except (ValueError, OSError) as error:
            problems.append(str(error))

    for work_dir, runs in folders.items():  # first, since evaluations refer to them
        tried(_training, work_dir, runs, trainings)
    for runs in folders.values():
        for run in runs:
            tried(_evaluation, run, trainings)
    return [run for run in found if run.name in names], problems


def _training(work_dir: Path, runs: List[Path], trainings: dict) -> Iterator[Measurement]:
    """The last validation of the training in ``work_dir``, entered into ``trainings``."""
    try:
        scalars = read_scalars(work_dir)
    except FileNotFoundError:
        return
    names = sorted(path.stem for path in work_dir.glob('*.py'))
    if len(names) != 1:
        raise ValueError(f'{work_dir} holds configs of {len(names)} names '
                         f'({", ".join(names) or "none"}): expected the one that was trained. '
                         'Give each training a --work-dir of its own')
    training, validation = Training(), _Log()
    for run in runs:
        if not (run / 'vis_data/scalars.json').exists():
            continue
        config, log = read_config(run), _read_log(run)
        if not config.get('resume'):
            training = Training()
        training.configs.append(config)
        training.gpus.append(log.gpus)
        trainings[f'{names[0]}_{run.name}'] = training
        validation, last = log if log.val_batches else validation, run
    step = max((step for curve in scalars.metrics.values() for step in curve), default=None)
    if step is None:
        raise ValueError(f'{work_dir} has not been validated yet')
    batch = (config.get('val_dataloader') or {}).get('batch_size')
    images = None
    if validation.val_batches and validation.gpus and batch:
        full = batch * validation.gpus
        images = (validation.val_batches - 1) * full + 1, validation.val_batches * full
    trained = (step, None) if scalars.metric_unit == 'epoch' else (None, step)
    yield Measurement(names[0], {name: curve[step] for name, curve in scalars.metrics.items()
                                 if step in curve},
                      images, config, last, trained=trained, training=training)


def _evaluation(run: Path, trainings: dict) -> Iterator[Measurement]:
    """What tools/test.py measured in ``run``."""
    path = run / RECORD
    if not path.exists():
        if (run / f'{run.name}.json').exists():  # mmengine's, of any test
            raise ValueError(f'{run} is an evaluation without {RECORD}, which does not tell what '
                             "was evaluated: repeat it with this project's tools/test.py")
        return
    try:
        record = json.loads(path.read_text())
        name, images, meta = Path(record['config']).stem, record['images'], record['meta']
        metrics, checkpoint = record['metrics'], record['checkpoint']
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is broken ({error!r}): repeat the evaluation') from error
    training = trainings.get(meta.get('experiment_name'))
    if training is None and 'cfg' in meta:
        training = Training([parse_config(meta['cfg'], checkpoint)], [None])
    yield Measurement(name, metrics, (images, images), read_config(run), run, checkpoint, meta,
                      (meta.get('epoch'), meta.get('iter')), training)


@dataclass
class _Log:
    gpus: Optional[int] = None
    val_batches: Optional[int] = None


def _read_log(run: Path) -> _Log:
    """What the log of a run alone tells: processes, and batches a validation has."""
    path = run / f'{run.name}.log'
    text = path.read_text(errors='replace') if path.exists() else ''
    gpus = re.search(r'GPU number: (\d+)', text)
    batches = re.findall(r'\(val\) +(?:\[ *\d+\])?\[ *\d+/(\d+)\]', text)
    return _Log(int(gpus[1]) if gpus else None, int(batches[-1]) if batches else None)


def read_config(run: Path) -> dict:
    """Return the config which mmengine dumped for a run.

    Raises:
        ValueError: It is not what mmengine writes.
    """
    path = run / 'vis_data/config.py'
    return parse_config(path.read_text(), str(path))


def parse_config(text: str, origin: str) -> dict:
    """Return a config from mmengine's dump of it, which is read as data and never run.

    Raises:
        ValueError: It is broken, or holds more than plain data; ``origin`` is named.
    """
    try:
        return {target.id: _plain(node.value)
                for node in ast.parse(text).body for target in node.targets}
    except (SyntaxError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'the config in {origin} is broken: {error}') from error


def _plain(node: ast.AST) -> Any:
    """The value of an expression made of literals and calls of ``dict``."""
    if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
        items, = map(_plain, node.args or [ast.Dict([], [])])  # dict({2: 'two'}) or dict(a=1)
        return {**items, **{item.arg: _plain(item.value) for item in node.keywords}}
    if isinstance(node, ast.Dict):
        return {_plain(key): _plain(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item) for item in node.elts]
    return ast.literal_eval(node)


def differences(config: dict, expected: dict, keys: Tuple[str, ...],
                ignored: Tuple[str, ...] = ()) -> List[str]:
    """Tell where two configs differ, below the given top-level keys.

    Where the data lie makes no difference; ``ignored`` are the last parts of keys
    that make none either.

    Returns:
        Texts like 'optim_wrapper.optimizer.lr=0.1 instead of 0.2'.
    """
    left, right = (dict(item for key in keys
                        for item in _flat(key, cfg.get(key), cfg.get('data_root') or ''))
                   for cfg in (config, expected))
    missing = object()

    def told(value):
        return 'nothing' if value is missing else repr(value)

    return [f'{key}={told(left.get(key, missing))} instead of {told(right.get(key, missing))}'
            for key in sorted({*left, *right})
            if left.get(key, missing) != right.get(key, missing)
            and not any(f'.{key}'.endswith(f'.{end}') or f'.{end}.' in f'.{key}'
                        for end in ignored)]


def _flat(key: str, value: Any, data_root: str) -> Iterator[Tuple[str, Any]]:
    """(dotted key, value) of everything in ``value``; sequences are lists."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(f'{key}.{name}', item, data_root)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        for i, item in enumerate(value):
            yield from _flat(f'{key}.{i}', item, data_root)
    elif isinstance(value, (list, tuple)):
        yield key, list(value)
    elif isinstance(value, str) and data_root and value.startswith(data_root):
        yield key, value[len(data_root):].lstrip('/')
    else:
        yield key, value
