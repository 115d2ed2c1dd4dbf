"""Loading is complete or leaves the backbone unchanged, and is reported."""
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
import transformers
from mmengine.hooks import EMAHook
from safetensors.torch import save_file

from mmeffformer import EfficientFormer, load_weights
from mmeffformer.models import ARCHS
from mmeffformer.models.attention import resample_table
from mmeffformer.weights import LAYOUTS, convert

SMALL = dict(widths=(8, 16, 24, 32), depths=(1, 1, 2, 2), attention_blocks=(0, 0, 0, 1))
NORMS = tuple(f'out_norms.{i}.{leaf}' for i in range(4) for leaf in ('weight', 'bias'))
TABLE = 'stages.3.blocks.1.token_mixer.bias.table'


def build(seed=0, arch=SMALL, **kwargs):
    """Return a backbone with random weights, statistics and scales."""
    net = EfficientFormer(arch, **kwargs)
    generator = torch.Generator().manual_seed(seed)
    for value in net.state_dict().values():
        if value.is_floating_point():
            fan_in = value[0].numel() if value.dim() in (2, 4) else 4
            value.copy_((torch.rand(value.shape, generator=generator) + .1) / fan_in)
    return net.eval()


def as_layout(net, layout='timm', prefix=''):
    state = convert(net.state_dict(), net.arch, 'mmeffformer', layout)
    return {prefix + key: value for key, value in state.items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(net, source, match, error=ValueError, **kwargs):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(error, match=match):
        load_weights(net, source, **kwargs)
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize('wrap, prefix, chosen', [
    (lambda s: s, '', ''),
    (lambda s: {'state_dict': s, 'epoch': torch.tensor(3)}, '', 'state_dict'),
    (lambda s: {'model': s, 'args': 1}, 'module.', 'model.module.'),
    (lambda s: {'model': {'state_dict': s}}, '', 'model.state_dict'),
    (lambda s: {'state_dict': s}, 'module.backbone.', 'state_dict.module.backbone.'),
    (lambda s: {'weights_of_run_7': s, 'optimizer': {'state': {0: {'step': torch.ones(1)}}}}, '',
     'weights_of_run_7.'),
    (lambda s: {'model': {'type': 'L1'}, 'params': s}, 'module.', 'params.module.'),
    (lambda s: {'state_dict': s}, 'module._orig_mod.backbone.', 'state_dict.module.backbone.'),
    (lambda s: {key.replace('blocks.', 'blocks._fsdp_wrapped_module.'): value
                for key, value in s.items()}, '_orig_mod.', ''),
    (lambda s: s, 'model.', 'model.'),
    (lambda s: s, 'efficientformer.', 'efficientformer.'),
])
@pytest.mark.parametrize('layout', ['timm', 'mmeffformer'])
def test_wrappers_and_prefixes_are_found(wrap, prefix, chosen, layout):
    source, net = build(1, out_norm_cfg=None), build(2, out_norm_cfg=None)
    report = load_weights(net, wrap(as_layout(source, layout, prefix)))
    assert same(net, source)
    assert (report.layout, report.prefix) == (layout, chosen)
    assert set(report.dropped) <= {'model.type', 'optimizer.state.0.step'} and not report.unknown


def test_prefix_chooses():
    student, teacher, net = build(1), build(2), build(3)
    state = {**as_layout(student, prefix='student.'), **as_layout(teacher, prefix='teacher.net.')}
    refused(net, state, "holds more than one backbone; .* one of 'student.', 'teacher.net.'$")
    for prefix in ('teacher.net', 'teacher.net.'):
        report = load_weights(net, state, prefix=prefix)
        assert torch.equal(net.stem[0].conv.weight, teacher.stem[0].conv.weight)
        assert len(report.dropped) == len(state) // 2 and not report.unknown
    refused(net, state, r"no keys under prefix 'neck.'; it has student, teacher$", prefix='neck')


def test_raw_weights_before_averaged_unless_asked():
    raw, averaged, net = build(1), build(2), build(3)
    checkpoint = {'model_ema': as_layout(averaged), 'model': as_layout(raw)}
    report = load_weights(net, checkpoint)
    assert torch.equal(net.stem[0].conv.weight, raw.stem[0].conv.weight)
    assert report.others == ('model_ema',)
    assert 'also in the file, choose with prefix=: model_ema' in str(report)
    report = load_weights(net, checkpoint, prefix='model_ema')
    assert torch.equal(net.stem[0].conv.weight, averaged.stem[0].conv.weight)
    assert report.others == ('model',)


def test_runs_of_mmengine_keep_the_average_as_state_dict():
    raw, averaged, net = build(1), build(2), build(3)
    checkpoint = {'state_dict': as_layout(raw, prefix='backbone.')}
    hook = EMAHook()
    hook.ema_model = SimpleNamespace(state_dict=lambda: {
        'steps': torch.tensor(9), **as_layout(averaged, prefix='module.backbone.')})
    hook.before_save_checkpoint(SimpleNamespace(iter=9, epoch=0), checkpoint)
    report = load_weights(net, checkpoint)
    assert torch.equal(net.stem[0].conv.weight, averaged.stem[0].conv.weight)
    assert report.others == ('ema_state_dict',)
    load_weights(net, checkpoint, prefix='ema_state_dict')
    assert torch.equal(net.stem[0].conv.weight, raw.stem[0].conv.weight)


@pytest.mark.parametrize('layout', [name for name in LAYOUTS if name != 'mmeffformer'])
def test_tables_of_the_backbones_oblong_grid_are_not_resampled(layout):
    square, net = build(1, bias_grid=6), build(2, bias_grid=(4, 9))
    report = load_weights(net, as_layout(square, layout))
    assert net.state_dict()[TABLE].equal(square.state_dict()[TABLE].view(8, 4, 9))
    assert not report.resampled
    refused(build(2), {key: value[:, :35] if value.shape[1:] == (36,) else value
                       for key, value in as_layout(square, layout).items()},
            r'shape \(8, 35\): expected .* build the backbone with its bias_grid=\(rows, cols\)')


def test_report_counts_and_reads():
    source, net = build(1), build(2, bias_grid=(25, 12))
    state = {**as_layout(source), 'head.weight': torch.ones(1), 'extra.a': torch.ones(1)}
    report = load_weights(net, state)
    assert len(report.loaded) == len(source.state_dict()) - len(NORMS)
    assert report.resampled == {TABLE: ((7, 7), (25, 12))}
    assert (report.dropped, report.unknown) == (('head.weight',), ('extra.a',))
    assert sorted(report.missing) == sorted(NORMS)
    assert str(report) == '\n'.join([
        f'loaded {len(report.loaded)} tensors from a state dict in memory (layout timm)',
        f'  bias tables resampled from 7 x 7 to 25 x 12: {TABLE}',
        '  not needed by a backbone: head.weight',
        '  left over, in no known layout: extra.a',
        '  missing, initial values kept: out_norms.0.weight, out_norms.0.bias, '
        'out_norms.1.weight and 5 more'])
    corners = net.state_dict()[TABLE][:, ::24, ::11]
    assert torch.equal(corners, source.state_dict()[TABLE][:, ::6, ::6])


def test_missing_counters_and_output_norms_keep_their_values():
    source, net = build(1), build(2, out_indices=(1, 3))
    state = {key: value for key, value in as_layout(source, 'official-dense').items()
             if 'num_batches' not in key}
    report = load_weights(net, state)
    assert torch.equal(net.out_norms['3'].bias, source.out_norms['3'].bias)
    assert {*report.dropped} == {f'norm{i}.{leaf}' for i in (0, 4) for leaf in ('weight', 'bias')}
    assert report.missing and all('num_batches' in key for key in report.missing)


def test_dtype_stays_and_frozen_stages_load():
    source = build(1, out_norm_cfg=None).half()
    net = build(2, out_norm_cfg=None, bias_grid=25, frozen_stages=4).to(torch.bfloat16)
    report = load_weights(net, as_layout(source))
    assert report.resampled == {TABLE: ((7, 7), (25, 25))}
    assert {v.dtype for v in net.parameters()} == {torch.bfloat16}
    for key, value in dict(source.named_parameters()).items():
        value = resample_table(value, (25, 25)) if key == TABLE else value
        assert torch.equal(net.state_dict()[key], value.bfloat16()), key


def test_nothing_is_loaded_when_resampling_fails(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError('not implemented for this dtype')

    monkeypatch.setattr(torch.nn.functional, 'interpolate', fail)
    refused(build(2, bias_grid=25), as_layout(build(1)), 'not implemented', RuntimeError)


@pytest.mark.parametrize('prefix', [None, 'backbone.'])
def test_init_cfg_loads_the_same(tmp_path, prefix):
    source = build(1, out_norm_cfg=None)
    torch.save({'state_dict': as_layout(source, 'mmpretrain', 'backbone.')}, tmp_path / 'a.pth')
    cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix=prefix)
    net = build(2, out_norm_cfg=None, init_cfg=cfg)
    net.init_weights()
    assert same(net, source)


# Incompatible checkpoints

def test_other_arch_is_named():
    with torch.device('meta'):
        l3 = EfficientFormer('l3').state_dict()
    l3 = {key: torch.zeros(value.shape) for key, value in l3.items()}
    for layout in ('official', 'mmeffformer'):
        state = convert(l3, ARCHS['l3'], 'mmeffformer', layout)
        refused(EfficientFormer('l1'), state, 'checkpoint is l3, backbone is l1: .* tensors have '
                r'another shape, first .* is \(32, 3, 3, 3\) and should be \(24, 3, 3, 3\)')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_deeper_checkpoint_is_refused(layout):
    # By blocks of a kind that the backbone has, and by its only block of a kind.
    deep = build(1, dict(SMALL, depths=(1, 1, 3, 2)))
    state = {**as_layout(deep, layout, 'backbone.'), 'neck.a': torch.ones(1)}
    refused(build(2, dict(SMALL, depths=(1, 1, 1, 2))), state,
            r'32 of the keys are unexpected, first backbone\..* and 29 more\. Noth')
    deep = build(1, dict(SMALL, depths=(1, 1, 2, 2)))
    shallow = dict(SMALL, depths=(1, 1, 2, 1), attention_blocks=(0, 0, 0, 0))
    refused(build(2, shallow), as_layout(deep, layout), '15 of the keys are unexpected')


def test_unknown_keys_do_not_make_a_checkpoint_another_arch():
    # A deeper backbone's checkpoint has all keys of the l1 as well.
    net = EfficientFormer(dict(widths=ARCHS['l1'].widths, depths=(4, 2, 6, 4),
                               attention_blocks=(0, 0, 0, 1)))
    assert load_weights(net, {**as_layout(net), 'extra.a': torch.ones(1)}).unknown == ('extra.a',)


def test_incompatible_checkpoints_change_nothing():
    net, good = build(2), as_layout(build(1))
    key = 'stages.1.blocks.0.mlp.fc1.weight'
    table = 'stages.3.blocks.2.token_mixer.attention_biases'

    def changed(**kwargs):
        return {**good, **{key if name == 'key' else table: v for name, v in kwargs.items()}}

    lacking = {k: v for k, v in good.items() if not k.startswith('stages.3.')}
    refused(net, lacking, 'it lacks stages.3.downsample.conv.weight, .* more. Nothing was loaded')
    refused(net, {**good, key: torch.ones(3)}, rf'first {key} is \(3,\) and should be \(64, 16, 1')
    refused(net, changed(key=good[key] * float('nan')), f'{key} has values that are NaN or inf')
    refused(net, changed(key=good[key] / 0), f'{key} has values that are NaN or inf')
    refused(net, changed(key=good[key].long()), f'{key} is of torch.int64, expected floating')
    refused(net, changed(key=good[key].numpy()), f'{key} is a ndarray, expected a tensor')
    refused(net, changed(table=torch.ones(8, 50)), r'shape \(8, 50\): expected \(heads, n \* n\)')
    refused(net, changed(table=torch.ones(4, 49)), r'is \(4, 7, 7\) and should be \(8, 7, 7\)')
    refused(net, {'a.b': torch.ones(1, 2), 'stem.conv1.weight': torch.ones(2)},
            'no known layout; accepted are mmeffformer, official, official-dense, mmpretrain, '
            'mmpretrain-dense, timm, transformers. Its 2 tensors are under a, stem, such as a.b '
            r'\(1, 2\), stem.conv1.weight \(2,\)$')
    refused(net, {'epoch': 3, 'model': {'depth': 2}}, 'has no tensors, only epoch, model.depth$')
    refused(net, {}, 'has no tensors, only an empty dict$')
    refused(build(1, norm_cfg=dict(type='GN', num_groups=1)), good,
            r'45 of the keys are unexpected, first stem.norm1.running_mean, .*type BN or SyncBN')
    refused(torch.nn.Linear(2, 2), good, 'got a Linear; expected a backbone', TypeError)


# Files

@pytest.mark.parametrize('safe', [True, False])
def test_split_files_of_save_pretrained(safe, tmp_path):
    reference = transformers.EfficientFormerModel(transformers.EfficientFormerConfig(
        depths=[1, 1, 1, 2], hidden_sizes=[8, 16, 24, 32], dim=32, num_meta3d_blocks=1))
    reference.save_pretrained(tmp_path, max_shard_size='20KB', safe_serialization=safe)
    files = sorted(tmp_path.glob('*-of-*'))
    assert len(files) > 3
    net = EfficientFormer(dict(SMALL, depths=(1, 1, 1, 2)), out_norm_cfg=None)
    assert load_weights(net, tmp_path).layout == 'transformers'
    assert net.stem[0].conv.weight.equal(reference.patch_embed.convolution1.weight)
    files[1].unlink()
    refused(net, tmp_path, f'{files[1].name}, but there is no such file', FileNotFoundError)
    index, = tmp_path.glob('*.index.json')
    index.write_text('{}')
    refused(net, index, 'is not an index of weights: expected JSON with a weight_map')
    index.unlink()
    refused(net, tmp_path, 'the folder has no model.safetensors or pytorch', FileNotFoundError)


def test_files_of_every_kind(tmp_path):
    source = build(1, out_norm_cfg=None)
    state = as_layout(source)
    paths = [tmp_path / name for name in ('a.pth', 'b.pth.tar', 'c.bin', 'd.safetensors')]
    torch.save(state, paths[0])
    torch.save({'state_dict': state}, paths[1], _use_new_zipfile_serialization=False)
    torch.save({'model_state_dict': state, 'args': Namespace(lr=.1)}, paths[2])
    save_file({key: value.contiguous() for key, value in state.items()}, paths[3])
    for path in paths:
        net = build(2, out_norm_cfg=None)
        assert load_weights(net, path).source == str(path)
        assert same(net, source), path
