"""Objects of data sets of any layout, compared with what was drawn."""
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support import own_data

from mmeffformer.datasets.own_data.files import Log, Options, photographs
from mmeffformer.datasets.own_data.objects import read_detection

PHOTOS = own_data.photos(10)


def read(root: Path, **options):
    log = Log([], [])
    before = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    found = read_detection(root, root.parent / 'written', Options(**options), log)
    assert before == {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    return found, log


def flat_coco(root):
    own_data.save_images(root, PHOTOS)
    own_data.write_coco(root / 'result.json', PHOTOS)


def coco_of_other_folders(root):
    for part, photos in (('learn', PHOTOS[:7]), ('check', PHOTOS[7:])):
        own_data.save_images(root / 'pictures' / part, photos)
    own_data.write_coco(root / 'a train.json', PHOTOS[:7], prefix='C:\\data\\learn\\')
    own_data.write_coco(root / 'a val.json', PHOTOS[7:])


def roboflow(root):
    for part, photos in (('train', PHOTOS[:6]), ('valid', PHOTOS[6:8]), ('test', PHOTOS[8:])):
        own_data.save_images(root / part, photos)
        data = own_data.coco(photos)
        data['categories'].insert(0, dict(id=0, name='hardware', supercategory='none'))
        for item in data['images'] + data['annotations']:
            item['id'] -= 1
        for item in data['annotations']:
            item['image_id'] -= 1
        (root / part / '_annotations.coco.json').write_text(json.dumps(data))


def voc(root):
    own_data.save_images(root / 'JPEGImages', PHOTOS)
    own_data.write_voc(root / 'Annotations', PHOTOS)
    lists = root / 'ImageSets/Main'
    lists.mkdir(parents=True)
    (lists / 'train.txt').write_text('\n'.join(photo.stem for photo in PHOTOS[:7]))
    (lists / 'val.txt').write_text('\n'.join(photo.stem for photo in PHOTOS[7:]))


def yolo(root, polygons=False):
    for part, photos in (('learn', PHOTOS[:7]), ('check', PHOTOS[7:])):
        own_data.save_images(root / 'images' / part, photos, '.PNG')
        own_data.write_yolo(root / 'labels' / part, photos, polygons)
    (root / 'data.yaml').write_text(
        'train: ../images/learn\nval: ../images/check\nnames: {0: nut, 1: bolt}\n')


def yolo_polygons(root):
    yolo(root, True)


def labelme(root):
    own_data.save_images(root, PHOTOS)
    own_data.write_labelme(root, PHOTOS)


# Layout: the numbers of training, validation and test images, whether there are masks.
LAYOUTS = {flat_coco: ([8, 2], True), coco_of_other_folders: ([7, 3], True),
           roboflow: ([6, 2, 2], True), voc: ([7, 3], False), yolo: ([7, 3], False),
           yolo_polygons: ([7, 3], True), labelme: ([8, 2], True)}


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.__name__)
def test_all_layouts_give_the_drawn_objects(layout, tmp_path):
    counts, masks = LAYOUTS[layout]
    layout(tmp_path / 'data')
    found, _ = read(tmp_path / 'data')
    assert (sorted(found.classes), found.masks) == (['bolt', 'nut'], masks)
    assert [len(found.content[split]['images']) for split in found.content] == counts
    photos = {photo.stem: photo for photo in PHOTOS}
    seen = []
    for split in found.content:
        coco = COCO(found.ann_files[split])
        for image in coco.loadImgs(coco.getImgIds()):
            path = found.folders[split] / image['file_name']
            assert path.is_file() and (image['width'], image['height']) == (96, 64)
            photo = photos[path.stem]
            seen.append(path.stem)
            items = coco.loadAnns(coco.getAnnIds(image['id']))
            assert len(items) == len(photo.objects)
            for item, drawn in zip(items, photo.objects):
                assert coco.cats[item['category_id']]['name'] == drawn.name
                np.testing.assert_allclose(item['bbox'], drawn.box, atol=1e-3)
                if masks:
                    expected = own_data.Photo('', photo.pixels, [drawn]).labels() > 0
                    mask = coco.annToMask(item) > 0
                    assert (mask & expected).sum() / (mask | expected).sum() > .65
        ids = [item['id'] for item in coco.dataset['annotations']]
        assert len({*ids}) == len(ids) and min(ids) > 0
    assert sorted(seen) == sorted(photos)


def test_sound_files_are_used_as_they_are(tmp_path):
    for part, photos in (('train', PHOTOS[:7]), ('val', PHOTOS[7:])):
        own_data.save_images(tmp_path / 'data' / part, photos)
        own_data.write_coco(tmp_path / f'data/{part}.json', photos)
    found, log = read(tmp_path / 'data')
    assert found.ann_files == {part: tmp_path / f'data/{part}.json' for part in ('train', 'val')}
    assert found.folders == {part: tmp_path / 'data' / part for part in ('train', 'val')}
    assert not (tmp_path / 'written').exists() and log == ([], [])


def perfect_ap(path: Path) -> float:
    """Return COCO's AP of the ground truth as predictions."""
    truth = COCO(path)
    found = truth.loadRes([dict(item, score=1.) for item in truth.dataset['annotations']])
    evaluation = COCOeval(truth, found, 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_faults_are_cleaned(tmp_path):
    root = tmp_path / 'data'
    own_data.save_images(root, PHOTOS)
    data = own_data.coco(PHOTOS)
    data['categories'] = [dict(id=0, name='hardware'), *data['categories'],
                          dict(id=7, name='nut')]
    for number, item in enumerate(data['annotations']):
        item['id'] = number
    annotations = data['annotations']
    (root / 'a.json').write_text(json.dumps(data))
    assert perfect_ap(root / 'a.json') < 1  # as id 0 counts as no match

    annotations[0]['category_id'] = 7
    annotations[3]['bbox'][2] = .5
    annotations[4]['bbox'][0] = 500
    annotations[5]['bbox'][1] = float('nan')
    annotations[6]['category_id'] = 99
    del annotations[7]['iscrowd'], annotations[8]['area'], annotations[9]['bbox']
    (root / 'a.json').write_text(json.dumps(data))
    found, log = read(root)
    assert [item['name'] for item in found.content['train']['categories']] == ['nut', 'bolt']
    items = [item for split in found.content.values() for item in split['annotations']]
    assert len(items) == 26 and {item['category_id'] for item in items} == {1, 2}
    by_box = {tuple(item['bbox']): item for item in items}
    objects = [item for photo in PHOTOS for item in photo.objects]
    assert by_box[tuple(objects[7].box)]['iscrowd'] == 0
    assert by_box[tuple(objects[8].box)]['area'] == pytest.approx(
        objects[8].box[2] * objects[8].box[3] / 2, rel=.2)  # a triangle
    assert tuple(objects[9].box) in by_box
    assert perfect_ap(found.ann_files['train']) == perfect_ap(found.ann_files['val']) == 1
    text = '\n'.join(log.notes + log.warnings)
    for part in ('classes without objects, left out: 1 (hardware)',
                 'classes with several ids, merged: 1 (nut)', '1 (box below 1 px)',
                 '1 (box outside the image)', '1 (box with NaN or infinity)',
                 '1 (unknown class)'):
        assert part in text


def test_the_split_follows_the_seed(tmp_path):
    flat_coco(tmp_path / 'data')

    def validation(**options):
        found, log = read(tmp_path / 'data', **options)
        names = [[image['file_name'] for image in found.content[split]['images']]
                 for split in ('train', 'val')]
        assert not {*names[0]} & {*names[1]} and len(names[0] + names[1]) == 10
        assert f'--seed {options.get("seed", 0)}' in log.notes[0]
        return names[1]

    assert validation() == validation()
    assert len({tuple(validation(seed=seed)) for seed in range(4)}) > 1
    assert len(validation(val_share=.4)) == 4


def test_crops_of_a_photograph_stay_together(tmp_path):
    crops = [photo._replace(stem=f'p{i % 5}_{i // 5 * 512}_0')
             for i, photo in enumerate(PHOTOS)]
    own_data.save_images(tmp_path / 'data', crops)
    own_data.write_coco(tmp_path / 'data/a.json', crops)
    found, log = read(tmp_path / 'data')
    assert len({image['file_name'][:2] for image in found.content['val']['images']}) == 1
    assert len(found.content['val']['images']) == 2
    assert 'by photograph: 1 of 5' in log.notes[0] and not log.warnings

    for part, photos in (('train', crops[:7]), ('val', crops[7:])):
        own_data.save_images(tmp_path / 'split' / part, photos)
        own_data.write_coco(tmp_path / f'split/{part}.json', photos)
    _, log = read(tmp_path / 'split')
    assert log.warnings == ['crops or copies of one photograph are in several splits, so the '
                            'evaluation is too good: 3 (p2, p3, p4)']


@pytest.mark.parametrize('names, expected', [
    (['a_jpg.rf.0af3', 'a_jpg.rf.99b0'], ['a_jpg', 'a_jpg']),
    (['a_crop1', 'a-tile_2_3', 'a_x10_y20'], ['a', 'a', 'a']),
    (['P1__1__0___0', 'P1__1__512___0'], ['P1__1', 'P1__1']),
    (['IMG_20200101_120000', 'IMG_20200102_120500'], None),  # dates and times
    (['2007_000027', '2007_000032', 'frame_001'], None),
])
def test_photographs_of_names(names, expected):
    found = photographs([Path(f'{name}.jpg') for name in names])
    assert list(found.values()) == (expected or names)


def write_twice(root):
    flat_coco(root)
    own_data.write_coco(root / 'other.json', PHOTOS)


def write_two_formats(root):
    labelme(root)
    own_data.write_voc(root, PHOTOS)


def mix_boxes_and_masks(root):
    flat_coco(root)
    data = own_data.coco(PHOTOS)
    data['annotations'][0]['segmentation'] = []
    (root / 'result.json').write_text(json.dumps(data))


def write_images_twice(root):
    flat_coco(root)
    own_data.save_images(root / 'a', PHOTOS)
    own_data.save_images(root / 'b', PHOTOS)
    (root / 'result.json').rename(root / 'a' / 'x.json')
    for path in root.glob('*.jpg'):
        path.unlink()
    (root / 'a' / 'x.json').rename(root / 'x.json')


def yolo_without_names(root):
    yolo(root)
    (root / 'data.yaml').unlink()


def break_a_file(root):
    voc(root)
    (root / 'Annotations/photo03.xml').write_text('<annotation><object>')


def without_annotations(root):
    own_data.save_images(root, PHOTOS)


def no_training_split(root):
    for part in ('val', 'test'):
        own_data.save_images(root / part, PHOTOS)
        own_data.write_coco(root / f'{part}.json', PHOTOS)


@pytest.mark.parametrize('layout, message, options', [
    (write_twice, 'several COCO files .* choose with --annotations',
     dict(annotations='other.json')),
    (write_two_formats, 'choose one with --format {voc,labelme}', dict(format='voc')),
    (mix_boxes_and_masks, '1 of 30 objects have a box, but no mask: choose --target boxes',
     dict(target='masks')),
    (write_images_twice, 'may be any of 2 .*; name the folder with --images', dict(images='a')),
    (yolo_without_names, 'in the order of their ids, with --classes',
     dict(classes=('nut', 'bolt'))),
    (break_a_file, 'correct or remove them:\n  .*photo03.xml: ', None),
    (without_annotations, 'has no annotations: expected COCO JSON', None),
    (no_training_split, 'expected a training split, found only test, val', None),
], ids=lambda value: getattr(value, '__name__', None))
def test_what_is_unclear_is_asked_for(layout, message, options, tmp_path):
    root = tmp_path / 'data'
    layout(root)
    with pytest.raises((ValueError, OSError), match=message):
        read(root)
    if options:
        for key in {'annotations', 'images'} & {*options}:
            options = {key: (root / options[key],)}
        found, _ = read(root, **options)
        assert sum(len(split['images']) for split in found.content.values()) == 10
        if options.get('target') == 'masks':  # the box as a rectangle
            assert all(item['segmentation'] for item in found.content['train']['annotations'])


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'supervision', None)
    labelme(tmp_path / 'data')
    with pytest.raises(ValueError, match=re.escape('pip install supervision')):
        read(tmp_path / 'data')
