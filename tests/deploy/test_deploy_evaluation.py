"""Predictions of an exported file instead of its model."""
import pytest
import torch
from support.helpers import image

from mmeffformer import EfficientFormer
from mmeffformer.deploy.evaluation import ExportedModel
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import ExportedFile


def predictions(name, exported, rows):
    """Return the data samples that a model, and its file, predict for an image of ROWS x 96 px,
    which was read at ROWS / 0.8 x 192 px."""
    if name == 'maskrcnn':
        from mmdet.structures import DetDataSample as Sample
        options = dict(scale_factor=(0.5, 0.8))
    else:
        from mmseg.structures import SegDataSample as Sample
        options = {}
    pixels = (image(rows, 96)[0] * 60 + 120).clamp(0, 255).byte()
    model, file = exported(name, 'onnx')
    found = []
    for each in (model, ExportedModel(model, file)):
        meta = dict(img_shape=(rows, 96), ori_shape=(rows * 5 // 4, 192), **options)
        with torch.no_grad():
            found += each.test_step(dict(inputs=[pixels], data_samples=[Sample(metainfo=meta)]))
    return found


def test_logits_are_resized(exported):
    expected, actual = predictions('semfpn', exported, 60)
    torch.testing.assert_close(actual.seg_logits.data, expected.seg_logits.data, rtol=0, atol=1e-3)
    same = actual.pred_sem_seg.data == expected.pred_sem_seg.data
    assert same.shape == (1, 75, 192) and same.double().mean() > 0.999


@pytest.mark.parametrize('options', [
    {'model.test_cfg': dict(mode='slide', crop_size=(48, 64), stride=(32, 40))},
    {'model.decode_head.out_channels': 1, 'model.decode_head.num_classes': 2,
     'model.decode_head.threshold': 0.4, 'model.backbone.in_channels': 1,
     'model.data_preprocessor.mean': None, 'model.data_preprocessor.std': None,
     'model.decode_head.loss_decode.use_sigmoid': True}], ids=['windows', 'binary and grey'])
def test_predictions_are_those_of_mmseg(options, build, tmp_path):
    from mmseg.structures import SegDataSample
    model, path = build('semfpn', **options), tmp_path / 'model.onnx'
    export(model, path, 'onnx', 'model', (64, 96), dynamic=True)
    channels = options.get('model.backbone.in_channels', 3)
    pixels = (image(70, 110, 2)[:, :channels] * 60 + 120).clamp(0, 255).byte()
    metas = [dict(img_shape=(70, 110), ori_shape=(90, 120)) for _ in pixels]
    found = []
    for each in (model, ExportedModel(model, ExportedFile(path, 'onnx'))):
        with torch.no_grad():
            found.append(each.test_step(dict(inputs=[*pixels], data_samples=[
                SegDataSample(metainfo=meta) for meta in metas])))
    for expected, actual in zip(*found):
        torch.testing.assert_close(actual.seg_logits.data, expected.seg_logits.data, rtol=0,
                                   atol=1e-3)
        same = actual.pred_sem_seg.data == expected.pred_sem_seg.data
        assert same.shape == (1, 90, 120) and same.double().mean() > 0.999
        assert len(expected.pred_sem_seg.data.unique()) > 1


def test_masks_are_pasted(exported):
    expected, actual = (each.pred_instances for each in predictions('maskrcnn', exported, 64))
    assert actual.bboxes.shape == expected.bboxes.shape and len(actual.bboxes) >= 20
    distance = (actual.bboxes[:, None] - expected.bboxes).abs().amax(2)
    distance = distance + 1e3 * (actual.labels[:, None] != expected.labels)
    nearest, twin = distance.min(1)
    near = nearest < 0.1
    assert near.double().mean() > 0.9
    same = actual.masks[near] == expected.masks[twin][near]
    assert same.shape[1:] == (80, 192) and same.double().mean() > 0.999
    # The file gets the padding too; boxes end where the image does.
    padded = predictions('maskrcnn', exported, 60)[1].pred_instances
    limits = padded.bboxes.amax(0)
    assert padded.masks.shape[1:] == (75, 192) and limits[3] == 75 and limits[2] <= 192


def test_no_detections(exported):
    for found in predictions('maskrcnn', exported, 32):  # all regions are too low
        instances = found.pred_instances
        assert instances.bboxes.shape == (0, 4) and instances.masks.shape == (0, 40, 192)
        assert instances.masks.dtype == torch.bool


def test_models_that_do_not_fit(arch, exported, tmp_path):
    model, file = exported('semfpn', 'onnx')
    served = ExportedModel(model, file)
    assert not served.state_dict()
    with pytest.raises(ValueError, match="mode='loss': an exported model predicts only"):
        served(image(64, 96), mode='loss')
    export(EfficientFormer(arch), tmp_path / 'part.onnx', 'onnx', 'backbone', (32, 32))
    with pytest.raises(ValueError, match='outputs feature0.*needs logits'):
        ExportedModel(model, ExportedFile(tmp_path / 'part.onnx', 'onnx'))
