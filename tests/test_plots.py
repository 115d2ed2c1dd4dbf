"""Reading logs and laying out pictures."""
import json

import cv2
import numpy as np
import pytest

from mmeffformer.plots import page, read_scalars


def test_scalars_of_the_newest_run_are_read(tmp_path):
    for run, loss in (('20260101_000000', 9.), ('20260102_000000', 1.)):
        folder = tmp_path / run / 'vis_data'
        folder.mkdir(parents=True)
        lines = [dict(step=10, epoch=1, loss=loss), dict(step=20, epoch=2, loss=.5),
                 {'coco/bbox_mAP': .25, 'step': 1}]
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    assert read_scalars(tmp_path) == {'loss': ([10, 20], [1., .5]), 'epoch': ([10, 20], [1, 2]),
                                      'coco/bbox_mAP': ([1], [.25])}


def test_a_folder_without_logs_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected the work dir of a training run'):
        read_scalars(tmp_path)


def test_page_shows_every_image(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    page([np.full((20, 30, 3), colour, np.uint8) for colour in colours], tmp_path / 'a/page.png',
         columns=3)
    picture = cv2.imread(str(tmp_path / 'a/page.png'))[..., ::-1].reshape(-1, 3)
    for colour in colours:
        assert (picture == colour).all(1).sum() > 1000
