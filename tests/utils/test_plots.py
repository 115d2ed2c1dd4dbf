"""Logs and plots."""
import itertools
import json

import cv2
import numpy as np
import pytest
from matplotlib import pyplot as plt

from mmeffformer.utils.plots import (
    Mark,
    agreement,
    figure,
    learning_curve,
    page,
    pareto_front,
    read_scalars,
    stacked_bars,
    tradeoff,
)


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of the figures that are drawn, which stay open until the end."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, 'close', figures.append)
    yield figures
    for each in figures:
        close(each)


def log(work_dir, run, *records, tail=''):
    folder = work_dir / run / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)) + tail)


def test_training_resumed_and_evaluated_is_one_run(tmp_path):
    log(tmp_path, '1', dict(step=10, epoch=1, loss=3., loss_cls=2., lr=.1),
        {'mIoU': 25., 'step': 1}, dict(step=20, epoch=2, loss=2.), tail='\n{"step": 30, "lo')
    log(tmp_path, '2', dict(step=20, epoch=2, loss=1.), {'mIoU': 50., 'step': 2, 'time': .1})
    log(tmp_path, '3', {'mIoU': 99., 'step': 0})  # tools/test.py in the same folder
    assert read_scalars(tmp_path) == (
        {'loss': {10: 3., 20: 1.}, 'loss_cls': {10: 2.}}, {'mIoU': {1: 25., 2: 50.}}, 'epoch')


def test_a_run_from_the_start_replaces_an_earlier_one(tmp_path):
    log(tmp_path, '1', dict(step=10, epoch=1, loss=3.), {'coco/bbox_mAP': .5, 'step': 1},
        dict(step=20, epoch=2, loss=2.))
    log(tmp_path, '2', dict(step=10, loss=1.), {'coco/bbox_mAP': .25, 'step': 10})
    assert read_scalars(tmp_path) == (
        {'loss': {10: 1.}}, {'coco/bbox_mAP': {10: .25}}, 'iteration')


def test_learning_curve_plots_what_was_logged(tmp_path, drawn):
    log(tmp_path, '1', dict(step=10, loss=3.), {'coco/bbox_mAP': .5, 'coco/bbox_mAP_s': 0,
                                               'step': 10}, dict(step=20, loss=2.))
    learning_curve(tmp_path, tmp_path / 'curve.png')
    plotted = [(ax.get_xlabel(), line.get_label(), line.get_xydata().tolist())
               for ax in drawn[0].axes for line in ax.lines]
    assert plotted == [('iteration', 'loss', [[10, 3], [20, 2]]),
                       ('iteration', 'coco/bbox_mAP', [[10, .5]])]
    assert cv2.imread(str(tmp_path / 'curve.png')).shape[1] > 1000


def test_a_folder_without_logs(tmp_path):
    with pytest.raises(FileNotFoundError, match='expected the work_dir of a training run'):
        read_scalars(tmp_path)


def test_page_shows_every_image(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]
    page([np.full((20, 30, 3), colour, np.uint8) for colour in colours], tmp_path / 'a/page.png',
         columns=3)
    picture = cv2.imread(str(tmp_path / 'a/page.png'))[..., ::-1].reshape(-1, 3)
    for colour in colours:
        assert (picture == colour).all(1).sum() > 1000


def test_tradeoff_shows_published_and_measured(tmp_path, drawn):
    marks = [Mark('L1 ?', 'A', 1., 30., 31.), Mark('L3', 'A', 4., 40., None),
             Mark('18', 'B', 1.05, None, 30.2)]
    tradeoff({('detector', 'AP, %'): marks, ('segmentor', 'mIoU, %'): marks[:1],
              ('none', 'AP, %'): []}, 'GMACs', tmp_path / 'a/plot.png')
    fig, = drawn
    left, right, _ = fig.axes
    assert (left.get_title(), left.get_xlabel(), left.get_ylabel()) == (
        'detector', 'GMACs', 'AP, %')
    lines = [(line.get_xydata().tolist(), line.get_markerfacecolor() == 'white')
             for line in left.lines]
    assert lines == [([[1, 30], [4, 40]], True), ([[1, 31]], False), ([[1.05, 30.2]], False)]
    assert len(right.lines) == 2
    assert [text.get_text() for text in left.texts] == ['L1 ?', 'L3', '18']
    boxes = [text.get_window_extent() for text in left.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    legend, = fig.legends
    assert [text.get_text() for text in legend.texts] == ['A', 'B', 'published', 'measured']
    assert cv2.imread(str(tmp_path / 'a/plot.png')).shape[1] > 900


def test_pareto_front_is_what_no_other_beats():
    points = [(3, 5.), (1, 2.), (2, 2.), (2, 4.), (4, 5.), (5, 6.), (1, 1.)]
    assert pareto_front(points) == [(1, 2.), (2, 4.), (3, 5.), (5, 6.)]
    assert pareto_front([]) == []


def test_tradeoff_with_front_spreads_and_caption(tmp_path, drawn):
    marks = [Mark('L1', 'A', 2., 30., None, (1.5, 2.5)),
             Mark('18', 'B', 4., 20., None, (3., 5.)),
             Mark('L3', 'A', 3., 40., None)]
    tradeoff({('eager', 'AP, %'): marks}, 'ms', tmp_path / 'plot.png', front=True, caption='note')
    ax, = drawn[0].axes
    front, = [line for line in ax.lines if line.get_drawstyle() == 'steps-post']
    # The front extends to the most expensive network.
    assert front.get_xydata().tolist() == [[2, 30], [3, 40], [4, 40]]
    assert [segment.tolist() for lines in ax.collections for segment in lines.get_segments()] == [
        [[1.5, 30], [2.5, 30]], [[3, 20], [5, 20]]]
    assert drawn[0].get_supxlabel() == 'note'


def test_tradeoff_with_levels_of_others(tmp_path, drawn):
    tradeoff({('eager', 'AP, %'): [Mark('L1', 'A', 2., 30., None)]}, 'ms', tmp_path / 'plot.png',
             levels=dict(peer=45.))
    ax, = drawn[0].axes
    dashed, = [line for line in ax.lines if line.get_linestyle() == '--']
    assert [*dashed.get_ydata()] == [45, 45] and ax.get_ylim()[1] > 45
    assert 'peer' in [text.get_text() for text in ax.texts]


def test_bars_show_every_part(tmp_path, drawn):
    stacked_bars({'a': (dict(x=1., y=3., z=-1.), 5.), 'b': (dict(x=2., y=2., z=.01), 4.)}, 'ms',
                 'title', tmp_path / 'x/bars.png', 'whole')
    ax, = drawn[0].axes
    bars = {container.get_label(): [(bar.get_x(), bar.get_width()) for bar in container]
            for container in ax.containers}
    assert bars == {'x': [(0, 1), (0, 2)], 'y': [(1, 3), (2, 2)],
                    'z': [(4, 0), (4, pytest.approx(.01))]}
    assert [text.get_text() for text in ax.texts] == ['25%', '50%', '75%', '50%', '', '']
    assert [text.get_text() for text in ax.get_yticklabels()] == ['a', 'b']
    assert cv2.imread(str(tmp_path / 'x/bars.png')).shape[1] > 1000


def test_agreement_labels_named_networks(tmp_path, drawn):
    agreement([('l1', 20., 25.), ('random0', 10., 9.)], tmp_path / 'check.png', 'title', 'note')
    ax, = drawn[0].axes
    assert [dots.get_offsets().tolist() for dots in ax.collections[1:]] == [[[25, 20]], [[9, 10]]]
    assert [text.get_text() for text in ax.texts] == ['l1']
    assert drawn[0].get_supxlabel() == 'note' and (tmp_path / 'check.png').is_file()


def test_a_failed_plot_leaves_no_file_and_no_figure(tmp_path):
    with pytest.raises(KeyError), figure(tmp_path / 'plot.png', (4, 3)):
        raise KeyError
    assert not [*tmp_path.iterdir()] and not plt.get_fignums()
