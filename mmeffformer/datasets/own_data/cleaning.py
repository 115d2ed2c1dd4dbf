"""COCO annotations without the entries that mmdet or the metric would misread."""
import math
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from PIL import Image
from pycocotools import mask as rle_api

from .files import Log, names


class Picture(NamedTuple):
    """An image, its entry in a COCO file and its annotations, with the names of the classes."""

    path: Path
    entry: dict
    annotations: List[dict]
    categories: Dict[Any, str]  # name by id


class Rules(NamedTuple):
    """Category ids by class name in all splits, and whether masks are used."""

    ids: Dict[str, int]
    masks: bool

    @property
    def classes(self) -> List[str]:
        return list(self.ids)


def find_rules(pictures: Sequence[Picture], target: Optional[str], log: Log) -> Rules:
    """Return the rules for ``pictures``.

    Raises:
        ValueError: No object is usable, or only some objects have masks and ``target`` is neither
            'boxes' nor 'masks'.
    """
    used = Counter(picture.categories.get(item.get('category_id')) for picture in pictures
                   for item in picture.annotations if fault_of(item, picture.entry) is None)
    used.pop(None, None)
    if not used:
        raise ValueError('no object has a box of at least 1 px within its image and a known class')
    ids: Dict[str, List[Any]] = {}
    for picture in {id(picture.categories): picture for picture in pictures}.values():
        for number, name in picture.categories.items():
            ids.setdefault(name, []).append(number)
    unused = [name for name in ids if name not in used]
    if unused:
        log.notes.append(f'classes without objects, left out: {names(unused)}')
    kept = {name: numbers for name, numbers in ids.items() if name in used}
    merged = [name for name, numbers in kept.items() if len({*numbers}) > 1]
    if merged:
        log.notes.append(f'classes with several ids, merged: {names(merged)}')
    sound = not merged and all(type(number) is int and number > 0
                               for numbers in kept.values() for number in numbers)
    sound = sound and len({numbers[0] for numbers in kept.values()}) == len(kept)
    table = {name: numbers[0] if sound else i
             for i, (name, numbers) in enumerate(kept.items(), 1)}
    items = [item for picture in pictures for item in picture.annotations
             if not item.get('iscrowd') and fault_of(item, picture.entry) is None]
    outlined = sum(outline_of(item) is not None for item in items)
    if target is None and 0 < outlined < len(items):
        raise ValueError(f'{len(items) - outlined:,} of {len(items):,} objects have a box, but no '
                         'mask: choose --target boxes, or --target masks, which fills these boxes')
    return Rules(table, target == 'masks' or (target is None and outlined > 0))


def fault_of(item: dict, entry: dict) -> Optional[str]:
    """Return why an annotation cannot be used, or None."""
    box = box_of(item)
    if box is None:
        return 'no box'
    if not all(map(math.isfinite, box)):
        return 'box with NaN or infinity'
    x, y, w, h = box
    if w < 1 or h < 1:
        return 'box below 1 px'
    if min(x + w, entry['width']) - max(x, 0) <= 0 or min(y + h, entry['height']) - max(y, 0) <= 0:
        return 'box outside the image'
    return None


def box_of(item: dict) -> Optional[List[float]]:
    """Return the box [x, y, w, h] of an annotation, or that of its polygons."""
    box = item.get('bbox')
    if isinstance(box, (list, tuple)) and len(box) == 4:
        try:
            return [float(value) for value in box]
        except (TypeError, ValueError):
            return None
    polygons = outline_of(item)
    if not isinstance(polygons, list):
        return None
    xs, ys = ([value for polygon in polygons for value in polygon[i::2]] for i in (0, 1))
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def outline_of(item: dict) -> Any:
    """Return the RLE or the polygons of at least three points of an annotation, or None."""
    found = item.get('segmentation')
    if isinstance(found, dict):
        return found if found.get('counts') else None
    if not isinstance(found, list):
        return None
    found = [polygon for polygon in found
             if isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0]
    return found or None


def clean(pictures: Sequence[Picture], rules: Rules, log: Log) -> dict:
    """Return COCO's dict of ``pictures`` by ``rules``; entries that are sound stay as they are."""
    images, annotations, left_out = [], [], Counter()
    image_ids = [picture.entry.get('id') for picture in pictures]
    keep = all(type(number) is int for number in image_ids) and len({*image_ids}) == len(image_ids)
    for number, picture in enumerate(pictures, 1):
        image_id = picture.entry['id'] if keep else number
        images.append({**picture.entry, 'id': image_id})
        for item in picture.annotations:
            name = picture.categories.get(item.get('category_id'))
            fault = fault_of(item, picture.entry)
            if not fault and name not in rules.ids:
                fault = 'unknown class'
            if fault:
                left_out[fault] += 1
            else:
                annotations.append(_complete(item, picture.entry, rules.masks) | dict(
                    image_id=image_id, category_id=rules.ids[str(name)]))
    ids = [item.get('id') for item in annotations]
    if not all(type(number) is int and number > 0 for number in ids) or len({*ids}) < len(ids):
        annotations = [dict(item, id=number) for number, item in enumerate(annotations, 1)]
    if left_out:
        log.warnings.append('objects left out: ' + ', '.join(
            f'{count:,} ({fault})' for fault, count in left_out.items()))
    return dict(images=images, annotations=annotations,
                categories=[dict(id=number, name=name) for name, number in rules.ids.items()])


def _complete(item: dict, entry: dict, masks: bool) -> dict:
    """Return an annotation with ``bbox``, ``iscrowd`` and ``area``, and an outline for masks."""
    box = item['bbox'] if item.get('bbox') else box_of(item)
    outline = outline_of(item)
    if masks and outline is None:
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    full = {**item, 'bbox': box, 'iscrowd': int(item.get('iscrowd') or 0)}
    if outline is not None:
        full['segmentation'] = outline
    if not item.get('area'):
        full['area'] = _area(outline, entry) if masks else box[2] * box[3]
    return full


def _area(outline: Any, entry: dict) -> float:
    """Return the area of polygons or an RLE in px."""
    size = entry['height'], entry['width']
    if isinstance(outline, dict) and isinstance(outline['counts'], str):
        return float(rle_api.area(outline))
    rles = rle_api.frPyObjects(outline, *size)
    return float(rle_api.area(rle_api.merge(rles) if isinstance(rles, list) else rles))


def with_size(entry: dict, path: Path) -> dict:
    """Return an image's entry with ``width`` and ``height``, from the file if they are missing."""
    if entry.get('width') and entry.get('height'):
        return entry
    with Image.open(path) as image:
        width, height = image.size
    return {**entry, 'width': width, 'height': height}

