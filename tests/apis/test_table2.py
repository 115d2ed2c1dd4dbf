"""The published figures, the plan, what is counted, and how measurements are judged."""
import json
import shlex
from copy import deepcopy
from pathlib import Path

import pytest
import timm
from mmengine.config import Config

from mmeffformer.apis import table2
from mmeffformer.apis.runs import Measurement, Training
from mmeffformer.models import ARCHS, ARCHS_V2

ROOT = Path(__file__).resolve().parents[2]
DET = ROOT / 'configs/detection/maskrcnn_effformer_l1.py'
SEG = ROOT / 'configs/segmentation/semfpn_effformerv2_s2.py'
ROWS = {row.config: row for row in table2.ROWS}
COCO = {'coco/bbox_mAP': .389, 'coco/bbox_mAP_50': .6, 'coco/segm_mAP': .354}


def test_every_row_has_its_figures():
    assert len(table2.ROWS) == 13
    # Each config of these folders is a row's.
    assert table2.config_names() == {path.stem for folder in ('detection', 'segmentation')
                                     for path in ROOT.glob(f'configs/{folder}/*.py')}
    for row in table2.ROWS:
        dense = row.config not in ('effformerv2_s0', 'effformerv2_s1')
        assert len(table2.published(row, 'det')) == (6 if dense else 0)
        assert len(table2.published(row, 'seg')) == (1 if dense else 0)
        assert row.released == (dense and 'effformer' in row.config)
    assert {row.family for row in table2.ROWS} == {
        'ResNet', 'PoolFormer', 'EfficientFormer', 'EfficientFormerV2'}


def test_figures_that_are_not_confirmed_keep_their_mark():
    l7, resnet101 = ROWS['effformer_l7'], ROWS['resnet101']
    figures = table2.published(l7, 'det')
    assert figures['box AP'] == '42.6 ?' and figures['mask AP75'] == '41.7 ?'
    assert table2.number('42.6 ?') == 42.6 and not table2.confirmed('42.6 ?')
    unsure = [text for row in table2.ROWS for text in (
        row.params, row.gmacs, row.whole, *table2.published(row, 'det').values(),
        *table2.published(row, 'seg').values()) if not table2.confirmed(text)]
    assert sorted(unsure) == sorted([*figures.values(), resnet101.params])
    entry = table2.Entry(l7, 'det')
    assert '| 42.6 ? | 65.1 ? | 46.1 ? | 39.0 ? | 62.2 ? | 41.7 ? |' in table2.markdown([entry])
    told, = table2.as_json([entry])['entries']
    assert told['paper']['figures']['box AP'] == dict(value=42.6, confirmed=False)
    entry.network = table2.Network(1, 10 ** 10, 1, 1)
    assert table2.marks([entry], 'box AP') == [('L7 ?', 'EfficientFormer', 10., 42.6, None)]


def test_rows_by_name():
    assert table2.find_rows(['EfficientFormer-L1', 'resnet50']) == [
        ROWS['effformer_l1'], ROWS['resnet50']]
    assert len(table2.find_rows(None)) == 13
    with pytest.raises(ValueError, match="row 'l9' is unknown; choose from resnet18, pool"):
        table2.find_rows(['l9'])


def test_plan_of_a_row():
    lines = list(table2.plan(ROOT, [ROWS['effformer_l1']], ['det']))
    config = 'configs/detection/maskrcnn_effformer_l1.py'
    assert [line for line in lines if line and not line.startswith('#')][:2] == [
        f'tools/dist_train.sh {config} 8',
        f'tools/dist_test.sh {config} work_dirs/maskrcnn_effformer_l1/epoch_12.pth 8']
    convert, test = (shlex.split(line) for line in lines if line.startswith('python'))
    assert convert[:3] == ['python', 'tools/convert_checkpoint.py',
                           'downloads/maskrcnn_effformer_l1.pth']
    assert test[:4] == ['python', 'tools/test.py', config,
                        'checkpoints/maskrcnn_effformer_l1-*.pth']
    assert convert[-2:] == ['--out', 'checkpoints'] and 'model.backbone.bias_mode=legacy' in test


def test_plan_for_other_numbers_of_gpus():
    commands = [line for line in table2.plan(ROOT, [ROWS['resnet50']], ['seg'])
                if line.startswith('tools/')]
    config = 'configs/segmentation/semfpn_resnet50.py'
    length = Config.fromfile(ROOT / config).train_cfg.max_iters
    gpus = 16 // 4  # mmseg's recipe
    assert commands == [
        f'tools/dist_train.sh {config} {gpus}',
        f'tools/dist_test.sh {config} work_dirs/semfpn_resnet50/iter_{length}.pth {gpus}']
    lines = list(table2.plan(ROOT, [ROWS['resnet50']], ['seg'], gpus=1))
    assert f'python tools/train.py {config} --auto-scale-lr' in lines
    assert f'python tools/test.py {config} work_dirs/semfpn_resnet50/iter_{length}.pth' in lines
    lines = list(table2.plan(ROOT, [ROWS['resnet50']], ['seg'], gpus=2))
    assert f'tools/dist_train.sh {config} 2 --auto-scale-lr' in lines


def test_plan_covers_the_table_and_names_files_that_are_there():
    lines = [line for line in table2.plan(ROOT) if line and not line.startswith('#')]
    commands = [shlex.split(line) for line in lines]
    assert len(commands) == 13 * 2 * 2 + 5 * 2 * 2
    for command in commands:
        for word in command:
            if word.startswith(('tools/', 'configs/')):
                assert (ROOT / word).is_file()


# In timm's classifiers: the heads, and the norm before them.
HEADS = {'effformer': ('head.', 'head_dist.', 'norm.'), 'poolformer': ('head.',),
         'resnet': ('fc.',)}


@pytest.mark.parametrize('name, timm_name', [
    ('effformer_l1', 'efficientformer_l1'), ('effformer_l7', 'efficientformer_l7'),
    ('effformerv2_s0', 'efficientformerv2_s0'), ('effformerv2_l', 'efficientformerv2_l'),
    ('poolformer_s12', 'poolformer_s12'), ('resnet50', 'resnet50')])
def test_parameters_are_timms(name, timm_name):
    row = ROWS[name]
    network = table2.count(ROOT / table2.TASKS['det'].config.format(name), (64, 64))
    classifier = timm.create_model(timm_name)
    heads = HEADS[''.join(filter(str.isalpha, name.split('_')[0].split('v2')[0]))]
    params = sum(p.numel() for key, p in classifier.named_parameters()
                 if not key.startswith(heads))
    if name.startswith('effformer_'):  # norms of the outputs, bias tables for 25 x 25 tokens
        arch = ARCHS[name.split('_')[1]]
        params += 2 * sum(arch.widths) + 8 * (25 ** 2 - 7 ** 2) * sum(arch.attention_blocks)
    elif name.startswith('effformerv2_'):
        blocks = ARCHS_V2[name.split('_')[1]].attention_blocks
        params += 8 * (25 ** 2 - 7 ** 2) * sum(blocks) + 8 * (50 ** 2 - 14 ** 2)
    elif name.startswith('poolformer'):  # norms of the outputs
        params += 2 * (64 + 128 + 320 + 512)
    assert network.backbone_params == params
    whole = sum(p.numel() for p in classifier.parameters()) / 1e6
    assert whole == pytest.approx(table2.number(row.params), abs=.25)


@pytest.mark.parametrize('name', ['effformer_l1', 'effformerv2_s1', 'effformerv2_s2'])
def test_macs_are_the_papers(name):
    network = table2.count(ROOT / table2.TASKS['seg'].config.format(name), (512, 512))
    assert network.backbone_macs_224 / 1e9 == pytest.approx(float(ROWS[name].gmacs), rel=.01)
    assert network.macs > 5 * network.backbone_macs_224  # 5.2 times the pixels, and the neck


@pytest.mark.parametrize('name, frozen', [
    ('effformer_l1', 0), ('poolformer_s12', 0), ('effformerv2_s2', 0),
    # The paper's of ResNet are without what is not trained: 7 x 7 conv, its norm, stage 1.
    ('resnet18', 64 * 3 * 49 + 128 + 4 * (64 * 64 * 9 + 128))])
def test_whole_detectors_are_the_papers(name, frozen):
    network = table2.count(ROOT / table2.TASKS['det'].config.format(name), (64, 64))
    assert round((network.params - frozen) / 1e6, 1) == float(ROWS[name].whole)


def measurement(path, task, metrics, tested=True, **changes):
    """A measurement of the row whose config is ``path``, as it should be."""
    cfg = Config.fromfile(path).to_dict()
    training = Training([deepcopy(cfg)], [8])
    done = (0, 40000) if task == 'seg' else (12, 87960)
    run = Measurement(path.stem, metrics, (table2.TASKS[task].data[1],) * 2, cfg,
                      Path(f'work_dirs/{path.stem}/20260101_000000'),
                      checkpoint='a.pth' if tested else None, trained=done, training=training,
                      meta=dict(experiment_name=f'{path.stem}_20251231_000000'))
    for key, value in changes.items():
        setattr(run, key, value)
    return run


def results(run, row, task):
    (entry,), left_out = table2.collect(ROOT, [run], [ROWS[row]], [task])
    return entry, left_out


@pytest.mark.parametrize('tested', [True, False])
def test_a_row_trained_here(tested):
    entry, left_out = results(measurement(DET, 'det', COCO, tested), 'effformer_l1', 'det')
    result, = entry.results
    assert (str(result), left_out) == ('trained here', [])
    assert result.figures == {'box AP': 38.9, 'box AP50': 60., 'mask AP': 35.4}
    text = table2.markdown([entry])
    assert '| EfficientFormer-L1 | paper | 37.9 | 60.3 | 41.0 | 35.4 | 57.3 | 37.3 |' in text
    assert '|  | here: trained here | 38.9 | 60.0 | – | 35.4 | – | – |' in text
    assert '|  | difference | +1.0 | -0.3 | – | +0.0 | – | – |' in text
    told, = table2.as_json([entry])['entries']
    assert told['measured'][0]['source'] == 'trained here'
    assert told['measured'][0]['difference']['box AP'] == pytest.approx(1.)
    assert told['measured'][0]['caveats'] == [] and json.dumps(told)
    entry.network = table2.Network(1, 1_290_000_000, 1, 1)
    assert table2.marks([entry], 'box AP') == [('L1', 'EfficientFormer', 1.29, 37.9, 38.9)]


def test_a_segmentor_trained_here():
    entry, _ = results(measurement(SEG, 'seg', {'mIoU': 42.}), 'effformerv2_s2', 'seg')
    assert str(*entry.results) == 'trained here'
    assert '|  | difference | -0.4 |' in table2.markdown([entry])


def change(run, key, value, of='training'):
    cfg = run.training.configs[0] if of == 'training' else run.config
    *path, last = key.split('.')
    for name in path:
        cfg = cfg[name]
    cfg[last] = value


@pytest.mark.parametrize('alter, caveat', [
    (lambda run: setattr(run, 'trained', (7, 51310)), '7 of 12 epochs'),
    (lambda run: setattr(run, 'trained', (None, None)), 'after an unknown number of epochs'),
    (lambda run: change(run, 'optim_wrapper.optimizer.lr', .1),
     'optim_wrapper.optimizer.lr=0.1 instead of 0.0002'),
    (lambda run: change(run, 'train_dataloader.dataset.ann_file', 'annotations/few.json'),
     "train_dataloader.dataset.ann_file='annotations/few.json' instead of "
     "'annotations/instances_train2017.json'"),
    (lambda run: change(run, 'model.backbone.init_cfg', None),
     'started from no weights instead of efficientformer-l1_3rdparty_in1k_20220915-cc3e1ac6.pth'),
    (lambda run: change(run, 'load_from', 'old.pth'), 'started from old.pth'),
    (lambda run: change(run, 'resume', True), 'started from unknown weights'),
    (lambda run: setattr(run.training, 'gpus', [1]), 'batches of 2 images instead of 16'),
    (lambda run: setattr(run.training, 'gpus', [None]),
     'batches of an unknown number of images instead of 16'),
    (lambda run: setattr(run, 'training', None), 'in an unknown way'),
    (lambda run: setattr(run, 'images', None),
     'on an unknown number of images in data/coco/'),
    (lambda run: change(run, 'model.backbone.bias_mode', 'legacy', 'test'),
     'bias_mode legacy instead of offset'),
    (lambda run: change(run, 'model.test_cfg.rcnn.max_per_img', 9, 'test'),
     'model.test_cfg.rcnn.max_per_img=9 instead of 100'),
])
def test_what_departs_from_the_row_is_said_and_not_plotted(alter, caveat):
    run = measurement(DET, 'det', COCO)
    alter(run)
    entry, _ = results(run, 'effformer_l1', 'det')
    result, = entry.results
    assert result.caveats == [caveat]
    assert f'here: trained here, {caveat} | 38.9 |' in table2.markdown([entry])
    entry.network = table2.Network(1, 1, 1, 1)
    assert table2.marks([entry], 'box AP')[0].measured is None


def test_what_makes_no_difference_is_not_said():
    run = measurement(DET, 'det', COCO)
    change(run, 'model.backbone.init_cfg.checkpoint',
           '/mnt/efficientformer-l1_3rdparty_in1k_20220915-cc3e1ac6.pth')
    change(run, 'model.backbone.init_cfg', None, 'test')
    change(run, 'train_dataloader.num_workers', 9)
    change(run, 'train_dataloader.batch_size', 4)
    change(run, 'train_cfg.val_interval', 3)
    run.training.gpus = [4]
    entry, _ = results(run, 'effformer_l1', 'det')
    assert str(*entry.results) == 'trained here'


def test_many_departures_are_counted():
    result = table2.Result('trained here', [*'abcdef'], {}, None)
    assert str(result) == 'trained here, a, b, c, d, and 2 more departures'


def test_checkpoints_from_elsewhere():
    run = measurement(DET, 'det', COCO, training=None,
                      meta=dict(converted_from='l1.pth', bias_mode='legacy'))
    change(run, 'model.backbone.bias_mode', 'legacy', 'test')
    entry, _ = results(run, 'effformer_l1', 'det')
    assert str(*entry.results) == 'converted checkpoint'
    run.config['model']['backbone'].pop('bias_mode')
    entry, _ = results(run, 'effformer_l1', 'det')
    assert str(*entry.results) == 'converted checkpoint, bias_mode offset instead of legacy'
    run.meta = dict(experiment_name='maskrcnn_effformer_l1_shapes_20260101_000000')
    entry, _ = results(run, 'effformer_l1', 'det')
    assert str(*entry.results) == 'checkpoint of unknown origin'


@pytest.mark.parametrize('images, told', [
    ((50, 50), 'is of 50 images, and COCO val2017 has 5000 (data in data/coco/)'),
    ((5001, 5008), 'is of 5001 to 5008 images, and')])
def test_other_data_are_left_out(images, told):
    entry, (note,) = results(measurement(DET, 'det', COCO, images=images), 'effformer_l1', 'det')
    assert entry.results == [] and told in note and DET.stem in note
    text = table2.markdown([entry], [note])
    assert '| EfficientFormer-L1 | paper; here: not run | 37.9 |' in text and told in text
    assert table2.as_json([entry])['entries'][0]['measured'] == [dict(source='not run')]


def test_other_metrics_are_left_out():
    entry, (note,) = results(measurement(DET, 'det', {'coco/proposal_AR': .5}), 'effformer_l1',
                             'det')
    assert entry.results == [] and 'has none of coco/bbox_mAP, ' in note


def test_the_best_of_each_source_is_taken():
    runs = [measurement(DET, 'det', dict(COCO, **{'coco/bbox_mAP': value}), folder=Path(folder),
                        trained=(epochs, 1), **more)
            for value, folder, epochs, more in (
                (.1, 'a/1', 12, {}), (.2, 'b/2', 12, {}), (.3, 'c/3', 11, {}),
                (.4, 'd/4', 12, dict(meta={})), (.5, 'e/0', 12, {}),
                (.6, 'f/9', 12, dict(training=None)))]
    (entry,), _ = table2.collect(ROOT, runs, [ROWS['effformer_l1']], ['det'])
    assert {result.source: result.figures['box AP'] for result in entry.results} == {
        'trained here': 20., 'checkpoint of unknown origin': 40.}


def test_the_readmes_table_is_the_published_one(repo_root):
    cells = [[cell.strip() for cell in line.strip('| \n').split('|')]
             for line in (repo_root / 'README.md').read_text().splitlines()
             if line.startswith('| ') and line.endswith('` |')]
    told = {names.split(',')[0].strip('`'): figures for _, *figures, names in cells}

    def printed(figures, kind):
        figures = [figures[f'{kind} AP{iou}'] for iou in ('', '50', '75')]
        mark = ' (?)' if any(figure.endswith('?') for figure in figures) else ''
        return ' / '.join(figure.removesuffix(' ?') for figure in figures) + mark

    for row in table2.ROWS:
        if not row.det:  # in one line, without figures
            assert row.config in told or row.config == 'effformerv2_s1'
            continue
        det, seg = table2.published(row, 'det'), table2.published(row, 'seg')
        assert told[row.config] == [row.params.replace(' ?', ' (?)'), printed(det, 'box'),
                                    printed(det, 'mask'), seg['mIoU']]
