"""mmengine loads checkpoints through the safe reader."""
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.infer import BaseInferencer
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel, Sequential
from mmengine.registry import init_default_scope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from mmseg.apis import init_model
from support.attacks import attack, refusal
from support.helpers import ROOT, run_code
from torch import nn

from mmeffformer import EfficientFormer, load_weights
from mmeffformer.utils.registry import MODELS
from mmeffformer.weights import safe_loading
from mmeffformer.weights.compatibility import load_compatible
from mmeffformer.weights.conversion import transfer_backbone, transfer_model

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
CONFIG = ROOT / 'tests/data/semfpn_tiny.py'


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Install the safe reader for one test."""
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    safe_loading.install()


class OneWeight(BaseModel):
    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, mode='loss', **kwargs):
        return dict(loss=(self.weight * torch.stack(x)).sum())


class Numbers(BaseDataset):
    def load_data_list(self):
        return [dict(x=torch.ones(1) * i) for i in range(4)]


def toy_runner(work_dir, **options) -> Runner:
    return Runner(**{**dict(
        model=OneWeight(), work_dir=str(work_dir), default_scope='mmengine',
        train_dataloader=dict(dataset=Numbers(), batch_size=1, num_workers=0,
                              sampler=dict(type='DefaultSampler', shuffle=False),
                              collate_fn=dict(type='pseudo_collate')),
        train_cfg=dict(by_epoch=True, max_epochs=2), log_level='ERROR',
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=.1)),
        experiment_name=Path(work_dir).name), **options})


def segmentor() -> nn.Module:
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.norm_cfg = dict(type='BN')
    return MODELS.build(cfg.model)


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


PLACES = dict(
    load_weights=lambda path: load_weights(EfficientFormer(TINY), path),
    init_cfg_of_a_backbone=lambda path: EfficientFormer(
        TINY, init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_module=lambda path: Sequential(
        nn.Conv2d(1, 1, 1), init_cfg=pretrained(path)).init_weights(),
    init_cfg_of_a_model=lambda path: OneWeight(pretrained(path)).init_weights(),
    load_checkpoint=lambda path: load_checkpoint(OneWeight(), str(path)),
    runner_load=lambda path: toy_runner(path.parent / 'work').load_checkpoint(str(path)),
    runner_resume=lambda path: toy_runner(path.parent / 'work').resume(str(path)),
    runner_load_from=lambda path: toy_runner(path.parent / 'work', load_from=str(path)).train(),
    init_model=lambda path: init_model(Config.fromfile(CONFIG), str(path), 'cpu'),
    load_compatible=lambda path: load_compatible(OneWeight(), str(path)),
    transfer_model=lambda path: transfer_model(str(path), segmentor()),
    transfer_backbone=lambda path: transfer_backbone(str(path), EfficientFormer(TINY).arch,
                                                     'timm'),
)


@pytest.mark.parametrize('place', PLACES)
def test_no_place_runs_code_in_a_file(place, tmp_path):
    path, marker = tmp_path / 'file.pth', tmp_path / 'marker'
    attack(path, marker)
    assert 'was refused: it asks for posix.mkdir' in refusal(path, PLACES[place])
    assert not marker.exists()


def test_mmengine_is_changed_by_an_explicit_call_only():
    run_code('from mmengine.runner import CheckpointLoader\n'
             'before = dict(CheckpointLoader._schemes)\n'
             'import mmeffformer\n'
             'assert CheckpointLoader._schemes == before\n'
             'from mmeffformer.weights import safe_loading\n'
             'safe_loading.install()\nsafe_loading.install()\n'
             'assert {*CheckpointLoader._schemes.values()} == {safe_loading.load_from_anywhere}\n'
             'assert {*CheckpointLoader._schemes} == {*before}')


def test_names_that_mmengine_knows_are_read_safely(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    marker, url = tmp_path / 'marker', 'https://no.where/file.pth'
    path = tmp_path / 'checkpoints/file.pth'
    path.parent.mkdir()
    attack(path, marker)
    lookups = safe_loading.mmengine_checkpoint
    for lookup in ('get_torchvision_models', 'get_mmcls_models', 'get_deprecated_model_names'):
        monkeypatch.setattr(lookups, lookup, lambda: dict(toy=url))
    monkeypatch.setattr(lookups, 'get_external_models',
                        lambda: {'toy': url, url: 'checkpoints/file.pth'})

    monkeypatch.setattr(safe_loading, 'get_local_path', lambda *_, **__: nullcontext(str(path)))
    for source in (url, 'torchvision://toy', 'modelzoo://toy', 'mmcls://toy', 'open-mmlab://toy',
                   'openmmlab://toy', 's3://bucket/toy', 'petrel://toy', 'cluster:s3://a/toy'):
        with pytest.raises(ValueError, match='was refused: it asks for posix.mkdir'):
            CheckpointLoader.load_checkpoint(source, 'cpu')
    for source, message in {'mmcls://other': "mmcls has no model 'other'",
                            'pavi://toy': 'expected a path, an http',
                            'unknown://toy': 'expected a path, an http'}.items():
        with pytest.raises(ValueError, match=message):
            CheckpointLoader.load_checkpoint(source)
    assert not marker.exists()
    torch.save({'state_dict': {'backbone.a': torch.ones(1), 'head.a': torch.ones(1)}}, path)
    assert CheckpointLoader.load_checkpoint('mmcls://toy') == {'state_dict': {'a': 1.}}
    assert set(CheckpointLoader.load_checkpoint('torchvision://toy')['state_dict']) == {
        'backbone.a', 'head.a'}


@pytest.mark.parametrize('supported', sorted({False, safe_loading.SAFE_GLOBALS_SUPPORTED}))
def test_a_training_resumes_with_its_log_and_without_its_config(tmp_path, monkeypatch, supported):
    """mmengine would execute a config's text on resuming, or in an inferencer without a config."""
    monkeypatch.setattr(safe_loading, 'SAFE_GLOBALS_SUPPORTED', supported)
    work_dir, again_dir = tmp_path / f'first_{supported}', tmp_path / f'again_{supported}'
    first = toy_runner(work_dir, train_cfg=dict(by_epoch=True, max_epochs=1))
    first.train()
    logged = first.message_hub.get_scalar('train/loss')
    marker, path = tmp_path / 'marker', str(tmp_path / 'a.pth')
    made = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    code = f'import os\nos.mkdir({str(marker)!r})\nmodel = dict()\n'
    made['meta'].update(config=code, cfg=code)
    assert 'cfg' in made['message_hub']['runtime_info']
    made['message_hub']['runtime_info']['cfg'] = code
    torch.save(made, path)

    again = toy_runner(again_dir, load_from=path, resume=True)
    again.load_or_resume()
    assert again.message_hub.get_info('cfg') != code
    history = again.message_hub.get_scalar('train/loss')
    assert type(history) is HistoryBuffer and history is not logged
    assert np.array_equal(history.data[0], logged.data[0]) and len(history.data[0]) == 4
    assert history.statistics('mean') == logged.mean()
    assert (again.epoch, again.iter) == (1, 4)
    assert torch.equal(again.model.weight, first.model.weight)
    again._has_loaded = True
    again.train()
    # It is saved as mmengine's own class again.
    saved = torch.load(again_dir / 'epoch_2.pth', weights_only=False)
    values = saved['message_hub']['log_scalars']['train/loss'].data[0]
    assert len(values) == 8 and np.array_equal(values[:4], logged.data[0])
    with pytest.raises(ValueError, match='Cannot find the config in the checkpoint'):
        BaseInferencer._init_model(None, ConfigDict(), path)
    assert not marker.exists()


@pytest.mark.parametrize('place, key', [
    ('load_checkpoint', 'state_dict'), ('runner_resume', 'ema_state_dict'),
    ('init_cfg_of_a_model', 'model')])
def test_weights_that_are_not_finite_are_refused(tmp_path, place, key):
    path = tmp_path / 'a.pth'
    torch.save({'meta': {}, key: {'weight': torch.tensor([float('nan')])}}, path)
    assert 'has 1 tensors with values that are NaN or infinite, first weight' in refusal(
        path, PLACES[place])
