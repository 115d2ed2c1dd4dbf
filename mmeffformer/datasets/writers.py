"""Data sets of drawn shapes in the layouts of COCO and ADE20K.

Every image is a pure function of (seed, split, index), so a data set is drawn instead of
downloaded, and the first n images do not depend on the number of images.
"""
import json
import os
import tempfile
from pathlib import Path
from typing import Sequence, Union

import cv2
import numpy as np
from rich.progress import track

from .masks import mask_to_polygons, mask_to_rle
from .shapes import CATEGORIES, COCO_LOOKS, LOOKS, VERSION, Size, draw

SPLITS = ('train', 'val')
COCO_CATEGORIES = tuple(
    'person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,'
    'stop sign,parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,'
    'backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,'
    'baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,'
    'bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,'
    'potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,'
    'oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,'
    'toothbrush'.split(','))
# COCO's ids run from 1 to 90: ten of the names first planned were never annotated.
COCO_IDS = tuple(sorted(set(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}))
COCO_SIZES = ((480, 640), (640, 480), (427, 640), (375, 500), (612, 612))


def _draw_split(split, count, sizes, seed, looks, progress):
    for i in track(range(count), f'Drawing {split}', disable=not progress):
        rng = np.random.default_rng([seed, SPLITS.index(split), i])
        yield i + 1, *draw(rng, sizes[rng.integers(len(sizes))], looks)


def _encode(path, image, *options):
    # Not cv2.imwrite, which reports a full disk by its return value only.
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1].tobytes())


def _write_set(root, layout, write_split, train, val, size, seed):
    """Call ``write_split(folder, split, count, sizes)`` in a folder that becomes ``root``."""
    sizes = [[int(s) for s in pair] for pair in ([size] if np.ndim(size) == 1 else size)]
    if min(train, val) < 0 or not sizes or any(len(s) != 2 or min(s) < 32 for s in sizes):
        raise ValueError('expected train and val of at least 0 and sizes (h, w) of at least 32 '
                         f'px; got train={train}, val={val}, size={size}')
    made = dict(generator='shapes', version=VERSION, layout=layout, train=train, val=val,
                sizes=sizes, seed=seed)
    root = Path(root).resolve()
    if _is_made(root, made):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same disk, where renaming is atomic.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as tmp:
        folder = Path(tmp) / 'set'  # below tmp, whose permissions exclude other users
        folder.mkdir()
        for split, count in zip(SPLITS, (train, val)):
            write_split(folder, split, count, sizes)
        (folder / 'shapes.json').write_text(json.dumps(made))
        try:
            os.rename(folder, root)
        except OSError:  # another process may have finished first
            if not _is_made(root, made):
                raise
    return root


def _is_made(root, made):
    """Return whether ``root`` holds this set; raise a ValueError if it holds anything else."""
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / 'shapes.json').read_text())
    except (OSError, ValueError):
        found = None
    if found != made:
        what = f'a set made with {found}' if found else 'something else'
        raise ValueError(f'{root} already holds {what}. Choose another folder, or delete this '
                         f'one, to write a set made with {made}')
    return True


def _coco_annotations(instances, image_id, first_id, category_ids):
    annotations = []
    for item in instances:
        if item.annotated:
            outline = mask_to_rle if item.crowd else mask_to_polygons
            annotations.append(dict(
                id=first_id + len(annotations), image_id=image_id,
                category_id=category_ids[item.category], iscrowd=int(item.crowd),
                segmentation=outline(item.mask), area=float(item.mask.sum()),
                bbox=[float(x) for x in cv2.boundingRect(item.mask.view(np.uint8))]))
    return annotations


def write_coco(root: Union[str, Path], train: int = 200, val: int = 50,
               size: Union[Size, Sequence[Size], None] = None, seed: int = 0,
               coco2017: bool = False, progress: bool = True) -> Path:
    """Write an instance segmentation data set in COCO's layout and return its absolute path.

    Args:
        root: The folder to create. The set is written to a hidden folder next to it, which is
            renamed at the end. If ``root`` holds the same set already, nothing is written.
        train, val: Number of images.
        size: (height, width) in px, or several of them to choose from. Default: (320, 320); with
            ``coco2017`` the usual sizes in COCO.
        seed: At least 0; sets with different seeds have different images.
        coco2017: Use the file names and the 80 categories of COCO 2017. There a category is a
            shape with a texture and a hue; its ``supercategory`` is the name of the shape.
            Otherwise the categories are ``CATEGORIES``, with ids from 1.
        progress: Show a progress bar.

    Raises:
        ValueError: ``root`` holds anything else, or a number is out of range.
    """
    year, looks = ('2017', COCO_LOOKS) if coco2017 else ('', LOOKS)
    names, ids = (COCO_CATEGORIES, COCO_IDS) if coco2017 else (CATEGORIES, range(1, 7))
    categories = [dict(supercategory=look.shape, id=i, name=name)
                  for look, i, name in zip(looks, ids, names)]

    def write_split(folder, split, count, sizes):
        images, annotations = [], []
        (folder / (split + year)).mkdir()
        for number, image, instances in _draw_split(split, count, sizes, seed, looks, progress):
            name, (h, w) = f'{number:012d}.jpg', image.shape[:2]
            _encode(folder / (split + year) / name, image, cv2.IMWRITE_JPEG_QUALITY, 92)
            images.append(dict(id=number, file_name=name, height=h, width=w, license=1))
            annotations += _coco_annotations(instances, number, len(annotations) + 1, ids)
        path = folder / 'annotations' / f'instances_{split}{year}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(dict(
            info=dict(description='Drawn shapes', version=str(VERSION), seed=seed),
            licenses=[dict(id=1, name='Public domain', url='')], images=images,
            annotations=annotations, categories=categories)))

    if size is None:
        size = COCO_SIZES if coco2017 else (320, 320)
    layout = 'coco2017' if coco2017 else 'coco'
    return _write_set(root, layout, write_split, train, val, size, seed)


def write_ade20k(root: Union[str, Path], train: int = 200, val: int = 50,
                 size: Union[Size, Sequence[Size]] = (320, 320), seed: int = 0,
                 progress: bool = True) -> Path:
    """Write a semantic segmentation data set in ADE20K's layout.

    The label maps, uint8 (h, w), hold 1 + the index in ``SEG_CLASSES``, and 0 on the remains of
    hidden objects, for ``reduce_zero_label=True``. The images, arguments, result and errors are
    those of :func:`write_coco`.
    """

    def write_split(folder, split, count, sizes):
        part, stem = {'train': ('training', 'ADE_train'), 'val': ('validation', 'ADE_val')}[split]
        for kind in 'images', 'annotations':
            (folder / kind / part).mkdir(parents=True)
        for number, image, instances in _draw_split(split, count, sizes, seed, LOOKS, progress):
            labels = np.ones(image.shape[:2], np.uint8)
            for item in instances:
                labels[item.mask] = 2 + item.category if item.annotated else 0
            name = f'{stem}_{number:08d}'
            _encode(folder / 'images' / part / f'{name}.jpg', image, cv2.IMWRITE_JPEG_QUALITY, 92)
            _encode(folder / 'annotations' / part / f'{name}.png', labels)

    return _write_set(root, 'ade20k', write_split, train, val, size, seed)
