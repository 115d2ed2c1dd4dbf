"""Counts against arithmetic by hand."""
import torch
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.utils.complexity import Complexity, complexity


def test_parts_of_a_backbone():
    *parts, whole = complexity(EfficientFormer('l1', out_norm_cfg=None), (224, 224))
    assert [part.name for part in parts] == ['stem', *(f'stages.{i}' for i in range(4))]
    assert sum(part.macs for part in parts) == whole.macs
    assert sum(part.params for part in parts) == whole.params


def test_attention_products_are_counted():
    def macs(height, width):
        backbone = EfficientFormer('l1', out_norm_cfg=None)
        return {part.name: part.macs for part in complexity(backbone, (height, width), depth=3)}

    tokens = 7 * 7
    name = 'stages.3.blocks.3.token_mixer'
    # q k and attention v, of 8 heads with 32 and 128 channels; then qkv and proj.
    assert macs(224, 224)[name] == tokens**2 * 8 * (32 + 128) + tokens * 448 * (1536 + 1024)
    tokens = 4 * 10
    assert macs(128, 320)[name] == tokens**2 * 8 * (32 + 128) + tokens * 448 * (1536 + 1024)


def test_parts_of_an_ordinary_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
                        nn.ReLU(), nn.ModuleDict({'a': nn.Conv2d(4, 5, 1)})['a'])
    assert complexity(net, (8, 6)) == [
        Complexity('0', 3 * 4 * 9, 3 * 4 * 9 * 4 * 3), Complexity('2', 25, 20 * 4 * 3),
        Complexity('', 3 * 4 * 9 + 25, (3 * 4 * 9 + 20) * 4 * 3)]
    assert {p.device for p in net.parameters()} == {torch.device('meta')}
