"""Checkpoints in the format of the authors' code, with reproducible values."""
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope

from mmeffformer.utils.registry import MODELS

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'tests/data'
# Layout of the authors' code: config of the same model in this project
CONFIGS = {
    'det_v1_l1': 'detection/maskrcnn_effformer_l1',
    'det_v2_s0': 'detection/maskrcnn_effformerv2_s0',
    'seg_v1_l1': 'segmentation/semfpn_effformer_l1',
    'seg_v2_s0': 'segmentation/semfpn_effformerv2_s0',
}


def value(key: str, shape) -> torch.Tensor:
    """Return values that depend on the key only, as in the parity vectors."""
    rng, name = np.random.default_rng(zlib.crc32(key.encode())), key.rsplit('.', 1)[-1]
    if name == 'num_batches_tracked':
        array = np.zeros(shape, np.int64)
    elif name == 'running_var':
        array = rng.uniform(.5, 1.5, shape)
    elif 'layer_scale' in name or name == 'gamma' or '.ls' in key:
        array = rng.uniform(.1, .5, shape)
    elif name.startswith('attention_biases'):
        array = rng.normal(0, 1, shape)
    elif name == 'weight' and len(shape) == 1:
        array = 1 + rng.normal(0, .1, shape)
    elif name == 'weight':
        array = rng.normal(0, int(np.prod(shape[1:])) ** -.5, shape)
    else:
        array = rng.normal(0, .1, shape)
    return torch.from_numpy(array.astype(array.dtype if array.dtype == np.int64 else np.float32))


def official(name: str) -> dict:
    shapes = json.loads((DATA / 'keys' / f'{name}.json').read_text())
    return {key: torch.zeros(shape, dtype=torch.int64) if 'idxs' in key else value(key, shape)
            for key, shape in shapes.items()}


@torch.no_grad()
def parity_error(backbone, name: str) -> float:
    """Return the largest difference from the outputs of the authors' network.

    It is relative to the largest value of its level. Levels of other shapes raise.
    """
    path, = DATA.glob(f'official_{name}_*.npz')
    height, width = map(int, path.stem.rpartition('_')[2].split('x'))
    x = np.random.default_rng(height * 10007 + width).normal(0, 1, (1, 3, height, width))
    levels, vectors = backbone(torch.from_numpy(x.astype(np.float32))), np.load(path)
    assert [level.shape for level in levels] == [tuple(vectors[f'shape{i}']) for i in range(4)]
    samples = [(level[:, ::7, ::3, ::5].numpy(), vectors[f'level{i}'])  # as they were saved
               for i, level in enumerate(levels)]
    return max(np.abs(found - expected).max() / np.abs(expected).max()
               for found, expected in samples)


def build(name: str, **backbone):
    cfg = Config.fromfile(ROOT / f'configs/{name}.py')
    cfg.model.backbone.update(init_cfg=None, bias_mode='legacy', **backbone)
    init_default_scope(cfg.default_scope)
    return revert_sync_batchnorm(MODELS.build(cfg.model)).eval()


def authors_checkpoint(name: str, tmp_path, **change) -> Path:
    """Save a file as the authors' training does, with the neck and heads of this project."""
    model = build(CONFIGS[name])
    state = {f'backbone.{key}': value for key, value in official(f'official_{name}').items()}
    state.update((key, torch.rand_like(value) if value.is_floating_point() else value)
                 for key, value in model.state_dict().items() if not key.startswith('backbone.'))
    state.update(change)
    path = tmp_path / 'epoch_12.pth'
    torch.save(dict(meta=dict(epoch=12, CLASSES=('person', 'bicycle')), state_dict=state,
                    optimizer=dict(state={}, param_groups=[])), path)
    return path
