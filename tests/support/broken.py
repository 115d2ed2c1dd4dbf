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


def write_both(folder: Path) -> Path:
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


# Change of the bytes of an image, None: deleted; part of the error, '' without an error.
FAILED = 'LoadImageFromFile failed on {}'
IMAGES = {
    'missing': (None, FAILED),
    'zero bytes': (lambda data: b'', FAILED),
    'text': (lambda data: b'no image', FAILED),
    'header only': (lambda data: data[:20], FAILED),
    'half': (lambda data: data[:len(data) // 2], FAILED),
    'without its last bytes': (lambda data: data[:-7], FAILED),
    'half a PNG': (lambda data: saved(opened(data), 'PNG')[:3000], FAILED),
    'EXIF': (lambda data: turned(opened(data), 6), 'the image is (96, 64) px'),
    'smaller': (lambda data: saved(opened(data).resize((48, 32)), 'JPEG'),
                'the image is (32, 48) px (height, width), its annotations are for (64, 96)'),
    # Legal
    'grey': (lambda data: saved(opened(data).convert('L'), 'JPEG'), ''),
    'CMYK': (lambda data: saved(opened(data).convert('CMYK'), 'JPEG'), ''),
    '16-bit': (lambda data: encoded_16_bit(opened(data)), ''),
    'alpha': (lambda data: saved(with_alpha(opened(data)), 'PNG'), ''),
    'EXIF of the annotated': (
        lambda data: turned(opened(data).transpose(Image.Transpose.ROTATE_90), 6), ''),
    'EXIF upside down': (lambda data: turned(opened(data), 3), ''),
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
UNREADABLE = 'LoadAnnotations failed on {}'
OUTSIDE = 'label values [{}] are neither classes (0 to 6) nor ignored (255)'
LABEL_MAPS = {
    'missing': (None, UNREADABLE),
    'zero bytes': (lambda data: b'', UNREADABLE),
    'text': (lambda data: b'no image', UNREADABLE),
    'half': (lambda data: data[:len(data) // 2], UNREADABLE),
    'smaller': (smaller_labels, 'the label map is (32, 48) px, its image (64, 96)'),
    'colours': (coloured_labels, 'the label map is (64, 96, 3) px, its image (64, 96)'),
    'one too high': (labels_set(8), OUTSIDE.format(7)),
    '254': (labels_set(254), OUTSIDE.format(253)),
    # Legal
    '255': (labels_set(255), ''),
    '0': (labels_set(0), ''),
    '16 bits': (labels_set(7, np.uint16), ''),
}


def rle(**parts):
    return dict(dict(counts=[0, 100, 64 * 96 - 100], size=[64, 96]), **parts)


# Change of the first annotation; part of the error, '' without an error; whether the object
# is left out.
UNREAD = 'CocoDataset cannot read 1 entries: 000000000001.jpg: '
UNUSABLE = 'LoadAnnotations failed on {}'
ANNOTATIONS = {
    'no area': (dict(bbox=[3, 3, 0, 5]), '', True),
    'negative width': (dict(bbox=[30, 3, -9, 5]), '', True),
    'area 0': (dict(area=0), '', True),
    'outside': (dict(bbox=[300, 3, 10, 5]), '', True),
    'NaN': (dict(bbox=[3, NAN, 10, 5]), '', True),
    'unknown category': (dict(category_id=99), '', True),
    'crowd': (dict(iscrowd=1), '', True),
    'partly outside': (dict(bbox=[80, 3, 50, 50]), '', False),
    'three numbers': (dict(bbox=[3, 3, 10]), UNREAD + 'ValueError', True),
    'text for a box': (dict(bbox=['3', '3', '9', '9']), UNREAD + 'TypeError', True),
    'no box': (dict(bbox=None), UNREAD + 'TypeError', True),
    'no segmentation': (dict(segmentation=None), UNUSABLE, True),
    'empty polygon': (dict(segmentation=[[]]), '', True),
    'two points': (dict(segmentation=[[1, 1, 9, 9]]), '', True),
    'two points and more': (
        dict(segmentation=[[1, 1, 9, 9], [1, 1, 40, 1, 40, 40]]), '', False),
    'flat': (dict(segmentation=[1, 1, 9, 9, 9, 1]), UNUSABLE, True),
    'polygon of text': (dict(segmentation=[['a'] * 6]), UNUSABLE, True),
    'good RLE': (dict(segmentation=rle()), '', False),
    'RLE too long': (dict(segmentation=rle(counts=[0, 100, 64 * 96])), UNUSABLE, True),
    'undecodable RLE': (dict(segmentation=rle(counts='zzzz!!!!')), UNUSABLE, True),
}
