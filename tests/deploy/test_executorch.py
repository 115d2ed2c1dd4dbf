"""ExecuTorch files, run by its runtime: `make executorch-test` installs it."""
import pytest
import torch
from support.helpers import image

from mmeffformer import EfficientFormer, EfficientFormerV2
from mmeffformer.deploy.comparison import compare
from mmeffformer.deploy.export import export
from mmeffformer.deploy.inputs import draw_pictures
from mmeffformer.deploy.runtimes import ExportedFile, SizeError

pytest.importorskip('executorch.runtime')
SHAPE = (96, 64)


def assert_same(model, what, file, inputs):
    for each in compare(model, what, file, inputs):
        assert each.error < 1e-4, each


@pytest.mark.parametrize('kind, mode', [(EfficientFormer, 'offset'),
                                        (EfficientFormerV2, 'legacy')])
def test_backbone(kind, mode, arch, randomize, tmp_path):
    model = randomize(kind(arch, bias_grid=(5, 3), bias_mode=mode)).eval()
    path = tmp_path / 'model.pte'
    compared = export(model, path, 'executorch', 'backbone', SHAPE, meta=dict(config='mine'))
    assert [each.output for each in compared] == ['feature0', 'feature1', 'feature2', 'feature3']
    file = ExportedFile(path, 'executorch')
    assert file.meta == dict(config='mine', shape=[*SHAPE], dynamic=False, size_divisor=1,
                             precision='fp32',
                             what='backbone', outputs=[each.output for each in compared])
    assert_same(model, 'backbone', file, [image(*SHAPE)])
    with pytest.raises(SizeError, match='takes images of 96 x 64 px.*the image has 64 x 96'):
        file(image(64, 96))
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, 'table'):
                module.table.copy_(module.table.flip(1))
    assert not all(each.matches for each in compare(model, 'backbone', file, [image(*SHAPE)]))


def test_segmentor_in_int8(build, tmp_path):
    """Its fp32 file is written and compared before."""
    model, path = build('semfpn'), tmp_path / 'model.pte'
    pictures = draw_pictures(model.data_preprocessor, 3, SHAPE)
    compared, = export(model, path, 'executorch', 'model', SHAPE, images=pictures[:1],
                       calibration=[*pictures, image(50, 70)])
    assert 1e-3 < compared.error < compared.tolerance and compared.inputs == 1
    file = ExportedFile(path, 'executorch')
    assert file.meta['precision'] == 'int8'
    assert file(pictures[0])['logits'].shape == (1, 7, *SHAPE)
    fp32 = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert path.stat().st_size < fp32 / 2


def test_neck_and_pooling_head(build, build_swapped, tmp_path):
    path = tmp_path / 'model.pte'
    export(build('maskrcnn', 'EfficientFormerV2'), path, 'executorch', 'neck', (64, 95))
    assert [*ExportedFile(path, 'executorch').meta['outputs']] == [f'feature{i}' for i in range(5)]
    model = build_swapped('pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py')
    export(model, path, 'executorch', 'model', (64, 95))
    assert_same(model, 'model', ExportedFile(path, 'executorch'), [image(64, 95)])


def test_runtime_lacks_operators_of_detectors():
    from executorch.runtime import Runtime
    names = Runtime.get().operator_registry.operator_names
    assert 'aten::convolution.out' in names
    assert not any('nms' in name or 'roi_align' in name for name in names)


@pytest.mark.parametrize('content', [b'', b'junk', bytes(1000)])
def test_broken_files(content, tmp_path):
    path = tmp_path / 'broken.pte'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'broken.pte is broken'):
        ExportedFile(path, 'executorch')
