"""The text of new configs."""
import os
from pathlib import Path
from pprint import pformat
from textwrap import fill
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from mmengine.config import Config

from ...datasets.own_data.label_maps import LabelMaps
from ...datasets.own_data.objects import Objects
from .recipe import Device, Schedule

_NEXT, _DEEPER = ',\n    ', ',\n        '


class Start(NamedTuple):
    """Inputs of a config: the data, its file, this project's config, weights, devices."""

    root: Path
    out: Path
    base: Path
    pretrained: bool
    device: Device


def _path(path: Path, start: Start) -> str:
    """Return an expression for a path in the config: below the data, or next to the config."""
    if path == start.root:
        return 'data_root'
    if path.is_relative_to(start.root) and not path.is_relative_to(_data(start)):
        inside = path.relative_to(start.root).as_posix()
        return f'data_root + {f"/{inside}"!r}'
    return repr('{{fileDirname}}/' + path.relative_to(start.out.parent).as_posix())


def _data(start: Start) -> Path:
    return start.out.with_name(f'{start.out.stem}_data')


def _base(path: Path, start: Start) -> str:
    """Return the path of a base, relative if both files are in the same project."""
    path = path.resolve()
    project = next(parent for parent in path.parents if parent.name == 'configs').parent
    return os.path.relpath(path, start.out.parent) if project in start.out.parents else str(path)


def _assign(name: str, value: Any) -> str:
    """Return ``name = value`` in lines of at most 99 characters."""
    lines = pformat(value, width=95 - len(name), compact=True).splitlines()
    return f'\n{" " * (len(name) + 3)}'.join([f'{name} = {lines[0]}', *lines[1:]])


def _head(base: Path, start: Start, schedule: Schedule, images: int, scale: Sequence[int],
          classes: List[str], palette: Sequence[Sequence[int]], more: Sequence[str] = ()) -> str:
    device = f'{start.device.gpus} GPUs' if start.device.gpus else 'a CPU'
    total = schedule.batch_size * max(1, start.device.gpus)
    epochs = schedule.num_steps * total / images
    return '\n'.join([
        f'# {start.root.name}: {images:,} training images; for {device}, '
        + ('from ImageNet weights.' if start.pretrained else 'from scratch.'),
        f'#   python tools/train.py {start.out.name}',
        f'_base_ = {_base(base, start)!r}', '',
        '# The recipe',
        f'num_steps = {schedule.num_steps}  # {epochs:.3g} epochs',
        f'batch_size = {schedule.batch_size}  # per GPU, or of the CPU',
        f'lr = {schedule.lr}',
        f'scale = {tuple(scale)}  # px, the long and short sides that images are resized into',
        *more, '',
        '# The data',
        f'data_root = {str(start.root)!r}',
        _assign('classes', tuple(classes)),
        _assign('palette', [tuple(colour) for colour in palette]),
        'num_classes = len(classes)',
        'metainfo = dict(classes=classes, palette=palette)'])


def _tail(schedule: Schedule, device: Device) -> str:
    """Return schedule and hooks, which are the same for both tasks."""
    return f'''
interval, warmup = max(1, num_steps // 5), max(1, num_steps // 10)
train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=num_steps, val_interval=interval)
optim_wrapper = dict(optimizer=dict(lr=lr), clip_grad=dict(max_norm=35.))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warmup),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=warmup, end=num_steps, eta_min=1e-6)]
auto_scale_lr = dict(base_batch_size={schedule.batch_size * max(1, device.gpus)})
default_hooks = dict(
    speed=dict(channels_last={not device.gpus}),
    logger=dict(interval=10, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=interval, max_keep_ckpts=1))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
'''


def _backbone(start: Start, grid: int, whole: bool) -> str:
    """Return the arguments of the backbone: all of them if ``whole``, as the base has another."""
    options: Dict[str, Any] = dict(bias_grid=grid)
    if whole:
        options = {'_delete_': True, **Config.fromfile(start.base).model.backbone, **options}
    if not start.pretrained:
        options.update(layer_scale_init_value=.1, init_cfg=None)
    return fill(', '.join(f'{key}={value!r}' for key, value in options.items()), 86,
                subsequent_indent=8 * ' ', break_long_words=False)


def _detector(masks: bool, start: Start, scale: Tuple[int, int], anchors: int,
              ) -> Tuple[Path, List[str]]:
    """Return the base of a detector's config, and the arguments of its model that differ."""
    base, whole = start.base, False
    if not start.pretrained:  # the demo's heads learn in hundreds of steps
        base = base.parents[1] / 'demo' / 'maskrcnn_effformer_l1_shapes.py'
        whole = start.base.stem != 'maskrcnn_effformer_l1'
    model = [f'backbone=dict(\n        {_backbone(start, -(-min(scale) // 32), whole)})',
             f'rpn_head=dict(anchor_generator=dict(scales=[{anchors}]))']
    if whole:
        model.append(f'neck=dict(in_channels={Config.fromfile(start.base).model.neck.in_channels})')
    extractor = f'dict(finest_scale={7 * anchors})'
    roi = [f'bbox_roi_extractor={extractor}', 'bbox_head=dict(num_classes=num_classes)']
    if masks:
        roi += [f'mask_roi_extractor={extractor}', 'mask_head=dict(num_classes=num_classes)']
    else:
        roi.append('mask_roi_extractor=None, mask_head=None')
        model = ["type='FasterRCNN'", 'data_preprocessor=dict(pad_mask=False)', *model]
    return base, [*model, 'roi_head=dict(\n        ' + ',\n        '.join(roi) + ')']


def _crowded(most: int, max_per_img: int) -> Tuple[List[str], List[str], str]:
    """Return what keeps and counts more than 100 objects: variables, model, evaluator.

    COCO's AP counts 100 detections per image and class; mmdet's own evaluation takes the last
    number.
    """
    rpn = 'dict(nms_pre=max(1000, 4 * max_per_img), max_per_img=max(1000, 2 * max_per_img))'
    return ([f'max_per_img = {max_per_img}  # detections; an image has up to {most} objects'],
            [f'train_cfg=dict(rpn_proposal={rpn})',
             f'test_cfg=dict(\n        rpn={rpn},\n        rcnn=dict(max_per_img=max_per_img))'],
            ',\n    proposal_nums=(100, 300, max(1000, max_per_img)), use_mp_eval=True'
            if most > 100 else '')


def detection_text(found: Objects, start: Start, schedule: Schedule, scale: Tuple[int, int],
                   anchors: int, most: int, max_per_img: int,
                   palette: Sequence[Sequence[int]], empty: bool) -> str:
    """Return the config of a detector.

    Args:
        found: The data.
        start, schedule, scale: Where it starts from, and its recipe.
        anchors: Scale of the RPN's anchors.
        most: The largest number of objects in an image.
        max_per_img: Detections to keep.
        palette: A colour per class.
        empty: Some training images have no objects.
    """
    base, model = _detector(found.masks, start, scale, anchors)
    more, crowded, evaluator = _crowded(most, max_per_img) if max_per_img > 100 else ([], [], '')
    evaluator = f"metric={['bbox', 'segm'] if found.masks else ['bbox']}{evaluator}"
    loaders = ''.join(_detection_loader(split, found, start, schedule, empty)
                      for split in found.content)
    loaders += ''.join(f'{split}_evaluator = dict(ann_file={split}_ann, {evaluator})\n'
                       for split in found.content if split != 'train')
    if 'test' not in found.content:
        loaders += 'test_dataloader = val_dataloader\ntest_evaluator = val_evaluator\n'
    anns = '\n'.join(f'{split}_ann = {_path(path, start)}'
                     for split, path in found.ann_files.items())
    return _head(base, start, schedule, len(found.content['train']['images']), scale,
                 found.classes, palette, more) + f'''
{anns}

model = dict(
    {_NEXT.join([*model, *crowded])})

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={found.masks}),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask={found.masks}),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]

{loaders}{_tail(schedule, start.device)}'''


def _detection_loader(split: str, found: Objects, start: Start, schedule: Schedule,
                      empty: bool) -> str:
    folder = found.folders[split].relative_to(start.root).as_posix()
    prefix = '' if folder == '.' else f'{folder}/'
    extra = 'filter_cfg=dict(filter_empty_gt=False), ' if split == 'train' and empty else ''
    sampler = ("batch_size=batch_size, sampler=dict(type='InfiniteSampler', shuffle=True),\n    "
               if split == 'train' else '')
    pipeline = 'train_pipeline' if split == 'train' else 'test_pipeline'
    return f'''{split}_dataloader = dict(
    {sampler}num_workers={schedule.num_workers},
    dataset=dict(
        data_root=data_root, metainfo=metainfo, ann_file={split}_ann,
        data_prefix=dict(img={prefix!r}), {extra}pipeline={pipeline}))
'''


def segmentation_text(found: LabelMaps, start: Start, schedule: Schedule, scale: Tuple[int, int],
                      crop: int, palette: Sequence[Sequence[int]]) -> str:
    """Return the config of a segmentor; arguments as in :func:`detection_text`."""
    labels = found.labels
    more = [f'crop_size = ({crop}, {crop})  # px']
    void = ''
    if labels.void != 255:
        more.append(f'void = {labels.void}  # this label is ignored')
        void = ', ignore_index=void'
    neck, head = '', f'num_classes=num_classes{void}'
    if not start.pretrained:  # as in the demo
        more.append('width = 64  # channels of the neck and the head')
        neck = "\n    neck=dict(out_channels=width, norm_cfg=dict(type='GN', num_groups=8)),"
        head = f'\n        in_channels=[width] * 4, channels=width, {head}'
    loaders = ''.join(_segmentation_loader(split, found, start, schedule, void)
                      for split in found.images)
    if 'test' not in found.images:
        loaders += 'test_dataloader = val_dataloader\n'
    evaluator = f"val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU']{void})"
    return _head(start.base, start, schedule, len(found.images['train']), scale, labels.classes,
                 palette, more) + f'''

model = dict(
    data_preprocessor=dict(size=crop_size{", seg_pad_val=void" if void else ""}),
    backbone=dict(
        {_backbone(start, -(-crop // 32), False)}),{neck}
    decode_head=dict({head}))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75{void}),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')]

{loaders}{evaluator}
test_evaluator = val_evaluator
{_tail(schedule, start.device)}'''


def _segmentation_loader(split: str, found: LabelMaps, start: Start, schedule: Schedule,
                         void: str) -> str:
    images, maps = found.folders[split]
    listed = found.lists[split]
    options = [f'img_suffix={found.img_suffix!r}, seg_map_suffix={found.seg_map_suffix!r}',
               *([f'ann_file={_path(listed, start)}'] if listed else []),
               *(['reduce_zero_label=True'] if found.labels.reduce_zero_label else [])]
    sampler = 'batch_size=batch_size, ' if split == 'train' else ''
    return f'''{split}_dataloader = dict(
    {sampler}num_workers={schedule.num_workers},
    dataset=dict(
        type='BaseSegDataset', data_root=data_root, metainfo=metainfo{void},
        {_DEEPER.join(options)},
        data_prefix=dict(
            img_path={_path(images, start)},
            seg_map_path={_path(maps, start)}),
        pipeline={"train" if split == "train" else "test"}_pipeline))
'''
