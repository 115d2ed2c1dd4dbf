"""Segmentation data of any layout for mmseg's ``BaseSegDataset``."""
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from .classes import Labels, find_labels
from .files import (
    SPLITS,
    Log,
    Options,
    common_suffix,
    complete_splits,
    list_files,
    match_files,
    names,
    splits_of_pairs,
)

# Label maps that are not for semantic segmentation, where there are others.
_OTHERS = re.compile(r'instance|object|colou?r|panoptic|overlay|polygon', re.IGNORECASE)
MAX_LABELS = 64  # different values in what is taken for a label map


class LabelMaps(NamedTuple):
    """Segmentation data; the folders and the list of names are by split.

    A list is None if the split has all images of its folder.
    """

    labels: Labels
    img_suffix: str
    seg_map_suffix: str
    folders: Dict[str, Tuple[Path, Path]]
    lists: Dict[str, Optional[Path]]
    images: Dict[str, List[Path]]


def read_segmentation(root: Path, out_dir: Path, options: Options, log: Log) -> LabelMaps:
    """Find the images and label maps below ``root``.

    ``out_dir`` gets lists of names where folders do not separate the splits, and label maps
    with indices where the labels are colours or are not numbered from 0.

    Raises:
        FileNotFoundError: There are no images or label maps.
        ValueError: The layout or the labels are ambiguous; the message names the option that
            decides.
    """
    images, maps = _images_and_maps(root, options)
    matches = match_files(images, maps, root)
    pairs = {image: _choose(image, matches[image], root, options) for image in sorted(matches)}
    if not pairs:
        raise FileNotFoundError(
            f'{root} has {len(images):,} images and {len(maps):,} label maps, but none with the '
            'same names; name their folders with --images and --annotations')
    if len(pairs) < len(images):
        log.notes.append(f'{len(images) - len(pairs):,} images without a label map are left out')
    splits = complete_splits(splits_of_pairs(pairs, root, options, 'seg'), options, log)
    pairs = {image: file for image, file in pairs.items() if image in splits}
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(count_values, pairs.values()))
    labels = find_labels(root, found, _palette(next(iter(pairs.values()))), options, log)
    images_of = {split: [image for image in pairs if splits[image] == split]
                 for split in SPLITS if split in splits.values()}
    regular = None if labels.table else _regular(pairs, images_of)
    if regular:
        return _with_lists(regular, labels, images_of, out_dir)
    return _converted(pairs, images_of, labels, root, out_dir, log)


def _images_and_maps(root: Path, options: Options) -> Tuple[List[Path], List[Path]]:
    """Return the photographs and the label maps, by the options or by their content."""
    images = list_files(root, IMG_EXTENSIONS, options.images) if options.images else []
    maps = list_files(root, IMG_EXTENSIONS, options.annotations) if options.annotations else []
    if not (images and maps):
        groups = defaultdict(list)
        for path in list_files(root, IMG_EXTENSIONS):
            tail = re.search(r'[_-][A-Za-z]+$', path.stem)
            groups[path.parent, path.suffix, tail and tail[0]].append(path)
        seen: Dict[bool, List[Path]] = {True: [], False: []}
        for group in groups.values():
            votes = [looks_like_labels(path) for path in group[::max(1, len(group) // 3)][:3]]
            seen[sum(votes) * 2 > len(votes)] += group
        images = images or sorted({*seen[False]} - {*maps})
        maps = maps or sorted({*seen[True]} - {*images})
    for kind, files, option in (('images', images, '--images'),
                                ('label maps', maps, '--annotations')):
        if not files:
            raise FileNotFoundError(f'{root} has no {kind}; name their folder with {option}')
    return images, maps


def looks_like_labels(path: Path) -> bool:
    """Return whether an image has a palette, or few different values, and is lossless."""
    if path.suffix.lower() in ('.jpg', '.jpeg'):
        return False
    with Image.open(path) as image:
        return image.mode in ('P', '1') or len(count_values(path)[1]) <= MAX_LABELS


def read_map(path: Path) -> np.ndarray:
    """Return a label map, int (h, w): values, or 0xRRGGBB of colours."""
    with Image.open(path) as image:
        if image.mode in ('RGBA', 'LA'):
            image = image.convert(image.mode[:-1])
        values = np.asarray(image).astype(np.int64)
    return values if values.ndim == 2 else values @ (1 << 16, 1 << 8, 1)


def count_values(path: Path) -> Tuple[str, Counter]:
    """Return how a file stores labels, 'values', 'grey' or 'colours', and the pixels of each.

    'grey' are values in three equal channels.
    """
    values = read_map(path)
    found, counts = np.unique(values, return_counts=True)
    with Image.open(path) as image:
        kind = 'values' if image.mode not in ('RGB', 'RGBA') else 'colours'
    if kind == 'colours' and not (found % 0x010101).any():
        kind, found = 'grey', found // 0x010101
    return kind, Counter(dict(zip(found.tolist(), counts.tolist())))


def _palette(path: Path) -> Optional[List[Tuple[int, ...]]]:
    with Image.open(path) as image:
        flat = image.getpalette() if image.mode == 'P' else None
    return flat and [tuple(flat[i:i + 3]) for i in range(0, len(flat), 3)]


def _choose(image: Path, found: Sequence[Tuple[str, Path]], root: Path, options: Options) -> Path:
    """Return the one label map of an image.

    Raises:
        ValueError: There are several.
    """
    rules: List[Callable[[str, Path], bool]] = [
        lambda tail, path: tail.endswith(options.label_suffix or ''),
        lambda tail, path: not _OTHERS.search(str(path.parent.relative_to(root)) + tail),
        lambda tail, path: tail.endswith('labelTrainIds.png')]
    for rule in rules:
        left = [(tail, path) for tail, path in found if rule(tail, path)]
        if left and len(left) < len(found):
            found = left
    if len(found) > 1:
        raise ValueError(f'{image} has several label maps, {names(path for _, path in found)}; '
                         'choose with --annotations FOLDER or --label-suffix')
    return found[0][1]


class _Regular(NamedTuple):
    img_suffix: str
    seg_map_suffix: str
    folders: Dict[str, Tuple[Path, Path]]


def _regular(pairs: Dict[Path, Path], images_of: Dict[str, List[Path]]) -> Optional[_Regular]:
    """Return suffixes and folders that give all pairs, as mmseg joins them, or None."""
    shared = common_suffix([image.stem for image in pairs])
    suffixes = {(shared + image.suffix, file.name[len(image.stem) - len(shared):])
                for image, file in pairs.items()}
    if len(suffixes) > 1:
        return None
    (img_suffix, map_suffix), folders = suffixes.pop(), {}
    for split, images in images_of.items():
        top, map_top = (Path(os.path.commonpath([path.parent for path in paths]))
                        for paths in (images, [pairs[image] for image in images]))
        for image in images:
            name = str(image.relative_to(top)).removesuffix(img_suffix)
            if pairs[image] != map_top / (name + map_suffix):
                return None
        folders[split] = top, map_top
    return _Regular(img_suffix, map_suffix, folders)


def _with_lists(regular: _Regular, labels: Labels, images_of: Dict[str, List[Path]],
                out_dir: Path) -> LabelMaps:
    """Return the data as they are, and write lists of the names that are a part of a folder."""
    lists: Dict[str, Optional[Path]] = {}
    for split, images in images_of.items():
        top = regular.folders[split][0]
        everything = set(top.rglob(f'*{regular.img_suffix}'))
        lists[split] = None if everything == {*images} else _write_list(
            out_dir / f'{split}.txt', (str(image.relative_to(top)).removesuffix(regular.img_suffix)
                                       for image in images))
    return LabelMaps(labels, *regular, lists, images_of)


def _write_list(path: Path, lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n')
    return path


def _converted(pairs: Dict[Path, Path], images_of: Dict[str, List[Path]], labels: Labels,
               root: Path, out_dir: Path, log: Log) -> LabelMaps:
    """Write label maps with indices, 255 for void, named like the images with .png added."""
    folder = out_dir / 'label_maps'

    def convert(image: Path) -> None:
        kind, _ = count_values(pairs[image])
        values = read_map(pairs[image]) // (0x010101 if kind == 'grey' else 1)
        found, inverse = np.unique(values, return_inverse=True)
        mapped = np.array([labels.index(value) for value in found.tolist()], np.uint8)
        target = folder / f'{image.relative_to(root)}.png'
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mapped[inverse.reshape(values.shape)]).save(target)

    with ThreadPoolExecutor() as pool:
        list(pool.map(convert, pairs))
    log.notes.append(f'wrote {len(pairs):,} label maps of indices to {folder}')
    lists: Dict[str, Optional[Path]] = {
        split: _write_list(out_dir / f'{split}.txt', (str(path.relative_to(root))
                                                      for path in images))
        for split, images in images_of.items()}
    return LabelMaps(labels._replace(void=255, reduce_zero_label=False), '', '.png',
                     dict.fromkeys(images_of, (root, folder)), lists, images_of)
