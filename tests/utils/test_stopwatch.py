"""Time by section, without the sections inside it."""
import pytest
from torch import nn

from mmeffformer.utils import stopwatch as module
from mmeffformer.utils.stopwatch import Stopwatch, watch


@pytest.fixture
def clock(monkeypatch):
    """Return a function that lets seconds pass."""
    now = [0.]
    monkeypatch.setattr(module.time, 'perf_counter', lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_a_section_is_without_those_inside(clock):
    watched = Stopwatch()
    for _ in range(2):
        with watched.section('outer'):
            clock(1)
            with watched.section('inner'):
                clock(2)
                with watched.section('innermost'):
                    clock(4)
            with pytest.raises(KeyError), watched.section('inner'):
                clock(8)
                raise KeyError
    assert watched.take() == dict(outer=2000, inner=20000, innermost=8000)
    assert watched.take() == {}


class Head(nn.Module):

    def __init__(self, wait):
        super().__init__()
        self.wait = wait

    def predict(self, features):
        self.wait(3)
        return self.predict_by_feat(features)

    def predict_by_feat(self, features):
        self.wait(5)
        return features


class Detector(nn.Module):

    def __init__(self, wait):
        super().__init__()
        self.backbone, self.bbox_head, self.wait = nn.Identity(), Head(wait), wait

    def predict(self, image):
        self.wait(1)
        return self.bbox_head.predict(self.backbone(image))


def test_parts_of_a_model(clock):
    model = Detector(clock)
    watched = watch(model)
    assert watched.section('other')(model.predict)(7) == 7
    assert watched.take() == dict(backbone=0, bbox_head=3000, post_processing=5000, other=1000)
