"""Objects of VOC XML, YOLO and LabelMe files, read by the package ``supervision``."""
import tempfile
import warnings
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import yaml

from ..masks import mask_to_polygons
from .cleaning import Picture, with_size
from .files import Log, Options, list_files, names

SUFFIXES = {'voc': '.xml', 'yolo': '.txt', 'labelme': '.json'}


def import_supervision() -> Any:
    """Return the package ``supervision``.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import supervision
    except ImportError as error:
        raise ValueError('VOC, YOLO and LabelMe files are read by the package supervision, which '
                         f'cannot be imported ({error}): pip install supervision') from error
    return supervision


def read_objects(kind: str, image: Path, annotation: Path, classes: Sequence[str],
                 masks: bool) -> List[dict]:
    """Return an image's objects as COCO annotations, with the class's name as ``category_id``.

    Args:
        kind: 'voc', 'yolo' or 'labelme'.
        image, annotation: Files.
        classes: Names in the order of YOLO's ids.
        masks: Read a box without outline as a rectangle of pixels.

    Raises:
        ValueError: The annotation file is broken.
    """
    data = import_supervision().DetectionDataset
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # One image at a time, as the masks of a whole data set may not fit into memory.
        (Path(folder) / f'image{image.suffix.lower()}').symlink_to(image.resolve())
        (Path(folder) / f'image{annotation.suffix.lower()}').symlink_to(annotation.resolve())
        try:
            if kind == 'voc':
                found = data.from_pascal_voc(folder, folder, force_masks=masks)
            elif kind == 'labelme':
                found = data.from_labelme(folder, folder, force_masks=masks)
            else:
                table = Path(folder) / 'data.yaml'
                table.write_text(yaml.safe_dump(dict(names=list(classes))))
                found = data.from_yolo(folder, folder, str(table), force_masks=masks)
        except Exception as error:  # of the XML and JSON parsers, of numpy and of supervision
            raise ValueError(f'{annotation}: {error}') from error
    detections, = found.annotations.values()
    objects = []
    for i, (x1, y1, x2, y2) in enumerate(detections.xyxy.tolist()):
        mask = None if detections.mask is None else np.asarray(detections.mask[i], bool)
        box = [x1, y1, x2 - x1, y2 - y1]
        outline: List[List[float]] = []
        if mask is not None and mask.any():
            outline = mask_to_polygons(np.ascontiguousarray(mask))
        elif masks:
            outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        area = float(mask.sum()) if mask is not None and mask.any() else box[2] * box[3]
        objects.append(dict(category_id=found.classes[detections.class_id[i]], bbox=box,
                            area=area, iscrowd=0, segmentation=outline))
    return objects


def read_all(kind: str, pairs: Dict[Path, Path], classes: Sequence[str], masks: bool,
             log: Log) -> List[Picture]:
    """Return the objects of (image, annotation file) pairs.

    Raises:
        ValueError: Some files are broken; the message names them.
    """
    pictures, broken = [], []
    categories: Dict[str, str] = {}  # an object's class is its category_id
    for image, file in pairs.items():
        try:
            items = read_objects(kind, image, file, classes, masks)
            entry = with_size(dict(id=len(pictures) + 1, file_name=str(image)), image)
        except (ValueError, OSError) as error:
            broken.append(str(error))
            continue
        pictures.append(Picture(image, entry, items, categories))
    if broken:
        raise ValueError('files cannot be read; correct or remove them:\n  '
                         + '\n  '.join(broken[:10])
                         + (f'\n  and {len(broken) - 10:,} more' if len(broken) > 10 else ''))
    found = {item['category_id'] for picture in pictures for item in picture.annotations}
    categories.update({name: name for name in classes or sorted(found)})
    log.notes.append(f'read {len(pictures):,} {kind} files')
    return pictures


def yolo_tables(root: Path) -> Dict[Path, dict]:
    """Return the contents of the YAML files below ``root`` that have ``names``."""
    found = {}
    for path in list_files(root, ('.yaml', '.yml')):
        try:
            table = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            continue
        if isinstance(table, dict) and table.get('names'):
            found[path] = table
    return found


def yolo_classes(root: Path, options: Options) -> List[str]:
    """Return the class names of ``--classes``, data.yaml, classes.txt or obj.names.

    Raises:
        ValueError: There are no names, or files with different names.
    """
    if options.classes:
        return list(options.classes)
    found: Dict[str, List[str]] = {}
    for path, table in yolo_tables(root).items():
        words = table['names']
        if isinstance(words, dict):
            words = [words[key] for key in sorted(words, key=int)]
        found[str(path)] = [str(word) for word in words]
    for path in list_files(root, ('.txt', '.names')):
        if path.name.lower() == 'classes.txt' or path.suffix == '.names':
            found[str(path)] = [line.strip() for line in path.read_text().splitlines()
                                if line.strip()]
    if len({tuple(words) for words in found.values()}) != 1:
        raise ValueError('the names of the classes of YOLO files are in '
                         + (f'different files: {names(found)}' if found else 'no file: expected '
                            'data.yaml with names, or classes.txt')
                         + '; name the classes, in the order of their ids, with --classes')
    return next(iter(found.values()))


def yolo_split(image: Path, root: Path, tables: Dict[Path, dict]) -> Optional[str]:
    """Return the split whose folder in a data.yaml contains an image."""
    for path, table in tables.items():
        for split in ('train', 'val', 'test'):
            for value in np.atleast_1d(table.get(split) or []):
                # Roboflow's paths start with ../, although the folders are next to the file.
                for folder in (path.parent / str(table.get('path', '')) / value,
                               path.parent / str(value).removeprefix('../'), root / value):
                    if folder.resolve() in image.resolve().parents:
                        return split
    return None
