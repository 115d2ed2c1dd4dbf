"""Images of textured shapes that overlap on cluttered backgrounds, drawn at random."""
import colorsys
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

CATEGORIES = ('circle', 'rectangle', 'triangle', 'star', 'ring', 'cross')
SEG_CLASSES = ('background', ) + CATEGORIES
Size = Tuple[int, int]  # height, width in px

VERSION = 1  # of the drawing: raise it whenever the pixels of a given seed change
TEXTURES = ('gradient', 'stripes', 'noise', 'checker')
MIN_AREA = 16  # px; an instance that shows less is not annotated
MIN_VISIBLE = 0.25  # nor an instance with a smaller visible share
KEEP_VISIBLE = 0.45  # an object leaves at least this share of every other one visible


class Instance(NamedTuple):
    """One object, or one crowd, in a drawn image."""
    category: int  # index, from 0
    mask: np.ndarray  # bool (h, w), the visible part
    crowd: bool
    visible: float  # visible share of the part inside the image, in [0, 1]

    @property
    def annotated(self) -> bool:
        """Return whether enough of the instance is visible."""
        return self.visible >= MIN_VISIBLE and self.mask.sum() >= MIN_AREA


def _wheel(n, radii=(1.0, ), span=2 * math.pi):
    """Return n points (n, 2) around the origin, whose distances from it repeat ``radii``."""
    angle = np.arange(n) * span / n - math.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], 1) * np.resize(radii, n)[:, None]


def _outlines():
    """Return contours of radius about 1 by shape name; a contour inside another is a hole."""
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
    """The common appearance of the objects of a category."""
    shape: str  # one of OUTLINES
    hue: float  # in [0, 1), the mean of the objects' hues
    texture: Optional[int] = None  # index into TEXTURES, None for any


# Hues of neighbouring categories overlap, as those of bananas and lemons do: colour is a hint, and
# shape decides. COCO has more categories than there are shapes, so texture counts there.
LOOKS = tuple(Look(name, i / len(CATEGORIES)) for i, name in enumerate(CATEGORIES))
COCO_LOOKS = tuple(Look(tuple(OUTLINES)[i % 10], i // 10 / 8, i // 10 % 4) for i in range(80))
HUE_SPREAD = .05  # standard deviation


def _pattern(rng, kind, h, w, period):
    """Return a scalar field, float32 (h, w) in [0, 1], with a period of about ``period`` px."""
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
    """Return two colours, float32 (2, 3) in [0, 255], for an object or a background (no look)."""
    # As in photographs, objects tend to be more vivid than their background. Otherwise a small
    # network would need hours to learn the difference.
    hue = rng.normal(look.hue, HUE_SPREAD) if look else rng.random()
    saturation = rng.uniform(.55, .95) if look else rng.uniform(0, .25)
    value = rng.uniform(.35, .95)
    other = value + rng.uniform(.1, .3) * (1 if value < .65 else -1)
    pair = [colorsys.hsv_to_rgb((hue + rng.uniform(-.03, .03)) % 1,
                                saturation + rng.uniform(0, .05), v) for v in (value, other)]
    return np.array(pair, np.float32)[:, ::-1] * 255


def _paint(rng, h, w, period, look=None, ground=None):
    """Return a textured surface, float32 (h, w, 3), unlike the mean colour ``ground`` (3, )."""
    texture = rng.integers(len(TEXTURES)) if look is None or look.texture is None else look.texture
    for _ in range(10):
        first, second = _colours(rng, look)
        # Objects must be visible on any background.
        if ground is None or np.linalg.norm((first + second) / 2 - ground) > 70:
            break
    pattern = _pattern(rng, TEXTURES[texture], h, w, period)
    return cv2.merge([a + pattern * (b - a) for a, b in zip(first, second)])


def _blend(canvas, cover, colour):
    cover = cover * np.float32(1 / 255)
    canvas += cv2.merge([cover, cover, cover]) * (colour - canvas)


def _background(rng, h, w):
    """Return a background of two surfaces with clutter, float32 (h, w, 3)."""
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
    """Return the contours of a shape in px around its centre, rotated and squeezed at random."""
    angle, squeeze = rng.uniform(0, 2 * math.pi), rng.uniform(.75, 1)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return [c * (1, squeeze) @ turn * (diameter / 2) for c in OUTLINES[name]]


def _cover(contours, h, w):
    """Return the coverage of the image by contours, uint8 in a window, and that window."""
    points = np.concatenate(contours)
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 2, (w, h))
    cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
    fixed = [np.round((c - (x0, y0)) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(cover, fixed, 255, cv2.LINE_AA, shift=4)
    return cover, np.s_[y0:y1, x0:x1]


class _Scene:
    """An image under construction, and the instance on top at every pixel."""

    def __init__(self, rng, h, w, looks):
        self.rng, self.h, self.w, self.looks = rng, h, w, looks
        self.canvas = _background(rng, h, w)
        self.owner = np.zeros((h, w), np.uint8)  # 0 is the background
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
        """Draw a straight bar across the whole image; it may divide objects."""
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


def draw(rng: np.random.Generator, size: Size,
         looks: Sequence[Look] = LOOKS) -> Tuple[np.ndarray, List[Instance]]:
    """Draw one image.

    Args:
        rng: The source of all random choices.
        size: Height and width in px.
        looks: One for each category.

    Returns:
        The image, uint8 (h, w, 3) in OpenCV's order BGR, and its instances, including those that
        are too hidden to be annotated (see ``Instance.annotated``).
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
