"""Which differences between an exported file and PyTorch are accepted."""
import pytest
import torch
from support.helpers import image

from mmeffformer import EfficientFormer
from mmeffformer.deploy.comparison import MismatchError, compare, expected_outputs
from mmeffformer.deploy.graphs import traceable


def test_detections_without_counterpart_count(build):
    model = build('maskrcnn')
    part = traceable(model, 'model')

    def run(x):
        outputs = dict(zip(part.output_names, part(x)))
        outputs['boxes'][:3] += 5
        return {name: value.flip(0) for name, value in outputs.items()}  # in another order

    with torch.no_grad():
        detections, *others = compare(model, 'model', run, [image(64, 96)])
    assert detections.error == pytest.approx(6 / 200) and not detections.matches
    assert str(detections) == 'detections: error 0.03, tolerance 0.02, over 1 inputs'
    assert [each.output for each in others] == ['boxes', 'scores', 'labels', 'masks']
    assert all(each.matches for each in others)


def test_int8_detections_are_weighted_by_their_scores(monkeypatch):
    boxes = torch.tensor([[0., 0., 40., 40.], [50., 0., 90., 40.], [0., 50., 40., 90.]])
    found = dict(boxes=boxes, scores=torch.tensor([0.9, 0.5, 0.1]), labels=torch.arange(3))
    other = dict(boxes=boxes.flip(0) + 2, scores=torch.tensor([0.1, 0.5, 0.8]),
                 labels=torch.tensor([2, 4, 0]))  # the second has another label
    monkeypatch.setattr('mmeffformer.deploy.comparison.expected_outputs', lambda *_: found)
    detections, paired = compare(None, 'model', lambda _: other, [image(96, 96)], precision='int8')
    assert detections.error == pytest.approx((0.1 + 2 * 0.5) / (1.5 + 1.4))
    assert detections.tolerance == 0.2 and not detections.matches
    # The boxes of labels 0 and 2, each coordinate 2 px off.
    norm = boxes[[0, 2]].norm().item()
    assert paired.output == 'boxes' and paired.error == pytest.approx(2 * 8 ** 0.5 / norm)
    assert paired.matches


@pytest.mark.parametrize('precision', ['fp32', 'fp16', 'bf16', 'int8'])
@pytest.mark.parametrize('wrong', [float('nan'), float('inf')])
def test_values_that_are_not_finite_do_not_match(arch, wrong, precision):
    model, x = EfficientFormer(arch).eval(), image(64, 64)

    def run(x):
        outputs = expected_outputs(model, 'backbone', x)
        outputs['feature2'][0, 0, 0, 0] = wrong
        return outputs

    compared = {each.output: each for each in compare(model, 'backbone', run, [x, x], precision)}
    assert [name for name, each in compared.items() if not each.matches] == ['feature2']


def test_other_shapes_are_refused(arch):
    model = EfficientFormer(arch).eval()

    def run(x):
        return {name: value[..., :-1] for name, value in
                expected_outputs(model, 'backbone', x).items()}

    with pytest.raises(MismatchError, match=r'feature0 for an image of 64 x 96 px has shape '
                       r'\(1, 8, 16, 23\): expected \(1, 8, 16, 24\)'):
        compare(model, 'backbone', run, [image(64, 96)])
