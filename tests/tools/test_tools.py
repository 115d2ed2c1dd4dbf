"""The tools, run like users run them."""
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from pycocotools.mask import decode
from support.helpers import ROOT, cache_published_l1, free_port, scalars
from support.helpers import run_tool as run
from torchvision.ops import batched_nms

from mmeffformer import EfficientFormer
from mmeffformer.datasets import write_coco

DEMO = 'configs/demo/maskrcnn_effformer_l1_shapes.py'
# Log and save every step or two.
OFTEN = ['default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=2']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Train the demo for two steps and return (data root, work dir)."""
    folder = tmp_path_factory.mktemp('demo')
    data, work_dir = folder / 'shapes', folder / 'work'
    write_coco(data, train=16, val=3, size=(96, 128), progress=False)
    run('tools/train.py', DEMO, '--data-root', data, '--work-dir', work_dir,
        '--cfg-options', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2', *OFTEN)
    return data, work_dir


def test_training_saves_and_evaluates(trained):
    data, work_dir = trained
    *steps, last = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]
    assert all(np.isfinite(step['loss']) for step in steps)
    assert {'coco/bbox_mAP_50', 'coco/segm_mAP_50'} <= {*last}
    assert (work_dir / 'iter_2.pth').is_file()


def test_evaluation_is_of_the_checkpoint_given(trained, tmp_path):
    data, work_dir = trained
    printed = run('tools/test.py', DEMO, work_dir / 'iter_2.pth', '--data-root', data,
                  '--work-dir', tmp_path, '--out', tmp_path / 'found.pkl',
                  '--show-dir', tmp_path / 'shown', '--at-least', 'coco/bbox_mAP=2', expect=1)
    assert re.search(r'coco/bbox_mAP is \S+, expected at least 2.0', printed)
    shown = [path for path in (tmp_path / 'shown').rglob('*') if path.suffix in ('.jpg', '.png')]
    assert len(shown) == 3
    found = pickle.loads((tmp_path / 'found.pkl').read_bytes())
    model = init_detector(str(ROOT / DEMO), str(work_dir / 'iter_2.pth'), device='cpu')
    assert len(found) == 3
    for sample in found:
        expected = inference_detector(model, sample['img_path']).pred_instances
        assert len(expected) > 0
        torch.testing.assert_close(sample['pred_instances']['scores'], expected.scores)
        torch.testing.assert_close(sample['pred_instances']['bboxes'], expected.bboxes)
        masks = np.stack([decode(mask) for mask in sample['pred_instances']['masks']])
        assert (masks == expected.masks.numpy()).all()


def test_boxes_with_test_time_augmentation(trained, tmp_path):
    data, work_dir = trained
    options = ['model.roi_head.mask_head=None', 'test_evaluator.metric=bbox']
    printed = run('tools/test.py', DEMO, work_dir / 'iter_2.pth', '--data-root', data,
                  '--work-dir', tmp_path, '--tta', '--out', tmp_path / 'found.pkl',
                  '--cfg-options', *options)
    assert 'coco/bbox_mAP' in printed and not [*tmp_path.rglob('evaluation.json')]
    model = init_detector(str(ROOT / DEMO), str(work_dir / 'iter_2.pth'), device='cpu')
    for sample in pickle.loads((tmp_path / 'found.pkl').read_bytes()):
        image = cv2.imread(sample['img_path'])
        plain, mirrored = (inference_detector(model, view).pred_instances
                           for view in (image, np.ascontiguousarray(image[:, ::-1])))
        boxes = mirrored.bboxes.clone()
        boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
        scores = torch.cat([plain.scores, mirrored.scores])
        kept = batched_nms(torch.cat([plain.bboxes, boxes]), scores,
                           torch.cat([plain.labels, mirrored.labels]), 0.5)[:100]
        found = sample['pred_instances']
        torch.testing.assert_close(found['scores'], scores[kept])
        # Rounding may exchange boxes of nearly equal scores.
        distance = torch.cdist(found['bboxes'], torch.cat([plain.bboxes, boxes])[kept],
                               compute_mode='donot_use_mm_for_euclid_dist')
        assert distance.amin(0).max() < .01 and distance.amin(1).max() < .01


# Tools that take a checkpoint
TAKES = {'tools/test.py': '{path} --data-root {data}',
         'tools/infer.py': '{path} {data}/val --out-dir {out}/drawn',
         'tools/train.py': '--data-root {data} --work-dir {out} --resume {path}'}


@pytest.mark.parametrize('tool', TAKES)
def test_checkpoints_of_other_models_are_refused(trained, tmp_path, tool):
    path = tmp_path / 'backbone.pth'
    torch.save(dict(EfficientFormer('l1').state_dict(), optimizer={}, message_hub={},
                    meta=dict(iter=1, epoch=0)), path)
    options = TAKES[tool].format(path=path, data=trained[0], out=tmp_path)
    printed = run(tool, DEMO, *options.split(), expect=1)
    assert f'checkpoint {path} is not of this config' in printed
    assert 'are missing, first backbone.stem.0.conv.weight' in printed
    assert 'Traceback' not in printed


class Hostile:
    """Creates a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize('tool', TAKES)
def test_code_in_a_checkpoint_is_not_run(trained, tmp_path, tool):
    path, marker = tmp_path / 'hostile.pth', tmp_path / 'ran'
    torch.save({'state_dict': {}, 'meta': Hostile(marker)}, path)
    options = TAKES[tool].format(path=path, data=trained[0], out=tmp_path)
    printed = run(tool, DEMO, *options.split(), expect=1)
    assert f'{path} was refused' in printed and 'Traceback' not in printed
    assert not marker.exists()


def test_learning_rate_scales_with_the_batch(trained, tmp_path):
    data, _ = trained
    run('tools/train.py', DEMO, '--data-root', data, '--work-dir', tmp_path, '--auto-scale-lr',
        '--cfg-options', 'train_cfg.max_iters=1', 'train_cfg.val_interval=9',
        'train_dataloader.batch_size=2', 'param_scheduler=[]', *OFTEN)
    # 1e-3 is for 4 images.
    assert scalars(tmp_path)[0]['lr'] == pytest.approx(5e-4)


def test_drawing_on_images_folders_and_video(trained, tmp_path):
    data, work_dir = trained
    video = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*'MJPG'), 10, (128, 96))
    image = cv2.imread(str(sorted((data / 'val').iterdir())[0]))
    for _ in range(3):
        writer.write(image)
    writer.release()
    out = tmp_path / 'out'
    printed = run('tools/infer.py', DEMO, work_dir / 'iter_2.pth', data / 'val', video,
                  '--score-thr', '0', '--out-dir', out, '--page', tmp_path / 'page.png')
    assert '4 drawn files' in printed
    for source in (data / 'val').iterdir():
        drawn = cv2.imread(str(out / source.name))
        assert drawn.shape == (96, 128, 3)
        assert (drawn != cv2.imread(str(source))).mean() > .2
    frames = cv2.VideoCapture(str(out / 'clip.avi.mp4'))
    assert frames.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert cv2.imread(str(tmp_path / 'page.png')).std() > 10


def test_unreadable_images_are_skipped_and_named(trained, tmp_path):
    data, work_dir = trained
    shutil.copytree(data / 'val', tmp_path / 'in')
    (tmp_path / 'in/000.jpg').write_bytes(b'no image')
    printed = run('tools/infer.py', DEMO, work_dir / 'iter_2.pth', tmp_path / 'in', '--out-dir',
                  tmp_path / 'out', expect=1)
    assert '3 drawn files' in printed and '000.jpg cannot be read as an image' in printed
    assert 'Traceback' not in printed and len([*(tmp_path / 'out').iterdir()]) == 3


def test_coco_config_on_pictures_of_cocos_sizes(tmp_path):
    """The config and the name of its weights are the published ones; the images are drawn."""
    data, work_dir = tmp_path / 'coco', tmp_path / 'work'
    write_coco(data, train=2, val=1, coco2017=True, progress=False)
    cache_published_l1(tmp_path)
    config = 'configs/detection/maskrcnn_effformer_l1.py'
    some = 'model.test_cfg.rcnn.score_thr=0'  # two steps may leave no detection above the default
    printed = run('tools/train.py', config, '--data-root', data, '--work-dir', work_dir,
                  '--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1',
                  'train_dataloader.batch_size=1', some, env={'TORCH_HOME': str(tmp_path)})
    assert 'layout transformers' in printed
    assert 'bias tables resampled from 7 x 7 to 25 x 25' in printed
    *steps, last = scalars(work_dir)
    assert len(steps) == 2 and all(np.isfinite(step['loss']) for step in steps)
    assert 'coco/segm_mAP' in last
    printed = run('tools/test.py', config, work_dir / 'epoch_1.pth', '--data-root', data,
                  '--work-dir', tmp_path / 'test', '--cfg-options', some)
    assert 'coco/segm_mAP' in printed


def test_weights_that_cannot_be_fetched_are_named(tmp_path):
    data = tmp_path / 'coco'
    write_coco(data, train=2, val=1, size=(64, 64), coco2017=True, progress=False)
    printed = run('tools/train.py', 'configs/detection/maskrcnn_effformer_l1.py',
                  '--data-root', data, '--work-dir', tmp_path / 'work', expect=1,
                  # Nothing listens there, so the connection is refused at once.
                  env={'TORCH_HOME': str(tmp_path), 'https_proxy': 'http://127.0.0.1:9'})
    assert 'hf-hub:snap-research/efficientformer-l1-300 could not be fetched' in printed
    assert str(tmp_path / 'hub/checkpoints') in printed
    assert 'Traceback' not in printed


def test_model_stats_are_the_published_ones():
    # 1.3 GMACs (paper, Table 1), of a classifier whose heads add 0.001.
    printed = run('tools/model_stats.py', 'l1')
    assert re.search(r'whole\W+11,391,032\W+1\.290\b', printed)
    printed = run('tools/model_stats.py', 'configs/detection/maskrcnn_effformer_l3.py',
                  '--shape', '800', '1344')
    assert re.search(r'backbone\.stages\.3\W+19,370,016\W+25\.910\b', printed)
    assert re.search(r'neck\W+2,623,488\W+54\.775\b', printed)


def test_dist_train_runs_two_processes(trained, tmp_path):
    data, _ = trained
    work_dir = tmp_path / 'work'
    done = subprocess.run(
        ['bash', 'tools/dist_train.sh', DEMO, '2', '--data-root', data, '--work-dir', work_dir,
         '--cfg-options', 'env_cfg.dist_cfg.backend=gloo', 'train_cfg.max_iters=2',
         'train_cfg.val_interval=2', 'train_dataloader.batch_size=2', *OFTEN],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
        env={**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
             'PORT': str(free_port()), 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stdout[-3000:]
    *steps, last = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]
    assert 'coco/bbox_mAP' in last
