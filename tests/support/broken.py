"""Ways to break a data set of drawn shapes."""
import io
import shutil
from pathlib import Path

import cv2
import numpy as np
from mmengine.config import Config
from PIL import Image

from mmeffformer.apis.options import set_data_root
from mmeffformer.datasets import write_ade20k, write_coco

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 96)
NAN, INF = float('nan'), float('inf')


def write_both(folder: Path):
    """Draw six images of training and two of validation in both layouts."""
    write_coco(folder / 'coco', 6, 2, SIZE, seed=2, progress=False)
    write_ade20k(folder / 'ade20k', 6, 2, SIZE, seed=2, progress=False)
    return folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def config_of(root: Path) -> Config:
    """Return a config of this project for a drawn data set in either layout."""
    cfg = Config.fromfile(ROOT / ('tests/data/semfpn_tiny.py' if (root / 'images').exists() else
                                  'configs/demo/maskrcnn_effformer_l1_shapes.py'))
    set_data_root(cfg, str(root))
    return cfg


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image, 'JPEG', exif=exif)


def with_alpha(image: Image.Image) -> Image.Image:
    image.putalpha(Image.fromarray(np.full(SIZE, 77, np.uint8)))
    return image


def encoded_16_bit(image: Image.Image) -> bytes:
    return cv2.imencode('.png', np.asarray(image)[..., ::-1].astype(np.uint16) * 257)[1].tobytes()


def half_zeros(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes(len(data) - len(data) // 2)


# (Change of the bytes of an image, None: deleted; kinds of fault that it makes.)
IMAGES = {
    'missing': (None, ['missing image']),
    'zero bytes': (lambda data: b'', ['zero-byte image']),
    'text': (lambda data: b'no image', ['unreadable image']),
    'header only': (lambda data: data[:20], ['truncated image']),
    'half': (lambda data: data[:len(data) // 2], ['truncated image']),
    'without its last bytes': (lambda data: data[:-7], ['truncated image']),
    'half zeros': (half_zeros, ['truncated image']),
    'half a PNG': (lambda data: saved(opened(data), 'PNG')[:3000], ['truncated image']),
    'EXIF': (lambda data: turned(opened(data), 6), ['EXIF rotation', 'image size']),
    'smaller': (lambda data: saved(opened(data).resize((48, 32)), 'JPEG'), ['image size']),
    # Handled
    'grey': (lambda data: saved(opened(data).convert('L'), 'JPEG'), ['grey image']),
    'CMYK': (lambda data: saved(opened(data).convert('CMYK'), 'JPEG'), ['CMYK image']),
    '16-bit': (lambda data: encoded_16_bit(opened(data)), ['16-bit image']),
    'alpha': (lambda data: saved(with_alpha(opened(data)), 'PNG'), ['alpha channel']),
    'EXIF of the annotated': (
        lambda data: turned(opened(data).transpose(Image.Transpose.ROTATE_90), 6),
        ['EXIF rotation']),
    'EXIF upside down': (lambda data: turned(opened(data), 3), ['EXIF rotation']),
}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert('RGB')


def break_file(path: Path, change) -> Path:
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    return path


def labels_set(value: int, dtype=np.uint8):
    """Give a corner of a label map another value."""

    def change(data: bytes) -> bytes:
        labels = np.array(Image.open(io.BytesIO(data))).astype(dtype)
        labels[:8, :9] = value
        return cv2.imencode('.png', labels)[1].tobytes()

    return change


def smaller_labels(data: bytes) -> bytes:
    return saved(Image.open(io.BytesIO(data)).resize((48, 32), Image.Resampling.NEAREST), 'PNG')


def coloured_labels(data: bytes) -> bytes:
    return saved(Image.open(io.BytesIO(data)).convert('RGB'), 'PNG')


# Like IMAGES, for label maps with the classes 1 to 7.
LABEL_MAPS = {
    'missing': (None, ['missing label map']),
    'zero bytes': (lambda data: b'', ['zero-byte label map']),
    'text': (lambda data: b'no image', ['unreadable label map']),
    'half': (lambda data: data[:len(data) // 2], ['truncated label map']),
    'smaller': (smaller_labels, ['label map size']),
    'colours': (coloured_labels, ['colour label map']),
    'one too high': (labels_set(8), ['label out of range']),
    '254': (labels_set(254), ['label out of range']),
    'over 255': (labels_set(258, np.uint16), ['label out of range']),
    # Allowed
    '255': (labels_set(255), []),
    '0': (labels_set(0), []),
    '16 bits': (labels_set(7, np.uint16), []),
}


def rle(**parts):
    return dict(dict(counts=[0, 100, 64 * 96 - 100], size=[64, 96]), **parts)


# (Change of the first annotation; kind of fault or None; number of its boxes that training uses,
# or None if training stops.)
ANNOTATIONS = {
    'no area': (dict(bbox=[3, 3, 0, 5]), 'box without area', 0),
    'negative width': (dict(bbox=[30, 3, -9, 5]), 'box without area', 0),
    'area 0': (dict(area=0), 'box without area', 0),
    'outside': (dict(bbox=[300, 3, 10, 5]), 'box outside the image', 0),
    'partly outside': (dict(bbox=[80, 3, 50, 50]), 'box partly outside', 1),
    'rounded': (dict(bbox=[-.4, 3, 50.3, 61.5]), None, 1),
    'NaN': (dict(bbox=[3, NAN, 10, 5]), 'box not finite', None),
    'infinite': (dict(bbox=[3, 3, INF, 5]), 'box not finite', None),
    'three numbers': (dict(bbox=[3, 3, 10]), 'wrong form', None),
    'text for a box': (dict(bbox=['3', '3', '9', '9']), 'wrong form', None),
    'no box': (dict(bbox=None), 'wrong form', None),
    'unknown category': (dict(category_id=99), 'unknown category', None),
    'unknown image': (dict(image_id=99), 'unknown image', 0),
    'no segmentation': (dict(segmentation=None), 'no segmentation', None),
    'empty segmentation': (dict(segmentation=[]), 'no segmentation', None),
    'empty polygon': (dict(segmentation=[[]]), 'empty polygon', 0),
    'two points': (dict(segmentation=[[1, 1, 9, 9]]), 'two-point polygon', 0),
    'odd': (dict(segmentation=[[1, 1, 9, 9, 9, 1, 5]]), 'odd polygon', 0),
    'two points and more': (
        dict(segmentation=[[1, 1, 9, 9], [1, 1, 40, 1, 40, 40]]), 'two-point polygon', 1),
    'flat': (dict(segmentation=[1, 1, 9, 9, 9, 1]), 'broken polygon', None),
    'polygon of NaN': (dict(segmentation=[[1, 1, 9, NAN, 9, 1]]), 'broken polygon', None),
    'polygon of text': (dict(segmentation=[['a'] * 6]), 'broken polygon', None),
    'good RLE': (dict(segmentation=rle()), None, 1),
    'RLE too short': (dict(segmentation=rle(counts=[0, 100])), 'broken RLE', None),
    'RLE too long': (dict(segmentation=rle(counts=[0, 100, 64 * 96])), 'broken RLE', None),
    'negative RLE': (dict(segmentation=rle(counts=[-5, 64 * 96 + 5])), 'broken RLE', None),
    'RLE of another size': (
        dict(segmentation=rle(size=[96, 64])), 'broken RLE', None),
    'RLE without counts': (dict(segmentation=dict(size=[64, 96])), 'broken RLE', None),
    'undecodable RLE': (dict(segmentation=rle(counts='zzzz!!!!')), 'broken RLE', None),
}
