"""Networks on a GPU against the CPU. Each test records its largest error for gpu_check.py."""
import pytest
import torch
from support.helpers import image

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.latency.building import compiled, graphed
from mmeffformer.models import gpu
from mmeffformer.models.precision import half_precision

pytestmark = pytest.mark.gpu
NETWORKS = [(EfficientFormer, arch) for arch in ('l1', 'l3', 'l7')] + [
    (EfficientFormerV2, arch) for arch in ('s0', 's1', 's2', 'l')]
ALL = pytest.mark.parametrize('kind, arch', NETWORKS, ids=[arch for _, arch in NETWORKS])
SMALLEST = pytest.mark.parametrize('kind, arch', [NETWORKS[0], NETWORKS[3]], ids=['l1', 's0'])


@pytest.fixture(autouse=True)
def exact_products():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def assert_near(record_property):
    """Return a function that compares lists of tensors, by the norm of the difference."""

    def compare(actual, expected, relative):
        errors = [((a.double().cpu() - b.double().cpu()).norm() / b.double().norm()).item()
                  for a, b in zip(actual, expected)]
        record_property('error', max(errors))
        assert len(actual) == len(expected) and max(errors) <= relative, errors

    return compare


def fused(kind, arch, randomize):
    return randomize(kind(arch)).eval().switch_to_deploy()


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
@ALL
def test_a_training_step_as_in_float64(kind, arch, layout, randomize, assert_near):
    model, x = randomize(kind(arch)).train(), image(96, 128, batch=2)
    found = []
    for device, dtype in (('cpu', torch.float64), ('cuda', torch.float32)):
        model.to(device, dtype, memory_format=layout).zero_grad()
        outs = model(x.to(device, dtype, memory_format=layout))
        sum(out.sin().sum() for out in outs).backward()
        found.append([*(out.detach() for out in outs), torch.cat(
            [p.grad.flatten() for p in model.parameters()])])
    assert_near(found[1], found[0], 1e-3)


@pytest.mark.parametrize('how', ['autocast', 'half_precision', 'weights', 'pool_block'])
@pytest.mark.parametrize('dtype, relative', [('bf16', 5e-2), ('fp16', 1e-2)])
@ALL
@torch.no_grad()
def test_half_precision(kind, arch, dtype, relative, how, randomize, assert_near, monkeypatch):
    monkeypatch.setattr(gpu, 'POOL_BLOCK', how == 'pool_block')
    model, x = fused(kind, arch, randomize), image(224, 224, batch=2)
    expected = model(x)
    model.to('cuda', memory_format=torch.channels_last)
    x = x.to('cuda', memory_format=torch.channels_last)
    torch_dtype = dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype]
    if how == 'autocast':
        with torch.autocast('cuda', torch_dtype):
            outs = model(x)
    elif how == 'half_precision':
        outs = half_precision(model, dtype)(x)
    else:
        outs = model.to(torch_dtype)(x.to(torch_dtype))
    assert_near(outs, expected, relative)


@pytest.mark.parametrize('dtype, relative', [('bf16', 2e-1), ('fp16', 4e-2)])
@SMALLEST
def test_training_under_autocast(kind, arch, dtype, relative, randomize, assert_near):
    model, x = randomize(kind(arch)).train().cuda(), image(96, 128, batch=2).cuda()
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast('cuda', dict(bf16=torch.bfloat16, fp16=torch.float16)[dtype],
                            enabled=enabled):
            outs = model(x)
        sum(out.float().sum() for out in outs).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        found.append([out.detach().cpu() for out in outs])
    assert_near(found[1], found[0], relative)


@pytest.mark.parametrize('size', [(224, 224), (127, 161)], ids=str)
@ALL
@torch.no_grad()
def test_fused_and_not_and_in_a_graph(kind, arch, size, randomize, assert_near):
    model, x = randomize(kind(arch)).eval(), image(*size)
    expected = model(x)
    model.to('cuda', memory_format=torch.channels_last)
    x = x.to('cuda', memory_format=torch.channels_last)
    outs = [*model(x), *model.switch_to_deploy()(x)]
    replay = graphed(torch.no_grad()(lambda: model(x)))
    x.normal_()  # another image in the same place
    assert_near([*outs, *replay()], [*expected, *expected, *(out.cpu() for out in model(x))], 1e-4)


@SMALLEST
@torch.no_grad()
def test_compiled(kind, arch, randomize, assert_near):
    model, x = fused(kind, arch, randomize), image(224, 224)
    expected = model(x)
    model.to('cuda', memory_format=torch.channels_last)
    run, x = compiled(model), x.to('cuda', memory_format=torch.channels_last)
    assert_near([*run(x), *graphed(lambda: run(x))()], [*expected, *expected], 1e-4)
