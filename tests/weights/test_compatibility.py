"""Checkpoints of whole models, told from others."""
import pytest
import torch
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.weights.compatibility import check_compatible

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))


def model(bias_grid=7):
    return nn.ModuleDict({'backbone': EfficientFormer(TINY, bias_grid=bias_grid),
                          'head': nn.Linear(24, 5)})


def saved(tmp_path, change=lambda state: state, **beside):
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': change(model().state_dict()), **beside}, path)
    return str(path)


def test_what_training_saved_fits(tmp_path):
    check_compatible(model(), saved(tmp_path, meta={'epoch': 3}))
    check_compatible(model(), saved(tmp_path, lambda state: {
        f'module.{k}': v for k, v in state.items()}))
    check_compatible(model(), saved(tmp_path, lambda state: {**state, 'more': torch.zeros(1)}))
    check_compatible(model(bias_grid=(9, 5)), saved(tmp_path))


@pytest.mark.parametrize('change, message', [
    (lambda state: {k: v for k, v in state.items() if 'head' not in k},
     '2 are missing, first head.weight'),
    (lambda state: {**state, 'head.weight': torch.zeros(3, 24), 'head.bias': torch.zeros(3)},
     r'2 have another shape, first head.weight: \(3, 24\) instead of \(5, 24\)'),
    (lambda state: {k: v[:4] if k.endswith('bias.table') else v for k, v in state.items()},
     '1 have another shape, first backbone.stages.3.blocks.0.token_mixer.bias.table'),
])
def test_what_does_not_fit_is_told(tmp_path, change, message):
    path = saved(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        check_compatible(model(), path)
    assert f'checkpoint {path} is not of this config' in str(caught.value)
