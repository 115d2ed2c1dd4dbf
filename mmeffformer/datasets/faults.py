"""What can be wrong with images, label maps and annotation files in COCO's form.

What training does about each was tried with mmdet 3 and mmseg 1. Nothing here needs either.
"""
import gc
import io
import json
import math
import re
import struct
from collections import Counter
from contextlib import contextmanager
from typing import Any, Collection, List, NamedTuple, Optional, Sequence, Tuple

import mmcv
import numpy as np
from mmengine import fileio
from PIL import Image
from pycocotools import mask as coco_mask


class Kind(NamedTuple):
    """A kind of fault."""
    error: bool  # training stops or is silently wrong; else it handles the fault
    effect: str  # what training does
    remedy: str


class Fault(NamedTuple):
    """One thing that is wrong."""
    kind: str  # a key of KINDS
    file: str
    detail: str = ''
    image_id: Any = None
    annotation_id: Any = None

    @property
    def error(self) -> bool:
        return KINDS[self.kind].error

    def __str__(self):
        ids = ', '.join(f'{name} {value}' for name, value in (
            ('image', self.image_id), ('annotation', self.annotation_id)) if value is not None)
        return f'{self.file}{ids and f" ({ids})"}{self.detail and f": {self.detail}"}'


STOPS = 'training stops at this file'
AGAIN = 'get the file again, or take it out of the data set'
DROPPED = 'the box is left out, as if nothing were there'
IGNORED = 'the polygon is left out; an object without any other counts neither as object nor as ' \
    'background'
CORRECT = 'correct the annotation, or take it out'
CONVERT = 'nothing, unless colours matter; to be sure, save it as 8-bit RGB'

KINDS = {
    # images
    'missing image': Kind(True, STOPS, 'put the file there, or take it out of the data set'),
    'zero-byte image': Kind(True, STOPS, AGAIN),
    'unreadable image': Kind(True, STOPS, AGAIN),
    'truncated image': Kind(
        True, f'{STOPS} (the libraries alone fill some in with grey)', AGAIN),
    'image size': Kind(
        True, f'{STOPS} (in the libraries alone the boxes and masks would lie elsewhere)',
        'if EXIF says that the image is to be rotated: rotate its pixels and remove the tag, or '
        "load with color_type='color_ignore_orientation', whichever the annotations are for; "
        'otherwise correct height and width, or get the image that was annotated'),
    'channels': Kind(
        True, 'the network takes three channels and stops at any other number',
        "load with color_type='color', or save the image as RGB"),
    'EXIF rotation': Kind(
        False, 'the image is rotated as its EXIF tag says', 'look at one whether its annotations '
        'are for the rotated image; where they are not, '
        "load with color_type='color_ignore_orientation'"),
    'grey image': Kind(False, 'its one channel is used for all three', 'nothing'),
    'CMYK image': Kind(False, 'it is converted to RGB, without colour profile', CONVERT),
    '16-bit image': Kind(
        False, 'only the upper 8 bits are kept', 'nothing where the values fill all 16 bits; '
        'otherwise the image becomes dark: scale it and save it with 8 bits'),
    'alpha channel': Kind(
        False, 'alpha is dropped, and what was transparent shows the colour beneath',
        'nothing, unless much of it is transparent: then paste it on a ground'),
    # annotation files
    'broken JSON': Kind(True, 'training does not start', 'get the file again'),
    'wrong form': Kind(True, 'training does not start', "write it in COCO's form"),
    'duplicate image id': Kind(
        True, 'only the last of these images is used, with the boxes of all (checked before '
        'training starts)', 'give each image its own id, and correct image_id in its annotations'),
    'duplicate annotation id': Kind(
        True, 'training does not start', 'give every annotation its own id'),
    'duplicate file name': Kind(
        True, 'the image is used several times, each time without the boxes of the others '
        '(checked before training starts)', 'make one of the entries, with all boxes'),
    'repeated image': Kind(False, 'the image, with the same boxes, is used several times',
                           'nothing, if that is intended'),
    'missing category': Kind(
        True, 'the labels of all categories after it would shift by one (checked before training '
        'starts)', 'add it to "categories" of the file, or correct the classes of the config'),
    'duplicate category': Kind(
        True, 'there would be more labels than classes (checked before training starts)',
        'join them'),
    'category order': Kind(
        True, "mmdet numbers the labels in the file's order, so that the config's names go to "
        'other labels (checked before training starts)',
        'write the classes of the config in the order of the file'),
    'unknown category': Kind(
        True, 'the box is left out, and the object trained as background (checked before '
        'training starts)', 'add the category to the file, or correct category_id'),
    'unknown image': Kind(
        False, 'the annotation is left out', 'nothing, if the file lists a part of the images'),
    'box not finite': Kind(
        True, 'NaN is left out, and the object trained as background; infinity reaches the '
        'network (checked before training starts)', CORRECT),
    'box without area': Kind(False, DROPPED, CORRECT),
    'box outside the image': Kind(False, DROPPED, CORRECT),
    'box partly outside': Kind(
        False, 'the box is clipped to the image when it is resized', CORRECT),
    'no segmentation': Kind(
        True, 'loading the masks fails (checked before training starts)', 'add the polygon, or '
        'take the annotation out'),
    'broken polygon': Kind(
        True, 'loading the masks fails, or gives a wrong one (checked before training starts)',
        CORRECT),
    'empty polygon': Kind(False, IGNORED, CORRECT),
    'two-point polygon': Kind(False, IGNORED, CORRECT),
    'odd polygon': Kind(False, IGNORED, CORRECT),
    'unusable polygon': Kind(
        True, 'the evaluation fails, or takes four numbers for a box (checked before it starts)',
        CORRECT),
    'broken RLE': Kind(
        True, 'loading the masks fails, or the object is ignored (checked before training '
        'starts)', CORRECT),
    'no images': Kind(
        True, 'training does not start', 'correct data_root, data_prefix, ann_file, the suffixes '
        'or filter_cfg of the config'),
    # label maps
    'missing label map': Kind(True, STOPS, 'put the file there, or take its image out'),
    'zero-byte label map': Kind(True, STOPS, AGAIN),
    'unreadable label map': Kind(True, STOPS, AGAIN),
    'truncated label map': Kind(True, STOPS, AGAIN),
    'label map size': Kind(
        True, f'{STOPS} (in the libraries alone it fails later, or labels lie elsewhere)',
        'get the label map of this image; where EXIF rotates the image, rotate the map too'),
    'colour label map': Kind(
        True, STOPS, 'replace each colour by the number of its class, and save one channel'),
    'label out of range': Kind(
        True, f'{STOPS} (in the libraries alone the loss fails, on GPUs without saying where; '
        'values over 255 wrap around to other classes)',
        'correct the values, or the classes and reduce_zero_label of the config'),
}

PNG = b'\x89PNG\r\n\x1a\n'
PNG_END = b'IEND\xaeB`\x82'
JPEG_END = b'\xff\xd9'
# In a JPEG's pixel data 0xFF is followed by 0x00 or a restart marker; anything else ends them.
JPEG_MARKER = re.compile(rb'\xff([^\x00\xff\xd0-\xd7])')


def is_cut_off(data: bytes) -> bool:
    """Whether a JPEG or PNG ends before its end marker, or is zeros from somewhere on.

    Decoders may fill in the rest without a word. False for all other formats.
    """
    if data.startswith(PNG):
        at = len(PNG)
        while at + 12 <= len(data):
            length, name = struct.unpack('>I4s', data[at:at + 8])
            if name == b'IEND':
                return False
            at += 12 + length
        return True
    if data.startswith(b'\xff\xd8'):
        at = 2
        while marker := JPEG_MARKER.search(data, at):
            if marker[0] == JPEG_END:
                return False
            at = marker.end()
            if marker[1] not in (b'\x01', b'\xd8'):  # those have nothing after them
                at += int.from_bytes(data[at:at + 2], 'big')
        return True
    return False


def file_is_cut_off(path: str) -> bool:
    """:func:`is_cut_off` of a file; of nearly all files only the last bytes are read."""
    with open(path, 'rb') as file:
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - len(PNG_END)))
        end = file.read()
        if end.endswith((JPEG_END, PNG_END)):
            return False
        file.seek(0)
        return is_cut_off(file.read())


class Reading(NamedTuple):
    """How a pipeline reads images and label maps: arguments of its loading transforms."""
    flag: str = 'color'
    backend: str = 'cv2'
    label_backend: str = 'pillow'
    backend_args: Optional[dict] = None


class Sample(NamedTuple):
    """An image, what an annotation file says about it, and its label map if it has one."""
    image: str
    image_id: Any = None
    size: Optional[Tuple[int, int]] = None  # height, width
    labels: Optional[str] = None


class Labels(NamedTuple):
    """Which values a label map may have, before anything is done to them."""
    classes: Optional[int] = None  # their number; None if it is not known
    reduce_zero_label: bool = False
    ignored: Collection[int] = (255, )

    def describe(self) -> str:
        first = int(self.reduce_zero_label)
        ignored = sorted({*self.ignored, *([0] if first else [])})
        return (f'expected {first} to {self.classes - 1 + first}, or '
                f'{" or ".join(map(str, ignored))} for what is ignored')

    def wrong(self, values: np.ndarray) -> np.ndarray:
        """Those of ``values`` that are neither a class nor ignored."""
        if self.classes is None:
            return values[:0]
        inside = (values >= 0) & (values < self.classes + int(self.reduce_zero_label))
        return values[~inside & ~np.isin(values, list(self.ignored))]


READING, LABELS = Reading(), Labels()

def inspect_sample(sample: Sample, reading: Reading = READING,
                   labels: Labels = LABELS) -> List[Fault]:
    """Read an image and its label map, as training would, and return what is wrong."""
    faults, size = inspect_image(sample, reading)
    if sample.labels is not None:
        faults += inspect_labels(sample, size, reading, labels)
    return faults


def _read(path: str, what: str, image_id: Any, reading: Reading, flag: str, backend: str):
    """(bytes, array, None), or (None, None, fault) where that fails."""
    try:
        data = fileio.get(path, backend_args=reading.backend_args)
    except FileNotFoundError:
        return None, None, Fault(f'missing {what}', path, image_id=image_id)
    except OSError as error:
        return None, None, Fault(f'unreadable {what}', path, str(error), image_id)
    if not data:
        return None, None, Fault(f'zero-byte {what}', path, image_id=image_id)
    problem, array = 'it is no image of a known format', None
    try:
        array = mmcv.imfrombytes(data, flag=flag, backend=backend)
    except Exception as error:  # each decoder has its own
        problem = f'{type(error).__name__}: {error}'.strip()
    if is_cut_off(data):
        return None, None, Fault(f'truncated {what}', path,
                                 f'it ends or turns to zeros within {len(data):,} bytes', image_id)
    if array is None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except Exception as error:
            problem = f'{type(error).__name__}: {error}'
        kind = 'truncated' if 'truncated' in problem.lower() else 'unreadable'
        return None, None, Fault(f'{kind} {what}', path, problem, image_id)
    return data, array, None


def inspect_image(sample: Sample, reading: Reading = READING):
    """Return (faults, (height, width) as training reads it or None) of an image."""
    path, image_id = sample.image, sample.image_id
    data, array, fault = _read(path, 'image', image_id, reading, reading.flag, reading.backend)
    if fault:
        return [fault], None
    faults, turned, orientation = [], '', None

    def found(kind, detail=''):
        faults.append(Fault(kind, path, detail, image_id))

    size = array.shape[:2]
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, orientation = image.mode, image.getexif().get(0x0112, 1)
            if mode in ('1', 'L', 'LA', 'La') or mode[0] in 'IF':
                found('grey image')
            if mode == 'CMYK':
                found('CMYK image')
            if _bits(image, data) > 8:
                found('16-bit image', f'values of {_bits(image, data)} bits')
            if mode in ('LA', 'La', 'PA', 'RGBA', 'RGBa') or 'transparency' in image.info:
                found('alpha channel')
            if orientation in range(2, 9):
                stored = f'{image.width} x {image.height} px'
                turned = f'EXIF orientation {orientation}, stored as {stored}'
                found('EXIF rotation', f'{turned}, read as {size[1]} x {size[0]} px')
    except Exception:  # what training reads need not be of Pillow's formats
        pass
    if sample.size is not None and tuple(sample.size) != size:
        height, width = sample.size
        found('image size', f'{size[1]} x {size[0]} px; the annotation file says {width} x '
              f'{height}' + (f' ({turned})' if turned else ''))
    if array.ndim != 3 or array.shape[2] != 3:
        if reading.flag == 'unchanged':
            found('channels', f'{1 if array.ndim == 2 else array.shape[2]} instead of 3')
    return faults, size


def _bits(image: Image.Image, data: bytes) -> int:
    """Bits of a channel, which Pillow itself reduces to 8 in some modes."""
    if data.startswith(PNG):
        return data[24]
    if image.format == 'TIFF':
        return max(np.ravel(image.tag_v2.get(258, 8)))
    return 16 if image.mode[0] == 'I' else 32 if image.mode[0] == 'F' else 8


def inspect_labels(sample: Sample, size, reading: Reading, labels: Labels) -> List[Fault]:
    """Return the faults of a label map. ``size``: (height, width) of its image, or None."""
    path = sample.labels
    _, array, fault = _read(path, 'label map', sample.image_id, reading, 'unchanged',
                            reading.label_backend)
    if fault:
        return [fault]
    array = np.squeeze(array)
    if array.ndim > 2 and labels.classes is not None:
        return [Fault('colour label map', path, f'{array.shape[2]} channels', sample.image_id)]
    faults = []
    if size is not None and array.shape[:2] != size:
        faults.append(Fault('label map size', path, f'{_px(array.shape)}; '
                            f'its image {sample.image} has {_px(size)}', sample.image_id))
    if labels.classes is not None:
        values, counts = np.unique(array, return_counts=True)
        values = values.astype(np.int64)
        wrong = labels.wrong(values)
        if len(wrong):
            listed = [f'{value} ({count} px)' for value, count in zip(values, counts)
                      if value in wrong]
            more = f' and {len(listed) - 5} more' if len(listed) > 5 else ''
            faults.append(Fault('label out of range', path, f'{", ".join(listed[:5])}{more}; '
                                f'{labels.describe()}', sample.image_id))
    return faults


def _px(shape) -> str:
    return f'{shape[1]} x {shape[0]} px' if len(shape) > 1 else f'{shape[0]} px'


class Coco(NamedTuple):
    """What mmdet's CocoDataset is told: see :func:`inspect_coco`."""
    path: str
    classes: Sequence[str]
    masks: bool = True  # whether segmentations are loaded
    testing: bool = False  # test_mode: for evaluation, nothing is filtered
    filter_empty: bool = False
    min_size: int = 0
    backend_args: Optional[dict] = None


@contextmanager
def _without_gc():
    """While millions of objects are made, looking for garbage doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_gc()
def inspect_coco(coco: Coco) -> Tuple[List[Fault], list]:
    """Look through an annotation file in COCO's form, without the images.

    Polygons, most of such a file, are looked at while it is read and not kept: a file as large
    as COCO 2017's takes 1.1 GB of memory, a third of what it takes as a whole, and some 20 s.

    Returns:
        The faults, and (id, file name, (height, width)) of each image.
    """
    try:
        with fileio.get_local_path(coco.path, backend_args=coco.backend_args) as path, \
                open(path, encoding='utf-8') as file:
            content = json.load(file, object_hook=_shrink)
    except json.JSONDecodeError as error:
        end = len(error.doc.rstrip())
        cut = ': the file is cut off' if (
            error.pos >= end - 8 or error.msg.startswith('Unterminated')) else ''
        return [Fault('broken JSON', coco.path, f'{error.msg} at character {error.pos:,} of '
                      f'{end:,}{cut}')], []
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        return [Fault('broken JSON', coco.path, f'{type(error).__name__}: {error}')], []
    faults = []

    def found(kind, detail='', image_id=None, annotation_id=None):
        faults.append(Fault(kind, coco.path, detail, image_id, annotation_id))

    if not isinstance(content, dict):
        found('wrong form', f'it holds a {type(content).__name__}; expected an object with '
              'images, annotations and categories')
        return faults, []
    lists = {}
    for name in ('images', 'annotations', 'categories'):
        lists[name] = content.pop(name, [] if coco.testing and name == 'annotations' else None)
        if not isinstance(lists[name], list):
            found('wrong form', f'it has no list of {name}')
            lists[name] = []
    images = _whole(lists['images'], 'images', dict(
        id=_is_id, file_name=_is_text, height=_is_number, width=_is_number), found)
    wanted = _inspect_categories(lists['categories'], coco, found)
    boxes = _inspect_annotations(lists['annotations'], images, wanted, coco, found)
    _inspect_images(images, boxes, coco, found)
    return faults, [(image['id'], image['file_name'], (image['height'], image['width']))
                    for image in images]


def _shrink(item: dict) -> dict:
    if 'segmentation' in item:
        item['segmentation'] = inspect_segmentation(item['segmentation'])
    return item


def inspect_segmentation(outline: Any) -> tuple:
    """(kind or None, detail, size of an RLE or None) of an annotation's segmentation."""
    if not outline:
        return 'no segmentation', 'its segmentation is empty', None
    if isinstance(outline, dict):
        return _inspect_rle(outline)
    if not isinstance(outline, list) or not all(isinstance(part, list) for part in outline):
        return 'broken polygon', 'expected a list of lists [x, y, x, y, ...], or RLE', None
    kind = None
    for part in outline:
        try:
            if not math.isfinite(sum(part)):
                return 'broken polygon', 'its coordinates are not finite', None
        except TypeError:
            return 'broken polygon', 'its coordinates are not numbers', None
        if len(part) % 2 or len(part) < 6:
            kind = 'empty polygon' if not part else (
                'odd polygon' if len(part) % 2 else 'two-point polygon')
            detail = f'{len(part)} numbers'
    return (kind, detail, None) if kind else (None, '', None)


def _inspect_rle(rle: dict) -> tuple:
    counts, size = rle.get('counts'), rle.get('size')
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_number, size))):
        return 'broken RLE', f'its size is {size}', None
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            return 'broken RLE', 'its counts are not all whole numbers from 0 on', size
        if sum(counts) != size[0] * size[1]:
            return ('broken RLE', f'its counts add up to {sum(counts)}, its size {size} to '
                    f'{size[0] * size[1]}', size)
        return None, '', size
    try:
        coco_mask.decode(dict(counts=counts, size=size))
    except Exception as error:
        return 'broken RLE', f'it cannot be decoded: {error}', size
    return None, '', size


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_id(value) -> bool:
    return isinstance(value, (int, float, str))


def _is_text(value) -> bool:
    return isinstance(value, str) and value != ''


def _whole(entries: list, name: str, fields: dict, found) -> list:
    """Those of ``entries`` that have all fields; the others are told."""
    good = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            found('wrong form', f'{name}[{i}] is no object')
            continue
        wrong = [field for field, fits in fields.items() if not fits(entry.get(field))]
        if not wrong:
            good.append(entry)
            continue
        its = {'images': dict(image_id=entry.get('id')), 'annotations': dict(
            image_id=entry.get('image_id'), annotation_id=entry.get('id'))}.get(name, {})
        found('wrong form', f'{name}[{i}]: {", ".join(wrong)} missing or wrong', **its)
    return good


def _inspect_categories(categories: list, coco: Coco, found) -> set:
    """Return the ids of all categories."""
    categories = _whole(categories, 'categories', dict(id=_is_id, name=_is_text), found)
    names = [category['name'] for category in categories]
    for name in coco.classes:
        if name not in names:
            found('missing category', f'{name!r} of the config is not in the file')
    for key in ('id', 'name'):
        for value, count in Counter(category[key] for category in categories).items():
            if count > 1:
                found('duplicate category', f'{count} categories have the {key} {value!r}')
    used = [name for name in names if name in coco.classes]
    if used != list(coco.classes) and sorted(used) == sorted(coco.classes):
        found('category order', f'in the file: {", ".join(used)}; in the config: '
              f'{", ".join(coco.classes)}')
    return {category['id'] for category in categories}


def _inspect_annotations(annotations: list, images: list, categories: set, coco: Coco, found):
    """Return the ids of images -> their (category id, box)s."""
    sizes = {image['id']: (image['height'], image['width']) for image in images}
    boxes, ids = {}, Counter()
    for item in _whole(annotations, 'annotations', dict(
            id=_is_id, image_id=_is_id, category_id=_is_id, bbox=_is_box, area=_is_number), found):
        its = dict(image_id=item['image_id'], annotation_id=item['id'])
        ids[item['id']] += 1
        if ids[item['id']] > 1:
            found('duplicate annotation id', **its)
        boxes.setdefault(item['image_id'], []).append((item['category_id'], *item['bbox']))
        if item['image_id'] not in sizes:
            found('unknown image', **its)
            continue
        if item.get('ignore'):  # mmdet looks no further
            continue
        if item['category_id'] not in categories:
            found('unknown category', f'category_id {item["category_id"]!r}', **its)
        size = sizes[item['image_id']]
        kind = _box_problem(item['bbox'], item['area'], *size)
        if kind:
            found(kind, f'box {item["bbox"]} (x, y, width, height) in {_px(size)}' + (
                f', area {item["area"]}' if item['area'] <= 0 else ''), **its)
        if coco.masks:
            kind, detail, rle_size = item.get('segmentation') or inspect_segmentation(None)
            if kind is None and rle_size and tuple(rle_size) != size:
                kind, detail = 'broken RLE', f'it is for {_px(rle_size)}, its image {_px(size)}'
            if kind and coco.testing and not KINDS[kind].error:
                kind = 'unusable polygon'
            if kind:
                found(kind, detail, **its)
    return boxes


def _is_box(value) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))


def _box_problem(box, area, height, width) -> Optional[str]:
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        return 'box not finite'
    # As mmdet decides what to leave out.
    if w < 1 or h < 1 or area <= 0:
        return 'box without area'
    if min(x + w, width) <= max(x, 0) or min(y + h, height) <= max(y, 0):
        return 'box outside the image'
    # A pixel is left for rounding.
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        return 'box partly outside'


def _inspect_images(images: list, boxes: dict, coco: Coco, found):
    """Find images that are listed twice, and whether any is left."""
    by_id, by_name = {}, {}
    for image in images:
        first = by_id.setdefault(image['id'], image)
        if first is not image:
            found('duplicate image id', f'of {first["file_name"]} and {image["file_name"]}',
                  image['id'])
            continue  # then it has no boxes of its own
        first = by_name.setdefault(image['file_name'], image)
        if first is not image:
            same, other = (sorted(map(str, boxes.get(entry['id'], []))) for entry in
                           (first, image))
            found('repeated image' if same == other else 'duplicate file name',
                  f'{image["file_name"]} is also image {first["id"]}', image['id'])
    left = [image for image in images if coco.testing or (
        min(image['height'], image['width']) >= coco.min_size
        and (not coco.filter_empty or image['id'] in boxes))]
    if not left:
        found('no images', f'of {len(images)} none has boxes and a side of {coco.min_size} px'
              if images else 'it lists no whole image')
