"""Published figures, and measured ones from the work dirs of tools/train.py and tools/test.py."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from support.helpers import ROOT, free_port
from support.helpers import run_tool as run

from mmeffformer.apis import report
from mmeffformer.datasets import write_ade20k
from mmeffformer.models import ARCHS, ARCHS_V2

MODELS = report.read_models()
DET, SEG = 'maskrcnn_effformer_l1', 'semfpn_effformer_l1'
COCO = {'coco/bbox_mAP': .389, 'coco/bbox_mAP_50': .6, 'coco/segm_mAP': .354}


# Measured figures -----------------------------------------------------------------------------


def leave_record(folder, name=DET, images=5000, meta=None, metrics=COCO):
    """Write what tools/test.py does."""
    folder.mkdir(parents=True)
    (folder / 'evaluation.json').write_text(json.dumps(dict(
        config=f'configs/{name}.py', checkpoint='work_dirs/epoch_7.pth', images=images,
        meta=dict(epoch=7, iter=51310) if meta is None else meta, metrics=metrics)))


def leave_training(work_dir, *records, name=DET):
    """Write what mmengine logs of a training run."""
    path = work_dir / '20260101_000000/vis_data/scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, records)))
    (work_dir / f'{name}.py').touch()


@pytest.mark.parametrize('name, record, source', [
    (DET, {}, 'epoch_7.pth, epoch 7 of 12, 5000 of 5000 images'),
    (DET, dict(images=50), 'epoch_7.pth, epoch 7 of 12, 50 of 5000 images'),
    (DET, dict(meta={}), 'epoch_7.pth, unknown training, 5000 of 5000 images'),
    (SEG, dict(images=2000), 'epoch_7.pth, iteration 51310 of 40000, 2000 of 2000 images'),
    (DET, dict(meta=dict(converted_from='l1.pth')),
     'epoch_7.pth, converted from l1.pth, 5000 of 5000 images')])
def test_an_evaluation_names_checkpoint_training_and_images(tmp_path, name, record, source):
    leave_record(tmp_path / 'a/b', name, **record)
    (found,), problems = report.read_measurements(tmp_path, MODELS)
    assert problems == []
    assert (found.model, found.source, found.path) == (name, source, tmp_path / 'a/b')


def test_the_last_validation_of_a_training(tmp_path):
    leave_training(tmp_path / 'net', dict(step=10, epoch=1, loss=1.),
                   {'step': 1, 'coco/bbox_mAP': .2}, dict(step=20, epoch=2, loss=.9),
                   {'step': 2, 'coco/bbox_mAP': .3, 'time': 1.})
    (found,), problems = report.read_measurements(tmp_path, MODELS)
    assert problems == [] and found.model == DET and found.figures == {'box AP': 30.}
    assert found.source == 'validation, epoch 2 of 12, unknown number of images'


def test_unusable_results_are_named(tmp_path):
    leave_record(tmp_path / 'good')
    leave_record(tmp_path / 'broken')
    (tmp_path / 'broken/evaluation.json').write_text('{"config": "x.py"}')
    leave_training(tmp_path / 'early', dict(step=10, epoch=1, loss=1.))
    leave_training(tmp_path / 'two', dict(step=10, epoch=1, loss=1.))
    (tmp_path / 'two/other.py').touch()
    leave_record(tmp_path / 'demo', 'maskrcnn_effformer_l1_shapes')  # not in the metafiles
    found, problems = report.read_measurements(tmp_path, MODELS)
    assert [each.path.name for each in found] == ['good']
    for problem, message in zip(problems, (
            "broken/evaluation.json cannot be used: KeyError('meta')",
            'early cannot be used: ValueError(\'the training has not been validated yet\')',
            f'two cannot be used: ValueError(\'it holds the configs of {DET}, other;')):
        assert f'{tmp_path}/{message}' in problem
    with pytest.raises(FileNotFoundError, match='nowhere is not a folder'):
        report.read_measurements(Path('nowhere'), MODELS)


def test_report_shows_measured_next_to_published(tmp_path):
    leave_record(tmp_path / 'a')
    measurements, _ = report.read_measurements(tmp_path, MODELS)
    models = [MODELS[name] for name in (DET, 'maskrcnn_effformer_l7', 'maskrcnn_effformerv2_s0')]
    lines = report.markdown_report(models, measurements, ['b is broken']).splitlines()
    assert lines[2] == ('| model | figures | Params (M) | box AP | box AP50 | box AP75 | mask AP '
                        '| mask AP50 | mask AP75 |')
    assert lines[4:8] == [
        f'| {DET} | published | 31.5 | 37.9 | 60.3 | 41.0 | 35.4 | 57.3 | 37.3 |',
        '|  | measured: epoch_7.pth, epoch 7 of 12, 5000 of 5000 images; '
        f'`{tmp_path / "a"}` | – | 38.9 (+1.0) | 60.0 (-0.3) | – | 35.4 (+0.0) | – | – |',
        '| maskrcnn_effformer_l7 | published | – | 42.6 ? | 65.1 ? | 46.1 ? | 39.0 ? | 62.2 ? '
        '| 41.7 ? |',
        '| maskrcnn_effformerv2_s0 | not published | – | – | – | – | – | – | – |']
    assert '- b is broken' in lines


@pytest.mark.parametrize('name, frozen', [
    ('effformer_l1', 0), ('poolformer_s12', 0), ('effformerv2_s2', 0),
    # The paper leaves out what ResNet does not train: 7 x 7 conv, its norm, stage 1.
    ('resnet18', 64 * 3 * 49 + 128 + 4 * (64 * 64 * 9 + 128))])
def test_counted_parameters_of_detectors_are_the_published_ones(name, frozen):
    model = MODELS[f'maskrcnn_{name}']
    params = report.count(model).figures['Params (M)'] - frozen / 1e6
    assert f'{params:.1f}' == model.published['Params (M)']


@pytest.mark.parametrize('name', [*(f'effformer_{arch}' for arch in ARCHS),
                                  *(f'effformerv2_{arch}' for arch in ARCHS_V2)])
def test_counts_of_backbones_are_the_published_ones(name):
    model = MODELS[name]
    figures = report.count(model).figures
    assert figures['GMACs'] == pytest.approx(float(model.published['GMACs']), rel=.012)
    with torch.device('meta'):
        classifier = timm.create_model(name.replace('eff', 'efficient'))
    params = {key: p.numel() for key, p in classifier.named_parameters()}
    assert sum(params.values()) == int(model.metadata['Parameters'])
    assert round(1e6 * figures['Params (M)']) == sum(
        size for key, size in params.items() if not key.startswith(('head', 'norm.')))


# The tools ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def work_dirs(tmp_path_factory):
    """A model of the metafiles, but tiny, trained, and evaluated by two processes."""
    root = tmp_path_factory.mktemp('report')
    write_ade20k(root / 'shapes', train=8, val=3, size=(64, 96), progress=False)
    config, work_dir = root / f'{SEG}.py', root / 'work_dirs' / SEG
    config.write_text((ROOT / 'tests/data/semfpn_tiny.py').read_text())
    options = ['--data-root', root / 'shapes', '--work-dir', work_dir]
    run('tools/train.py', config, *options)
    done = subprocess.run(
        ['bash', 'tools/dist_test.sh', config, work_dir / 'iter_2.pth', '2', *options,
         '--cfg-options', 'env_cfg.dist_cfg.backend=gloo'],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
        env={**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
             'PORT': str(free_port()), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-3000:]
    return root / 'work_dirs'


def test_what_the_tools_leave_is_read(work_dirs):
    # Two processes leave one record.
    (evaluation, validation), problems = report.read_measurements(work_dirs, MODELS)
    assert problems == []
    assert evaluation.source == 'iter_2.pth, iteration 2 of 40000, 3 of 2000 images'
    assert validation.source == 'validation, iteration 2 of 40000, unknown number of images'
    assert evaluation.figures['mIoU'] == pytest.approx(validation.figures['mIoU'], abs=.01)
    assert 0 < evaluation.figures['mIoU'] < 100


def test_tool_prints_and_saves_the_report(work_dirs, tmp_path):
    printed = run('tools/analysis_tools/report.py', work_dirs, '--models', SEG, '--count',
                  '--json', tmp_path / 'a/report.json')
    assert f'| {SEG} | published | 38.9 | – | – |' in printed
    assert 'measured: iter_2.pth, iteration 2 of 40000, 3 of 2000 images' in printed
    assert 'GMACs without heads at 512 x 512 px' in printed and '| 15.6 | 20.03 |' in printed
    saved = json.loads((tmp_path / 'a/report.json').read_text())
    assert [model['published'] for model in saved['models']] == [{'mIoU': '38.9'}]
    assert len(saved['measurements']) == 3 and saved['problems'] == []
    assert saved['measurements'][2]['figures']['GMACs'] == pytest.approx(20.03, abs=.01)


def test_tool_explains_mistakes():
    assert '--models l9: no such model; choose from maskrcnn_resnet18, ' in run(
        'tools/analysis_tools/report.py', '--models', 'l9', expect=None)


# Published figures of others ------------------------------------------------------------------


def test_figures_of_the_libraries_and_of_peers():
    assert report.read_library_published(
        'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py') == {'box AP': '40.5',
                                                                'mask AP': '35.4'}
    found = report.read_library_published(
        'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py')
    assert found['mIoU'] == '37.49'
    with pytest.raises(FileNotFoundError, match='none.py'):
        report.read_library_published('mmdet::rtmdet/none.py')
    assert report.read_peers('mask AP')['RF-DETR-Seg-N'] == 40.3
    assert report.read_peers('mIoU') == {}
