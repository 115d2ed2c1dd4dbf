"""The V1 backbone equals timm's and transformers' networks."""
import pytest
import timm
import torch
from support.helpers import assert_close, assert_losses_close, image
from timm.models.efficientformer import Attention as TimmAttention
from torch import nn

from mmeffformer import EfficientFormer, load_weights

# A network of every kind of part that runs in milliseconds.
TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))


def tiny(**kwargs) -> EfficientFormer:
    return EfficientFormer(TINY, **kwargs)


def timm_twin(arch: str, randomize, bias_grid=(7, 7)):
    """Return timm's network with random weights and the backbone with the same, in float64."""
    reference = timm.create_model(f'efficientformer_{arch}')
    for block in reference.stages[3].blocks:
        if hasattr(block, 'norm1'):
            dim = block.token_mixer.qkv.in_features
            block.token_mixer = TimmAttention(dim, resolution=bias_grid)
    randomize(reference).double().eval()
    backbone = EfficientFormer(arch, bias_grid=bias_grid, out_norm_cfg=None).double().eval()
    load_weights(backbone, reference.state_dict())
    return reference, backbone


def timm_features(model, x):
    """The four stages' outputs of timm's network, at any size of the last grid."""
    x = model.stem(x)
    features = []
    for stage in model.stages:
        x = stage(x)
        if x.dim() == 3:
            height, width = (-(-n // 2) for n in features[-1].shape[2:])
            x = x.transpose(1, 2).unflatten(2, (height, width))
        features.append(x)
    return features


@pytest.mark.parametrize('arch', ['l1', 'l3', 'l7'])
def test_features_equal_timm_at_224(arch, randomize):
    reference, backbone = timm_twin(arch, randomize)
    x = image(224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = reference.forward_intermediates(x, intermediates_only=True)
        assert_close(backbone(x), expected, 1e-9)


@pytest.mark.parametrize('grid', [(5, 9), (12, 4), (25, 3)])
def test_features_equal_timm_with_attention_built_for_another_grid(grid, randomize):
    reference, backbone = timm_twin('l1', randomize, grid)
    # The last row and column of tokens see only a part of their 32 px.
    x = image(grid[0] * 32 - 3, grid[1] * 32 - 31, dtype=torch.float64)
    with torch.no_grad():
        assert_close(backbone(x), timm_features(reference, x), 1e-9)


@pytest.mark.parametrize('train, side', [(False, 224), (True, 96)])
def test_gradients_of_every_parameter_equal_timm(train, side, randomize):
    reference, backbone = timm_twin('l1', randomize, (side // 32, side // 32))
    reference.train(train)
    backbone.train(train)
    x = image(side, side, batch=2, dtype=torch.float64)
    # A convolution's bias has no effect on what a BatchNorm in training makes of it.
    assert_losses_close(reference, timm_features(reference, x), backbone, backbone(x),
                        zero=['conv.bias'] * train)


def test_norm_and_activation_follow_their_configs():
    model = tiny(norm_cfg=dict(type='SyncBN', eps=1e-3), act_cfg=dict(type='SiLU'))
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 2 + 3 + 2 * 4 and {norm.eps for norm in norms} == {1e-3}
    assert not [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GELU))]
    assert len([m for m in model.modules() if isinstance(m, nn.SiLU)]) == 7
    frozen = tiny(norm_cfg=dict(type='BN', requires_grad=False))
    assert not frozen.stem[0].norm.weight.requires_grad


def test_layer_scale_init_value():
    model = tiny(layer_scale_init_value=1e-3)
    scales = [p for key, p in model.named_parameters() if 'layer_scale' in key]
    assert len(scales) == 14 and all((p == 1e-3).all() for p in scales)


def test_expansion():
    model = EfficientFormer(dict(TINY, expansion=2.5))
    assert model.stages[0].blocks[0].mlp.expand.conv.out_channels == 20
    assert model.stages[3].blocks[2].mlp.expand.out_features == 60
