"""Random networks and the rank correlation of a table's validation."""
import pytest

from mmeffformer.latency.measuring import new_header
from mmeffformer.latency.validation import random_archs, spearman


def test_random_networks_change_to_tokens_once():
    header = new_header(max_widths=(64, 128, 320, 512))
    archs = random_archs(300, header, seed=3)
    assert archs == random_archs(300, header, seed=3) != random_archs(300, header, seed=4)
    for arch in archs:
        assert all(width % 16 == 0 and width <= most
                   for width, most in zip(arch.widths, (64, 128, 320, 512)))
        assert all(depth <= most for depth, most in zip(arch.depths, (4, 4, 12, 6)))
        assert arch.attention_blocks[:2] == (0, 0)
        assert arch.attention_blocks[2] == 0 or arch.attention_blocks[3] == arch.depths[3]
        assert sum(arch.attention_blocks) <= 6
    assert {arch.attention_blocks[2] > 0 for arch in archs} == {False, True}
    assert {arch.attention_blocks[3] for arch in archs} == {*range(7)}
    assert {arch.widths[3] for arch in archs} == {*range(16, 513, 16)}


def test_spearman():
    assert spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(.5)
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(.9 ** .5)  # ties
