"""Look for faults in all that the data sets of a config read."""
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
from mmcv.transforms import LoadAnnotations, LoadImageFromFile
from mmengine import DefaultScope
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from ..utils.errors import TrainingStopped
from ..utils.files import atomic_write
from .check import _get, _leaves
from .faults import Coco, Fault, Labels, Reading, Sample, inspect_coco, inspect_sample

CHUNK = 32  # samples that a process takes at a time
ADVICE = '`python tools/check_data.py CONFIG` lists every broken file, and what to do about it'


class BrokenData(TrainingStopped):
    """Data that training cannot use; the message names the file."""

    def __init__(self, message: str):
        # A DataLoader puts the traceback of its worker before it.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2])


class Source(NamedTuple):
    """A data set of a config, built but not loaded."""
    split: str  # 'train', or 'val, test' where both have the same
    dataset: Dataset


class Report(NamedTuple):
    """What was looked at and found."""
    looked_at: Dict[str, int]  # what a data set reads -> its number of images
    faults: List[Tuple[str, Fault]]  # with the splits


def sources(cfg, splits: Sequence[str]) -> List[Source]:
    """Build the data sets of a config that wrap no others, without loading them."""
    found = []  # (splits, config); configs cannot be dict keys
    for split in splits:
        loader = f'{split}_dataloader'
        for _, leaf in _leaves(_get(cfg, loader, 'dataset'), f'{loader}.dataset'):
            same = [entry for entry in found if entry[1] == leaf]
            if same:
                same[0][0].append(split)
            else:
                found.append(([split], leaf))
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return [Source(', '.join(dict.fromkeys(names)), _unloaded(leaf)) for names, leaf in found
                if _is_known(leaf)]


def _is_known(leaf: dict) -> bool:
    """Whether a data set is one of mmengine's kind, which alone can be built without loading."""
    kind = leaf.get('type')
    kind = DATASETS.get(kind) if isinstance(kind, str) else kind
    return kind is None or isinstance(kind, type) and issubclass(kind, BaseDataset)


def _unloaded(leaf: dict) -> Dataset:
    try:
        return DATASETS.build(dict(leaf, lazy_init=True))
    except (KeyError, TypeError, ImportError) as error:
        raise ValueError(f'the data set {leaf.get("type")!r} of the config cannot be built: '
                         f'{error}') from error


def is_coco(dataset: Dataset) -> bool:
    """Whether a data set reads its annotations as mmdet's CocoDataset does."""
    coco = getattr(sys.modules.get('mmdet.datasets'), 'CocoDataset', None)
    return coco is not None and isinstance(dataset, coco) and all(
        getattr(type(dataset), name) is getattr(coco, name)
        for name in ('load_data_list', 'parse_data_info', 'filter_data'))


def reading_of(dataset: Dataset, pipeline: Compose) -> Reading:
    """How a pipeline reads the files of a data set."""
    reading = Reading(backend_args=getattr(dataset, 'backend_args', None))
    for step in pipeline.transforms:
        if isinstance(step, LoadImageFromFile):
            reading = reading._replace(flag=step.color_type, backend=step.imdecode_backend)
        elif isinstance(step, LoadAnnotations):
            reading = reading._replace(label_backend=step.imdecode_backend)
    return reading


def labels_of(dataset: Dataset, pipeline: Compose) -> Labels:
    """Which values the label maps of a data set may have; known where mmseg loads them."""
    loading = [step for step in pipeline.transforms if isinstance(step, LoadAnnotations)
               and type(step)._load_seg_map.__module__.startswith('mmseg.')]
    if not loading or not hasattr(dataset, 'reduce_zero_label'):
        return Labels()
    # A label_map, from the numbers of all classes to those of some, is applied at last.
    classes = getattr(dataset, 'label_map', None) or dataset.metainfo.get('classes')
    return Labels(len(classes) if classes else None, bool(dataset.reduce_zero_label),
                  {255, getattr(dataset, 'ignore_index', 255)})


def _labels_alone(dataset: Dataset, samples: List[Sample]) -> List[Fault]:
    """Faults of a data set that lists its images by their folder: label maps without an image."""
    folder = (getattr(dataset, 'data_prefix', None) or {}).get('seg_map_path')
    suffix = getattr(dataset, 'seg_map_suffix', None)
    if getattr(dataset, 'ann_file', None) or not folder or not suffix or getattr(
            dataset, 'backend_args', None):
        return []
    known = {os.path.normpath(sample.labels) for sample in samples if sample.labels}
    return [Fault('missing image', str(path), f'a label map without an image{_suffix(dataset)}')
            for path in sorted(Path(folder).rglob(f'*{suffix}'))
            if os.path.normpath(path) not in known]


def samples_of(dataset: Dataset) -> Tuple[List[Fault], List[Sample]]:
    """Read the annotation file, or list the folders, of a data set that is not loaded.

    Returns:
        The faults of the annotation file, and the images to be looked at.
    """
    ann_file = str(getattr(dataset, 'ann_file', '') or '')
    if is_coco(dataset):
        chosen = dataset.filter_cfg or {}
        faults, images = inspect_coco(Coco(
            ann_file, dataset.metainfo['classes'],
            any(getattr(step, 'with_mask', False) for step in dataset.pipeline.transforms),
            dataset.test_mode, chosen.get('filter_empty_gt', False), chosen.get('min_size', 0),
            dataset.backend_args))
        folder, labels = dataset.data_prefix['img'], dataset.data_prefix.get('seg')
        return faults, [Sample(
            os.path.join(folder, name), image_id, size, os.path.join(
                labels, name.rsplit('.', 1)[0] + dataset.seg_map_suffix) if labels else None)
            for image_id, name, size in images]
    where = ann_file or _paths_of(dataset)
    try:
        entries = dataset.load_data_list()
    except Exception as error:  # any a data set may have
        return [Fault('wrong form', where, f'{type(dataset).__name__} fails to read it: '
                      f'{type(error).__name__}: {error}')], []
    entries = [image for entry in entries for image in entry.get('images', [entry])]  # of videos
    samples = [Sample(entry['img_path'], entry.get('img_id'), size_in(entry),
                      entry.get('seg_map_path')) for entry in entries if entry.get('img_path')]
    if not samples:
        return [Fault('no images', where, f'{type(dataset).__name__} finds none'
                      f'{_suffix(dataset)}')], []
    seen, faults = set(), _labels_alone(dataset, samples)
    for sample in samples:
        if sample.image in seen:
            faults.append(Fault('repeated image', sample.image, f'in {where}', sample.image_id))
        seen.add(sample.image)
    return faults, samples


def _paths_of(dataset: Dataset) -> str:
    folders = (getattr(dataset, 'data_prefix', None) or {}).values()
    return ', '.join(str(path) for path in (getattr(dataset, 'ann_file', ''), *folders) if path)


def size_in(entry: dict) -> Optional[Tuple[int, int]]:
    """(height, width) as an annotation file says it, if it does."""
    size = entry.get('height'), entry.get('width')
    return None if None in size else size


def _suffix(dataset: Dataset) -> str:
    return f' that end in {dataset.img_suffix}' if getattr(dataset, 'img_suffix', '') else ''


def check_annotations(cfg, splits: Sequence[str] = ('train', 'val')) -> None:
    """Look through the annotation files of a config, but not at the images.

    Args:
        cfg (mmengine.Config): A config of mmdet or mmseg.
        splits: Of 'train', 'val' and 'test', those that will be used.

    Raises:
        BrokenData: Training would stop, or be silently wrong; the message names the files.
    """
    found = [fault for source in sources(cfg, splits)
             for fault in samples_of(source.dataset)[0] if fault.error]
    if found:
        lines = [f'  {fault.kind}: {fault}' for fault in found[:10]]
        lines += [f'  and {len(found) - 10:,} more'] if len(found) > 10 else []
        raise BrokenData('\n'.join(['the annotations of this config are broken:', *lines, ADVICE]))


def inspect(cfg, splits: Sequence[str] = ('train', 'val', 'test'), workers: int = 1,
            tell: Optional[Callable[[str, int, int], Any]] = None) -> Report:
    """Look for faults in all that the data sets of a config read.

    Args:
        cfg (mmengine.Config): A config of mmdet or mmseg.
        splits: Of 'train', 'val' and 'test', those to look at, where the config has them.
        workers: Processes that read the images.
        tell: Called with what is being done, how many images are done, and of how many.

    Raises:
        ValueError: The config has no data sets.
        RuntimeError: One of the processes was killed.
    """
    tell = tell or (lambda *_: None)
    chosen = sources(cfg, splits)
    if not chosen:
        raise ValueError(f'the config has no data set for {", ".join(splits)}')
    report = Report({}, [])
    for split, dataset in chosen:
        name = f'{split}: {_describe(dataset)}'
        tell(f'{split}: reading annotations', 0, 0)
        faults, samples = samples_of(dataset)
        look = partial(_inspect_all, reading=reading_of(dataset, dataset.pipeline),
                       labels=labels_of(dataset, dataset.pipeline))
        chunks = [samples[i:i + CHUNK] for i in range(0, len(samples), CHUNK)]
        done, by_chunk = 0, {}
        with ProcessPoolExecutor(workers, _context(), _quiet) as pool:
            jobs = {pool.submit(look, chunk): i for i, chunk in enumerate(chunks)}
            try:
                for job in as_completed(jobs):
                    by_chunk[jobs[job]] = job.result()
                    done += len(chunks[jobs[job]])
                    tell(f'{split}: reading images', done, len(samples))
            except BrokenProcessPool as error:
                raise RuntimeError('a process that reads images was killed, maybe for its memory: '
                                   f'try fewer than {workers} workers') from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        faults += [fault for i in sorted(by_chunk) for fault in by_chunk[i]]
        report.looked_at[name] = len(samples)
        report.faults.extend((split, fault) for fault in faults)
    return report


def _describe(dataset: Dataset) -> str:
    return f'{type(dataset).__name__} of {_paths_of(dataset)}'


def _inspect_all(samples: Sequence[Sample], reading: Reading, labels: Labels) -> List[Fault]:
    return [fault for sample in samples for fault in inspect_sample(sample, reading, labels)]


def _context():
    # A forked process is there at once; a new one would first import torch.
    methods = multiprocessing.get_all_start_methods()
    return multiprocessing.get_context('fork' if 'fork' in methods else None)


def _quiet():
    """Set up a process that reads images."""
    cv2.setNumThreads(0)
    # Decoders complain there about what is reported anyway.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def save_report(report: Report, path: Path) -> None:
    """Save all of a report as JSON."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(dict(looked_at=report.looked_at, faults=[
            dict(split=split, severity='error' if fault.error else 'note', **fault._asdict())
            for split, fault in report.faults]), indent=1))
