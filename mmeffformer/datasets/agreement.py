"""Checks that the model, the data sets and the loaders of a config agree."""
import copy
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from .samples import Labels, Sample

# Parts that count classes of their own.
SKIPPED = {'backbone', 'neck', 'rpn_head', 'semantic_head', 'teacher'}


class Head(NamedTuple):
    """A part of a model that predicts classes."""
    name: str
    classes: int
    ignored: Optional[int]  # label that its loss ignores
    module: nn.Module


def heads_of(model: nn.Module) -> List[Head]:
    """Return the heads that tell classes apart; the RPN tells objects from background."""
    return [Head(name, module.num_classes, getattr(module, 'ignore_index', None), module)
            for name, module in model.named_modules()
            if isinstance(getattr(module, 'num_classes', None), int) and module.num_classes > 0
            and name and not SKIPPED & {*name.split('.')}]


def labels_of(heads: Sequence[Head]) -> Labels:
    """Return the label values that all heads take."""
    if not heads:
        return Labels()
    ignored = {head.ignored for head in heads}
    # A single class has the label 1, next to the background.
    classes = min(max(head.classes, 2) if head.ignored is not None else head.classes
                  for head in heads)
    return Labels(classes, (*ignored, ) if len(ignored) == 1 and None not in ignored else ())


def check_heads(model: nn.Module, classes: Optional[Sequence[str]], key: str) -> Iterator[str]:
    """Yield how the classes of a data set differ from those of the model."""
    heads = heads_of(model)
    for name, count, _, module in heads if classes else ():
        if count != len(classes):
            yield (f'model.{name} has num_classes={count}, and {key} has {len(classes)} classes '
                   f'({", ".join(map(str, classes[:5]))}{", ..." if len(classes) > 5 else ""}). '
                   f'Set num_classes={len(classes)}, or correct metainfo.classes')
        # Softmax losses of detectors have one more class, the background.
        allowed = {count} if hasattr(module, 'ignore_index') else {count, count + 1}
        for inner, loss in module.named_modules():
            weight = getattr(loss, 'class_weight', None)
            if isinstance(weight, (list, tuple)) and len(weight) not in allowed:
                yield (f'model.{name}.{inner}.class_weight has {len(weight)} values for {count} '
                       'classes')
    pad = getattr(getattr(model, 'data_preprocessor', None), 'seg_pad_val', None)
    for name, count, ignored, _ in heads:
        if None not in (pad, ignored) and pad != ignored:
            what = 'is trained as a class' if 0 <= pad < count else 'is not a class'
            yield (f'model.data_preprocessor.seg_pad_val={pad} {what}, because '
                   f'model.{name}.ignore_index={ignored}. Give both the same value')


def check_palette(classes: Optional[Sequence[str]], palette: Any, key: str) -> Iterator[str]:
    """Yield whether a palette lacks colours."""
    if classes and isinstance(palette, (list, tuple)) and 0 < len(palette) < len(classes):
        yield f'{key}: metainfo.palette has {len(palette)} colours for {len(classes)} classes'


def check_batches(model: nn.Module, loader: DataLoader, batch_size: int, source: Any,
                  samples: Sequence[Sample], key: str, training: bool) -> Iterator[str]:
    """Yield why the model cannot take the batches of a loader.

    Args:
        model: The model of the config.
        loader: The loader of the config.
        batch_size: Its batch size in the config; a loader of mmengine does not have it.
        source: The data set that ``samples`` come from.
        samples: Its samples.
        key: Name of the loader in the config.
        training: Whether the batches are for training.
    """
    sizes: Dict[Tuple[int, ...], Sample] = {}
    for sample in samples:
        if len(sample.size) == 3:
            sizes.setdefault(sample.size, sample)
    batches = [[sample] for sample in {size[0]: sample for size, sample in sizes.items()}.values()]
    if batch_size > 1:
        batches += [same for channels in {size[0] for size in sizes}
                    if len(same := [sizes[size] for size in sizes if size[0] == channels][:2]) > 1]
    stem = next((module for module in getattr(model, 'backbone', nn.Module()).modules()
                 if isinstance(module, nn.Conv2d)), None)
    preprocessor = copy.deepcopy(model.data_preprocessor)
    preprocessor.batch_augments = None  # some draw from a training run in progress
    for batch in batches:
        names = ' and '.join(f'{sample.name} {sample.size}' for sample in batch)
        try:
            data = loader.collate_fn([source[sample.index] for sample in batch])
            with torch.no_grad():
                inputs = preprocessor(data, training)['inputs']
        except Exception as error:  # any that a preprocessor may have
            yield (f'{key}: model.data_preprocessor fails on {names}: {type(error).__name__}: '
                   f'{error}' + ('. Set its size or size_divisor, or use batch_size=1'
                                 if len(batch) > 1 else ''))
            continue
        if stem is not None and isinstance(inputs, torch.Tensor) and (
                inputs.shape[1] != stem.in_channels):
            yield (f'{key}: {names} has {inputs.shape[1]} channels, and model.backbone takes '
                   f'{stem.in_channels}. Set its in_channels, or color_type of the transform that '
                   'loads images')


def check_loader(loader: DataLoader, key: str) -> Iterator[str]:
    """Yield whether a loader has no batch."""
    batches = loader.batch_sampler
    data = [loader.dataset, getattr(loader.dataset, 'dataset', None)]
    try:  # on a copy, as some keep samples for the next batch; the data is not copied
        batches = copy.deepcopy(batches, {id(each): each for each in data})
    except TypeError:  # a generator, as samplers without end have
        return
    if batches is not None and next(iter(batches), None) is None:
        yield (f'{key} has no batch: {len(loader.dataset)} samples are fewer than batch_size, and '
               'drop_last=True leaves them out. Use a smaller batch_size or drop_last=False')


def check_metrics(model: nn.Module, metrics: Sequence[dict], key: str) -> Iterator[str]:
    """Yield which metrics need what the model does not predict."""
    masks = any('mask' in part for name, _ in model.named_modules() for part in name.split('.'))
    for metric in metrics:
        wanted = metric.get('metric')
        if 'segm' in (wanted if isinstance(wanted, (list, tuple)) else [wanted]) and not masks:
            yield f"{key} has metric='segm', and the model has no mask head. Use metric='bbox'"
