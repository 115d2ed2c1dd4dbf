"""Predictions are those of tools/test.py, without a data set; pictures that fail are named."""
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import MODELS
from support.helpers import ROOT
from support.helpers import run_tool as run

from mmeffformer.apis.inference import (
    PictureError,
    Predictor,
    find_media,
    load_drawer,
    make_folder,
    reads_any_file,
    to_rgb,
)
from mmeffformer.datasets import write_ade20k, write_coco
from mmeffformer.deploy.export import export_checkpoint
from mmeffformer.deploy.runtimes import ExportedFile
from mmeffformer.utils.config import model_cfg

# Arrays through a loader of the user's own.
LOADER = """
import numpy
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import TRANSFORMS

@TRANSFORMS.register_module(force=True)
class LoadArray(LoadImageFromFile):
    def transform(self, results):
        image = numpy.load(results['img_path'])
        return dict(results, img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])
"""


def rewrite(folder, change):
    """Replace the JPEGs below a folder by PNGs of what ``change`` makes of them."""
    for path in folder.rglob('*.jpg'):
        cv2.imwrite(str(path.with_suffix('.png')), change(cv2.imread(str(path))))
        path.unlink()
    for path in folder.rglob('*.json'):
        path.write_text(path.read_text().replace('.jpg', '.png'))


def save_random(cfg: Config, path):
    """Save random weights of a config's model."""
    torch.manual_seed(0)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        network = registry.build(model_cfg(cfg))
    torch.save(dict(state_dict=network.state_dict()), path)


def steps(library, *middle, **loading):
    """Return a pipeline of mmdet ('Det') or mmseg ('Seg')."""
    annotations = (dict(with_bbox=True, with_mask=True) if library == 'Det'
                   else dict(reduce_zero_label=True))
    return [dict(type='LoadImageFromFile', **loading), *middle,
            dict(type='LoadAnnotations', **annotations), dict(type=f'Pack{library}Inputs')]


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory):
    """Config, checkpoint and data of a segmentor of 16-bit images; the config's preprocessor is
    at its top."""
    folder = tmp_path_factory.mktemp('seg')
    write_ade20k(folder / 'data', train=1, val=3, size=(64, 96), progress=False)
    rewrite(folder / 'data/images', lambda image: image.astype(np.uint16) * 257)
    cfg = Config.fromfile(ROOT / 'tests/data/semfpn_tiny.py')
    cfg.data_preprocessor = dict(
        cfg.model.pop('data_preprocessor'), mean=[31784., 29884., 26610.],
        std=[15007., 14680., 14745.])
    cfg.test_dataloader.dataset.update(img_suffix='.png', pipeline=steps(
        'Seg', color_type='unchanged', to_float32=True))
    return save(cfg, folder)


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Config, checkpoint and data of a detector of images with four channels."""
    folder = tmp_path_factory.mktemp('det')
    write_coco(folder / 'data', train=1, val=3, size=(64, 96), progress=False)
    rewrite(folder / 'data', lambda image: np.dstack([image, 255 - image[..., :1]]))
    cfg = Config.fromfile(ROOT / 'configs/demo/maskrcnn_effformer_l1_shapes.py')
    tiny = Config.fromfile(ROOT / 'tests/data/semfpn_tiny.py').model.backbone
    cfg.model.data_preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
    cfg.model.backbone = dict(tiny, in_channels=4)
    cfg.model.neck.in_channels = [*tiny.arch.widths]
    cfg.model.test_cfg.rcnn.score_thr = 0.
    cfg.test_dataloader.dataset.metainfo.palette = [(230, 60, 60)]  # fewer than classes
    cfg.default_hooks.visualization.score_thr = 0.
    cfg.test_dataloader.num_workers = 0
    cfg.test_dataloader.persistent_workers = False
    cfg.test_dataloader.dataset.pipeline = steps(
        'Det', dict(type='Resize', scale=(128, 96), keep_ratio=True), color_type='unchanged')
    return save(cfg, folder)


def save(cfg, folder):
    """Save a config and random weights of its model."""
    cfg.dump(folder / 'config.py')
    torch.manual_seed(0)
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        network = registry.build(model_cfg(cfg))
    torch.save(dict(state_dict=network.state_dict()), folder / 'random.pth')
    return folder


def predicted(folder):
    """Return the predictor, and for each image what tools/test.py dumps."""
    run('tools/test.py', folder / 'config.py', folder / 'random.pth', '--data-root',
        folder / 'data', '--work-dir', folder / 'work', '--out', folder / 'found.pkl',
        '--show-dir', folder / 'shown')
    predict = Predictor(Config.fromfile(folder / 'config.py'), str(folder / 'random.pth'))
    found = load(folder / 'found.pkl')
    assert len(found) == len([*(folder / 'shown').rglob('*.png')]) == 3
    return predict, found


def test_16_bit_images_are_predicted_as_in_testing(segmentor):
    predict, tested = predicted(segmentor)
    for each in tested:
        sample, image = predict(each['img_path'])
        assert image.dtype == np.float32 and image.max() > 255
        expected = torch.as_tensor(each['pred_sem_seg']['data'])
        assert len(expected.unique()) > 1
        assert torch.equal(sample.pred_sem_seg.data, expected)
    assert predict.metainfo['classes'][1] == 'circle'


def test_images_of_four_channels_are_predicted_as_in_testing(detector):
    predict, tested = predicted(detector)
    for each in tested:
        sample, image = predict(each['img_path'])
        assert image.shape == (64, 96, 4)
        found, expected = sample.pred_instances, each['pred_instances']
        assert len(found) == len(expected['scores']) > 0
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(found[key], torch.as_tensor(expected[key]))


@pytest.mark.parametrize('color_type, has_loader', [('unchanged', True), ('color', True),
                                                    ('grayscale', False)])
def test_frames_are_predicted_as_files_of_them(segmentor, tmp_path, color_type, has_loader):
    cfg = Config.fromfile(segmentor / 'config.py')
    cfg.test_dataloader.dataset.pipeline[0].color_type = color_type
    channels = 1 if color_type == 'grayscale' else 3
    cfg.model.backbone.in_channels = channels
    cfg.data_preprocessor.update(mean=[128.] * channels, std=[64.] * channels, bgr_to_rgb=False)
    save_random(cfg, tmp_path / 'random.pth')
    predict = Predictor(cfg, str(tmp_path / 'random.pth'))
    assert (predict.frame_loader is not None) == has_loader
    frame = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'frame.png'), frame)
    (found, image), (expected, loaded) = predict(frame), predict(tmp_path / 'frame.png')
    assert image.dtype == loaded.dtype == np.float32 and (image == loaded).all()
    assert torch.equal(found.seg_logits.data, expected.seg_logits.data)
    assert found.ori_shape == expected.ori_shape


def test_an_exported_file_predicts_as_its_checkpoint(segmentor, tmp_path):
    cfg, checkpoint = Config.fromfile(segmentor / 'config.py'), str(segmentor / 'random.pth')
    export_checkpoint(cfg, checkpoint, str(tmp_path / 'model.onnx'), 'onnx', 'model', (64, 96))
    file = ExportedFile(tmp_path / 'model.onnx', 'onnx')
    path = next((segmentor / 'data/images/validation').iterdir())
    (found, image), (expected, loaded) = (
        Predictor(cfg, source)(path) for source in (checkpoint, file))
    assert (image == loaded).all()
    torch.testing.assert_close(found.seg_logits.data, expected.seg_logits.data, rtol=0, atol=1e-3)
    printed = run('tools/infer.py', segmentor / 'config.py', path, '--backend', 'onnx', '--model',
                  tmp_path / 'model.onnx', '--out-dir', tmp_path / 'out')
    assert '1 drawn files are in' in printed and ' images or frames per second' in printed
    drawn = load_drawer(cfg, checkpoint)(path)
    assert (cv2.imread(str(tmp_path / 'out' / path.name)) == drawn).mean() > .999


def test_bfloat16(segmentor):
    cfg, checkpoint = Config.fromfile(segmentor / 'config.py'), str(segmentor / 'random.pth')
    path = next((segmentor / 'data/images/validation').iterdir())
    half = Predictor(cfg, checkpoint, dtype='bf16')
    assert half.model.backbone.deployed
    exact, found = (each(path)[0].seg_logits.data for each in (Predictor(cfg, checkpoint), half))
    assert found.dtype == torch.float32
    assert 0 < (found - exact).norm() < .02 * exact.norm()
    with pytest.raises(ValueError, match="'fp16': expected bf16, or fp16 for a model on a GPU"):
        Predictor(cfg, checkpoint, dtype='fp16')


@pytest.mark.parametrize('arguments, message', [
    ('photos', 'give images, folders or videos after the checkpoint'),
    ('photos --model a.onnx', 'give either a checkpoint, or --backend and --model'),
    ('photos --backend onnx --model a.onnx --dtype bf16',
     '--dtype bf16 is for a checkpoint; make a file that computes in bf16 by tools/export.py '
     '--precision bf16'),
    ('photos --backend onnx --model a.onnx --device cuda', '--device cuda is for a checkpoint')])
def test_options_that_do_not_go_together(arguments, message, segmentor):
    assert message in run('tools/infer.py', segmentor / 'config.py', *arguments.split(), expect=2)


def test_pictures_that_fail_are_named_and_the_rest_is_drawn(segmentor, tmp_path):
    photos = tmp_path / 'photos'
    photos.mkdir()
    for name in ('a', 'z', 'sub\\b'):
        cv2.imwrite(str(photos / f'{name}.png'), np.full((40, 60, 3), 30000, np.uint16))
    (photos / 'broken.png').write_bytes(b'no image')
    cv2.imwrite(str(photos / 'four.png'), np.zeros((40, 60, 4), np.uint16))
    cfg = Config.fromfile(segmentor / 'config.py')
    for key in ('test_dataloader', 'val_dataloader', 'train_dataloader', 'test_evaluator'):
        cfg.pop(key)
    cfg.test_pipeline = steps('Seg', color_type='unchanged', to_float32=True)
    cfg.dump(tmp_path / 'config.py')
    printed = run('tools/infer.py', tmp_path / 'config.py', segmentor / 'random.pth', photos,
                  '--out-dir', tmp_path / 'out', '--page', tmp_path / 'page.png', expect=1)
    assert 'broken.png cannot be read as an image by LoadImageFromFile: ' in printed
    assert 'four.png cannot be processed by the model: ' in printed
    assert '3 drawn files are in' in printed and 'infer.py: 2 of 5 files failed' in printed
    assert 'Traceback' not in printed
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'a.png', 'sub\\b.png', 'z.png']
    assert cv2.imread(str(tmp_path / 'out/a.png'), cv2.IMREAD_UNCHANGED).shape == (40, 60, 3)


def test_strip_that_cannot_be_resized(detector, tmp_path):
    draw = load_drawer(Config.fromfile(detector / 'config.py'), str(detector / 'random.pth'))
    cv2.imwrite(str(tmp_path / 'strip.png'), np.zeros((1, 4000, 4), np.uint8))
    with pytest.raises(PictureError, match='cannot be processed by Resize: '):
        draw(tmp_path / 'strip.png')
    assert draw(next((detector / 'data/val').iterdir())).shape == (64, 96, 3)


def test_arrays_through_a_loader_of_the_user(segmentor, tmp_path):
    exec(LOADER, {})
    cfg = Config.fromfile(segmentor / 'config.py')
    assert not reads_any_file(cfg)
    cfg.test_dataloader.dataset.pipeline[0] = dict(type='LoadArray')
    assert reads_any_file(cfg)
    np.save(tmp_path / 'a.npy', np.zeros((40, 60, 3), np.float32))
    (source, target), = find_media([str(tmp_path)], tmp_path / 'out', any_file=True)
    assert (source.name, target.name) == ('a.npy', 'a.npy.png')
    with pytest.raises(FileNotFoundError, match='no files with suffix .jpg, .*; pass others by'):
        find_media([str(tmp_path)], tmp_path / 'out')
    draw = load_drawer(cfg, str(segmentor / 'random.pth'))
    assert draw(source).shape == (40, 60, 3)


@pytest.mark.parametrize('image, expected', [
    (np.array([[[1, 2, 3]]], np.uint8), [3, 2, 1]),
    (np.array([[[1, 2, 3, 4]]], np.float32), [3, 2, 1]),
    (np.array([[7]], np.uint8), [7, 7, 7]),
    (np.array([[7, 1000]], np.uint16), [0, 0, 0]),
    (np.array([[[-1., 0., 1., 9., 9.]]]), [255, 127, 0]),
    (np.array([[[np.nan, 5.]]]), [0, 0, 0])])
def test_images_to_look_at(image, expected):
    shown = to_rgb(image)
    assert shown.shape == (*image.shape[:2], 3) and shown.dtype == np.uint8
    assert shown[0, 0].tolist() == expected


def test_errors_of_users(segmentor, tmp_path):
    cfg, checkpoint = Config.fromfile(segmentor / 'config.py'), str(segmentor / 'random.pth')
    with pytest.raises(ValueError, match='device .cuda:99. cannot be used: '):
        Predictor(cfg, checkpoint, 'cuda:99')
    cfg.pop('visualizer')
    with pytest.raises(ValueError, match="expected visualizer=dict.type='SegLocalVisualizer'."):
        load_drawer(cfg, checkpoint)
    cfg.default_scope = 'mmpretrain'
    with pytest.raises(ValueError, match="default_scope 'mmpretrain': expected mmdet or mmseg"):
        Predictor(cfg, checkpoint)
    (tmp_path / 'file').write_text('')
    for folder in (tmp_path / 'file', tmp_path / 'file/below'):
        with pytest.raises(OSError, match='cannot be used as the folder for drawn files: '):
            make_folder(folder)
