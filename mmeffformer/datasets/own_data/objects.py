"""Detection data of any layout as COCO annotations: finding, cleaning, splitting, writing."""
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from ...utils.files import atomic_write
from .cleaning import Picture, clean, find_rules, with_size
from .converters import (
    SUFFIXES,
    import_supervision,
    read_all,
    yolo_classes,
    yolo_split,
    yolo_tables,
)
from .files import (
    SPLITS,
    Log,
    Options,
    complete_splits,
    list_files,
    list_images,
    match_files,
    names,
    read_lists,
    split_by_options,
    split_of,
    splits_of_pairs,
)

FORMATS = ('coco', *SUFFIXES)


class Objects(NamedTuple):
    """Detection data for mmdet's ``CocoDataset``.

    By split: COCO's dict, the annotation file, and the folder of the images.
    """

    classes: List[str]
    masks: bool
    content: Dict[str, dict]
    ann_files: Dict[str, Path]
    folders: Dict[str, Path]


def read_detection(root: Path, out_dir: Path, options: Options, log: Log) -> Objects:
    """Find the annotated objects below ``root``.

    A split whose annotation file can be used as it is keeps it. Otherwise ``out_dir`` gets a
    cleaned or converted one, SPLIT.json, with file names relative to ``root``.

    Raises:
        FileNotFoundError: There are no images or annotations.
        ValueError: Files are broken, or the layout is ambiguous: the message names the option
            that decides.
    """
    images = list_images(root, options)
    coco = _find_coco(root, options)
    pairs = {kind: _find_pairs(kind, images, root, options) for kind in SUFFIXES}
    kinds = [*(['coco'] if coco else []), *(kind for kind in pairs if pairs[kind])]
    if not kinds or options.format not in (None, *kinds):
        raise FileNotFoundError(
            f'{root} has no {options.format or "annotations"}: expected COCO JSON, or VOC XML, '
            'YOLO text or LabelMe JSON files with the names of the images; --annotations names '
            'other folders')
    if len(kinds) > 1 and not options.format:
        raise ValueError(f'{root} has annotations in several formats; choose one with --format '
                         f'{{{",".join(kinds)}}}')
    kind = options.format or kinds[0]
    splits: Dict[Path, Optional[str]]
    if kind == 'coco':
        pictures, splits = [], {}
        for path, data in coco.items():
            split = _split_of_file(path, root, options)
            found = list(_pictures(path, data, split, images, root, options, log))
            pictures += found
            splits.update({picture.path: split for picture in found})
        if not any(splits.values()):
            lists = read_lists(root, images, 'det')
            splits = {path: lists.get(path) for path in splits}
    else:
        import_supervision()
        classes = yolo_classes(root, options) if kind == 'yolo' else []
        pictures = read_all(kind, pairs[kind], classes, options.target == 'masks', log)
        tables = yolo_tables(root)
        splits = splits_of_pairs(pairs[kind], root, options, 'det',
                                 lambda image: yolo_split(image, root, tables))
        if len(pictures) < len(images):
            log.notes.append(f'{len(images) - len(pictures):,} images without a file of '
                             'annotations are left out')
    final = complete_splits(splits, options, log)
    pictures = [picture for picture in pictures if picture.path in final]
    return _write(pictures, final, coco if kind == 'coco' else {}, root, out_dir,
                  options.target, log)


def _find_coco(root: Path, options: Options) -> Dict[Path, dict]:
    """Return the content of the files with images, annotations and categories."""
    found = {}
    labelme = set()  # folders of a LabelMe file; thousands more may be next to it
    for path in list_files(root, ('.json',), options.annotations):
        if path.parent in labelme:
            continue
        try:
            data = json.loads(path.read_text(encoding='utf-8'))
        except ValueError as error:
            raise ValueError(f'{path} is broken JSON: {error}') from error
        if isinstance(data, dict) and 'shapes' in data:
            labelme.add(path.parent)
        elif isinstance(data, dict) and data.get('annotations') and all(
                isinstance(data.get(key), list)
                for key in ('images', 'annotations', 'categories')):
            found[path] = data
    by_split = defaultdict(list)
    for path in found:
        by_split[_split_of_file(path, root, options)].append(path)
    for split, paths in by_split.items():
        if len(paths) > 1:
            raise ValueError(f'several COCO files are of {split or "an unknown"} split: '
                             f'{names(paths)}; choose with --annotations TRAIN VAL')
    return found


def _split_of_file(path: Path, root: Path, options: Options) -> Optional[str]:
    return split_by_options(path, options.annotations) or split_of(path.relative_to(root))


def _pictures(source: Path, data: dict, split: Optional[str], images: Sequence[Path], root: Path,
              options: Options, log: Log) -> Iterator[Picture]:
    """Yield the images of a COCO file that exist.

    Raises:
        FileNotFoundError: No image exists.
        ValueError: Entries are broken, or several files fit an image's name.
    """
    by_name = defaultdict(list)
    for path in images:
        by_name[path.name].append(path)
    by_image = defaultdict(list)
    for item in data['annotations']:
        by_image[item.get('image_id')].append(item)
    categories = {item.get('id'): str(item.get('name')).strip() for item in data['categories']}
    missing, ids = [], set()
    for entry in data['images']:
        if 'file_name' not in entry or 'id' not in entry:
            raise ValueError(f'{source}: an image has no id or no file_name: {entry}')
        path = _find_image(entry['file_name'], source, split, by_name, root, options)
        if path is None:
            missing.append(entry['file_name'])
        elif entry['id'] in ids:
            raise ValueError(f'{source}: the image id {entry["id"]!r} occurs twice, so the '
                             'objects of its images cannot be distinguished')
        else:
            ids.add(entry['id'])
            yield Picture(path, with_size(entry, path), by_image.get(entry['id'], []), categories)
    if not ids:
        raise FileNotFoundError(f'no image of {source} is below {root}, for example '
                                f'{names(missing)}; name their folder with --images')
    if missing:
        log.warnings.append(f'missing images of {source}, left out: {names(missing)}')


def _find_image(name: str, source: Path, split: Optional[str], by_name: Dict[str, List[Path]],
                root: Path, options: Options) -> Optional[Path]:
    """Return the file that shares most of the path ``name``, then split and folder."""
    wanted = Path(name.replace('\\', '/'))
    candidates = by_name.get(wanted.name, [])
    if len(candidates) < 2:
        return candidates[0] if candidates else None

    def likeness(path: Path) -> Tuple[int, bool, bool]:
        shared = os.path.commonprefix([path.parts[::-1], wanted.parts[::-1]])
        own = split_by_options(path, options.images) or split_of(path.parent.relative_to(root))
        return len(shared), own == split, path.parent == source.parent

    best = max(map(likeness, candidates))
    found = [path for path in candidates if likeness(path) == best]
    if len(found) > 1:
        raise ValueError(f'{name} of {source} may be any of {names(found)}; name the folder with '
                         '--images')
    return found[0]


def _find_pairs(kind: str, images: Sequence[Path], root: Path, options: Options,
                ) -> Dict[Path, Path]:
    """Return the annotation file of each image that has one.

    Raises:
        ValueError: An image has several.
    """
    files = list_files(root, (SUFFIXES[kind],), options.annotations)
    if kind == 'labelme':
        files = [path for path in files if '"shapes"' in path.read_text(errors='replace')]
    pairs = {}
    for image, matches in sorted(match_files(images, files, root).items()):
        found = [path for _, path in matches if path.stem == image.stem]
        if len(found) > 1:
            raise ValueError(f'{image} has several annotation files, {names(found)}; choose a '
                             'folder with --annotations')
        if found:
            pairs[image] = found[0]
    return pairs


def _write(pictures: Sequence[Picture], splits: Dict[Path, str], coco: Dict[Path, dict],
           root: Path, out_dir: Path, target: Optional[str], log: Log) -> Objects:
    """Clean the annotations, and write those that no file of the user has."""
    rules = find_rules(pictures, target, log)
    found = Objects(rules.classes, rules.masks, {}, {}, {})
    for split in (split for split in SPLITS if split in splits.values()):
        own = [picture for picture in pictures if splits[picture.path] == split]
        data = clean(own, rules, log)
        folders = {_folder(picture) for picture in own}
        folder = folders.pop() if len(folders) == 1 else None
        same = [path for path, given in coco.items() if _same(data, given)]
        found.content[split] = data
        if folder and same:
            found.ann_files[split], found.folders[split] = same[0], folder
            continue
        for entry, picture in zip(data['images'], own):
            entry['file_name'] = picture.path.relative_to(root).as_posix()
        found.ann_files[split], found.folders[split] = out_dir / f'{split}.json', root
        with atomic_write(found.ann_files[split]) as tmp_path:
            tmp_path.write_text(json.dumps(data))
    return found


def _folder(picture: Picture) -> Optional[Path]:
    """Return the folder to which an image's ``file_name`` is relative, if there is one."""
    name = Path(picture.entry['file_name'])
    if name.is_absolute() or picture.path.parts[-len(name.parts):] != name.parts:
        return None
    return picture.path.parents[len(name.parts) - 1]


def _same(data: Dict[str, Any], given: Dict[str, Any]) -> bool:
    """Return whether cleaning changed nothing that matters; categories may have more keys."""
    return (data['images'] == given['images'] and data['annotations'] == given['annotations']
            and data['categories'] == [dict(id=item.get('id'), name=item.get('name'))
                                       for item in given['categories']])
