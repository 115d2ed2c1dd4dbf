"""Converts checkpoint files between layouts: whole detectors and segmentors, and backbones."""
import hashlib
import io
import os
from pathlib import Path
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple, Union

import torch
from torch import nn

from ..models import EfficientFormer, EfficientFormerV2
from ..models.arch import Arch, ArchV2
from ..utils.config import dataset_meta
from ..utils.files import atomic_write
from ..version import __version__
from .compatibility import check_state
from .fetch import locate
from .layouts import NATIVE, convert
from .load import Report, load_weights, unwrap
from .safe_loading import read_checkpoint

# The modules that distinguish whole models from backbones and from each other.
HEADS = {'detector': ('rpn_head', 'roi_head', 'bbox_head', 'mask_head'),
         'segmentor': ('decode_head', 'auxiliary_head')}


def transfer_model(source: str, model: nn.Module) -> Dict[str, Dict[str, Any]]:
    """Return a detector or segmentor of the authors as a checkpoint of ``model``.

    Only the backbone's keys differ from those of mmdet 2.x and mmseg 0.x. The authors' models
    compute the same only with ``bias_mode='legacy'`` and their bias grid, so the checkpoint's
    ``meta`` asks for that mode.

    Args:
        source: Path or URL of their checkpoint.
        model: The detector or segmentor that is to use it. Its weights are changed.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: The checkpoint is not one of a whole model (but of an ImageNet classifier,
            say); is of the other task, another arch or bias grid; has weights that are not
            finite; or cannot be read.
    """
    path = locate(source)
    checkpoint = read_checkpoint(path)
    state = unwrap(checkpoint, None)[1]
    targets = model.state_dict()
    _check_task(path, state, targets)
    backbone = model.get_submodule('backbone')
    report = load_weights(backbone, path)
    _check_backbone(path, report)
    inside = _inside(checkpoint, report)
    converted = {f'backbone.{key}': value for key, value in backbone.state_dict().items()}
    rest = {key.removeprefix('module.'): value for key, value in state.items()
            if key not in inside}
    converted.update((key, value) for key, value in rest.items() if key in targets)
    check_state(converted, model, path)
    meta = _origin(path, report)
    if report.layout == 'official-dense':
        meta['bias_mode'] = 'legacy'
    classes = dataset_meta(checkpoint.get('meta') or {}).get('classes')
    if classes:
        meta['dataset_meta'] = dict(classes=tuple(classes))
    return dict(meta=meta, state_dict=converted)


def transfer_backbone(source: str, arch: Arch, target: str,
                      prefix: Optional[str] = None) -> Tuple[Dict[str, Any], Report]:
    """Return a backbone's checkpoint in layout ``target``, and a report of how it was read.

    Args:
        source: Path, URL or ``hf-hub:`` name of a checkpoint of any known layout.
        arch: Its arch.
        target: Name of a layout. Classifier heads are left out.
        prefix: The prefix of the backbone's keys; by default it is found. It is required to
            take the backbone out of a detector or segmentor.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: The checkpoint is a whole detector or segmentor, or is incompatible.
    """
    path = locate(source)
    checkpoint = read_checkpoint(path)
    task, heads = _task(unwrap(checkpoint, None)[1])
    if task and prefix is None:
        raise ValueError(f'{path} is a whole {task} (it has {heads}), expected a backbone or an '
                         'ImageNet classifier. Give --config to convert all of it, or --prefix '
                         'backbone to take its backbone alone')
    kind = EfficientFormerV2 if isinstance(arch, ArchV2) else EfficientFormer
    report = load_weights(kind(arch), path, prefix=prefix)  # checks that it is complete
    inside = _inside(checkpoint, report)
    state = unwrap(checkpoint, report.prefix)[1]
    converted = convert({inside[key]: state[key] for key in inside}, arch, report.layout, target)
    if target == NATIVE:
        return dict(meta=_origin(path, report), state_dict=converted), report
    return converted, report  # the loaders of other libraries expect bare tensors


def save_checkpoint(checkpoint: Mapping, folder: Union[str, os.PathLike], stem: str) -> Path:
    """Write ``folder/stem-HASH.pth``, where HASH starts its SHA-256, and return the path."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    path = Path(folder) / f'{stem}-{hashlib.sha256(buffer.getbuffer()).hexdigest()[:8]}.pth'
    with atomic_write(path) as tmp_path:
        tmp_path.write_bytes(buffer.getbuffer())
    return path


def _task(keys: Iterable[str]) -> Tuple[Optional[str], str]:
    """Return 'detector', 'segmentor' or None, and the names of its heads."""
    first = {key.removeprefix('module.').split('.')[0] for key in keys}
    for task, heads in HEADS.items():
        found = [head for head in heads if head in first]
        if found:
            return task, ' and '.join(found)
    return None, ''


def _check_task(path: Path, source_keys: Iterable[str], target_keys: Iterable[str]) -> None:
    (source, heads), (target, _) = _task(source_keys), _task(target_keys)
    if not target:
        raise ValueError('the config is of neither a detector nor a segmentor, which have one of '
                         f'{", ".join(head for heads in HEADS.values() for head in heads)}')
    if not source:
        raise ValueError(
            f'{path} is a backbone or an ImageNet classifier, expected a {target}, which has one '
            f'of {", ".join(HEADS[target])}. To train from it, name it in the config as '
            "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...); to change its "
            'layout alone, give --arch instead of --config')
    if source != target:
        raise ValueError(f'{path} is a {source} (it has {heads}), the config is of a {target}')


def _check_backbone(path: Path, report: Report) -> None:
    if report.resampled and report.layout == 'official-dense':
        # Resampled tables would give other results than they were trained to give.
        key, (source, target) = next(iter(report.resampled.items()))
        raise ValueError(f'{path} has bias tables of other grids: {key} is {source[0]} x '
                         f'{source[1]} there and {target[0]} x {target[1]} in the config. Set '
                         'model.backbone.bias_grid (25 for the authors\' detectors, 16 for their '
                         'segmentors)')
    missing = [key for key in report.missing if not key.endswith('.num_batches_tracked')]
    if missing:
        raise ValueError(f'{path} lacks {len(missing)} tensors of the config\'s backbone, first '
                         f'{missing[0]}: if its outputs have no norms, set '
                         'model.backbone.out_norm_cfg=None')


def _inside(checkpoint: Mapping, report: Report) -> Dict[str, str]:
    """Return ``{key: key without prefix}`` of the keys under the backbone's prefix."""
    _, state, _, prefix = unwrap(checkpoint, report.prefix)
    prefix = prefix or ''
    return {key: key[len(prefix):] for key in state if key.startswith(prefix)}


def _origin(path: Path, report: Report) -> Dict[str, Any]:
    return dict(converted_from=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                layout=report.layout, mmeffformer_version=__version__)
