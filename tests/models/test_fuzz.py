"""Random backbones, options and inputs: each works as promised, or is refused by name.

CI draws the same cases every time. To draw others, and more (docs/results/robustness.md):
    FUZZ_CASES=5000 pytest tests/models/test_fuzz.py --hypothesis-seed=1
"""
import io
import math
import os
import warnings
from collections import Counter
from copy import deepcopy
from functools import cache, partial

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmengine.utils import digit_version

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.deploy.export import OPSET
from mmeffformer.deploy.graphs import traceable

CASES = int(os.environ.get('FUZZ_CASES', 500))
fuzz = partial(settings, derandomize='FUZZ_CASES' not in os.environ, deadline=None, database=None,
               suppress_health_check=[*HealthCheck])

STRIDES = (4, 8, 16, 32)
NOT_DYNAMO = {} if digit_version(torch.__version__) < digit_version('2.5') else dict(dynamo=False)
# How far results of two ways of computing may be apart, as a share of all values (Euclidean
# norms). A norm over two channels turns rounding into a step from -1 to 1, so it is not little.
TOLERANCE = {torch.float64: 1e-6, torch.float32: .02, torch.bfloat16: .5}
if digit_version(torch.__version__) >= digit_version('2.3'):  # before, CPUs could not
    TOLERANCE[torch.float16] = .2


def sometimes(usual, *others):
    """Draw what is usual in about half of the cases."""
    return st.one_of(*[usual] * len(others), *others)


@st.composite
def archs(draw, v2: bool) -> dict:
    widths = draw(st.tuples(st.integers(1, 10).map(lambda n: 2 * n), *[st.integers(1, 20)] * 3))
    depths = draw(st.tuples(*[sometimes(st.just(1), st.just(2))] * 4))
    attention = [draw(st.integers(0, 0 if v2 and i < 2 else depth))
                 for i, depth in enumerate(depths)]
    number = st.one_of(st.integers(1, 4), st.floats(1, 4))
    per_stage = [st.one_of(number, st.tuples(*[number] * depth)) for depth in depths]
    arch = dict(widths=widths, depths=draw(st.sampled_from([depths, list(depths)])),
                attention_blocks=tuple(attention))
    expansion = draw(sometimes(st.none(), st.one_of(number, st.tuples(*per_stage))))
    return arch if expansion is None else dict(arch, expansion=expansion)


def norms():
    return sometimes(st.just(dict(type='BN')), st.sampled_from([
        dict(type='SyncBN'), dict(type='GN', num_groups=1), dict(type='IN', affine=True),
        dict(type='BN', eps=1e-3, momentum=None, requires_grad=False),
        dict(type='BN', track_running_stats=False), dict(type='BN2d', affine=False)]))


ACTS = [dict(type='ReLU', inplace=True), dict(type='SiLU'), dict(type='HSwish'),
        dict(type='GELU', approximate='tanh'), dict(type='PReLU'), dict(type='RReLU'),
        dict(type=torch.nn.Identity)]


@st.composite
def options(draw, v2: bool) -> dict:
    """Arguments that are all right."""
    grids = sometimes(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5)))
    every = dict(
        in_channels=st.integers(1, 5),
        out_indices=st.sets(st.integers(0, 3), min_size=1).map(sorted).flatmap(
            lambda found: st.sampled_from([found, tuple(found)])),
        drop_path_rate=st.one_of(st.just(0), st.floats(0, .9)),
        layer_scale_init_value=st.one_of(st.just(1), st.floats(0, 1)),
        bias_grid=grids, bias_mode=st.sampled_from(['offset', 'legacy']),
        out_norm_cfg=st.one_of(st.none(), norms()), norm_cfg=norms(),
        act_cfg=sometimes(st.just(dict(type='GELU')), st.sampled_from(ACTS)),
        frozen_stages=st.integers(-1, 4), norm_eval=st.booleans(), with_cp=st.booleans())
    given_ = draw(st.sets(st.sampled_from(sorted(every)), max_size=6))
    return dict(arch=draw(archs(v2)), **{key: draw(every[key]) for key in sorted(given_)})


@st.composite
def backbones(draw):
    v2 = draw(st.booleans())
    return (EfficientFormerV2 if v2 else EfficientFormer), draw(options(v2))


LAYOUTS = {
    'contiguous': lambda x: x,
    'channels_last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'cut out': lambda x: torch.nn.functional.pad(x, (3, 1, 0, 2, 1, 1))[:, 1:-1, :-2, 3:-1],
    'one channel': lambda x: x[:, :1].expand_as(x),
    'every second column': lambda x: x.repeat_interleave(2, 3)[..., ::2]}


@st.composite
def inputs(draw) -> dict:
    # What is simplest for hypothesis comes often: let it not be one token, that few norms take.
    side = sometimes(st.integers(0, 68).map(lambda n: 32 + (n + 5) % 69),
                     st.sampled_from([33, 63, 64, 65, 96]))
    return dict(size=(draw(side), draw(side)), batch=draw(st.integers(1, 3)),
                dtype=draw(sometimes(st.just(torch.float32), st.sampled_from([*TOLERANCE]))),
                layout=draw(st.sampled_from([*LAYOUTS])),
                model_layout=draw(st.sampled_from([torch.contiguous_format,
                                                   torch.channels_last])),
                seed=draw(st.integers(0, 99)))


def far_apart(actual, expected, exact=None) -> float:
    """Return the largest difference over tolerance of two lists of tensors of one dtype.

    The distance of ``expected`` from ``exact`` shows how much the network amplifies rounding.
    """
    return max(((a.double() - b).norm() / (TOLERANCE[a.dtype] * b.norm().clamp(min=.1)
                                  + 3 * (b - c).norm())).item()
               for a, b, c in zip(actual, expected, exact or expected))


def largest_value(model, x) -> float:
    """The largest value that any module of a backbone takes or gives, in float32."""
    found, model = [], deepcopy(model).float()

    def note(module, args, out):
        found.extend(v.abs().max().item() for v in (args[0], out) if isinstance(v, torch.Tensor))

    for module in model.modules():
        module.register_forward_hook(note)
    model.train()(x.float())
    model.eval()(x.float())
    return max(found)


def check_case(kind, kwargs, case, randomize, also=lambda model, x: None):
    """Run a backbone in every way on one input; before and after it is fused, ``also``."""
    torch.manual_seed(case['seed'])
    dtype, (height, width) = case['dtype'], case['size']
    model = randomize(kind(**kwargs), case['seed']).to(dtype)
    model.to(memory_format=case['model_layout'])
    x = LAYOUTS[case['layout']](torch.randn(case['batch'], model.in_channels, height, width)
                                .to(dtype))
    # Random weights can give large values, and torch has no RReLU in float16 on CPUs.
    if dtype == torch.float16 and ('RReLU' in str(kwargs) or largest_value(model, x) > 1e4):
        dtype = torch.bfloat16
        model, x = model.to(dtype), x.to(dtype)
    indices = kwargs.get('out_indices', range(4))
    assert model.out_channels == tuple(kwargs['arch']['widths'][i] for i in indices)
    assert model.out_strides == tuple(STRIDES[i] for i in indices)
    expected = [(case['batch'], c, math.ceil(height / s), math.ceil(width / s))
                for c, s in zip(model.out_channels, model.out_strides)]

    def check(outs):
        assert isinstance(outs, tuple)
        assert [tuple(out.shape) for out in outs] == expected
        assert {out.dtype for out in outs} == {dtype}
        assert all(out.isfinite().all() for out in outs)
        return outs

    before = x.clone()
    outs = check(model.train()(x))
    if any(out.requires_grad for out in outs):
        sum(out.square().mean() for out in outs if out.requires_grad).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    model.eval()
    with torch.no_grad():
        outs = check(model(x))
        exact = deepcopy(model).double()(x.double())
        if case['layout'] != 'contiguous':
            assert far_apart(check(model(x.contiguous())), outs, exact) < 1
        also(model, x)
        model.switch_to_deploy()
        assert far_apart(check(model(x)), outs, exact) < 1
        also(model, x)
    assert torch.equal(x, before)


# Found once. torch's GroupNorm ended the process where the layers before it were not trained:
CRASHED = ((EfficientFormer, dict(
    arch=dict(widths=(10, 4, 4, 8), depths=(1, 1, 1, 1)), frozen_stages=1)),
    dict(size=(100, 64), batch=2, dtype=torch.float32, layout='channels_last',
         model_layout=torch.channels_last, seed=88))
# Products of V2's queries and keys were more than float16 holds:
OVERFLOWED = ((EfficientFormerV2, dict(
    arch=dict(widths=(10, 18, 6, 9), depths=(2, 2, 2, 1), attention_blocks=(0, 0, 1, 1),
              expansion=(1.6298750780031093, 2.0891555246467686, 2.0891555246467686, 1)))),
    dict(size=(65, 65), batch=3, dtype=[*TOLERANCE][-1], layout='contiguous',
         model_layout=torch.channels_last, seed=25))


# Exported on the grid that its table is for, a legacy bias was for that grid alone:
FROZEN_SIZE = ((EfficientFormerV2, dict(
    arch=dict(widths=(12, 6, 8, 8), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 1, 1)),
    bias_grid=3, bias_mode='legacy')),
    dict(size=(65, 74), batch=1, dtype=torch.float32, layout='contiguous',
         model_layout=torch.channels_last, seed=74))


def statistics_of_one(kwargs, case) -> bool:
    """Return whether a norm may get a single value per channel, which has no statistics."""
    tokens = math.prod(math.ceil(side / 32) for side in case['size'])
    return tokens == 1 and (case['batch'] == 1 or 'IN' in str(kwargs))


def test_what_is_right_works(randomize):
    counts = Counter()

    @fuzz(max_examples=CASES * 2 // 5)
    @given(backbones(), inputs())
    @example(*CRASHED)
    @example(*OVERFLOWED)
    def run(backbone, case):
        try:
            check_case(*backbone, case, randomize)
            counts['worked'] += 1
        except ValueError as error:
            assert statistics_of_one(backbone[1], case) and 'xpected more than 1' in str(error)
            counts['refused'] += 1

    run()
    assert counts['worked'] > .9 * CASES * 2 // 5


NOT_A_NUMBER = ['4', None, [], {}, math.nan, math.inf, -math.inf, 1j, b'4', object]
NOT_A_WIDTH = [*NOT_A_NUMBER, 0, -1, 8., 2.5, True, False, (8,), np.float32(8)]


def bad_fours(lowest: int):
    bad = [value for value in NOT_A_WIDTH if lowest or type(value) is not int or value < 0]
    broken = st.tuples(st.integers(0, 3), st.sampled_from(bad)).map(
        lambda found: tuple(found[1] if i == found[0] else 2 for i in range(4)))
    return st.one_of(broken, st.lists(st.integers(1, 4).map(lambda n: 2 * n), max_size=7).filter(
        lambda found: len(found) != 4), st.sampled_from(NOT_A_WIDTH))


def bad_archs(v2: bool):
    """Draw a bad arch and the text that names its fault."""
    good = dict(widths=(8, 8, 8, 8), depths=(1, 1, 2, 3), attention_blocks=(0, 0, 1, 2))

    def with_bad(key):
        return lambda value: (dict(good, **{key: value}), repr(value))

    expansions = [(4, 4, 4), (4, 4, 4, (4, 4)), 0, -1, 1e-3, (4, 4, 4, 0), (4, 4, (4, None), 4),
                  '4', None, math.nan, math.inf, [], {}, True, (4, 4, '44', 4), 1j, 10 ** 400,
                  (4, 4, (4, (4,)), 4), (4, 4, 4, (4, True, 4))]
    wrong_names = ['', 'L1', 'resnet50', 's0' if not v2 else 'l1', 3, None, 1.5, [], (), b'l1']
    return st.one_of(
        bad_fours(1).map(with_bad('widths')), bad_fours(1).map(with_bad('depths')),
        bad_fours(0).map(with_bad('attention_blocks')),
        st.integers(0, 9).map(lambda n: with_bad('widths')((2 * n + 1, 8, 8, 8))),
        st.sampled_from([(0, 0, 0, 4), (0, 0, 3, 0), (2, 0, 0, 0)]).map(
            with_bad('attention_blocks')),
        st.sampled_from(expansions).map(with_bad('expansion')),
        st.text(max_size=9).filter(lambda key: key not in (*good, 'expansion')).map(
            lambda key: ({**good, key: 1}, key)),
        st.sampled_from([1, None, (1, 2)]).map(lambda key: ({**good, key: 1}, repr(key))),
        st.sampled_from(['widths', 'depths']).map(
            lambda key: ({k: v for k, v in good.items() if k != key}, key)),
        st.sampled_from(wrong_names).map(lambda name: (name, repr(name))),
        *[st.just(with_bad('attention_blocks')((0, 1, 1, 2)))] * v2)


BAD_CFGS = [{'num_groups': 1}, dict(type=None), dict(type=''), dict(type='Foo'), dict(type=3),
            dict(type='functional'), dict(type='Module'), dict(type='Conv2d'), 'BN', 3, [], (),
            ['type', 'BN'], dict(type=['BN']), dict(type=torch.relu)]
BAD_NORMS = [dict(type='GN'), dict(type='GN', num_groups=7), dict(type='GN', num_groups=0),
             dict(type='GN', num_groups='1'), dict(type='BN', foo=1),
             dict(type='BN', num_features=9), dict(type='PixelShuffle'), dict(type='Dropout')]
BAD_ACTS = [dict(type='GELU', foo=1), dict(type='GLU'), dict(type='Linear'), dict(type='Flatten'),
            {}, None, dict(type='MaxPool2d', kernel_size=2), dict(type='Bilinear')]
BAD = dict(
    in_channels=[*NOT_A_WIDTH],
    out_indices=[(), [], (4,), (-1,), (0, 0), (1, 0), (0, 4), (0.,), (True,), ('0',), (None,),
                 3, None, '0', {0, 1}, ((0,),), (math.nan,), (0, 1, 2, 3, 3), range(0), [[0]]],
    drop_path_rate=[*NOT_A_NUMBER, 1, 1., -.1, 2, True, (0.,)],
    layer_scale_init_value=[*NOT_A_NUMBER, True, (1.,)],
    bias_grid=[*NOT_A_WIDTH, (7,), (7, 7, 7), (), (0, 7), (7, -1), (7., 7), (True, 7), '77'],
    bias_mode=['', 'Offset', None, 0, [], b'offset', {}, ('offset',)],
    out_norm_cfg=[*BAD_CFGS, *BAD_NORMS],
    norm_cfg=[*BAD_CFGS, *BAD_NORMS, None, {}],
    act_cfg=[*BAD_CFGS, *BAD_ACTS],
    frozen_stages=[-2, 5, 1., True, False, None, '1', [], (1,), math.nan, 1.5],
    norm_eval=['', 'False', None, 0, 1, []], with_cp=['', 'no', None, 0, 1., []])


@st.composite
def bad_arguments(draw, name: str):
    """Draw a class, its arguments with a bad one called ``name``, and the text that names it."""
    v2 = draw(st.booleans())
    if name == 'arch':
        value, expected_text = draw(bad_archs(v2))
    else:
        value = draw(st.sampled_from(BAD[name]))
        expected_text = repr(value)
    kwargs = dict(draw(options(v2)), **{name: value})
    return (EfficientFormerV2 if v2 else EfficientFormer), kwargs, expected_text


@pytest.mark.parametrize('name', ['arch', *BAD])
@fuzz(max_examples=CASES // 25)
@given(st.data())
def test_a_wrong_argument_is_refused_by_name(name, data):
    kind, kwargs, expected_text = data.draw(bad_arguments(name))
    with pytest.raises(ValueError) as error:
        kind(**kwargs)
    assert name in str(error.value) and expected_text in str(error.value), error.value


@st.composite
def bad_inputs(draw):
    """Draw a bad input and the text that names its fault."""
    how = draw(st.sampled_from(['size', 'channels', 'dimensions', 'dtype', 'kind', 'batch']))
    batch, side = draw(st.integers(1, 2)), st.integers(32, 64)
    size = [draw(side), draw(side)]
    shape = [batch, 3, *size]
    if how == 'size':
        small = draw(st.integers(0, 31))
        size[draw(st.integers(0, 1))] = small
        x = torch.zeros(batch, 3, *size)
        return x, f'{size[0]} x {size[1]} px (height x width): expected at least 32'
    if how == 'channels':
        shape[1] = draw(st.integers(0, 9).filter(lambda n: n != 3))
    if how == 'dimensions':
        shape = draw(st.sampled_from([shape[1:], size, [9], [], [1, *shape], [*shape, 1]]))
    if how == 'batch':
        shape[0] = 0
    if how == 'dtype':
        dtype = draw(st.sampled_from([
            torch.uint8, torch.int64, torch.int32, torch.bool, torch.float64, torch.bfloat16,
            torch.float16, torch.complex64]))
        return torch.zeros(shape, dtype=dtype), str(dtype)
    if how == 'kind':
        return draw(st.sampled_from([
            (np.zeros(shape, np.float32), 'ndarray'), ([[[[0.]]]], 'list'), (None, 'NoneType'),
            ('image.jpg', 'str'), ((torch.zeros(shape),), 'tuple'), (3., 'float')]))
    return torch.zeros(shape), str(tuple(shape))


@cache
def small_models() -> list:
    """Return a backbone of both kinds, and both fused."""
    arch = dict(widths=(4, 4, 4, 4), depths=(1, 1, 1, 1), attention_blocks=(0, 0, 0, 1))
    models = [kind(arch, norm_cfg=dict(type='GN', num_groups=1))
              for kind in (EfficientFormer, EfficientFormerV2)]
    return [*models, *(deepcopy(model).switch_to_deploy() for model in models)]


@fuzz(max_examples=CASES // 10)
@given(st.integers(0, 3), st.booleans(), bad_inputs())
def test_a_wrong_input_is_refused_by_what_it_is(number, train, found):
    (x, expected_text), model = found, small_models()[number]
    model.train(train and not model.deployed)
    with pytest.raises(ValueError) as error:
        model(x)
    assert expected_text in str(error.value) and 'expected' in str(error.value), error.value


def test_what_works_is_exported_to_onnx(randomize):
    counts = Counter()

    def exported(model, x):
        file, graph = io.BytesIO(), traceable(model, 'backbone')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(graph, (x, ), file, input_names=['image'], opset_version=OPSET,
                              output_names=[*graph.output_names], **NOT_DYNAMO,
                              dynamic_axes={'image': {2: 'height', 3: 'width'}})
        session = onnxruntime.InferenceSession(file.getvalue())
        for image in (x, torch.nn.functional.pad(x, (0, 31, 5, 0))):  # another size, too
            outs = [torch.from_numpy(out) for out in session.run(None, {'image': image.numpy()})]
            assert [out.shape for out in outs] == [out.shape for out in graph(image)]
            assert far_apart(outs, graph(image)) < 1
        counts['exported'] += 1

    @fuzz(max_examples=max(6, CASES // 100))
    @given(backbones(), inputs())
    @example(*FROZEN_SIZE)
    def run(backbone, case):
        try:
            check_case(*backbone, dict(case, dtype=torch.float32), randomize, exported)
        except ValueError as error:
            assert statistics_of_one(backbone[1], case) or 'track_running_stats' in str(error)

    run()
    assert counts['exported'] > 1.5 * max(6, CASES // 100)  # two each
