"""Checkpoint files from one layout to another: whole detectors and segmentors, and backbones.

What is written holds tensors and plain metadata alone, under a name that ends in the
first eight digits of the file's SHA-256, as published checkpoints have it.
"""
import os
import tempfile
from pathlib import Path
from typing import Dict, Iterable, Mapping, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..models import EfficientFormer, EfficientFormerV2
from ..models.arch import Arch, ArchV2
from ..version import __version__
from .compatibility import check_state
from .fetch import locate, sha256
from .layouts import NATIVE, convert
from .load import Report, load_weights, unwrap
from .read import read_checkpoint
from .safe_loading import check_finite

# What tells whole models from backbones and from each other.
HEADS = {'detector': ('rpn_head', 'roi_head', 'bbox_head', 'mask_head'),
         'segmentor': ('decode_head', 'auxiliary_head')}


def transfer_model(source: str, model: nn.Module) -> Dict[str, dict]:
    """Return a detector or segmentor of the authors as a checkpoint of ``model``.

    Backbones of mmdet 2.x and mmseg 0.x take our names; necks and heads have kept
    theirs. What the authors trained computes the same with ``bias_mode='legacy'``
    and their bias grid only, so the checkpoint's ``meta`` asks for that mode.

    Args:
        source: Path or URL of their checkpoint.
        model: The detector or segmentor that is to use it. Its weights are changed.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: It is none of a whole model (an ImageNet classifier, say), is of
            the other task, another arch or bias grid, has values that are not finite, or
            cannot be read.
    """
    path = locate(source)
    checkpoint = read_checkpoint(path)
    state = unwrap(checkpoint, None)[1]
    wanted = model.state_dict()
    (theirs, heads), (ours, _) = _task(state), _task(wanted)
    if not ours:
        raise ValueError('the config is of neither a detector nor a segmentor: its model has none '
                         f'of {", ".join(head for heads in HEADS.values() for head in heads)}')
    if not theirs:
        raise ValueError(
            f'{path} is a backbone or an ImageNet classifier, expected a {ours}: it has none of '
            f'{", ".join(HEADS[ours])}. To train from it, name it in the config as '
            "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...); to change its "
            'layout alone, give --arch instead of --config')
    if theirs != ours:
        raise ValueError(f'{path} is a {theirs} (it has {heads}), the config is of a {ours}')
    report = load_weights(model.backbone, path)
    legacy = report.layout == 'official-dense'
    if report.resampled and legacy:
        key, (theirs, ours) = next(iter(report.resampled.items()))
        # Resampled, a table would no longer give what it was trained to give.
        raise ValueError(f'{path} has bias tables of other grids: {key} is {theirs[0]} x '
                         f'{theirs[1]} there and {ours[0]} x {ours[1]} in the config. Set '
                         'model.backbone.bias_grid (25 for the authors\' detectors, 16 for their '
                         'segmentors)')
    missing = [key for key in report.missing if not key.endswith('.num_batches_tracked')]
    if missing:
        raise ValueError(f'{path} lacks {len(missing)} tensors of the config\'s backbone, first '
                         f'{missing[0]}: if its outputs have no norms, set '
                         'model.backbone.out_norm_cfg=None')
    inside = _inside(checkpoint, report)
    converted = {f'backbone.{key}': value for key, value in model.backbone.state_dict().items()}
    converted.update((key.removeprefix('module.'), value) for key, value in state.items()
                     if key not in inside and isinstance(value, Tensor))
    check_state(converted, wanted, str(path))
    check_finite(converted, path)  # what else is kept, too
    meta = _origin(path, report)
    if legacy:
        meta['bias_mode'] = 'legacy'
    theirs = checkpoint.get('meta')
    classes = theirs.get('CLASSES') if isinstance(theirs, dict) else None
    if isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes):
        meta['dataset_meta'] = dict(classes=tuple(classes))
    return dict(meta=meta, state_dict=converted)


def transfer_backbone(source: str, arch: Arch, target: str,
                      prefix: Optional[str] = None) -> Tuple[Dict[str, object], Report]:
    """Return a backbone's checkpoint in layout ``target``, and how it was read.

    Args:
        source: Path, URL or ``hf-hub:`` name of a checkpoint of any known layout.
        arch: Its arch.
        target: Name of a layout; classifier heads do not come along.
        prefix: What stands before the backbone's keys; by default it is found.
            Needed to take the backbone out of a detector or segmentor.

    Raises:
        FileNotFoundError, ConnectionError: The checkpoint is not there.
        ValueError: It is a whole detector or segmentor, or does not fit.
    """
    path = locate(source)
    checkpoint = read_checkpoint(path)
    task, heads = _task(unwrap(checkpoint, None)[1])
    if task and prefix is None:
        raise ValueError(f'{path} is a whole {task} (it has {heads}), expected a backbone or an '
                         'ImageNet classifier. Give --config to convert all of it, or --prefix '
                         'backbone to take its backbone alone')
    kind = EfficientFormerV2 if isinstance(arch, ArchV2) else EfficientFormer
    report = load_weights(kind(arch), path, prefix=prefix)  # whether it is one, and whole
    inside = _inside(checkpoint, report)
    converted = convert({inside[key]: value for key, value in unwrap(
        checkpoint, report.prefix)[1].items() if key in inside}, arch, report.layout, target)
    if target == NATIVE:
        return dict(meta=_origin(path, report), state_dict=converted), report
    return converted, report  # other libraries' loaders take bare tensors


def save_checkpoint(checkpoint: Mapping, folder: Union[str, os.PathLike], stem: str) -> Path:
    """Write ``folder/stem-HASH.pth``, whole or not at all, and return its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix='.', suffix='.partial')
    partial = Path(name)
    try:
        with os.fdopen(handle, 'wb') as file:
            torch.save(checkpoint, file)
        path = folder / f'{stem}-{sha256(partial)[:8]}.pth'
        partial.chmod(0o644)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _task(keys: Iterable[str]) -> Tuple[Optional[str], str]:
    """Return 'detector', 'segmentor' or None, and the heads that say so."""
    first = {key.removeprefix('module.').split('.')[0] for key in keys}
    for task, heads in HEADS.items():
        found = [head for head in heads if head in first]
        if found:
            return task, ' and '.join(found)
    return None, ''


def _inside(checkpoint: Mapping, report: Report) -> Dict[str, str]:
    """Return ``{key: key without prefix}`` of what is under the backbone's prefix."""
    _, state, _, prefix = unwrap(checkpoint, report.prefix)
    prefix = prefix or ''
    return {key: key[len(prefix):] for key in state if key.startswith(prefix)}


def _origin(path: Path, report: Report) -> dict:
    return dict(converted_from=path.name, sha256=sha256(path), layout=report.layout,
                mmeffformer_version=__version__)
