"""Every kind of fault in a file, found there and nowhere else."""
import json

import cv2
import numpy as np
import pytest
from PIL import Image
from support import broken
from support.broken import ANNOTATIONS, IMAGES, LABEL_MAPS, SIZE, break_file

from mmeffformer.datasets import CATEGORIES
from mmeffformer.datasets.faults import (
    KINDS,
    Coco,
    Fault,
    Labels,
    Reading,
    Sample,
    file_is_cut_off,
    inspect_coco,
    inspect_sample,
    is_cut_off,
)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    return broken.write_both(tmp_path_factory.mktemp('drawn'))


def kinds(faults):
    return [fault.kind for fault in faults]


@pytest.mark.parametrize('name', IMAGES)
def test_images(drawn, tmp_path, name):
    change, expected = IMAGES[name]
    path = tmp_path / 'a.jpg'
    path.write_bytes((drawn / 'coco/train/000000000001.jpg').read_bytes())
    sample = Sample(str(path), 7, SIZE)
    assert inspect_sample(sample) == []
    break_file(path, change)
    found = inspect_sample(sample)
    assert kinds(found) == expected
    assert {(fault.file, fault.image_id) for fault in found} == {(str(path), 7)}
    if 'image size' in expected:
        assert 'the annotation file says 96 x 64' in found[-1].detail
        assert (name == 'EXIF') == ('EXIF orientation 6' in found[-1].detail)


@pytest.mark.parametrize('name', LABEL_MAPS)
def test_label_maps(drawn, tmp_path, name):
    change, expected = LABEL_MAPS[name]
    path = tmp_path / 'a.png'
    path.write_bytes((drawn / 'ade20k/annotations/training/ADE_train_00000001.png').read_bytes())
    image = drawn / 'ade20k/images/training/ADE_train_00000001.jpg'
    labels = Labels(7, reduce_zero_label=True)
    assert inspect_sample(Sample(str(image), labels=str(path)), labels=labels) == []
    break_file(path, change)
    found = inspect_sample(Sample(str(image), labels=str(path)), labels=labels)
    assert kinds(found) == expected
    assert {fault.file for fault in found} <= {str(path)}
    if name == 'over 255':
        assert found[0].detail == '258 (72 px); expected 1 to 7, or 0 or 255 for what is ignored'


def test_labels_from_zero_on(tmp_path):
    cv2.imwrite(str(tmp_path / 'a.jpg'), np.zeros((20, 30, 3), np.uint8))
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30) % 9).save(tmp_path / 'a.png')
    sample = Sample(str(tmp_path / 'a.jpg'), labels=str(tmp_path / 'a.png'))

    def details(labels):
        return [fault.detail for fault in inspect_sample(
            sample, Reading(flag='grayscale'), labels) if fault.kind == 'label out of range']

    # 600 = 66 * 9 + 6, wrapped at 256: 8 comes 28 + 28 + 9 times.
    assert details(Labels(8)) == ['8 (65 px); expected 0 to 7, or 255 for what is ignored']
    assert details(Labels(8, ignored={8})) == details(Labels(9)) == details(Labels()) == []
    assert details(Labels(2))[0].startswith('2 (')
    assert 'and 2 more; expected 0 to 1, ' in details(Labels(2))[0]


@pytest.mark.parametrize('form,options', [
    ('JPEG', {}), ('JPEG', dict(progressive=True)), ('JPEG', dict(restart_marker_rows=2)),
    ('JPEG', dict(exif=b'Exif\0\0' + b'\xff\xd8 a small picture \xff\xd9' * 9)),
    ('PNG', {}), ('PNG', dict(bits=1))])
def test_cut_off_anywhere(tmp_path, form, options):
    grain = np.random.default_rng(0).integers(0, 256, (60, 80), np.uint8)
    data = broken.saved(Image.fromarray(grain).convert('P' if 'bits' in options else 'RGB'), form,
                        **options)
    path = tmp_path / 'a'
    path.write_bytes(data)
    assert not is_cut_off(data) and not file_is_cut_off(path)
    # Cameras and editors leave things after the end.
    for tail in b'\0' * 99, b'\xff\xda text', data:
        path.write_bytes(data + tail)
        assert not is_cut_off(data + tail) and not file_is_cut_off(path)
    for length in range(8, len(data), 97):
        for rest in b'', bytes(len(data) - length):
            path.write_bytes(data[:length] + rest)
            assert is_cut_off(data[:length] + rest) and file_is_cut_off(path), length
    assert is_cut_off(data[:-1])
    assert not is_cut_off(b'') and not is_cut_off(b'GIF89a')


def test_channels_left_unchanged(drawn, tmp_path):
    path = tmp_path / 'a.jpg'
    Image.open(drawn / 'coco/train/000000000001.jpg').convert('L').save(path)
    faults = inspect_sample(Sample(str(path)), Reading(flag='unchanged'))
    assert kinds(faults) == ['grey image', 'channels'] and faults[1].error


def coco(drawn, path, content=None, **options):
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return inspect_coco(Coco(str(path), CATEGORIES, **options))


@pytest.fixture
def content(drawn):
    return json.loads((drawn / 'coco/annotations/instances_train.json').read_text())


def test_whole_annotations(drawn):
    path = drawn / 'coco/annotations/instances_train.json'
    faults, images = coco(drawn, path)
    assert faults == []
    assert images[0] == (1, '000000000001.jpg', SIZE) and len(images) == 6
    assert coco(drawn, path, testing=True)[0] == []


@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotations(drawn, content, tmp_path, name):
    change, kind, _ = ANNOTATIONS[name]
    item = content['annotations'][0]
    item.update(change)
    faults, images = coco(drawn, tmp_path / 'a.json', content)
    path = str(tmp_path / 'a.json')
    assert [fault._replace(detail='') for fault in faults] == (
        [Fault(kind, path, '', item['image_id'], item['id'])] if kind else [])
    assert len(images) == 6
    # Evaluation does not leave polygons out, and detectors without masks do not read them.
    faults, _ = coco(drawn, tmp_path / 'a.json', testing=True)
    left_out = kind in ('empty polygon', 'two-point polygon', 'odd polygon')
    assert kinds(faults) == (['unusable polygon'] if left_out else [kind] if kind else [])
    faults, _ = coco(drawn, tmp_path / 'a.json', masks=False)
    assert kinds(faults) == ([kind] if kind and 'segmentation' not in change else [])


def first(content, name):
    return content[name][0]


def second(content, name):
    return content[name][1]


@pytest.mark.parametrize('change,expected', [
    (lambda c: second(c, 'images').update(id=1), {('duplicate image id', 1, None)}),
    (lambda c: second(c, 'annotations').update(id=1), {('duplicate annotation id', 0, 1)}),
    (lambda c: second(c, 'images').update(file_name='000000000001.jpg'),
     {('duplicate file name', 2, None)}),
    (lambda c: c['images'].append(dict(first(c, 'images'), id=77, file_name='000000000002.jpg')),
     {('duplicate file name', 77, None)}),
    (lambda c: c['categories'].pop(2), {('missing category', None, None)}),
    (lambda c: c['categories'].reverse(), {('category order', None, None)}),
    (lambda c: c['categories'].append(dict(id=77, name='ring')),
     {('duplicate category', None, None)}),
    (lambda c: c['categories'].append(dict(id=77, name='another')), set()),
    (lambda c: first(c, 'images').pop('file_name'), {('wrong form', 1, None)}),
    (lambda c: first(c, 'images').pop('height'), {('wrong form', 1, None)}),
    (lambda c: first(c, 'annotations').pop('id'), {('wrong form', 0, None)}),
    (lambda c: first(c, 'annotations').pop('area'), {('wrong form', 0, 1)}),
    (lambda c: c['annotations'].append(3), {('wrong form', None, None)}),
    (lambda c: c.update(images={}), {('wrong form', None, None), ('no images', None, None)}),
    (lambda c: c.pop('annotations'), {('wrong form', None, None)}),
    (lambda c: c.pop('categories'), {('wrong form', None, None),
                                     ('missing category', None, None)}),
    (lambda c: c.update(images=[]), {('no images', None, None)}),
])
def test_lists(drawn, content, tmp_path, change, expected):
    for item in content['annotations']:  # annotation 1 has no other on its image
        item['image_id'] = {1: 0}.get(item['id'], item['image_id'])
    content['images'].append(dict(content['images'][0], id=0, file_name='first.jpg'))
    change(content)
    faults, _ = coco(drawn, tmp_path / 'a.json', content)
    faults = [fault for fault in faults if fault.kind not in ('unknown image', 'unknown category')]
    actual = {(fault.kind, fault.image_id, fault.annotation_id) for fault in faults}
    assert {(kind, 0 if kind == 'duplicate annotation id' else image, item)
            for kind, image, item in actual} == expected


def test_repeated_image_with_the_same_boxes(drawn, content, tmp_path):
    image = content['images'][1]
    content['images'].append(dict(image, id=77))
    content['annotations'] += [dict(item, id=1000 + item['id'], image_id=77)
                               for item in content['annotations'] if item['image_id'] == 2]
    faults, _ = coco(drawn, tmp_path / 'a.json', content)
    assert kinds(faults) == ['repeated image'] and not faults[0].error


def test_filtered_to_nothing(drawn, content, tmp_path):
    assert kinds(coco(drawn, tmp_path / 'a.json', content, min_size=65)[0]) == ['no images']
    content['annotations'] = []
    assert coco(drawn, tmp_path / 'a.json', content)[0] == []
    faults, _ = coco(drawn, tmp_path / 'a.json', filter_empty=True)
    assert kinds(faults) == ['no images'] and faults[0].error
    assert coco(drawn, tmp_path / 'a.json', filter_empty=True, testing=True)[0] == []


def test_without_annotations_one_can_still_test(drawn, content, tmp_path):
    del content['annotations']
    assert coco(drawn, tmp_path / 'a.json', content, testing=True)[0] == []


@pytest.mark.parametrize('part', [0, 1, 100, .3, .6, .9, -1, -2])
def test_cut_off_json(drawn, tmp_path, part):
    text = (drawn / 'coco/annotations/instances_train.json').read_text()
    part = int(len(text) * part) if isinstance(part, float) else part
    faults, images = coco(drawn, tmp_path / 'a.json', text[:part])
    assert kinds(faults) == ['broken JSON'] and images == []
    assert faults[0].detail.endswith(': the file is cut off')


@pytest.mark.parametrize('text,kind', [
    ('[]', 'wrong form'), ('3', 'wrong form'), ('{]' + ' ' * 99 + '}', 'broken JSON')])
def test_json_of_another_form(drawn, tmp_path, text, kind):
    faults, _ = coco(drawn, tmp_path / 'a.json', text)
    assert kinds(faults) == [kind] and 'cut off' not in faults[0].detail


def test_json_that_is_no_text(drawn, tmp_path):
    (tmp_path / 'a.json').write_bytes(b'\xff\xfe\x00' * 9)
    assert kinds(coco(drawn, tmp_path / 'a.json')[0]) == ['broken JSON']
    assert kinds(coco(drawn, tmp_path / 'gone.json')[0]) == ['broken JSON']


def test_faults_read_well():
    assert str(Fault('grey image', 'a.jpg')) == 'a.jpg'
    assert str(Fault('image size', 'a.jpg', 'too big', 3, 4)) == (
        'a.jpg (image 3, annotation 4): too big')
    assert all(about.effect and about.remedy for about in KINDS.values())
