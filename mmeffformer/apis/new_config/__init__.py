"""Configs for data sets of the user, with a recipe for this machine."""
import os
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional

import numpy as np
from mmengine.config import Config
from PIL import Image

from ...datasets.own_data.files import MARKER, Log, Options
from ...datasets.own_data.label_maps import LabelMaps, read_segmentation
from ...datasets.own_data.objects import Objects, read_detection
from ...utils.files import atomic_write
from ...weights.fetch import locate
from ..swap.config import CONFIGS, FAMILIES
from .recipe import (
    MIN_OBJECT_PX,
    Device,
    find_anchor_scale,
    find_max_per_img,
    find_scale,
    find_schedule,
    make_palette,
    round_up,
)
from .text import Start, detection_text, segmentation_text

ARCHS = {name: f'{prefix}_{name}' for prefix, kind in FAMILIES.items() for name in kind.archs}
SCOPES = {'det': 'mmdet', 'seg': 'mmseg'}
OPTIONS = Options()
FOLDER = Path(__file__).parents[2] / '.mim' / 'configs'


class NewConfig(NamedTuple):
    """A written config.

    ``scale`` is the (long, short) side in px that images are resized into, ``sizes`` are the
    square roots of the areas of the training objects at that scale, and ``examples`` is the folder
    of the images to validate on.
    """

    num_steps: int
    scale: tuple
    sizes: Optional[np.ndarray]
    examples: Path
    log: Log


def new_config(task: str, root: Path, out: Path, arch: str = 'l1', pretrained: bool = True,
               options: Options = OPTIONS, device: Optional[Device] = None) -> NewConfig:
    """Write a config for a folder of images and annotations, and the files that it needs.

    Args:
        task: 'det' (boxes, and masks if the objects have outlines) or 'seg'.
        root: The folder.
        out: The config to write. Annotations that have to be converted, cleaned or split are
            written to ``OUT_data`` in the same folder, never to ``root``.
        arch: 'l1', 'l3', 'l7', 's0', 's1', 's2' or 'l'.
        pretrained: Start from ImageNet weights. If they can be neither found nor fetched, the
            recipe is one from scratch.
        options: What the folder does not show.
        device: What trains (default: the devices of this machine).

    Raises:
        FileNotFoundError, ValueError: As in :func:`read_detection` and :func:`read_segmentation`.
    """
    log, root, out = Log([], []), root.resolve(), out.resolve()
    out_dir = out.with_name(f'{out.stem}_data')
    base = FOLDER / CONFIGS[SCOPES[task]].format(ARCHS[arch])
    found = (read_detection if task == 'det' else read_segmentation)(root, out_dir, options, log)
    pretrained = pretrained and _can_fetch(base, log)
    start = Start(root, out, base, pretrained, device or Device.find())
    written = (_write_detection(found, start, log) if isinstance(found, Objects) else
               _write_segmentation(found, start, log))
    out_dir.mkdir(exist_ok=True)
    (out_dir / MARKER).touch()
    return written


def _can_fetch(base: Path, log: Log) -> bool:
    """Return whether the ImageNet weights of a config are on this machine, or now fetched."""
    try:
        locate(Config.fromfile(base).model.backbone.init_cfg.checkpoint)
    except (OSError, ValueError) as error:
        log.warnings.append('the recipe is one from scratch, which needs more images and steps: '
                            + str(error).splitlines()[0])
        return False
    return True


def _common_folder(paths: Iterable[Path]) -> Path:
    return Path(os.path.commonpath([path.parent for path in paths]))


def _write_detection(found: Objects, start: Start, log: Log) -> NewConfig:
    train = found.content['train']
    objects: Dict[int, List[float]] = {image['id']: [] for image in train['images']}
    for item in train['annotations']:
        if not item['iscrowd']:
            objects[item['image_id']].append((item['bbox'][2] * item['bbox'][3])**.5)
    scale, sizes = find_scale([(image['width'], image['height']) for image in train['images']],
                              list(map(np.array, objects.values())), start.device,
                              start.pretrained)
    small = (sizes < MIN_OBJECT_PX).mean()
    if small > .05:
        log.warnings.append(f'{small:.0%} of the objects are below {MIN_OBJECT_PX} px at '
                            f'{scale[0]} x {scale[1]} px; train on crops of the images')
    most = max(np.bincount([item['image_id'] for item in data['annotations']], minlength=1).max()
               for data in found.content.values())
    schedule = find_schedule('det', len(objects), (scale[0] * scale[1])**.5, start.pretrained,
                             start.device)
    counts = {split: (len(data['images']), len(data['annotations']))
              for split, data in found.content.items()}
    log.notes.append('images and objects: ' + ', '.join(
        f'{split} {images:,} and {items:,}' for split, (images, items) in counts.items()))
    log.notes.append(f'classes: {", ".join(found.classes)}; '
                     + ('boxes and masks' if found.masks else 'boxes only'))
    text = detection_text(found, start, schedule, scale, find_anchor_scale(sizes),
                          int(most), find_max_per_img(int(most)), make_palette(len(found.classes)),
                          any(not own for own in objects.values()))
    with atomic_write(start.out) as tmp_path:
        tmp_path.write_text(text)
    examples = _common_folder(found.folders['val'] / image['file_name']
                              for image in found.content['val']['images'])
    return NewConfig(schedule.num_steps, scale, sizes, examples, log)


def _write_segmentation(found: LabelMaps, start: Start, log: Log) -> NewConfig:
    sizes = []
    for path in found.images['train'][:200]:
        with Image.open(path) as image:
            sizes.append(image.size)
    scale, _ = find_scale(sizes, None, start.device, False)
    crop = min(512 if start.device.gpus else 256, round_up(scale[1]))
    schedule = find_schedule('seg', len(found.images['train']), crop, start.pretrained,
                             start.device)
    log.notes.append('images: ' + ', '.join(
        f'{split} {len(images):,}' for split, images in found.images.items()))
    log.notes.append(f'classes: {", ".join(found.labels.classes)}')
    palette = found.labels.palette or make_palette(len(found.labels.classes))
    with atomic_write(start.out) as tmp_path:
        tmp_path.write_text(segmentation_text(found, start, schedule, scale, crop, palette))
    return NewConfig(schedule.num_steps, scale, None, _common_folder(found.images['val']), log)
