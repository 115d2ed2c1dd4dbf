"""Errors of data sets that name the file and the transform."""
import traceback
from typing import Any, Callable, Iterator, Optional

from mmengine.dataset import Compose
from torch.utils.data import Dataset

from ..utils.errors import TrainingStopped, explain_import_error

ADVICE = '`python tools/check_data.py CONFIG` checks every sample'


class SampleError(TrainingStopped):
    """A sample that cannot be prepared; the message names the file and the transform."""

    def __init__(self, message: str):
        # A DataLoader puts the traceback of its worker before the message.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2])


class TracedPipeline(Compose):
    """A pipeline whose errors name the file and the transform.

    Args:
        pipeline: The transforms.
        observe: Called after each transform with the transform and what it returned.
    """

    def __init__(self, pipeline: Compose,
                 observe: Optional[Callable[[Any, Optional[dict]], None]] = None):
        self.transforms, self.observe = pipeline.transforms, observe

    def __call__(self, data: dict) -> Optional[dict]:
        name = file_of(data)
        for step in self.transforms:
            try:
                data = step(data)
            except SampleError:
                raise
            except Exception as error:
                raise SampleError(explain(f'{type(step).__name__} failed on {name}',
                                         error)) from error
            if self.observe:
                self.observe(step, data)
            if data is None:
                return None
        return data


class TracedDataset(Dataset):
    """A data set with the samples and attributes of another one, whose errors name the file.

    Args:
        dataset: A data set of mmdet, mmseg or mmengine. The pipelines in it, wrapped ones
            included, become :class:`TracedPipeline`.

    Raises:
        SampleError: A sample cannot be prepared.
    """

    def __init__(self, dataset: Dataset):
        self.__dict__['dataset'] = dataset
        for leaf in leaves(dataset):
            leaf.pipeline = _traced(leaf.pipeline)

    def __getattr__(self, name):
        if name == 'dataset':  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):
        # Hooks replace the pipeline to end an augmentation before the last epochs.
        setattr(self.dataset, name, _traced(value) if name == 'pipeline' else value)

    __getitems__ = None  # torch would find the inner one, and not call __getitem__

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        try:
            return self.dataset[index]
        except SampleError:
            raise
        except Exception as error:
            if isinstance(error, IndexError) and not -len(self) <= index < len(self):
                raise  # the end of `for sample in dataset`
            kind = type(self.dataset).__name__
            raise SampleError(explain(f'sample {index} of {kind} cannot be prepared',
                                     error)) from error


def leaves(dataset: Dataset) -> Iterator[Dataset]:
    """Yield the data sets that wrap no others."""
    inside = vars(dataset)
    inner = inside.get('datasets') or inside.get('dataset') or inside.get('_dataset')
    if inner is not None:
        for item in inner if isinstance(inner, (list, tuple)) else [inner]:
            yield from leaves(item)
    elif hasattr(dataset, 'pipeline'):
        yield dataset


def file_of(data: Any) -> str:
    """Return the name of a sample: its image, id and label map, or else any path in it."""
    if not isinstance(data, dict):
        return str(data)[:100]
    image, labels = data.get('img_path'), data.get('seg_map_path')
    if image is None:  # an entry of an annotation file
        nested = [pair for key, value in data.items()
                  for pair in (value.items() if isinstance(value, dict) else [(key, value)])]
        return ', '.join(str(value) for key, value in nested
                         if 'path' in key or 'file' in key) or str(data)[:100]
    number = f' (image {data["img_id"]})' if data.get('img_id') is not None else ''
    return f'{image}{number}' + (f' with label map {labels}' if labels else '')


def explain(what: str, error: Exception) -> str:
    """Return one message on an error of a data set; an ImportError names its package."""
    if isinstance(error, ImportError):
        return f'{what}: {explain_import_error(error)}'
    if isinstance(error, KeyError):
        return f'{what}: the key {error} is missing'
    where = [*traceback.walk_tb(error.__traceback__)][-1:]
    place = [f' ({frame.f_code.co_filename}, line {line})' for frame, line in where]
    return f'{what}: {type(error).__name__}: {error}' + ('' if isinstance(
        error, OSError) else ''.join(place))


def _traced(pipeline: Any) -> Any:
    return TracedPipeline(pipeline) if type(pipeline) is Compose else pipeline
