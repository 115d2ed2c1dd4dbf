"""Small data sets in the layouts that people have, with objects on noise."""
import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
from PIL import Image

CLASSES = ('nut', 'bolt')
COLOURS = ((64, 128, 64), (192, 0, 128), (0, 128, 192))  # background and the classes


class Object(NamedTuple):
    name: str
    polygon: np.ndarray  # (n, 2), px

    @property
    def box(self) -> List[float]:
        """x, y, w, h."""
        (x0, y0), (x1, y1) = self.polygon.min(0), self.polygon.max(0)
        return [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]


class Photo(NamedTuple):
    stem: str
    pixels: np.ndarray
    objects: List[Object]

    def labels(self) -> np.ndarray:
        """Return the label map: 0 background, 1 nut, 2 bolt."""
        labels = np.zeros(self.pixels.shape[:2], np.uint8)
        for item in self.objects:
            cv2.fillPoly(labels, [item.polygon], 1 + CLASSES.index(item.name))
        return labels


def photos(count: int, size: Tuple[int, int] = (96, 64), objects: int = 3,
           stem: str = 'photo{:02d}') -> List[Photo]:
    """Return ``count`` photographs of (width, height) px with objects of both classes."""
    rng, (w, h) = np.random.default_rng(0), size
    found = []
    for number in range(count):
        pixels = rng.integers(60, 120, (h, w, 3), np.uint8)
        items = []
        for i in range(objects):
            name = CLASSES[i % 2]
            x, y, side = rng.integers(2, w - 22), rng.integers(2, h - 22), rng.integers(10, 20)
            corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
            polygon = np.array(corners[:3 if name == 'nut' else 4], np.int32)
            cv2.fillPoly(pixels, [polygon], (220, 60, 40) if name == 'nut' else (40, 80, 230))
            items.append(Object(name, polygon))
        found.append(Photo(stem.format(number), pixels, items))
    return found


def save_images(folder: Path, data: Sequence[Photo], suffix: str = '.jpg') -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in data:
        Image.fromarray(photo.pixels).save(folder / (photo.stem + suffix), quality=95)


def coco(data: Sequence[Photo], masks: bool = True, prefix: str = '') -> dict:
    """Return COCO's dict, without any of the faults that tests add."""
    images, annotations = [], []
    for number, photo in enumerate(data, 1):
        h, w = photo.pixels.shape[:2]
        images.append(dict(id=number, file_name=f'{prefix}{photo.stem}.jpg', width=w, height=h))
        for item in photo.objects:
            annotations.append(dict(
                id=len(annotations) + 1, image_id=number, bbox=item.box, iscrowd=0,
                category_id=1 + CLASSES.index(item.name),
                area=float(cv2.contourArea(item.polygon)),
                segmentation=[item.polygon.ravel().tolist()] if masks else []))
    return dict(images=images, annotations=annotations, categories=[
        dict(id=number, name=name) for number, name in enumerate(CLASSES, 1)])


def write_coco(file: Path, data: Sequence[Photo], **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(coco(data, **options)))


def write_voc(folder: Path, data: Sequence[Photo]) -> None:
    """Write XML files, whose pixels count from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in data:
        h, w = photo.pixels.shape[:2]
        items = ''
        for item in photo.objects:
            x, y, dx, dy = item.box
            items += (f'<object><name>{item.name}</name><bndbox><xmin>{x + 1}</xmin>'
                      f'<ymin>{y + 1}</ymin><xmax>{x + dx}</xmax><ymax>{y + dy}</ymax>'
                      '</bndbox></object>')
        (folder / f'{photo.stem}.xml').write_text(
            f'<annotation><filename>{photo.stem}.jpg</filename><size><width>{w}</width>'
            f'<height>{h}</height><depth>3</depth></size>{items}</annotation>')


def write_yolo(folder: Path, data: Sequence[Photo], polygons: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in data:
        h, w = photo.pixels.shape[:2]
        lines = []
        for item in photo.objects:
            x, y, dx, dy = item.box
            values = ((item.polygon / (w, h)).ravel() if polygons else
                      ((x + dx / 2) / w, (y + dy / 2) / h, dx / w, dy / h))
            lines.append(' '.join([str(CLASSES.index(item.name)), *(f'{v:.6f}' for v in values)]))
        (folder / f'{photo.stem}.txt').write_text('\n'.join(lines))


def write_labelme(folder: Path, data: Sequence[Photo]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for photo in data:
        h, w = photo.pixels.shape[:2]
        (folder / f'{photo.stem}.json').write_text(json.dumps(dict(
            version='5.5.0', flags={}, imagePath=f'{photo.stem}.jpg', imageData=None,
            imageWidth=w, imageHeight=h, shapes=[
                dict(label=item.name, points=item.polygon.tolist(), shape_type='polygon',
                     group_id=None, flags={}) for item in photo.objects])))


def save_maps(folder: Path, data: Sequence[Photo], name: str = '{}.png', form: str = 'index',
              values: Dict[int, int] = {}) -> None:
    """Write label maps: 'index', 'palette', 'colour' or 'grey' in three channels."""
    folder.mkdir(parents=True, exist_ok=True)
    for photo in data:
        labels = photo.labels()
        labels = np.array([values.get(i, i) for i in range(256)], np.uint8)[labels]
        if form == 'colour':
            picture = Image.fromarray(np.array(COLOURS, np.uint8)[labels])
        elif form == 'grey':
            picture = Image.fromarray(np.stack([labels] * 3, -1))
        else:
            picture = Image.fromarray(labels)
            if form == 'palette':
                picture.putpalette(sum(COLOURS, ()))
        picture.save(folder / name.format(photo.stem))
