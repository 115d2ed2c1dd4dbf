"""Inputs of exported files, read and preprocessed as in testing."""
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmeffformer.deploy.inputs import describe_input, draw_pictures, read_pictures
from mmeffformer.utils.config import model_cfg
from mmeffformer.utils.registry import MODELS


@pytest.fixture
def read(repo_root):
    """A function that returns a segmentor's config with another loader and preprocessor, and the
    preprocessor."""

    def built(loader: dict, **preprocessor):
        cfg = Config.fromfile(repo_root / 'tests/data/semfpn_tiny.py')
        cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile', **loader),
                                                dict(type='LoadAnnotations'),
                                                dict(type='PackSegInputs')]
        cfg.data_preprocessor = cfg.model.pop('data_preprocessor')  # for the whole runner
        cfg.data_preprocessor.update(preprocessor)
        init_default_scope('mmseg')
        return cfg, MODELS.build(model_cfg(cfg).data_preprocessor)

    return built


def test_four_channels_of_16_bits(read, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 2 ** 16, (40, 50, 4), np.uint16)
    cv2.imwrite(str(tmp_path / 'image.png'), pixels)
    cfg, preprocessor = read(
        dict(color_type='unchanged', to_float32=True), mean=[3e4], std=[1e4],
        bgr_to_rgb=False)
    actual, = read_pictures(cfg, preprocessor, [tmp_path / 'image.png'])
    expected = torch.zeros(1, 4, 64, 64)
    expected[..., :40, :50] = torch.from_numpy((pixels - 3e4) / 1e4).permute(2, 0, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert describe_input(cfg, 4) == dict(
        channels='as read', mean=[3e4] * 4, std=[1e4] * 4)
    (tmp_path / 'note.txt').write_text('no image')
    with pytest.raises(ValueError, match='note.txt cannot be read by the test pipeline'):
        read_pictures(cfg, preprocessor, [tmp_path / 'note.txt'])


@pytest.mark.parametrize('backend, to_rgb, channels', [
    ('cv2', True, 'RGB'), ('cv2', False, 'BGR'), ('tifffile', False, 'as read'),
    ('tifffile', True, 'as read, reversed')])
def test_order_of_channels_without_normalisation(backend, to_rgb, channels, read):
    cfg, _ = read(dict(imdecode_backend=backend), mean=None, std=None, bgr_to_rgb=to_rgb)
    assert describe_input(cfg, 3) == dict(channels=channels, mean=[0.] * 3, std=[1.] * 3)


def test_drawn_pictures(read):
    _, preprocessor = read({}, mean=None, std=None)
    for channels in (1, 3, 5):
        first, second = draw_pictures(preprocessor, channels, (64, 96))
        assert first.shape == second.shape == (1, channels, 64, 96)
        assert not torch.equal(first, second) and 20 < first.std() < 128
        if channels == 5:
            assert torch.equal(first[:, :2], first[:, 3:])
