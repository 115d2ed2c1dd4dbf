"""Data sets of drawn shapes in the layouts of COCO and ADE20K.

The pictures show textured shapes that overlap on cluttered grounds. Every image is a pure function
of (seed, split, index), so a set can be made anywhere instead of being downloaded, and the first n
images are the same however many follow.
"""
import colorsys
import json
import math
import os
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np
from rich.progress import track

from .masks import mask_to_polygons, mask_to_rle

CATEGORIES = ('circle', 'rectangle', 'triangle', 'star', 'ring', 'cross')
SEG_CLASSES = ('background', ) + CATEGORIES
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

VERSION = 1  # of the drawing: raise it whenever the pixels of a given seed change
SPLITS = ('train', 'val')
TEXTURES = ('gradient', 'stripes', 'noise', 'checker')
MIN_AREA = 16  # px; an instance that shows less is not annotated
MIN_VISIBLE = 0.25  # nor is one of which a smaller part shows
KEEP_VISIBLE = 0.45  # no object is put where it leaves less than this of another


class Instance(NamedTuple):
    """One object, or one crowd of them, of a drawn image."""
    category: int  # index, from 0
    mask: np.ndarray  # bool (h, w), the visible part
    crowd: bool
    visible: float  # visible share of the part inside the image, in [0, 1]

    @property
    def annotated(self):
        return self.visible >= MIN_VISIBLE and self.mask.sum() >= MIN_AREA


def _wheel(n, radii=(1.0, ), span=2 * math.pi):
    """n points (n, 2) around the origin, whose distances from it repeat ``radii``."""
    angle = np.arange(n) * span / n - math.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.resize(radii, n)[:, None]


def _outlines():
    """Shape name -> contours of radius about 1; a contour inside another one is a hole."""
    circle, box = _wheel(72), np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (0.95, 0.68)
    a = 0.33
    cross = np.array([[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1],
                      [-a, a], [-1, a], [-1, -a], [-a, -a]])
    arrow = np.array([[0, -1], [.8, 0], [.3, 0], [.3, 1], [-.3, 1], [-.3, 0], [-.8, 0]])
    half = _wheel(37, span=math.pi * 37 / 36)
    return dict(
        circle=[circle], rectangle=[box], triangle=[_wheel(3)], star=[_wheel(10, (1, .42))],
        ring=[circle, circle * .52], cross=[cross], frame=[box, box * .5], arrow=[arrow],
        crescent=[np.concatenate([half, half[::-1] * (.35, 1)])],
        semicircle=[half - (.4, 0)])


OUTLINES = _outlines()


class Look(NamedTuple):
    """What the objects of a category have in common."""
    shape: str  # one of OUTLINES
    hue: float  # in [0, 1), about which theirs are spread
    texture: Optional[int] = None  # index into TEXTURES, None for any


# Hues overlap between neighbours, as bananas are usually yellow and lemons are too: colour is a
# hint, and shape decides. COCO has more categories than there are shapes, so texture counts there.
LOOKS = tuple(Look(name, i / len(CATEGORIES)) for i, name in enumerate(CATEGORIES))
COCO_LOOKS = tuple(Look(tuple(OUTLINES)[i % 10], i // 10 / 8, i // 10 % 4) for i in range(80))
HUE_SPREAD = .05  # standard deviation


def _pattern(rng, kind, h, w, period):
    """A scalar field, float32 (h, w) in [0, 1], that repeats about every ``period`` px."""
    if kind == 'noise':
        grid = rng.random((int(h / period) + 3, int(w / period) + 3), dtype=np.float32)
        return cv2.resize(grid, (w, h), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    angle = rng.uniform(0, 2 * math.pi)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = np.arange(w, dtype=np.float32), np.arange(h, dtype=np.float32)[:, None]
    u = x * c + y * s
    if kind == 'gradient':
        return (u - u.min()) / max(float(np.ptp(u)), 1)
    k = np.float32(2 * math.pi / period)
    wave = np.sin(u * k)
    if kind == 'checker':
        wave *= np.sin((y * c - x * s) * k)
    return (wave * 3 + 0.5).clip(0, 1)


def _colours(rng, look=None):
    """Two related colours, float32 (2, 3) in [0, 255], of an object or (no look) of a ground."""
    # As in photographs, objects tend to be more vivid than what is around them. Were they not,
    # a small network would need hours to tell them from the ground.
    hue = rng.normal(look.hue, HUE_SPREAD) if look else rng.random()
    saturation = rng.uniform(.55, .95) if look else rng.uniform(0, .25)
    value = rng.uniform(.35, .95)
    other = value + rng.uniform(.1, .3) * (1 if value < .65 else -1)
    pair = [colorsys.hsv_to_rgb((hue + rng.uniform(-.03, .03)) % 1,
                                saturation + rng.uniform(0, .05), v) for v in (value, other)]
    return np.array(pair, np.float32)[:, ::-1] * 255


def _paint(rng, h, w, period, look=None, ground=None):
    """A textured surface, float32 (h, w, 3), set off from the mean colour ``ground`` (3, )."""
    texture = rng.integers(len(TEXTURES)) if look is None or look.texture is None else look.texture
    for _ in range(10):
        first, second = _colours(rng, look)
        # Objects have to be seen, whatever they lie on.
        if ground is None or np.linalg.norm((first + second) / 2 - ground) > 70:
            break
    pattern = _pattern(rng, TEXTURES[texture], h, w, period)
    return cv2.merge([a + pattern * (b - a) for a, b in zip(first, second)])


def _blend(canvas, cover, colour):
    cover = cover * np.float32(1 / 255)
    canvas += cv2.merge([cover, cover, cover]) * (colour - canvas)


def _background(rng, h, w):
    """A ground of two surfaces with clutter that is no object, float32 (h, w, 3)."""
    side = min(h, w)
    canvas = _paint(rng, h, w, side * rng.uniform(.05, .4))
    if rng.random() < .6:  # ragged patches of another surface
        patches = _pattern(rng, 'noise', h, w, side * rng.uniform(.15, .4)) - rng.uniform(.4, .6)
        _blend(canvas, (patches * 1000).clip(0, 255),
               _paint(rng, h, w, side * rng.uniform(.05, .4)))
    for _ in range(rng.integers(4)):  # scribbles
        steps = rng.normal(0, side * .12, (rng.integers(2, 7), 2))
        path = np.cumsum(steps, 0) + rng.uniform(0, 1, 2) * (w, h)
        cv2.polylines(canvas, [np.round(path).astype(np.int32)], False,
                      _colours(rng)[0].tolist(), int(rng.integers(1, max(2, side // 60) + 1)))
    return canvas


def _contours(rng, name, diameter):
    """Contours of a shape in px around its centre, turned and squeezed at random."""
    angle, squeeze = rng.uniform(0, 2 * math.pi), rng.uniform(.75, 1)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [c * (1, squeeze) @ turn * (diameter / 2) for c in OUTLINES[name]]


def _cover(contours, h, w):
    """Coverage of the image by contours (even-odd rule), uint8 in a window, and that window."""
    points = np.concatenate(contours)
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (w, h))
    cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
    fixed = [np.round((c - (x0, y0)) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(cover, fixed, 255, cv2.LINE_AA, shift=4)
    return cover, np.s_[y0:y1, x0:x1]


class _Scene:
    """A picture under construction and, for every pixel, which instance is on top there."""

    def __init__(self, rng, h, w, looks):
        self.rng, self.h, self.w, self.looks = rng, h, w, looks
        self.canvas = _background(rng, h, w)
        self.owner = np.zeros((h, w), np.uint8)  # 0 is the ground
        self.items = []  # (category, crowd)
        self.full = [0]  # px of each owner inside the image, hidden or not

    def _choose(self):
        category = int(self.rng.integers(len(self.looks)))
        return category, self.looks[category]

    def _stamp(self, cover, window, look):
        canvas = self.canvas[window]
        period = max(4, max(cover.shape) * self.rng.uniform(.12, .5))
        ground = cv2.mean(canvas)[:3]
        _blend(canvas, cover, _paint(self.rng, *cover.shape, period, look, ground))
        self.owner[window][cover > 127] = len(self.items)

    def add_object(self, diameter):
        """Put an object where it hides no other one too much; do nothing if there is no room."""
        category, look = self._choose()
        contours = _contours(self.rng, look.shape, diameter)
        margin = np.minimum(.35 * diameter, (self.w / 2, self.h / 2))
        shown = np.bincount(self.owner.ravel(), minlength=len(self.full))
        for _ in range(8):
            centre = self.rng.uniform(margin, np.subtract((self.w, self.h), margin))
            cover, window = _cover([c + centre for c in contours], self.h, self.w)
            hidden = np.bincount(self.owner[window][cover > 127], minlength=len(self.full))
            left = (shown - hidden)[1:] >= KEEP_VISIBLE * np.array(self.full[1:])
            if left.all():
                self.items.append((category, False))
                self.full.append(int((cover > 127).sum()))
                return self._stamp(cover, window, look)

    def add_crowd(self, diameter, count):
        """Put a cluster of small objects of one category, annotated as a whole."""
        category, look = self._choose()
        limit = np.array([self.w, self.h]) - 1
        middle = self.rng.uniform(.2, .8, 2) * limit
        self.items.append((category, True))
        for _ in range(count):
            centre = self.rng.normal(middle, diameter * math.sqrt(count) * .5).clip(0, limit)
            contours = _contours(self.rng, look.shape, diameter * self.rng.uniform(.8, 1.2))
            self._stamp(*_cover([c + centre for c in contours], self.h, self.w), look)
        self.full.append(int((self.owner == len(self.items)).sum()))

    def add_pole(self, width):
        """Draw a straight bar across the whole image, which may cut objects in two."""
        angle, reach = self.rng.uniform(0, math.pi), self.h + self.w
        step = np.array([math.cos(angle), math.sin(angle)]) * reach
        middle = self.rng.uniform(.15, .85, 2) * (self.w, self.h)
        ends = np.round(np.stack([middle - step, middle + step])).astype(int).tolist()
        cover = np.zeros((self.h, self.w), np.uint8)
        cv2.line(cover, ends[0], ends[1], 255, width, cv2.LINE_AA)
        _blend(self.canvas, cover, _colours(self.rng)[0])
        self.owner[cover > 127] = 0

    def finish(self):
        canvas = self.canvas
        if self.rng.random() < .5:  # light from one side
            canvas *= .75 + .35 * _pattern(self.rng, 'gradient', self.h, self.w, 1)[..., None]
        grain = int(self.rng.integers(1, 24))
        canvas += self.rng.integers(-grain, grain + 1, canvas.shape, np.int8)
        masks = [self.owner == i for i in range(1, len(self.full))]
        return canvas.clip(0, 255).astype(np.uint8), [
            Instance(category, mask, crowd, mask.sum() / max(full, 1))
            for (category, crowd), mask, full in zip(self.items, masks, self.full[1:])]


def draw(rng, size, looks=LOOKS):
    """Draw one image.

    Args:
        rng (np.random.Generator): Where all choices come from.
        size (tuple[int, int]): Height and width in px.
        looks (Sequence[Look]): One for each category.

    Returns:
        tuple[np.ndarray, list[Instance]]: The image, uint8 (h, w, 3) in OpenCV's order BGR, and
        its instances, also those too well hidden to be annotated (see ``Instance.annotated``).
    """
    h, w = size
    side = min(h, w)
    scene = _Scene(rng, h, w, looks)
    if rng.random() > .05:  # else an image without objects
        if rng.random() < .08:
            scene.add_crowd(max(6, side * .035), int(rng.integers(12, 30)))
        for _ in range(1 + rng.binomial(4, .45)):
            tiny = rng.random() < .06
            low, high = (.04, .09) if tiny else (.15, .65)
            scene.add_object(max(8, side * math.exp(rng.uniform(math.log(low), math.log(high)))))
    if rng.random() < .25:
        for _ in range(rng.integers(1, 3)):
            scene.add_pole(int(max(3, side * rng.uniform(.012, .03))))
    return scene.finish()


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
        raise ValueError('train and val must not be negative, and sizes be (h, w) of at least '
                         f'32 px; got train={train}, val={val}, size={size}')
    made = dict(generator='shapes', version=VERSION, layout=layout, train=train, val=val,
                sizes=sizes, seed=seed)
    root = Path(root).resolve()
    if _is_made(root, made):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    # A sibling is on the same disk, where renaming is atomic: the set appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as tmp:
        folder = Path(tmp) / 'set'  # below tmp because tmp is closed to other users
        folder.mkdir()
        for split, count in zip(SPLITS, (train, val)):
            write_split(folder, split, count, sizes)
        (folder / 'shapes.json').write_text(json.dumps(made))
        try:
            os.rename(folder, root)
        except OSError:  # another process may have been quicker
            if not _is_made(root, made):
                raise
    return root


def _is_made(root, made):
    """Whether ``root`` holds this very set; ValueError if it holds anything else."""
    if not root.exists() or root.is_dir() and not any(root.iterdir()):
        return False
    try:
        found = json.loads((root / 'shapes.json').read_text())
    except (OSError, ValueError):
        found = None
    if found != made:
        what = f'a set made with {found}' if found else 'something else'
        raise ValueError(f'{root} already holds {what}, which is left as it is. Choose another '
                         f'folder, or remove that one, to write a set made with {made}')
    return True


def write_coco(root, train=200, val=50, size=None, seed=0, coco2017=False, progress=True):
    """Write an instance segmentation data set in COCO's layout.

    Args:
        root (str | Path): The folder to make. The set is written to a hidden folder beside it and
            renamed at the end. Nothing is done if it holds the same set already.
        train (int): Number of training images.
        val (int): Number of validation images.
        size (tuple[int, int] | Sequence[tuple], optional): (height, width) in px, or several of
            them to choose from. Default: (320, 320); with ``coco2017`` sizes usual in COCO.
        seed (int): Not negative; sets with different seeds have different images.
        coco2017 (bool): Use the file names and the 80 categories of COCO 2017. There a category
            is a shape with a texture and a hue; its ``supercategory`` is the name of the shape.
            Otherwise the categories are ``CATEGORIES``, with ids from 1.
        progress (bool): Whether to show a progress bar.

    Returns:
        Path: The absolute path of ``root``.

    Raises:
        ValueError: If ``root`` holds anything else, or a number is out of range.
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
            for item in instances:
                if not item.annotated:
                    continue
                outline = mask_to_rle if item.crowd else mask_to_polygons
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=number, category_id=ids[item.category],
                    iscrowd=int(item.crowd), segmentation=outline(item.mask),
                    area=float(item.mask.sum()),
                    bbox=[float(x) for x in cv2.boundingRect(item.mask.view(np.uint8))]))
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


def write_ade20k(root, train=200, val=50, size=(320, 320), seed=0, progress=True):
    """Write a semantic segmentation data set in ADE20K's layout.

    The label maps, uint8 (h, w), hold 1 + the index in ``SEG_CLASSES``, and 0 on the rests of
    hidden objects: to be read with ``reduce_zero_label=True``. The images are those which
    ``write_coco`` draws for the same seed; arguments, result and errors are the same too.
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
