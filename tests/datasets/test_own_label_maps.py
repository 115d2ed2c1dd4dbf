"""Label maps of any layout, as mmseg loads them from the written config."""
import pickle
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from support.own_data import COLOURS, photos, save_images, save_maps

from mmeffformer.apis.new_config import new_config
from mmeffformer.apis.new_config.recipe import Device
from mmeffformer.datasets.own_data.classes import Row, parse_rows
from mmeffformer.datasets.own_data.files import Options

PHOTOS = photos(10)
NAMES = ('background', 'nut', 'bolt')
KEEP, VOID_0 = [0, 1, 2], [255, 0, 1]  # the label of each drawn class


def write(root: Path, **options):
    """Write a config and return its text as a config, and what was found."""
    before = {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    written = new_config('seg', root, root.parent / 'config.py', pretrained=False,
                         options=Options(**options), device=Device(0, 0, 2))
    assert before == {path: path.read_bytes() for path in root.rglob('*') if path.is_file()}
    return Config.fromfile(root.parent / 'config.py'), written.log


def check_labels(cfg, table, counts=(8, 2)):
    """Compare all label maps that mmseg loads with what was drawn, and the images too."""
    init_default_scope('mmseg')
    loading = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    by_number = {photo.stem[-2:]: photo for photo in PHOTOS}
    seen = []
    for loader, count in zip((cfg.train_dataloader, cfg.val_dataloader), counts):
        dataset = DATASETS.build(dict(loader.dataset, pipeline=loading))
        assert len(dataset) == count
        void = loader.dataset.get('ignore_index', 255)
        for item in dataset:
            number = next(number for number in by_number
                          if f'photo{number}' in Path(item['img_path']).name)
            seen.append(number)
            photo = by_number[number]
            assert np.abs(item['img'][..., ::-1].astype(int) - photo.pixels).mean() < 12  # JPEG
            labels = np.where(item['gt_seg_map'] == void, 255, item['gt_seg_map'])
            np.testing.assert_array_equal(labels, np.array(table)[photo.labels()])
    assert len({*seen}) == len(seen)


def colours(root: Path) -> None:
    (root / 'label_colors.txt').write_text(''.join(
        '{} {} {}\t{}\n'.format(*colour, name) for colour, name in zip(COLOURS, NAMES)))


def cityscapes(root, parts=('train', 'val')):
    for part, found in zip(parts, (PHOTOS[:6], PHOTOS[6:])):
        images = [photo._replace(stem=f'town_{photo.stem}_000019_leftImg8bit') for photo in found]
        save_images(root / 'leftImg8bit' / part / 'town', images, '.png')
        maps = [photo._replace(stem=f'town_{photo.stem}_000019_gtFine') for photo in found]
        folder = root / 'gtFine' / part / 'town'
        save_maps(folder, maps, '{}_labelTrainIds.png', values={0: 255, 1: 0, 2: 1})
        save_maps(folder, maps, '{}_labelIds.png')
        save_maps(folder, maps, '{}_color.png', form='colour')


def camvid(root):
    for part, found in (('train', PHOTOS[:6]), ('val', PHOTOS[6:])):
        save_images(root / part, found, '.png')
        save_maps(root / f'{part}annot', found, values={0: 2, 1: 0, 2: 1})
    (root / 'classes.txt').write_text('nut\nbolt\nvoid\n')


def voc(root):
    save_images(root / 'JPEGImages', PHOTOS)
    for name in 'SegmentationClass', 'SegmentationObject':
        save_maps(root / name, PHOTOS[:8], form='palette')
    for name, first, last in (('Segmentation', 6, 8), ('Main', 3, 4)):
        lists = root / 'ImageSets' / name
        lists.mkdir(parents=True)
        (lists / 'train.txt').write_text('\n'.join(photo.stem for photo in PHOTOS[:first]))
        (lists / 'val.txt').write_text('\n'.join(photo.stem for photo in PHOTOS[first:last]))


def index(root):
    save_images(root / 'scans', PHOTOS)
    save_maps(root / 'truth', PHOTOS)


def one_folder(root):
    save_images(root, PHOTOS)
    save_maps(root, PHOTOS, '{}_mask.png', form='palette')
    (root / 'codes.txt').write_text('\n'.join(NAMES))


def coloured(root):
    save_images(root / 'a', PHOTOS, '.png')
    save_maps(root / 'b', PHOTOS, '{}_L.png', form='colour')
    colours(root)


def three_channels(root):
    save_images(root / 'a', PHOTOS, '.tif')
    save_maps(root / 'b', PHOTOS, form='grey')


def binary(root):
    save_images(root / 'a', PHOTOS)
    save_maps(root / 'b', PHOTOS, values={1: 255, 2: 255})


# Layout: options, the label of each drawn class, images of both splits, ignore_index.
LAYOUTS = {
    cityscapes: (dict(classes=('nut', 'bolt')), VOID_0, (6, 4), 255),
    camvid: ({}, VOID_0, (6, 4), 2),
    voc: (dict(classes=NAMES), KEEP, (6, 2), 255),
    index: (dict(classes=NAMES), KEEP, (8, 2), 255),
    one_folder: ({}, KEEP, (8, 2), 255),
    coloured: ({}, KEEP, (8, 2), 255),
    three_channels: (dict(classes=NAMES), KEEP, (8, 2), 255),
    binary: (dict(classes=('other', 'thing')), [0, 1, 1], (8, 2), 255),
}


@pytest.mark.parametrize('layout', LAYOUTS, ids=lambda layout: layout.__name__)
def test_all_layouts_give_the_drawn_labels(layout, tmp_path):
    options, table, counts, void = LAYOUTS[layout]
    layout(tmp_path / 'data')
    cfg, _ = write(tmp_path / 'data', **options)
    check_labels(cfg, table, counts)
    assert cfg.model.decode_head.num_classes == len(cfg.classes) == len(cfg.palette)
    assert cfg.model.decode_head.get('ignore_index', 255) == void
    assert cfg.val_evaluator.get('ignore_index', 255) == void
    assert cfg.model.data_preprocessor.seg_pad_val == void
    assert pickle.loads(pickle.dumps(cfg)).classes == cfg.classes


@pytest.mark.parametrize('options, table, classes, reduced', [
    (dict(classes=NAMES, void='0'), VOID_0, NAMES[1:], True),
    (dict(classes=NAMES[1:], void='0'), VOID_0, NAMES[1:], True),
    (dict(classes=('void', 'nut', 'bolt')), VOID_0, NAMES[1:], True),
    (dict(classes=('void', 'nut', 'bolt'), void='none'), KEEP, ('void', 'nut', 'bolt'), False),
    (dict(classes=NAMES, void='nut'), [0, 255, 1], ('background', 'bolt'), False),
    (dict(classes=NAMES[:2], void='2'), [0, 1, 255], NAMES[:2], False),
])
def test_void_is_a_value_or_a_name(options, table, classes, reduced, tmp_path):
    index(tmp_path / 'data')
    cfg, _ = write(tmp_path / 'data', **options)
    check_labels(cfg, table)
    assert cfg.classes == classes
    assert cfg.train_dataloader.dataset.get('reduce_zero_label', False) == reduced


def test_colours_of_palettes_and_tables_are_kept(tmp_path):
    one_folder(tmp_path / 'a/data')
    coloured(tmp_path / 'b/data')
    for root in 'a', 'b':
        cfg, _ = write(tmp_path / root / 'data')
        assert [tuple(colour) for colour in cfg.palette] == list(COLOURS)


def two_maps(root):
    index(root)
    save_maps(root / 'other', PHOTOS)


def no_table(root):
    coloured(root)
    (root / 'label_colors.txt').unlink()


def new_colour(root):
    coloured(root)
    lines = (root / 'label_colors.txt').read_text().splitlines()
    (root / 'label_colors.txt').write_text('\n'.join(lines[1:]))


def lost_class_or_void(root):
    save_images(root / 'a', PHOTOS)
    save_maps(root / 'b', PHOTOS, values={2: 255})


def new_folders(root):
    cityscapes(root, ('learn', 'check'))


@pytest.mark.parametrize('layout, given, message, options', [
    (index, {}, r'Values found: 0 \(\d.*1 \(\d.*2 \(.* with --classes', dict(classes=NAMES)),
    (index, dict(classes=NAMES[:2]), r'without a class. Values found: 2 .* --void',
     dict(classes=NAMES)),
    (two_maps, dict(classes=NAMES), 'several label maps, 2 .* choose with --annotations',
     dict(classes=NAMES, annotations='other')),
    (no_table, dict(classes=NAMES), 'a name and R G B per line with --classes', None),
    (new_colour, {}, 'without a class. Colours found: 64 128 64', None),
    (lost_class_or_void, dict(classes=NAMES), 'is 255 void, or bolt',
     dict(classes=NAMES, void='none')),
    (binary, dict(classes=NAMES, void='x'), '--void x: expected a value, none, or one of', None),
], ids=lambda value: getattr(value, '__name__', ''))
def test_what_is_unclear_is_asked_for(layout, given, message, options, tmp_path):
    root = tmp_path / 'data'
    layout(root)
    with pytest.raises(ValueError, match=message):
        write(root, **given)
    if options:
        if 'annotations' in options:
            options = dict(options, annotations=(root / options['annotations'],))
        check_labels(write(root, **options)[0], KEEP)


def test_folders_of_other_names_are_named(tmp_path):
    root = tmp_path / 'data'
    cityscapes(root, ('learn', 'check'))
    cfg, _ = write(root, classes=NAMES[1:],
                   annotations=(root / 'gtFine/learn', root / 'gtFine/check'))
    check_labels(cfg, VOID_0, (6, 4))
    cfg, log = write(root, classes=NAMES, label_suffix='labelIds.png')
    check_labels(cfg, KEEP)
    assert 'made a validation split' in log.notes[0]


@pytest.mark.parametrize('text, expected', [
    ('64 128 64\tAnimal\n192 0 128\tTraffic light\n',
     [Row('Animal', (64, 128, 64)), Row('Traffic light', (192, 0, 128))]),
    ('name,r,g,b\nsky,128,128,128\nbus stop,1,2,3\n',
     [Row('sky', (128, 128, 128)), Row('bus stop', (1, 2, 3))]),
    ('# label:color_rgb:parts:actions\ncar:0,0,142::\n', [Row('car', (0, 0, 142))]),
    ('0 sky\n3: road\n', [Row('sky', None, 0), Row('road', None, 3)]),
    ('sky\nclass_2\n', [Row('sky'), Row('class_2')]),
])
def test_tables_of_classes(text, expected):
    assert parse_rows(text) == expected
