"""Core ML files, as programs."""
import coremltools
import pytest
from support.helpers import image

from mmeffformer.deploy.comparison import expected_outputs
from mmeffformer.deploy.coreml import check_program
from mmeffformer.deploy.export import export

PSPNET = 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'


@pytest.fixture(scope='module')
def models(build, build_swapped):
    """Models by the part that is exported of them."""
    return dict(neck=build('maskrcnn', 'EfficientFormerV2'), model=build_swapped(PSPNET))


@pytest.mark.parametrize('what, precision, size', [
    ('neck', None, 2), ('model', 'fp32', 4)])
def test_program(what, precision, size, models, tmp_path):
    model, path, x = models[what], tmp_path / 'model.mlpackage', image(64, 95)
    export(model, path, 'coreml', what, (64, 95), precision=precision)
    expected = expected_outputs(model, what, x)

    spec = coremltools.models.MLModel(str(path), skip_model_load=True).get_spec().description
    arrays = {each.name: each.type.multiArrayType for each in [*spec.input, *spec.output]}
    assert {name: [*each.shape] for name, each in arrays.items()} == {
        name: [*value.shape] for name, value in dict(expected, image=x).items()}
    assert {each.ArrayDataType.Name(each.dataType) for each in arrays.values()} == {'FLOAT32'}
    used = (model.backbone, model.neck if what == 'neck' else model.decode_head)
    weights = sum(p.numel() for part in used for p in part.parameters() if p.dim() > 1)
    stored, = path.rglob('weight.bin')
    # The file also has biases and expanded attention biases.
    assert weights * size < stored.stat().st_size < 1.5 * weights * size

    other = 'fp16' if size == 4 else 'fp32'
    found, wrong = ('FLOAT32', 'FLOAT16') if size == 4 else ('FLOAT16', 'FLOAT32')
    with pytest.raises(ValueError, match=f'has type {found}: expected {wrong}'):
        check_program(path, x, expected, other)
    with pytest.raises(ValueError, match='has the inputs and outputs .*64, 95.*: expected'):
        check_program(path, x[..., 1:], expected, 'fp16')

    file = path / 'Data/com.apple.CoreML/model.mlmodel'
    spec = coremltools.utils.load_spec(str(file))
    function, = spec.mlProgram.functions.values()
    function.block_specializations[function.opset].operations[-1].type = 'custom_layer'
    coremltools.utils.save_spec(spec, str(file))
    with pytest.raises(ValueError, match="operator custom_layer is not one of Core ML's own"):
        check_program(path, x, expected, precision or 'fp16')
