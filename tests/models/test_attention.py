"""The attention bias on grids other than its own, and its cache."""
import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from mmeffformer.models.attention import (
    CACHED_GRIDS,
    AttentionBias,
    expand_table,
    resample_table,
)


def random_bias(grid=(7, 7), heads=2) -> AttentionBias:
    bias = AttentionBias(heads, grid).eval()
    torch.manual_seed(0)
    nn.init.normal_(bias.table)
    return bias


@pytest.mark.parametrize('rows, cols, stride', [(3, 4, 1), (4, 6, 2), (5, 3, 2)])
def test_expansion_is_the_table_at_every_offset(rows, cols, stride):
    table = torch.randn(2, rows, cols)
    bias = expand_table(table, stride)
    queries = [(y, x) for y in range(0, rows, stride) for x in range(0, cols, stride)]
    assert bias.shape == (2, len(queries), rows * cols)
    for i, (y, x) in enumerate(queries):
        for k in range(rows * cols):
            assert torch.equal(bias[:, i, k], table[:, abs(y - k // cols), abs(x - k % cols)])


def test_legacy_mode_stretches_the_expanded_bias_as_a_picture():
    bias = AttentionBias(2, (4, 4), stride=2, mode='legacy').eval()
    nn.init.normal_(bias.table)
    expanded = expand_table(bias.table, 2)
    assert bias((4, 4), torch.float32).equal(expanded)
    assert bias((2, 8), torch.float32).equal(expanded)  # as many tokens, whatever their grid
    stretched = nn.functional.interpolate(expanded[None], (6, 24), mode='bicubic')[0]
    with torch.no_grad():
        assert bias((4, 6), torch.float32).equal(stretched)
        assert bias((3, 8), torch.float64).dtype == torch.float64
    assert not bias._expanded


def test_resampling_keeps_zero_and_farthest_offset_and_is_linear_between():
    table = torch.tensor([[[0., 3., 9.], [1., 4., 10.]]])
    wide = resample_table(table, (3, 5))
    assert wide[0].tolist() == [[0, 1.5, 3, 6, 9], [.5, 2, 3.5, 6.5, 9.5], [1, 2.5, 4, 7, 10]]
    assert resample_table(wide, (2, 3)).equal(table)
    assert resample_table(table, (1, 1)).tolist() == [[[0]]]
    assert resample_table(table, (2, 3)) is table


def test_gradients_reach_the_table_through_another_grid():
    bias = AttentionBias(2, (3, 4)).double()
    nn.init.normal_(bias.table)
    assert torch.autograd.gradcheck(
        lambda table: expand_table(resample_table(table, (5, 3))), bias.table)


def test_cache_holds_a_few_grids_and_answers_from_them():
    bias = random_bias()
    with torch.no_grad():
        first = bias((4, 5), torch.float32)
        assert bias((4, 5), torch.float32) is first
        assert bias((4, 5), torch.bfloat16).dtype == torch.bfloat16
        for side in range(1, 9):
            bias((side, side), torch.float32)
            assert len(bias._expanded) <= CACHED_GRIDS
        assert bias((4, 5), torch.float32).equal(first)


def fill_behind_autograd(bias):
    """Change the table as EMAHook swaps averages in: torch's version counter does not notice."""
    bias.table.data.fill_(1)


@torch.inference_mode()
def fill_in_inference_mode(bias):
    bias.table.fill_(1)


@pytest.mark.parametrize('change', [
    lambda bias: bias.load_state_dict({'table': torch.ones(2, 7, 7)}),
    lambda bias: bias.load_state_dict({'table': torch.ones(2, 9, 5)}),
    lambda bias: bias.load_state_dict({'table': torch.ones(2, 7, 7)}, assign=True),
    lambda bias: nn.init.ones_(bias.table),
    fill_in_inference_mode,
    lambda bias: setattr(bias, 'table', nn.Parameter(torch.ones(2, 7, 7))),
    lambda bias: setattr(bias.table, 'data', torch.ones(2, 7, 7)),
    lambda bias: (fill_behind_autograd(bias), bias.train(), bias.eval()),
    lambda bias: (fill_behind_autograd(bias), bias.eval()),
    lambda bias: (fill_behind_autograd(bias), bias.double(), bias.float()),
], ids=['load', 'load resampled', 'load and assign', 'in place', 'inference mode', 'replace',
        'data', 'train', 'eval', 'move'])
def test_cache_never_outlives_the_weights(change):
    bias = random_bias()
    with torch.no_grad():
        assert not bias((4, 5), torch.float32).eq(1).all()
        change(bias)
        assert bias((4, 5), torch.float32).eq(1).all()


@torch.inference_mode()
def test_cache_is_not_used_for_a_table_of_inference_mode():
    bias = random_bias()
    assert not bias((4, 5), torch.float32).eq(1).all()
    bias.table.fill_(1)
    assert bias((4, 5), torch.float32).eq(1).all()


@torch.no_grad()
def test_cache_is_not_used_for_the_tables_of_functional_call():
    bias = random_bias()
    own = bias((4, 5), torch.float32)
    for value in (1, 2):
        table = torch.full((2, 7, 7), float(value))
        out = functional_call(bias, {'table': table}, ((4, 5), torch.float32))
        assert out.eq(value).all()
    assert bias((4, 5), torch.float32).equal(own)
    on_meta = functional_call(bias, {'table': table.to('meta')}, ((4, 5), torch.float32))
    assert on_meta.is_meta and bias.to('meta')((4, 5), torch.float32).is_meta


def test_copies_of_the_module_have_no_cache():
    bias, table = random_bias(), torch.randn(2, 7, 7, requires_grad=True)
    size = len(pickle.dumps(bias))
    with torch.no_grad():
        functional_call(bias, {'table': 2 * table}, ((20, 20), torch.float32))
    assert len(pickle.dumps(bias)) == size and not deepcopy(bias)._expanded


def test_cache_is_not_used_in_training_or_for_gradients():
    bias = random_bias().train()
    assert bias((4, 5), torch.float32).requires_grad
    assert bias.eval()((4, 5), torch.float32).requires_grad
    assert not bias._expanded


def test_loading_resamples_tables_of_another_grid():
    small, large = random_bias((7, 7)), AttentionBias(2, (25, 25))
    large.load_state_dict(small.state_dict())
    assert large.table.equal(resample_table(small.table.detach(), (25, 25)))
    with pytest.raises(RuntimeError, match='size mismatch for table'):
        AttentionBias(4, (7, 7)).load_state_dict(small.state_dict())
