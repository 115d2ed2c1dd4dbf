"""Deformable convolution and attention of ``mmcv.ops`` against loops."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
    MultiScaleDeformableAttention,
    deform_conv2d,
    modulated_deform_conv2d,
)
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmdet.models.necks import DyHead
from support.operators import (
    assert_half_precision,
    assert_same,
    assert_same_with_grads,
    rand,
    stand_ins_only,
)
from torch import nn


def sample_zero_padded(image, y, x):
    """Bilinear sample of (C, H, W), 0 outside, differentiable by the tensors ``y`` and ``x``.

    As in mmcv's kernels a point one pixel outside counts as outside, so it has no gradient, and
    the derivative at a pixel is the one to the next pixel.
    """
    height, width = image.shape[1:]
    result = image.new_zeros(len(image)) + 0 * (y + x)
    if not (-1 < y < height and -1 < x < width):
        return result
    y0, x0 = math.floor(y.item()), math.floor(x.item())
    for yi, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
        for xi, wx in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
            if 0 <= yi < height and 0 <= xi < width:
                result = result + wy * wx * image[:, yi, xi]
    return result


def reference_deform_conv(x, offset, mask, weight, bias, stride, padding, dilation, groups,
                          deform_groups):
    """Deformable convolution; offsets and masks are read by the addresses of mmcv's kernels."""
    kernel = weight.shape[2:]
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(
        x.shape[2:], kernel, stride, padding, dilation))
    points, part = kernel[0] * kernel[1], x.shape[1] // deform_groups
    result = []
    for image, shift, modulation in zip(x, offset.flatten(1), mask.flatten(1)):
        for i in range(height):
            for j in range(width):
                columns = []
                for g in range(deform_groups):
                    for k in range(points):
                        point = g * points + k
                        dy, dx, factor = (values[(channel * height + i) * width + j]
                                          for values, channel in ((shift, 2 * point),
                                                                  (shift, 2 * point + 1),
                                                                  (modulation, point)))
                        y = i * stride[0] - padding[0] + k // kernel[1] * dilation[0] + dy
                        x_ = j * stride[1] - padding[1] + k % kernel[1] * dilation[1] + dx
                        value = sample_zero_padded(image[g * part:(g + 1) * part], y, x_)
                        columns.append(value * factor)
                # Order (deform group, point, channel) to (channel, point).
                column = torch.stack(columns).view(deform_groups, points, part)
                column = column.transpose(1, 2).reshape(groups, -1)
                filters = weight.reshape(groups, weight.shape[0] // groups, -1)
                result.append(torch.einsum('gck,gk->gc', filters, column).flatten() + bias)
    return torch.stack(result).view(len(x), height, width, -1).permute(0, 3, 1, 2)


#       kernel, stride, padding, dilation, groups, deform_groups
DEFORMED = [
    ((3, 3), (1, 1), (1, 1), (1, 1), 1, 1),
    ((3, 2), (2, 1), (1, 2), (1, 2), 1, 2),
    ((2, 3), (1, 2), (0, 1), (2, 1), 2, 1),
    ((1, 1), (1, 1), (0, 0), (1, 1), 2, 2),
    ((3, 3), (2, 2), (1, 1), (1, 1), 2, 4),
]


def deformed(kernel, stride, padding, dilation, groups, deform_groups):
    """Input, offset, mask, weight and bias; offsets reach over the image's borders."""
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip((5, 4), kernel, stride, padding, dilation)]
    points = deform_groups * kernel[0] * kernel[1]
    return (rand(2, 4, 5, 4), rand(2, 2 * points, *size, seed=1, low=-2.5, high=2.5),
            rand(2, points, *size, seed=2, low=0), rand(6, 4 // groups, *kernel, seed=3),
            rand(6, seed=4))


def contiguous(*tensors):
    return tensors


def strided(*tensors):
    return [t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() == 4 else t
            for t in tensors]


@pytest.mark.parametrize('geometry, laid_out', [
    *((geometry, contiguous) for geometry in DEFORMED),
    pytest.param(DEFORMED[1], strided, marks=stand_ins_only)])  # compiled operators refuse it
def test_deform_conv(device, geometry, laid_out):
    x, offset, mask, weight, bias = deformed(*geometry)
    options = geometry[1:]
    for im2col_step in (32, 1):
        assert_same_with_grads(
            lambda *t, step=im2col_step: deform_conv2d(*laid_out(*t), *options, False, step),
            lambda x, offset, weight: reference_deform_conv(
                x, offset, torch.ones_like(mask), weight, 0, *options),
            [x, offset, weight], device)
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*laid_out(*t), *options),
        lambda *t: reference_deform_conv(*t, *options), [x, offset, mask, weight, bias], device)
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*laid_out(*t), None, *options),
        lambda *t: reference_deform_conv(*t, 0, *options), [x, offset, mask, weight], device)


@pytest.mark.parametrize('low, high', [(0, 1), (-3, 3)])
def test_deform_conv_between_integer_positions(device, low, high):
    """Points lie on pixels and one pixel outside, as when training starts."""
    x, offset, mask, weight, bias = deformed(*DEFORMED[0])
    generator = torch.Generator().manual_seed(0)
    offset = torch.randint(low, high, offset.shape, generator=generator).double()
    options = DEFORMED[0][1:]
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*t, *options),
        lambda *t: reference_deform_conv(*t, *options), [x, offset, mask, weight, bias], device)


def test_deform_conv_with_offsets_of_a_larger_map(device):
    x, _, _, weight, bias = deformed(*DEFORMED[0])
    offset, mask = rand(2, 18, 9, 7, seed=1, low=-2, high=2), rand(2, 9, 6, 5, seed=2, low=0)
    options = DEFORMED[0][1:]
    assert_same_with_grads(
        lambda *t: modulated_deform_conv2d(*t, *options),
        lambda *t: reference_deform_conv(*t, *options), [x, offset, mask, weight, bias], device)


@stand_ins_only  # the compiled operator reads outside of the offsets
def test_deform_conv_with_offsets_of_a_smaller_map(device):
    x, offset, mask, weight, bias = (t.to(device) for t in deformed(*DEFORMED[0]))
    with pytest.raises(ValueError, match=r'too small; expected at least \(18, 5, 4\)'):
        modulated_deform_conv2d(x, offset[:, :, :-1], mask, weight, bias, *DEFORMED[0][1:])


def test_dyhead(device, monkeypatch):
    """A level's offsets also serve the next level, of half the size."""
    torch.manual_seed(0)
    head = DyHead(16, 16, num_blocks=1, zero_init_offset=False).double()
    for parameter in head.parameters():  # also biases, so that no ReLU gets 0
        nn.init.normal_(parameter, std=.2)
    maps = [rand(2, 16, 7, 6), rand(2, 16, 4, 3, seed=1), rand(2, 16, 2, 2, seed=2)]
    results = []
    for reference in (False, True):
        if reference:
            monkeypatch.setattr(ModulatedDeformConv2d, 'forward', lambda self, x, offset, mask:
                                reference_deform_conv(x, offset, mask, self.weight, 0, self.stride,
                                                      self.padding, self.dilation, 1, 1))
        module = copy.deepcopy(head).to('cpu' if reference else device)
        outs = module([t.to(module.dyhead_blocks[0].spatial_conv_offset.weight) for t in maps])
        sum(out.square().sum() for out in outs).backward()
        results.append([*outs, *(p.grad for p in module.parameters())])
    assert [out.shape for out in results[0][:3]] == [m.shape for m in maps]
    for actual, expected in zip(*results):
        assert_same(actual, expected)


def test_deform_conv_without_offsets_is_a_convolution(device):
    x = rand(2, 4, 6, 5).float().to(device)
    for kind in (DeformConv2dPack, ModulatedDeformConv2dPack):
        pack = kind(4, 6, 3, padding=1).to(device)
        want = F.conv2d(x, pack.weight, padding=1)
        if isinstance(pack, ModulatedDeformConv2d):
            want = want / 2 + pack.bias[:, None, None]
        assert_same(pack(x), want, 1e-5)
    # mmcv pads an input smaller than the kernel.
    small = DeformConv2d(4, 6, 3, padding=1).to(device)
    assert small(x[:, :, :2, :2], x.new_zeros(2, 18, 2, 2)).shape == (2, 6, 2, 2)


SHAPES = [(3, 4), (2, 5)]


def reference_ms_deform_attn(value, locations, weights, shapes=SHAPES):
    batch, _, heads, channels = value.shape
    starts = [0, 12]
    result = []
    for n in range(batch):
        for q in range(locations.shape[1]):
            for h in range(heads):
                total = 0
                for level, (height, width) in enumerate(shapes):
                    image = value[n, starts[level]:starts[level] + height * width, h]
                    image = image.t().reshape(channels, height, width)
                    for p in range(locations.shape[4]):
                        x, y = locations[n, q, h, level, p]
                        sample = sample_zero_padded(image, y * height - .5, x * width - .5)
                        total = total + weights[n, q, h, level, p] * sample
                result.append(total)
    return torch.stack(result).view(batch, locations.shape[1], heads * channels)


def test_ms_deform_attn(cuda_op_device):
    shapes = torch.tensor(SHAPES, device=cuda_op_device)
    starts = torch.tensor([0, 12], device=cuda_op_device)
    inputs = [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, seed=1, low=-.2, high=1.2),
              rand(2, 3, 2, 2, 3, seed=2, low=0)]
    assert_same_with_grads(
        lambda value, locations, weights: MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, locations, weights, 64), reference_ms_deform_attn, inputs,
        cuda_op_device, 1e-8)


def test_ms_deform_attn_at_the_border(cuda_op_device):
    """Points exactly one pixel outside: -1 / 4 + 1 / 8 of a side of 4 px."""
    shapes = torch.tensor([(4, 4)], device=cuda_op_device)
    locations = rand(1, 2, 1, 1, 4, 2, low=.1, high=.9)
    locations[..., :2, 0] = locations[..., 1:3, 1] = -.125
    assert_same_with_grads(
        lambda value, locations, weights: MultiScaleDeformableAttnFunction.apply(
            value, shapes, shapes.new_zeros(1), locations, weights, 64),
        lambda *t: reference_ms_deform_attn(*t, shapes=[(4, 4)]),
        [rand(1, 16, 1, 2), locations, rand(1, 2, 1, 1, 4, seed=2)], cuda_op_device, 1e-8)


def test_ms_deform_attn_module(device):
    module = MultiScaleDeformableAttention(16, 2, 2, 3, batch_first=True).to(device)
    out = module(rand(2, 3, 16).float().to(device), value=rand(2, 22, 16).float().to(device),
                 reference_points=rand(2, 3, 2, 2, low=0).float().to(device),
                 spatial_shapes=torch.tensor(SHAPES, device=device),
                 level_start_index=torch.tensor([0, 12], device=device))
    assert out.shape == (2, 3, 16)
    out.sum().backward()
    assert module.value_proj.weight.grad.any()


@stand_ins_only
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(device, dtype):
    x, offset, mask, weight, bias = deformed(*DEFORMED[4])
    options, shapes = DEFORMED[4][1:], torch.tensor(SHAPES, device=device)
    for op, inputs in [
            (lambda *t: deform_conv2d(*t, *options), [x, offset, weight]),
            (lambda *t: modulated_deform_conv2d(*t, *options), [x, offset, mask, weight, bias]),
            (lambda *t: MultiScaleDeformableAttnFunction.apply(t[0], shapes, shapes, *t[1:], 64),
             [rand(2, 22, 2, 4), rand(2, 3, 2, 2, 3, 2, low=0), rand(2, 3, 2, 2, 3, low=0)])]:
        assert_half_precision(op, inputs, dtype, device)
