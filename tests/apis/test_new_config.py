"""New configs: their recipe, their models, and runs from a folder to predictions."""
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import METRICS, MODELS, init_default_scope
from support import own_data
from support.helpers import run_code, run_tool

from mmeffformer.apis import new_config as new_configs
from mmeffformer.apis.new_config import ARCHS, new_config
from mmeffformer.apis.new_config.recipe import (
    Device,
    find_anchor_scale,
    find_max_per_img,
    find_scale,
    find_schedule,
    make_palette,
)

CPU, GPU = Device(0, 0, 2), Device(2, 24, 16)


def write_objects(root: Path, photos=None, **options) -> Path:
    photos = photos or own_data.photos(6)
    own_data.save_images(root / 'photos', photos)
    own_data.write_coco(root / 'photos.json', photos, **options)
    return root


def write_labels(root: Path) -> Path:
    photos = own_data.photos(6)
    own_data.save_images(root / 'scans', photos)
    own_data.save_maps(root / 'labels', photos, values={0: 255, 1: 0, 2: 1})
    (root / 'classes.txt').write_text('\n'.join(own_data.CLASSES))
    return root


@pytest.mark.parametrize('size, side, device, pretrained, scale, anchors', [
    ((640, 480), 64, CPU, False, (512, 384), 6),
    ((640, 480), 64, GPU, True, (1280, 960), 16),
    ((640, 480), 64, GPU, False, (640, 480), 8),
    ((4000, 3000), 200, CPU, False, (512, 384), 3),
    ((4000, 3000), 200, GPU, True, (1344, 1024), 8),
    ((4000, 3000), 40, CPU, False, (800, 608), 2),  # 8 px
    ((1000, 500), 5, GPU, True, (1600, 800), 2),
    ((100, 80), 20, CPU, False, (128, 128), 3),
])
def test_scale_and_anchors(size, side, device, pretrained, scale, anchors):
    found, sizes = find_scale([size, size[::-1]], [np.full(3, side), np.full(2, side)], device,
                              pretrained)
    factor = min(scale[0] / size[0], scale[1] / size[1])
    np.testing.assert_allclose(sizes, [side * factor] * 5)
    assert found == scale and find_anchor_scale(sizes) == anchors


def test_objects_too_small_for_any_scale_are_reported(tmp_path):
    photos = own_data.photos(6, (640, 640))
    tiny = [photo._replace(objects=[own_data.Object('nut', np.array([[5, 5], [7, 5], [7, 7]]))])
            for photo in photos]
    log = new_config('det', write_objects(tmp_path / 'data', tiny), tmp_path / 'a.py',
                     pretrained=False, device=CPU).log
    assert log.warnings == ['100% of the objects are below 8 px at 1312 x 1312 px; train on crops '
                            'of the images']


@pytest.mark.parametrize('most, kept', [(1, 100), (66, 100), (67, 200), (100, 200), (150, 300)])
def test_detections_to_keep(most, kept):
    assert find_max_per_img(most) == kept


def test_schedule_follows_images_and_devices():
    small, large = (find_schedule('det', images, 900, True, GPU) for images in (200, 20000))
    assert small.batch_size == large.batch_size == 10
    assert small.num_steps == 400 and large.num_steps == 12 * 20000 // 20  # two GPUs
    assert find_schedule('det', 3, 500, False, CPU)[:2] == (3, 480)
    assert find_schedule('seg', 10**5, 500, False, CPU).num_steps == 600


def test_colours_differ():
    assert len({*make_palette(100)}) == 100


def test_more_than_100_objects_are_counted(tmp_path):
    """Ground truth as predictions has an AP of 1 by the config's evaluator only."""
    photos = own_data.photos(6, (300, 300), objects=220)
    new_config('det', write_objects(tmp_path / 'data', photos), tmp_path / 'a.py',
               pretrained=False, device=CPU)
    cfg = Config.fromfile(tmp_path / 'a.py')
    model = cfg.model
    assert model.test_cfg.rcnn.max_per_img == cfg.max_per_img == 400
    assert model.test_cfg.rpn.max_per_img == model.train_cfg.rpn_proposal.max_per_img == 1000
    init_default_scope('mmdet')
    found = []
    for options in (cfg.val_evaluator, {**cfg.val_evaluator, 'proposal_nums': (100, 300, 1000),
                                        'use_mp_eval': False}):
        metric = METRICS.build({**options, 'metric': 'bbox'})
        metric.dataset_meta = cfg.metainfo
        coco = metric._coco_api
        for number in coco.get_img_ids():
            items = coco.load_anns(coco.get_ann_ids(img_ids=[number]))
            boxes = torch.tensor([item['bbox'] for item in items])
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([item['category_id'] - 1 for item in items])
            metric.process({}, [dict(
                img_id=number, ori_shape=(300, 300), pred_instances=dict(
                    bboxes=boxes, labels=labels, scores=torch.ones(len(items))))])
        found.append(metric.evaluate(len(metric.results))['coco/bbox_mAP'])
    assert found[0] == 1 > found[1]


@pytest.fixture(scope='module')
def many_archs(tmp_path_factory):
    """Configs for both tasks and several archs, from scratch and from (made-up) weights."""
    folder, found = tmp_path_factory.mktemp('archs'), {}
    roots = dict(det=write_objects(folder / 'objects'), seg=write_labels(folder / 'labels'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(new_configs, 'locate', lambda source: Path(source))
        for task, root in roots.items():
            for arch in ('l1', 'l7', 's2'):
                for pretrained in (False, True):
                    out = folder / f'{task}_{arch}_{pretrained}.py'
                    new_config(task, root, out, arch, pretrained, device=CPU)
                    found[out] = (task, arch, pretrained)
    return found


def test_configs_load_without_a_patched_mmengine(many_archs):
    """Other programs read them so, from any folder."""
    code = ('import sys; from mmengine.config import Config\n'
            'for path in sys.argv[1:]: print(Config.fromfile(path).model.type)')
    printed = run_code(code, *list(many_archs)[4:8])  # two of each task
    assert printed.split() == ['MaskRCNN'] * 2 + ['EncoderDecoder'] * 2


def test_configs_are_short_and_have_the_arch(many_archs):
    for path, (task, arch, pretrained) in many_archs.items():
        text = path.read_text()
        lines = text.splitlines()
        assert len(lines) < 85 and max(map(len, lines)) < 100, path
        assert len(re.findall(r'num_classes = ', text)) == 1
        cfg = Config.fromfile(path)
        base = Config.fromfile(new_configs.FOLDER / new_configs.CONFIGS[
            new_configs.SCOPES[task]].format(ARCHS[arch])).model
        assert cfg.model.backbone.arch == arch
        assert cfg.model.backbone.type == base.backbone.type
        assert cfg.model.backbone.init_cfg == (base.backbone.init_cfg if pretrained else None)
        cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        assert model.neck.in_channels == list(model.backbone.out_channels)
        head = model.roi_head.bbox_head if task == 'det' else model.decode_head
        assert head.num_classes == len(cfg.metainfo.classes) == 2


def test_a_config_in_the_folder_of_the_data_is_written_again(tmp_path):
    root = write_labels(tmp_path)
    save = own_data.save_maps  # colours, so that label maps are written into the folder
    save(root / 'labels', own_data.photos(6), form='grey')
    (root / 'classes.txt').write_text('other\nnut\nbolt')
    texts = []
    for _ in range(2):
        new_config('seg', root, root / 'a.py', pretrained=False, device=CPU)
        texts.append((root / 'a.py').read_text())
        assert len(list((root / 'a_data/label_maps').rglob('*.png'))) == 6
        own_data.save_images(root / 'a_data', own_data.photos(1))  # as --preview
    assert texts[0] == texts[1]


def test_without_a_connection_the_recipe_is_from_scratch(tmp_path, monkeypatch):
    def fail(source):
        raise ConnectionError(f'{source} could not be fetched: no network\nmore')

    monkeypatch.setattr(new_configs, 'locate', fail)
    log = new_config('seg', write_labels(tmp_path / 'data'), tmp_path / 'a.py', device=CPU).log
    assert 'from scratch' in log.warnings[0] and log.warnings[0].endswith('no network')
    assert Config.fromfile(tmp_path / 'a.py').model.backbone.init_cfg is None


def run_all(task: str, root: Path, out: Path, *options) -> str:
    """Run the tools from a folder to pictures, and return what new_config.py prints."""
    new = run_tool('tools/new_config.py', '--task', task, '--data', root, '--out', out,
                   '--weights', 'none', '--preview', *options)
    work_dir = out.parent / 'work'
    run_tool('tools/train.py', out, '--work-dir', work_dir, '--cfg-options',
             'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
             'default_hooks.checkpoint.interval=2')
    checkpoint = work_dir / 'iter_2.pth'
    printed = run_tool('tools/test.py', out, checkpoint, '--work-dir', work_dir / 'test',
                       '--show-dir', work_dir / 'pictures')
    assert ('coco/segm_mAP' if task == 'det' else 'mIoU') in printed
    assert len(list((work_dir / 'pictures').rglob('*.[jp][pn]g'))) == 1
    run_tool('tools/infer.py', out, checkpoint, root, '--limit', 1, '--out-dir', work_dir / 'a')
    data = out.parent / f'{out.stem}_data'
    assert cv2.imread(str(data / 'preview.png')).std() > 20
    assert (data / 'object_sizes.png').exists() == (task == 'det')
    return new


@pytest.mark.parametrize('task, write', [('det', write_objects), ('seg', write_labels)])
def test_from_a_folder_to_predictions(task, write, tmp_path):
    root = write(tmp_path / 'data')
    printed = run_all(task, root, tmp_path / 'mine.py')
    steps = Config.fromfile(tmp_path / 'mine.py').num_steps
    for tool in 'train', 'test', 'infer', 'export':
        assert f'  python tools/{tool}.py {tmp_path}/mine.py' in printed
    assert printed.count(f'work_dirs/mine/iter_{steps}.pth') == 3
    again = run_tool('tools/new_config.py', '--task', task, '--data', root, '--out',
                     tmp_path / 'mine.py', expect=1)
    assert 'mine.py exists; choose another --out, or add --overwrite' in again


def test_objects_without_masks_get_a_box_detector(tmp_path):
    new_config('det', write_objects(tmp_path / 'data', masks=False), tmp_path / 'a.py',
               pretrained=False, device=CPU)
    cfg = Config.fromfile(tmp_path / 'a.py')
    assert cfg.val_evaluator.metric == ['bbox']
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert type(model).__name__ == 'FasterRCNN' and not model.with_mask


@pytest.mark.parametrize('options, message', [
    ('--data nope', '--data nope is not a folder'),
    ('--data docs --out a.txt', '--out a.txt must end in .py'),
    ('--data docs --images tools', '--images ... does not exist in --data docs'),
    ('--data requirements', 'requirements has no images'),
    ('--data docs --val-share 2', '--val-share 2.0: expected a number between 0 and 1'),
])
def test_user_errors_are_one_message(options, message):
    printed = run_tool('tools/new_config.py', '--task', 'det', '--weights', 'none',
                       *options.split(), expect=None)
    assert 'Traceback' not in printed
    assert all(part in printed for part in message.split(' ... '))
