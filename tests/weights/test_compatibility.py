"""Checkpoints of whole models are checked before anything is loaded."""
import pytest
import torch
from mmengine.model import BaseTTAModel, ExponentialMovingAverage
from torch import nn

from mmeffformer import EfficientFormer
from mmeffformer.utils.modules import unwrap_model
from mmeffformer.weights.compatibility import check_compatible, load_compatible

TINY = dict(widths=(8, 16, 16, 24), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
NAN, INF = float('nan'), float('inf')


def build(bias_grid=7):
    model = nn.ModuleDict({'backbone': EfficientFormer(TINY, bias_grid=bias_grid),
                           'head': nn.Linear(24, 5)})
    model.register_parameter('queries', nn.Parameter(torch.zeros(2)))
    for name in ('mask', 'bias'):
        model.register_buffer(name, torch.full((2, 2), -INF).triu(1))
    return model


def saved(tmp_path, change=lambda state: state, **rest):
    path = tmp_path / 'model.pth'
    torch.save({'state_dict': change(build().state_dict()), **rest}, path)
    return str(path)


@pytest.mark.parametrize('change', [
    lambda state: {f'module.{key}': value for key, value in state.items()},
    lambda state: {**state, 'more': torch.zeros(1)},
    lambda state: {key: value for key, value in state.items() if 'num_batches' not in key}])
def test_checkpoints_of_the_model_are_accepted(change, tmp_path):
    check_compatible(build(bias_grid=(9, 5)), saved(tmp_path, change))


class Averaging(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


@pytest.mark.parametrize('wrap', [
    Averaging, ExponentialMovingAverage, nn.DataParallel,
    lambda model: nn.DataParallel(Averaging(model))])
def test_the_module_inside_a_wrapper_is_compared_and_loaded(wrap, tmp_path):
    inner = build()
    inner.test_step = None  # BaseTTAModel asks for it
    wrapped, path = wrap(inner), saved(tmp_path, lambda state: {**state, 'queries': torch.ones(2)})
    check_compatible(wrapped, path)
    load_compatible(wrapped, path)
    assert unwrap_model(wrapped).queries.eq(1).all()
    with pytest.raises(ValueError, match='1 are missing, first queries'):
        check_compatible(wrapped, saved(tmp_path, lambda state: {
            key: value for key, value in state.items() if key != 'queries'}))


@pytest.mark.parametrize('trained', ['offset', 'legacy'])
def test_the_mode_that_differs_is_named(trained, tmp_path):
    model = build()
    other = {'offset': 'legacy', 'legacy': 'offset'}[trained]
    model['second'] = EfficientFormer(TINY, bias_mode='legacy')
    path = str(tmp_path / 'model.pth')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(bias_mode=trained)), path)
    with pytest.raises(ValueError, match=f"bias_mode='{trained}', the config has '{other}'"):
        check_compatible(model, path)


@pytest.mark.parametrize('change, message', [
    (dict.fromkeys(['head.weight', 'head.bias']), '2 are missing, first head.weight'),
    ({'head.weight': torch.zeros(3, 24), 'head.bias': torch.zeros(3)},
     r'2 have another shape, first head.weight: \(3, 24\) instead of \(5, 24\)'),
    ({'backbone.stages.3.blocks.0.token_mixer.bias.table': torch.zeros(4, 7, 7)},
     '1 have another shape, first backbone.stages.3.blocks.0.token_mixer.bias.table'),
    ({'head.bias': [1.]}, '1 are of another type, first head.bias: list instead of a tensor'),
    ({'head.bias': torch.zeros(5, dtype=torch.int64)},
     'first head.bias: torch.int64 instead of torch.float32'),
    ({'head.bias': torch.zeros(5, dtype=torch.complex64)}, 'torch.complex64 instead'),
    ({'head.bias': torch.zeros(5, dtype=torch.bool)}, 'torch.bool instead'),
])
def test_other_checkpoints_leave_the_model_unchanged(tmp_path, change, message):
    path = saved(tmp_path, lambda state: {key: value for key, value in {
        **state, **change}.items() if value is not None})
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_compatible(model, path)
    assert f'checkpoint {path} is not of this config' in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('key, bad', [
    ('head.bias', NAN), ('queries', -INF), ('backbone.stem.0.norm.running_var', INF),
    ('backbone.stages.0.blocks.0.layer_scale1', NAN), ('mask', None)])
def test_weights_and_statistics_must_be_finite_but_masks_need_not(tmp_path, key, bad):
    path = saved(tmp_path, lambda state: {**state, key: state[key] + (bad or 0)})
    if bad is None:
        check_compatible(build(), path)
    else:
        with pytest.raises(ValueError, match=f'has 1 tensors .* NaN or infinite, first {key}'):
            check_compatible(build(), path)


def test_meta_is_returned_and_floats_are_converted(tmp_path):
    model = build()
    path = saved(tmp_path, lambda state: {key: value.half() if key == 'head.bias' else value
                                          for key, value in state.items()}, meta={'epoch': 3})
    assert load_compatible(model, path) == {'epoch': 3}
    assert model['head'].bias.dtype == torch.float32
    assert load_compatible(model, saved(tmp_path, meta=['none'])) == {}
    torch.save({'state_dict': [1]}, path)
    with pytest.raises(ValueError, match='has a list as its state_dict'):
        load_compatible(model, path)
