"""Configs are read as mmengine's Runner reads them."""
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmseg.datasets import ADE20KDataset

from mmeffformer.utils import config
from mmeffformer.utils.config import (
    class_name,
    dataset_meta,
    dataset_metainfo,
    find_scope,
    model_cfg,
    preprocessor_cfg,
)

LOAD, LABELS, PACK = (dict(type=f'{name}') for name in (
    'LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs'))


def detector(**parts) -> Config:
    return Config(dict(default_scope='mmdet', model=dict(type='FCOS'), **parts))


def loader(**dataset) -> dict:
    return dict(dataset=dict(type='CocoDataset', **dataset))


def steps(cfg) -> list:
    return [class_name(step) for step in config.test_pipeline_cfg(cfg)]


def test_preprocessor_at_the_top_is_that_of_the_model():
    cfg = detector(data_preprocessor=dict(type='P', mean=[1.]))
    assert model_cfg(cfg) == dict(type='FCOS', data_preprocessor=dict(type='P', mean=[1.]))
    assert preprocessor_cfg(cfg) == dict(type='P', mean=[1.])
    assert 'data_preprocessor' not in cfg.model
    cfg.model.data_preprocessor = dict(type='Q')  # Runner keeps the model's own
    assert preprocessor_cfg(cfg) == dict(type='Q')
    assert preprocessor_cfg(detector()) is None


def test_preprocessor_of_wrapped_models():
    semi = dict(type='MultiBranchDataPreprocessor', data_preprocessor=dict(type='P'))
    assert preprocessor_cfg(detector(data_preprocessor=semi)) == dict(type='P')
    tta = dict(type='DetTTAModel', module=dict(type='FCOS', data_preprocessor=dict(type='P')))
    assert preprocessor_cfg(Config(dict(model=tta))) == dict(type='P')


@pytest.mark.parametrize('parts', [
    dict(test_dataloader=loader(pipeline=[LOAD, LABELS, PACK])),
    dict(test_dataloader=dict(dataset=dict(
        type='ConcatDataset', datasets=[loader(pipeline=[LOAD, LABELS, PACK])['dataset']] * 2))),
    dict(test_dataloader=dict(dataset=dict(
        type='RepeatDataset', times=2, dataset=loader(pipeline=[LOAD, PACK])['dataset']))),
    dict(test_dataloader=dict(dataset=dict(type='MultiImageMixDataset', pipeline=[PACK],
                                           dataset=loader(pipeline=[LOAD])['dataset']))),
    dict(test_dataloader=None, val_dataloader=loader(pipeline=[LOAD, LABELS, PACK])),
    dict(test_dataloader=loader(), test_pipeline=[LOAD, PACK, LABELS]),
])
def test_pipeline_is_that_of_the_test_set_or_the_next_one(parts):
    assert steps(detector(**parts)) == ['LoadImageFromFile', 'PackDetInputs']


def test_pipeline_without_nested_annotations():
    tta = dict(type='TestTimeAug', transforms=[
        [dict(type='Resize')], [dict(type='mmdet.LoadAnnotations')], [PACK]])
    cfg = detector(test_pipeline=[LOAD, tta, dict(type='LoadPanopticAnnotations')])
    assert config.test_pipeline_cfg(cfg) == [
        LOAD, dict(type='TestTimeAug', transforms=[[dict(type='Resize')], [PACK]])]
    assert len(cfg.test_pipeline[1].transforms) == 3


def test_error_for_a_config_without_pipelines():
    with pytest.raises(ValueError, match='expected one in test_dataloader.dataset.pipeline, val_d'
                                         'ataloader.dataset.pipeline or test_pipeline'):
        steps(detector(test_dataloader=loader()))
    with pytest.raises(ValueError, match='no model'):
        model_cfg(Config(dict(a=1)))


def test_classes_and_palette_of_any_split_go_before_those_of_the_checkpoint():
    red, green = (255, 0, 0), (0, 255, 0)
    meta = dict(dataset_meta=dict(classes=('x', 'y'), palette=[green, red]))
    own = dict(metainfo=dict(classes=['a', 'b'], palette=[red, green]))
    expected = dict(classes=('a', 'b'), palette=[red, green])
    for split in ('train', 'val', 'test'):
        assert dataset_metainfo(detector(**{f'{split}_dataloader': loader(**own)}),
                                meta) == expected
    assert dataset_metainfo(detector(), meta) == dict(classes=('x', 'y'), palette=[green, red])
    concat = dict(type='ConcatDataset', datasets=[loader(**own)['dataset']])
    assert dataset_metainfo(detector(test_dataloader=dict(dataset=concat))) == expected


def test_classes_of_the_type_of_the_data_set_or_of_the_heads(tmp_path):
    coco = detector(test_dataloader=loader(ann_file='not/there.json'))
    assert dataset_metainfo(coco) == dict(
        classes=CocoDataset.METAINFO['classes'], palette=CocoDataset.METAINFO['palette'])
    assert dataset_metainfo(coco, dict(CLASSES=('x',)))['classes'] == ('x',)
    ade = Config(dict(default_scope='mmseg', model=dict(type='E'), val_dataloader=dict(
        dataset=dict(type='ADE20KDataset', metainfo=dict(classes=('tree', 'wall'))))))
    assert dataset_metainfo(ade)['palette'] == [
        tuple(ADE20KDataset.METAINFO['palette'][i]) for i in (4, 0)]
    heads = detector()
    heads.model.bbox_head = [dict(num_classes=3)]
    assert dataset_metainfo(heads)['classes'] == ('class 0', 'class 1', 'class 2')
    (tmp_path / 'names.txt').write_text('a\nb\n')
    named = loader(metainfo=dict(classes=str(tmp_path / 'names.txt')))
    assert dataset_metainfo(detector(test_dataloader=named))['classes'] == ('a', 'b')


@pytest.mark.parametrize('palette', [None, [(1, 2, 3)], ((1, 2, 3),), 'random'])
def test_missing_colours_are_made_and_differ(palette):
    names = tuple(map(str, range(1203)))  # as LVIS has
    found = dataset_metainfo(detector(test_dataloader=loader(
        metainfo=dict(classes=names, palette=palette))))['palette']
    assert len({*found}) == 1203
    assert all(type(part) is int and 0 <= part <= 255 for colour in found for part in colour)
    assert (found[0] == (1, 2, 3)) == (palette not in (None, 'random'))
    # The colours of a few classes look different.
    few = found[1:9]
    assert min(sum(abs(a - b) for a, b in zip(x, y))
               for i, x in enumerate(few) for y in few[:i]) > 60


@pytest.mark.parametrize('meta, classes', [
    ({'dataset_meta': {'classes': ['a', 'b']}}, ['a', 'b']),
    ({'dataset_meta': {'CLASSES': ('a', 'b')}}, ('a', 'b')),
    ({'CLASSES': ('c', 'd')}, ('c', 'd')),
    ({'dataset_meta': {'classes': 7}}, None),
    ({'dataset_meta': {'classes': ('a', 1)}}, None),
    ({'dataset_meta': 'all'}, None),
    ({}, None)])
def test_class_names_of_old_and_new_checkpoints(meta, classes):
    assert dataset_meta(meta).get('classes') == classes


@pytest.mark.parametrize('name, scope, kinds', [
    ('faster_rcnn', 'mmdet', ['LoadImageFromFile', 'Resize', 'PackDetInputs']),
    ('semfpn', 'mmseg', ['LoadImageFromFile', 'Resize', 'PackSegInputs'])])
def test_configs_of_the_new_style(repo_root, name, scope, kinds):
    cfg = Config.fromfile(repo_root / f'tests/data/new_style/{name}.py')
    assert find_scope(cfg) == scope
    assert steps(cfg) == kinds
    assert preprocessor_cfg(cfg)['mean'] == [123.675, 116.28, 103.53]
    assert model_cfg(cfg).type is cfg.model.type
    found = dataset_metainfo(cfg)
    assert found['classes'][-2:] == ('ring', 'cross') and len(found['palette']) in (6, 7)
