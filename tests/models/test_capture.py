"""Programs captured once run at any batch size and image size."""
import pytest
import torch
from support.helpers import assert_close, image
from torch._subclasses.fake_tensor import FakeTensorMode

from mmeffformer import EfficientFormer, EfficientFormerV2

KINDS = [EfficientFormer, EfficientFormerV2]
ARCH = dict(widths=(8, 16, 16, 24), depths=(1, 1, 2, 1), attention_blocks=(0, 0, 1, 1))
GRID = 3  # of the bias tables: that of 96 x 96 px
INPUTS = [(96, 96, 3), (96, 96, 1), (64, 160, 3), (33, 65, 2)]  # rows, columns, images


def build(kind, randomize, fused=False, **options):
    model = randomize(kind(ARCH, bias_grid=GRID, **options)).eval()
    return model.switch_to_deploy() if fused else model


def check(program, model, inputs=INPUTS, memory_format=torch.contiguous_format):
    for size in inputs:
        x = image(*size).to(memory_format=memory_format)
        assert_close(program(x), model(x), 1e-4)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('options', [dict(fused=True), dict(bias_mode='legacy')],
                         ids=['fused', 'legacy'])
@pytest.mark.parametrize('size', [(96, 96, 2), (64, 64, 1)])
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_traced(kind, size, options, randomize):
    model = build(kind, randomize, **options)
    check(torch.jit.trace(model, image(*size), check_trace=False), model)


@pytest.mark.parametrize('kind, fused, memory_format', [
    (EfficientFormer, False, torch.contiguous_format),
    (EfficientFormerV2, True, torch.channels_last)])
def test_exported(kind, fused, memory_format, randomize):
    model = build(kind, randomize, fused).to(memory_format=memory_format)
    x = image(96, 96, batch=2).to(memory_format=memory_format)
    # To torch.export, one row or column of tokens is a special case.
    dims = {0: torch.export.Dim('batch', min=1, max=64),
            **{i: torch.export.Dim(name, min=33, max=2048)
               for i, name in ((2, 'height'), (3, 'width'))}}
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False).module()
    check(program, model, INPUTS, memory_format)


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('kind', KINDS)
@torch.no_grad()
def test_fake_tensors_leave_nothing_behind(kind, fused, randomize):
    model = build(kind, randomize, fused).to(memory_format=torch.channels_last)
    x = image(96, 160, batch=2).to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(mode.from_tensor(x))
    outs = model(x)
    assert_close(outs, build(kind, randomize, fused)(x), 1e-5)
    assert [out.shape for out in fake] == [out.shape for out in outs]
