import json

import cv2
import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from mmeffformer.datasets import (
    CATEGORIES,
    SEG_CLASSES,
    draw,
    shapes,
    write_ade20k,
    write_coco,
    writers,
)
from mmeffformer.datasets.masks import mask_to_polygons, mask_to_rle

TRAIN, VAL = 120, 10


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp('data') / 'shapes', TRAIN, VAL, progress=False)


@pytest.fixture(scope='module')
def coco(root):
    return COCO(str(root / 'annotations/instances_train.json'))


@pytest.fixture(scope='module')
def drawn():
    """(image, annotated instances) of each training image, drawn again."""
    scenes = []
    for i in range(TRAIN):
        rng = np.random.default_rng([0, 0, i])
        rng.integers(1)  # the choice of a size
        image, instances = draw(rng, (320, 320))
        scenes.append((image, [item for item in instances if item.annotated]))
    return scenes


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob('*') if p.is_file()}


def iou(a, b):
    return np.logical_and(a, b).sum() / np.logical_or(a, b).sum()


def test_tree(root):
    names = set(files(root))
    assert {'annotations/instances_train.json', 'annotations/instances_val.json', 'shapes.json',
            'train/000000000001.jpg', f'train/{TRAIN:012d}.jpg', f'val/{VAL:012d}.jpg'} <= names
    assert len(names) == TRAIN + VAL + 3
    assert [p.name for p in root.parent.iterdir()] == [root.name]
    assert root.stat().st_mode & 0o777 == (root / 'train').stat().st_mode & 0o777


def test_same_seed_same_bytes(tmp_path):
    a, b, c = (write_coco(tmp_path / name, 5, 2, (96, 128), seed, progress=False)
               for name, seed in (('a', 3), ('b', 3), ('c', 4)))
    assert files(a) == files(b)
    assert not any(files(a)[name] == files(c)[name] for name in files(a) if name.endswith('.jpg'))
    # nor do the splits share images
    assert not {p.read_bytes() for p in (a / 'train').iterdir()} & {
        p.read_bytes() for p in (a / 'val').iterdir()}


def test_longer_sets_start_alike(tmp_path):
    sizes = [(96, 128), (128, 96)]
    short, long = (write_coco(tmp_path / str(n), n, n, sizes, progress=False) for n in (4, 9))
    for split in 'train', 'val':
        parts = [json.loads((r / f'annotations/instances_{split}.json').read_text())
                 for r in (short, long)]
        for key in 'images', 'annotations':
            assert parts[0][key] == parts[1][key][:len(parts[0][key])]
        for path in (short / split).iterdir():
            assert path.read_bytes() == (long / split / path.name).read_bytes()


def test_images_are_as_annotated(root, coco, drawn):
    for info, (image, _) in zip(coco.loadImgs(coco.getImgIds()), drawn):
        stored = cv2.imread(str(root / 'train' / info['file_name']))
        assert stored.shape == (info['height'], info['width'], 3) == image.shape
        assert np.abs(stored.astype(int) - image).mean() < 12  # JPEG


def test_annotations_equal_the_visible_masks(coco, drawn):
    count = 0
    for image_id, (_, instances) in enumerate(drawn, 1):
        anns = coco.imgToAnns[image_id]
        assert len(anns) == len(instances)
        for ann, item in zip(anns, instances):
            decoded = coco.annToMask(ann).astype(bool)
            assert ann['category_id'] == item.category + 1
            assert ann['area'] == item.mask.sum() >= shapes.MIN_AREA
            ys, xs = np.nonzero(item.mask)
            x, y, w, h = ann['bbox']
            assert (x, y, x + w, y + h) == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
            assert x >= 0 and y >= 0 and x + w <= 320 and y + h <= 320
            if ann['iscrowd']:
                assert (decoded == item.mask).all()
            else:
                assert iou(decoded, item.mask) > (.95 if ann['area'] > 100 else .8)
            count += 1
        # the visible parts share no pixel
        assert not instances or np.sum([i.mask for i in instances], 0).max() == 1
    assert count == len(coco.anns) > 2 * TRAIN


def test_ids_are_unique(root):
    for split, n in ('train', TRAIN), ('val', VAL):
        data = json.loads((root / f'annotations/instances_{split}.json').read_text())
        assert [c['name'] for c in data['categories']] == list(CATEGORIES)
        assert [c['id'] for c in data['categories']] == [1, 2, 3, 4, 5, 6]
        assert [i['id'] for i in data['images']] == list(range(1, n + 1))
        ids = [a['id'] for a in data['annotations']]
        assert ids == list(range(1, len(ids) + 1))
        assert {a['image_id'] for a in data['annotations']} <= set(range(1, n + 1))


def test_variety(coco, drawn):
    anns = list(coco.anns.values())
    single = [a for a in anns if not a['iscrowd']]
    per_category = np.bincount([a['category_id'] for a in single], minlength=7)[1:]
    assert per_category.min() > 25
    small, medium, large = np.histogram([a['area'] for a in single], [0, 32**2, 96**2, 1e9])[0]
    assert small > 30 and medium > 100 and large > 25
    assert small < len(single) / 2
    crowds = [a for a in anns if a['iscrowd']]
    assert len(crowds) >= 4
    parts = [cv2.connectedComponents(coco.annToMask(a))[0] - 1 for a in crowds]
    assert np.median(parts) > 6  # clusters of many
    assert all(isinstance(a['segmentation']['counts'], list) for a in crowds)
    assert sum(len(a['segmentation']) > 1 for a in single) > 10  # cut by what is in front
    hidden = [i for _, instances in drawn for i in instances if i.visible < .9]
    assert len(hidden) > 30 and min(i.visible for i in hidden) >= shapes.MIN_VISIBLE
    empty = TRAIN - len({a['image_id'] for a in anns})
    assert 1 <= empty < TRAIN / 8
    objects = np.bincount([a['image_id'] for a in single], minlength=TRAIN + 1)[1:]
    assert 2 < objects.mean() < 4 and objects.max() <= 5


def test_colour_is_a_hint_and_no_more(drawn):
    """Guessing the category from the hue is often right, and wrong too often to suffice."""
    right = []
    for image, instances in drawn:
        hue = cv2.cvtColor(image, cv2.COLOR_BGR2HSV_FULL)[..., 0] * (2 * np.pi / 256)
        for item in instances:
            if item.mask.any() and not item.crowd:
                angle = np.angle(np.exp(1j * hue[item.mask]).mean()) / (2 * np.pi)
                right.append(round(angle * len(CATEGORIES)) % len(CATEGORIES) == item.category)
    assert .6 < np.mean(right) < .95


def test_objects_differ_from_what_surrounds_them(drawn):
    contrast = []
    for image, instances in drawn:
        owned = np.any([i.mask for i in instances], 0) if instances else None
        for item in instances:
            around = cv2.dilate(item.mask.view(np.uint8), np.ones((9, 9))) > 0
            around &= ~owned
            if around.any() and not item.crowd:
                contrast.append(np.linalg.norm(image[item.mask].mean(0) - image[around].mean(0)))
    assert np.mean(np.array(contrast) > 50) > .95


def test_holes_and_islands():
    mask = np.zeros((40, 50), bool)
    mask[2:30, 3:40] = True
    mask[5:12, 6:14] = mask[15:25, 20:30] = False  # two holes
    mask[18:21, 23:26] = True  # an island in one of them
    mask[35, 45] = True  # a single pixel
    mask[33:38, 10] = True  # a line one pixel wide
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 4
    decoded = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, 40, 50)))
    assert (decoded == mask).all()


@pytest.mark.parametrize('rows,counts', [
    ([[0, 1], [0, 1]], [2, 2]),
    ([[1, 0], [1, 0]], [0, 2, 2]),
    ([[0, 1, 0], [1, 1, 0]], [1, 3, 2]),
    ([[1, 1], [1, 1]], [0, 4]),
    ([[0, 0], [0, 0]], [4]),
])
def test_rle(rows, counts):
    mask = np.array(rows, bool)
    rle = mask_to_rle(mask)
    assert rle == dict(counts=counts, size=list(mask.shape))
    assert (mask_api.decode(mask_api.frPyObjects(rle, *mask.shape)) == mask).all()


def test_categories_look_as_they_are_called(drawn):
    """Whole objects: share of their convex hull, and of the smallest rectangle around it."""
    expected = dict(circle=(1, .785), rectangle=(1, 1), triangle=(1, .5), ring=(.73, .785))
    seen = set()
    for _, instances in drawn:
        for item in instances:
            box = cv2.boundingRect(item.mask.view(np.uint8))
            inside = min(box[:2]) > 0 and max(box[0] + box[2], box[1] + box[3]) < 320
            if item.crowd or item.visible < 1 or item.mask.sum() < 1500 or not inside:
                continue
            hull = cv2.convexHull(np.argwhere(item.mask))
            area = cv2.contourArea(hull)
            shares = item.mask.sum() / area, area / np.prod(cv2.minAreaRect(hull)[1])
            name = CATEGORIES[item.category]
            seen.add(name)
            if name in expected:
                assert shares == pytest.approx(expected[name], abs=.08)
            else:
                assert .5 < shares[0] < .78 and shares[1] > .62
    assert seen == set(CATEGORIES)


def test_coco2017(tmp_path):
    root = write_coco(tmp_path / 'coco', 12, 3, coco2017=True, progress=False)
    assert {p.name for p in root.iterdir()} == {'annotations', 'train2017', 'val2017',
                                                'shapes.json'}
    assert (root / 'val2017/000000000003.jpg').is_file()
    coco = COCO(str(root / 'annotations/instances_train2017.json'))
    assert COCO(str(root / 'annotations/instances_val2017.json')).getImgIds() == [1, 2, 3]
    ids = coco.getCatIds()
    assert len(ids) == len(set(ids)) == 80 and (min(ids), max(ids)) == (1, 90)
    assert 12 not in ids and 83 not in ids
    names = {c['id']: c['name'] for c in coco.loadCats(ids)}
    # spot checks against COCO's own file
    assert [names[i] for i in (1, 13, 27, 44, 67, 73, 90)] == [
        'person', 'stop sign', 'backpack', 'bottle', 'dining table', 'laptop', 'toothbrush']
    assert coco.getCatIds(catNms=['dog', 'tv', 'clock']) == [18, 72, 85]
    assert len(set(shapes.COCO_LOOKS)) == 80
    sizes = {(i['height'], i['width']) for i in coco.dataset['images']}
    assert len(sizes) > 2 and sizes <= set(writers.COCO_SIZES)
    for ann in coco.anns.values():
        info, mask = coco.imgs[ann['image_id']], coco.annToMask(ann)
        x, y, w, h = ann['bbox']
        assert x + w <= info['width'] and y + h <= info['height']
        assert mask.shape == (info['height'], info['width'])
        assert ann['area'] < 100 or .95 < mask.sum() / ann['area'] < 1.05


def test_ade20k(tmp_path):
    root = write_ade20k(tmp_path / 'ade', 30, 2, progress=False)
    assert len(list((root / 'images/training').iterdir())) == 30
    assert (root / 'images/validation/ADE_val_00000002.jpg').is_file()
    seen = np.zeros(256, int)
    for path in sorted((root / 'images/training').iterdir()):
        label = cv2.imread(str(root / 'annotations/training' / f'{path.stem}.png'), -1)
        assert label.dtype == np.uint8 and label.shape == cv2.imread(str(path)).shape[:2]
        seen += np.bincount(label.ravel(), minlength=256)
    assert len(SEG_CLASSES) == 7 and seen[8:].sum() == 0
    assert seen[1:8].min() > 1000 and seen[1] == seen.max()
    assert seen[0] < .02 * seen.sum()
    # the very masks and images that the COCO layout holds
    twin = write_coco(tmp_path / 'coco', 2, 0, progress=False)
    coco = COCO(str(twin / 'annotations/instances_train.json'))
    for i in 1, 2:
        name = f'ADE_train_{i:08d}'
        assert ((root / f'images/training/{name}.jpg').read_bytes() ==
                (twin / f'train/{i:012d}.jpg').read_bytes())
        label = cv2.imread(str(root / f'annotations/training/{name}.png'), -1)
        for category in coco.getCatIds():
            area = sum(a['area'] for a in coco.imgToAnns[i] if a['category_id'] == category)
            assert (label == category + 1).sum() == area


def test_hidden_objects_are_unlabelled(tmp_path, monkeypatch):
    def scene(rng, size, looks):
        masks = np.zeros((2, *size), bool)
        masks[0, :20], masks[1, 40:60] = True, True
        return np.zeros((*size, 3), np.uint8), [shapes.Instance(0, masks[0], False, .1),
                                                shapes.Instance(2, masks[1], False, .9)]

    monkeypatch.setattr(writers, 'draw', scene)
    root = write_ade20k(tmp_path / 'ade', 1, 0, (64, 64), progress=False)
    label = cv2.imread(str(root / 'annotations/training/ADE_train_00000001.png'), -1)
    assert [label[y, 5] for y in (0, 30, 50)] == [0, 1, 4]
    root = write_coco(tmp_path / 'coco', 1, 0, (64, 64), progress=False)
    data = json.loads((root / 'annotations/instances_train.json').read_text())
    assert [a['bbox'] for a in data['annotations']] == [[0., 40., 64., 20.]]


def test_finished_set_is_kept(tmp_path, monkeypatch):
    root = write_coco(tmp_path / 'set', 2, 1, (64, 64), progress=False)
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    monkeypatch.setattr(writers, 'draw', None)  # drawing again would fail
    assert write_coco(tmp_path / 'set', 2, 1, [(64, 64)], progress=False) == root
    assert {p: p.stat().st_mtime_ns for p in root.rglob('*')} == before
    for other in dict(train=3), dict(seed=1), dict(size=(64, 96)), dict(coco2017=True):
        with pytest.raises(ValueError, match='already holds a set made with'):
            write_coco(root, **{**dict(train=2, val=1, size=(64, 64)), **other}, progress=False)
    with pytest.raises(ValueError, match='already holds a set made with'):
        write_ade20k(root, 2, 1, (64, 64), progress=False)


def test_foreign_folder_is_left_alone(tmp_path):
    root = tmp_path / 'mine'
    root.mkdir()
    (root / 'thesis.txt').write_text('precious')
    with pytest.raises(ValueError, match='already holds something else'):
        write_coco(root, 1, 1, progress=False)
    assert files(tmp_path) == {'mine/thesis.txt': b'precious'}
    (root / 'shapes.json').write_text('not json')
    with pytest.raises(ValueError, match='already holds something else'):
        write_ade20k(root, 1, 1, progress=False)
    with pytest.raises(ValueError, match='already holds something else'):
        write_coco(root / 'thesis.txt', 1, 1, progress=False)
    assert set(files(tmp_path)) == {'mine/thesis.txt', 'mine/shapes.json'}


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert len(files(write_coco(tmp_path / 'empty', 1, 1, (64, 64), progress=False))) == 5


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    encode, calls = writers._encode, []

    def fail_at_fourth(path, *args):
        calls.append(path)
        if len(calls) == 4:
            assert not (tmp_path / 'set').exists()
            assert path.parent.name == 'val' and path.is_relative_to(tmp_path)
            raise error
        encode(path, *args)

    monkeypatch.setattr(writers, '_encode', fail_at_fourth)
    with pytest.raises(error):
        write_coco(tmp_path / 'set', 3, 3, (64, 64), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_loser_of_a_race_takes_the_winners_set(tmp_path, monkeypatch):
    rename = writers.os.rename

    def late(source, target):
        monkeypatch.setattr(writers.os, 'rename', rename)
        write_coco(tmp_path / 'set', 1, 1, (64, 64), seed, progress=False)
        rename(source, target)

    seed = 0
    monkeypatch.setattr(writers.os, 'rename', late)
    root = write_coco(tmp_path / 'set', 1, 1, (64, 64), progress=False)
    assert len(files(root)) == 5 and list(tmp_path.iterdir()) == [root]


@pytest.mark.parametrize('options', [
    dict(train=-1), dict(size=(16, 320)), dict(size=[]), dict(size=[(64, 64, 3)]), dict(seed=-1)])
def test_bad_numbers(tmp_path, options):
    with pytest.raises(ValueError):
        write_coco(tmp_path / 'set', **{**dict(train=1, val=0), **options}, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('size', [(32, 32), (33, 400), (700, 40)])
def test_odd_sizes(size):
    for i in range(40):
        image, instances = draw(np.random.default_rng(i), size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert all(item.mask.shape == size for item in instances)
