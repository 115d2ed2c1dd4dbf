"""A data set around another, whose failures name the file."""
import os
import traceback
from typing import Any, Iterator, List, Optional

import numpy as np
from mmengine.dataset import Compose
from torch.utils.data import Dataset

from .faults import (
    PNG,
    Fault,
    Labels,
    Reading,
    Sample,
    file_is_cut_off,
    inspect_sample,
    inspect_segmentation,
)
from .inspection import ADVICE, BrokenData, labels_of, reading_of, size_in


class GuardedDataset(Dataset):
    """Gives what ``dataset`` gives, and has its attributes, but lets nothing broken pass.

    Whatever goes wrong while a sample is made becomes one :class:`BrokenData` that names the
    file. Moreover, what the libraries do not notice is checked as soon as it is loaded: an
    image cut off, or of another size than its annotations are for (EXIF); boxes that are not
    finite; label maps of another size than the image, or with values that are neither a class
    nor ignored. What they handle is left to them: boxes without area are dropped, images
    without boxes skipped, and for a None out of the pipeline another image is taken.

    The data sets inside, whatever wraps them, get a :class:`GuardedPipeline`.

    Args:
        dataset: A data set of mmdet, mmseg or mmengine, built.
    """

    def __init__(self, dataset: Dataset):
        self.__dict__['dataset'] = dataset
        for leaf in _innermost(dataset):
            leaf.pipeline = _guarded(leaf.pipeline, leaf)

    def __getattr__(self, name):
        if name == 'dataset':  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):
        # As by hooks that end an augmentation before the last epochs.
        setattr(self.dataset, name, _guarded(value, self.dataset) if name == 'pipeline' else value)

    __getitems__ = None  # else torch finds the inner one's, and passes by __getitem__

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except BrokenData:
            raise
        except Exception as error:
            if isinstance(error, IndexError) and not -len(self) <= index < len(self):
                raise  # the end of `for sample in dataset`
            raise BrokenData(_unexplained(f'{_name(self.dataset, index)} (with others, where '
                                          'several are mixed)', error)) from error


class GuardedPipeline(Compose):
    """A pipeline of transforms that checks what they have loaded.

    Args:
        pipeline: Of mmengine.
        reading: How it reads files.
        labels: The values that label maps have in their files.
        classes: The number of classes after loading; None if it is not known.
    """

    def __init__(self, pipeline: Compose, reading: Reading, labels: Labels,
                 classes: Optional[int] = None):
        self.transforms = pipeline.transforms
        self.reading, self.labels, self.classes = reading, labels, classes

    def __call__(self, data: dict) -> Optional[dict]:
        sample = Sample(data.get('img_path'), data.get('img_id'), size_in(data),
                        data.get('seg_map_path'))
        instances = data.get('instances') or []
        checks = dict(img=self._check_image, gt_bboxes=self._check_boxes,
                      gt_seg_map=self._check_labels)
        if not isinstance(sample.image, str):  # several, as of a video
            checks = {}
        for step in self.transforms:
            try:
                data = step(data)
            except BrokenData:
                raise
            except Exception as error:
                faults = self._faults(sample, instances)
                message = _told(faults) if faults else _unexplained(_called(sample), error)
                raise BrokenData(message) from error
            if data is None:
                return None
            for key in [key for key in checks if key in data]:
                faults = checks.pop(key)(data, sample)
                if faults:
                    raise BrokenData(_told(faults))
        return data

    def _local(self, path: Any) -> bool:
        return isinstance(path, str) and not self.reading.backend_args and os.path.isfile(path)

    def _check_image(self, data: dict, sample: Sample) -> Optional[List[Fault]]:
        shape = tuple(data.get('ori_shape') or ())[:2]
        wrong = shape and sample.size and tuple(sample.size) != shape
        if wrong or self._local(sample.image) and file_is_cut_off(sample.image):
            return self._faults(sample._replace(labels=None)) or (wrong and [Fault(
                'image size', sample.image, f'{shape}; the annotation file says '
                f'{sample.size}', sample.image_id)])

    def _check_boxes(self, data: dict, sample: Sample) -> List[Fault]:
        boxes = np.asarray(getattr(data['gt_bboxes'], 'tensor', data['gt_bboxes']))
        finite = np.isfinite(boxes).all(-1)
        return [Fault('box not finite', str(sample.image), f'{box.tolist()} (x1, y1, x2, y2)',
                      sample.image_id) for box in boxes[~finite]]

    def _check_labels(self, data: dict, sample: Sample) -> Optional[List[Fault]]:
        labels, path = np.asarray(data['gt_seg_map']), sample.labels
        shape = tuple(data.get('ori_shape') or ())[:2]
        kind, wrong = 'label out of range', ''
        if shape and labels.shape[:2] != shape:
            kind, wrong = 'label map size', f'{labels.shape} of an image of {shape} px'
        elif self.classes and labels.size and (labels.ndim > 2 or labels.max() >= self.classes):
            outside = labels >= self.classes
            for value in self.labels.ignored:
                outside &= labels != value
            if labels.ndim > 2 or outside.any():
                wrong = f'values {np.unique(labels[outside])[:5].tolist()}'
        if wrong or self.classes and self._local(path) and _is_16_bit(path):
            return self._faults(sample) or (
                wrong and [Fault(kind, str(path), wrong, sample.image_id)])

    def _faults(self, sample: Sample, instances: list = ()) -> List[Fault]:
        """What an exact look finds; it takes its time, which no longer matters."""
        faults = []
        if isinstance(sample.image, str):
            faults = inspect_sample(sample, self.reading, self.labels)
        if any(getattr(step, 'with_mask', False) for step in self.transforms):
            for instance in instances:
                kind, detail, _ = inspect_segmentation(instance.get('mask'))
                if kind:
                    faults.append(Fault(kind, str(sample.image), f'{detail}; the object with box '
                                        f'{instance.get("bbox")}', sample.image_id))
        return [fault for fault in faults if fault.error]


def _innermost(dataset: Dataset) -> Iterator[Dataset]:
    """The data sets that wrap no others."""
    inside = vars(dataset)
    inner = inside.get('datasets') or inside.get('dataset') or inside.get('_dataset')
    if inner is None:
        if hasattr(dataset, 'pipeline'):
            yield dataset
        return
    for item in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from _innermost(item)


def _guarded(pipeline: Any, dataset: Dataset) -> Any:
    if type(pipeline) is not Compose:  # guarded already, or a list of what mixes images
        return pipeline
    # Of mmseg's data sets only: elsewhere label maps have classes of their own.
    classes = dataset.metainfo.get('classes') if hasattr(dataset, 'reduce_zero_label') else None
    return GuardedPipeline(pipeline, reading_of(dataset, pipeline), labels_of(dataset, pipeline),
                           len(classes) if classes else None)


def _is_16_bit(path: str) -> bool:
    """Whether it is a PNG of 16 bits, of whose values mmseg would keep the lower 8."""
    with open(path, 'rb') as file:
        head = file.read(25)
    return head.startswith(PNG) and head[24:] == b'\x10'


def _name(dataset: Dataset, index: int) -> str:
    try:
        info = dataset.get_data_info(index)
        return _called(Sample(info['img_path'], info.get('img_id'), labels=info.get(
            'seg_map_path')))
    except Exception:  # of the data set, whose sample has failed already
        return f'sample {index} of {type(dataset).__name__}'


def _called(sample: Sample) -> str:
    return str(Fault('', str(sample.image), '', sample.image_id)) + (
        f' with label map {sample.labels}' if sample.labels else '')


def _told(faults: List[Fault]) -> str:
    return '\n'.join([*(f'{fault.kind}: {fault}' for fault in faults), ADVICE])


def _unexplained(name: str, error: Exception) -> str:
    told = ''.join(traceback.format_exception(type(error), error, error.__traceback__))
    return f'{told}{name} could not be prepared: {type(error).__name__}: {error}\n{ADVICE}'
