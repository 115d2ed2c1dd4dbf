"""Data sets as the Runner builds them, and their samples as the model gets them."""
import copy
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadAnnotations
from mmengine.dataset import BaseDataset, Compose
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from .repeatable import seed_all
from .traced import SampleError, TracedDataset, TracedPipeline, explain, file_of

SHOWN = 10  # files that a list of errors names


@dataclass
class Listing:
    """The entries of an annotation file, before and after the filter of the data set."""
    dataset: BaseDataset
    broken: List[Tuple[str, Exception]] = field(default_factory=list)  # (name, error)
    annotations: int = 0  # in the file; 0 where the data set has no such list
    objects: int = 0
    images: int = 0
    kept: Optional[int] = None  # images after the filter
    repeated: int = 0  # entries of an image that another entry has
    categories: Optional[List[str]] = None  # names in the order of the labels, as COCO files have

    def errors(self) -> Iterator[str]:
        """Yield what training cannot use."""
        known = vars(self.dataset)
        kind, classes = type(self.dataset).__name__, known.get('_metainfo', {}).get('classes', ())
        if self.broken:
            names = '; '.join(explain(name, error) for name, error in self.broken[:SHOWN])
            more = len(self.broken) - SHOWN
            yield (f'{kind} cannot read {len(self.broken)} entries: {names}'
                   + (f'; and {more} more' if more > 0 else ''))
        if self.categories is not None and self.categories != [*classes]:
            missing = [name for name in classes if name not in self.categories]
            yield (f'{known["ann_file"]} has no category {", ".join(map(repr, missing))}, so that '
                   'the labels of later classes shift' if missing else
                   f'the classes {(*classes, )} are in another order than the categories '
                   f'{(*self.categories, )} of {known["ann_file"]}, by which labels are numbered'
                   ) + '. Correct metainfo.classes'
        if self.kept == 0 and not self.images and not self.broken:
            where = {name: known[name] for name in ('ann_file', 'data_prefix', 'img_suffix')
                     if known.get(name)}
            yield f'{kind} finds no images: {where}'
        elif self.kept == 0 and self.images:
            yield (f'none of the {self.images} images of {kind} is left. No image has an object '
                   f'of these classes ({", ".join(map(str, classes[:5]))}), or filter_cfg='
                   f'{known.get("filter_cfg")} leaves all out')

    def warnings(self, share: float) -> Iterator[str]:
        """Yield what is left out, where it is more than a share."""
        if self.repeated:
            yield (f'{self.repeated:,} images of {type(self.dataset).__name__} are listed twice; '
                   'objects of one entry are background in the other')
        left_out = self.annotations - self.objects
        if self.images and left_out > share * self.annotations:
            yield (f'{left_out:,} of {self.annotations:,} annotations are left out: of no class '
                   'of the config, below 1 px, without area, outside their image, or ignored')
        if self.kept and self.images - self.kept > share * self.images:
            yield (f'filter_cfg={vars(self.dataset).get("filter_cfg")} leaves out '
                   f'{self.images - self.kept:,} of {self.images:,} images')


@contextmanager
def observed_datasets() -> Iterator[List[Listing]]:
    """Context manager: list what the data sets that are built inside it read and left out.

    An entry that cannot be parsed is recorded and left out, so that the others are read.
    """
    listings: List[Listing] = []
    original = BaseDataset.__init__

    def init(self, *args, **kwargs):
        listings.append(Listing(self))
        observers = _observers(listings[-1])
        vars(self).update(observers)
        try:
            original(self, *args, **kwargs)
        finally:
            for name in observers:  # closures cannot be pickled for a worker process
                vars(self).pop(name, None)

    BaseDataset.__init__ = init
    try:
        yield listings
    finally:
        BaseDataset.__init__ = original


def _observers(listing: Listing) -> Dict[str, Callable]:
    """Return methods that replace those of a data set while it is built."""
    dataset = listing.dataset
    parse, load, keep = dataset.parse_data_info, dataset.load_data_list, dataset.filter_data

    def parse_data_info(raw):
        if listing.categories is None and hasattr(dataset, 'coco'):
            listing.categories = [item['name'] for item in dataset.coco.load_cats(dataset.cat_ids)]
        try:
            entry = parse(raw)
        except Exception as error:
            listing.broken.append((file_of(raw), error))
            return {}
        if isinstance(raw, dict) and isinstance(raw.get('raw_ann_info'), list):
            listing.annotations += len(raw['raw_ann_info'])
        return entry

    def load_data_list():
        entries = [entry for entry in load() if entry]
        listing.images += len(entries)
        listing.repeated = len(entries) - len({str(item.get('img_path')) for item in entries})
        listing.objects += sum(len(entry.get('instances') or ()) for entry in entries)
        return entries

    def filter_data():
        entries = keep()
        listing.kept = len(entries)
        return entries

    return dict(parse_data_info=parse_data_info, load_data_list=load_data_list,
                filter_data=filter_data)


class Labels(NamedTuple):
    """Label values that a model takes."""
    classes: Optional[int] = None  # the fewest classes of a head
    ignored: Tuple[int, ...] = ()  # values that every head ignores


@dataclass
class Sample:
    """A sample after its pipeline."""
    index: int
    name: str
    error: str = ''
    size: Tuple[int, ...] = ()  # of the input: channels, height, width
    given: int = 0  # objects in the annotations
    left: Optional[Counter] = None  # label -> objects, or label maps that have it
    reasons: Counter = field(default_factory=Counter)  # transform -> objects it left out


class SampleReader(Dataset):
    """The samples of a data set as :class:`Sample`, errors included.

    Args:
        dataset: A data set whose samples come from its own ``pipeline``.
        labels: The label values that the model takes.
        workers: Number of processes that read samples; ``current`` has the index of each one's.
    """

    def __init__(self, dataset: Dataset, labels: Labels, workers: int):
        self.dataset, self.labels = dataset, labels
        self.current = torch.zeros(max(1, workers), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        worker = get_worker_info()
        self.current[worker.id if worker else 0] = index
        seed_all(index)
        sample = Sample(index, f'sample {index}')
        try:
            packed = self._prepare(index, sample)
            if packed is None:  # the pipeline leaves the sample out
                sample.left = Counter()
            elif isinstance(packed, dict):
                self._inspect(packed, sample)
        except SampleError as error:
            sample.error = str(error)
        except Exception as error:  # any that a data set may have
            sample.error = f'{sample.name}: {type(error).__name__}: {error}'
        return sample

    def _prepare(self, index: int, sample: Sample) -> Optional[dict]:
        if not isinstance(self.dataset.pipeline, Compose):
            return self.dataset[index]
        info = self.dataset.get_data_info(index)
        sample.name = file_of(info)
        objects = info.get('instances') or ()
        sample.given = len(objects)
        count = sum(not item.get('ignore_flag') for item in objects)
        sample.reasons['ignored by the annotations'] += sample.given - count
        size = info.get('height'), info.get('width')

        def observe(step: Any, data: Optional[dict]) -> None:
            nonlocal count
            now = 0 if data is None else _count(data, count)
            if now < count:
                sample.reasons[type(step).__name__] += count - now
            count = now
            shape = tuple((data or {}).get('ori_shape', ()))[:2]
            if shape and None not in size and shape != size:
                raise ValueError(
                    f'the image is {shape} px (height, width), its annotations are for {size}. '
                    "Correct the annotations, or load with color_type='color_ignore_orientation' "
                    'if its EXIF tag rotates the image')
            if shape and isinstance(step, LoadAnnotations) and 'gt_seg_map' in data and (
                    data['gt_seg_map'].shape != shape):
                raise ValueError(f'the label map is {data["gt_seg_map"].shape} px, its image '
                                 f'{shape}')

        return TracedPipeline(self.dataset.pipeline, observe)(info)

    def _inspect(self, packed: dict, sample: Sample) -> None:
        inputs, truth = packed.get('inputs'), packed.get('data_samples')
        if isinstance(inputs, torch.Tensor):
            sample.size = tuple(inputs.shape)
            if inputs.is_floating_point() and not inputs.isfinite().all():
                sample.error = f'{sample.name}: the image has values that are not finite'
        truth = truth if isinstance(truth, BaseDataElement) else BaseDataElement()  # of one image
        if 'gt_instances' in truth and 'bboxes' in truth.gt_instances:
            boxes = truth.gt_instances.bboxes
            boxes = getattr(boxes, 'tensor', boxes)
            sample.left = Counter(truth.gt_instances.labels.tolist())
            if not torch.as_tensor(boxes).isfinite().all():
                sample.error = f'{sample.name}: a box is not finite: {boxes.tolist()}'
        elif 'gt_sem_seg' in truth:
            sample.left = Counter(truth.gt_sem_seg.data.unique().tolist())
        elif 'gt_label' in truth:  # of mmpretrain
            sample.left = Counter(truth.gt_label.tolist())
        classes = self.labels.classes
        wrong = [value for value in sample.left or () if classes and not 0 <= value < classes
                 and value not in self.labels.ignored]
        if wrong:
            sample.error = (
                f'{sample.name}: label values {sorted(wrong)[:5]} are neither classes (0 to '
                f'{classes - 1}) nor ignored ({", ".join(map(str, self.labels.ignored))})')


def _count(data: dict, count: int) -> int:
    """Return the number of objects that training uses; ``count`` where there is no such list."""
    truth = data.get('data_samples')
    if isinstance(truth, BaseDataElement) and 'gt_instances' in truth:
        return len(truth.gt_instances)
    if 'gt_bboxes_labels' in data:
        return int((~np.asarray(data.get('gt_ignore_flags', False), bool)
                    * np.ones(len(data['gt_bboxes_labels']), bool)).sum())
    return count


def own_pipelines(dataset: Dataset) -> List[Dataset]:
    """Return the data sets inside whose pipelines make the samples that a model gets.

    They are copies: transforms with a state, such as a cache, are not changed by a check.
    """
    if hasattr(dataset, 'pipeline'):
        dataset = copy.copy(dataset)
        dataset.pipeline = copy.deepcopy(dataset.pipeline)
        # Those of several images have a list of transforms.
        return [dataset if isinstance(dataset.pipeline, Compose) else TracedDataset(dataset)]
    inside = vars(dataset)
    inner = inside.get('datasets') or inside.get('dataset') or []
    return [leaf for item in (inner if isinstance(inner, (list, tuple)) else [inner])
            for leaf in own_pipelines(item)]


def _use_one_thread(worker: int) -> None:
    cv2.setNumThreads(0)


def read_samples(dataset: Dataset, labels: Labels, limit: Optional[int] = None,
                 workers: int = 0) -> Iterator[Sample]:
    """Yield the samples of a data set, or ``limit`` of them at equal distances."""
    reader = SampleReader(dataset, labels, workers)
    chosen = range(len(reader)) if not limit or len(reader) <= limit else np.linspace(
        0, len(reader) - 1, limit).astype(int).tolist()
    loader = DataLoader(Subset(reader, chosen), batch_size=8, num_workers=workers, collate_fn=list,
                        worker_init_fn=_use_one_thread)
    try:
        for batch in loader:
            yield from batch
    except RuntimeError as error:  # such as a worker without memory for a mask
        names = [file_of(dataset.get_data_info(index)) for index in reader.current.tolist()]
        yield Sample(-1, '', f'a process stopped while it prepared {" or ".join(names)}; the '
                     f'samples after it are not checked ({str(error).strip()})')
