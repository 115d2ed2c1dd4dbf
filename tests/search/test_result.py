"""Configs and weights of the networks found, in a segmentor, a classifier and a detector."""
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from support.detectors import NARROW
from support.helpers import assert_close, made_up_table

from mmeffformer import EfficientFormer
from mmeffformer.datasets import write_coco
from mmeffformer.search.result import finish, write_network
from mmeffformer.search.search import Search, Share
from mmeffformer.utils.registry import MODELS

WIDTHS = (16, 32, 32, 48)
SUPERNET = dict(
    type='mmeffformer.SuperEfficientFormer', layer_scale_init_value=.1,
    arch=dict(widths=WIDTHS, depths=(1, 1, 2, 2)))


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    """A made-up table, in which every part takes 0.01 ms per channel."""
    return str(made_up_table(tmp_path_factory.mktemp('table') / 'table.json', (64, 64), WIDTHS,
                             lambda part: sum(part.widths) / 100))


def configure(cfg: Config, scale, batch_size, **dataset):
    """Give a config the supernet as its backbone, and small batches of small images."""
    cfg.model.backbone = dict(SUPERNET, out_indices=cfg.model.backbone.get(
        'out_indices', (0, 1, 2, 3)))
    cfg.param_scheduler = []
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
        loader.dataset.update(dataset)
        for step in loader.dataset.pipeline:
            if step['type'] in ('RandomResizedCrop', 'Resize'):
                step['scale'] = scale


def classifier(repo_root, folder) -> Config:
    rng = np.random.default_rng(0)
    for name, i in product('abc', range(3)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name / f'{i}.png'),
                    rng.integers(0, 255, (80, 72, 3), dtype=np.uint8))
    cfg = Config.fromfile(repo_root / 'configs/search/imagenet_super_l3.py')
    cfg.merge_from_dict(dict(
        model=dict(head=dict(in_channels=48, num_classes=3),
                   data_preprocessor=dict(num_classes=3)), train_cfg=dict(max_epochs=1)))
    configure(cfg, 64, 4, type='CustomDataset', data_root='', with_label=True,
              data_prefix=str(folder))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.pop('split', None)
    cfg.val_evaluator.topk = cfg.test_evaluator.topk = (1,)
    return cfg


def detector(repo_root, folder) -> Config:
    write_coco(folder, train=4, val=2, size=(64, 96), progress=False)
    cfg = Config.fromfile(repo_root / 'configs/demo/maskrcnn_effformer_l1_shapes.py')
    cfg.merge_from_dict(NARROW)
    cfg.merge_from_dict(dict(
        model=dict(neck=dict(in_channels=list(WIDTHS)),
                   test_cfg=dict(rcnn=dict(score_thr=0., max_per_img=20))),
        train_cfg=dict(max_iters=1, val_interval=2),
        val_evaluator=dict(ann_file=str(folder / 'annotations/instances_val.json')),
        custom_hooks=[dict(type='mmeffformer.TemperatureHook')],
        optim_wrapper=dict(paramwise_cfg=dict(custom_keys=dict(importance=dict(lr_mult=5.))))))
    configure(cfg, (96, 64), 2, data_root=str(folder))
    return cfg


@pytest.mark.parametrize('make, metric, reader', [
    (classifier, 'accuracy/top1', 'head.fc.weight'),
    (detector, 'coco/bbox_mAP', 'neck.lateral_convs.3.conv.weight'),
])
def test_searched_cut_and_trained(repo_root, tmp_path, table, make, metric, reader):
    cfg = make(repo_root, tmp_path / 'data')
    init_default_scope(cfg.default_scope)
    checkpoint = tmp_path / 'supernet.pth'
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), checkpoint)
    cfg.work_dir = str(tmp_path / 'slim')
    search = Search(cfg, str(checkpoint), table, Share(.6), batches=1)
    steps = search.slim()
    assert search.evaluation.metric == metric
    found = steps[-1].network
    assert search.ms(found) <= .6 * search.ms(search.start)
    # The last stage is narrowed as well, so that the layer that reads it is cut.
    widths = (16, 16, 32, 32)
    config = write_network(
        search, steps[-1]._replace(network=type(found)(found.choices, widths)), 'found')

    cfg = Config.fromfile(config)
    cfg.work_dir = str(tmp_path / 'trained')
    runner = Runner.from_cfg(cfg)
    assert isinstance(runner.model.backbone, EfficientFormer)
    assert runner.model.backbone.arch.widths == widths
    state = torch.load(cfg.load_from, weights_only=True)['state_dict']
    assert state[reader].shape[1] == 32
    kept = search.evaluation.ranking['stage.3'][:32].sort().values
    assert torch.equal(state[reader], search.model.state_dict()[reader][:, kept])
    runner.model.load_state_dict(state)
    runner.train()  # starts from these


@pytest.fixture(scope='module')
def config(slimmed):
    """The config that a finished search has written."""
    search, steps = slimmed
    return finish(search, steps, {}, {'l1': None})


def test_config_and_weights_are_those_evaluated(slimmed, config, tmp_path):
    search, steps = slimmed
    cfg = Config.fromfile(config)
    assert cfg.model.backbone.type == 'mmeffformer.EfficientFormer'
    assert cfg.model.neck.in_channels == list(steps[-1].network.widths)
    assert not cfg.custom_hooks and 'importance' not in str(cfg.optim_wrapper)
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.load_checkpoint(cfg.load_from, strict=True)
    loop = runner.val_loop
    metrics = loop.run()
    assert metrics['mIoU'] == steps[-1].accuracy
    assert torch.load(cfg.load_from, weights_only=True)['meta']['accuracy'] == metrics['mIoU']
    # mIoU is rounded; logits are not.
    data = runner.model.data_preprocessor(next(iter(loop.dataloader)), False)
    with torch.no_grad(), search.evaluation.installed(steps[-1].network) as model:
        logits = [each(data['inputs'], mode='tensor') for each in (runner.model.eval(), model)]
    assert_close(logits[:1], logits[1:], 1e-4)
