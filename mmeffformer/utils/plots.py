"""Plots: learning curves, pages of images, and cost and quality of networks."""
import json
import math
from contextlib import contextmanager
from pathlib import Path
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import matplotlib
import numpy as np

from .files import atomic_write

matplotlib.use('Agg')
from matplotlib import lines, ticker  # noqa: E402  after the backend is chosen
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axis import Axis  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

MAX_ON_A_PAGE = 64
STYLE: Dict[Any, Any] = {'axes.grid': True, 'grid.alpha': .3, 'axes.axisbelow': True,
                         'axes.titlesize': 10, 'legend.fontsize': 8}
Curve = Dict[int, float]  # value by step


@contextmanager
def figure(out: Path, figsize: Tuple[float, float], rows: int = 1, columns: int = 1,
           caption: str = '') -> Iterator[Tuple[Any, ...]]:
    """Context manager: yield a figure and each of its axes; save it to ``out`` and close it.

    Args:
        figsize: Width and height in inches.
        caption: Text below the axes.
    """
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=figsize, squeeze=False,
                                 layout='constrained')
        if caption:
            fig.supxlabel(caption, fontsize=8, color='dimgrey', wrap=True)
        try:
            yield fig, *axes.flat
            with atomic_write(out) as tmp_path:
                fig.savefig(tmp_path, dpi=110)
        finally:
            plt.close(fig)


def _log_ticks(axis: Axis, subs: Sequence[float]) -> None:
    """Label a logarithmic axis at ``subs`` times powers of ten."""
    axis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
    axis.set_minor_locator(ticker.NullLocator())


class Scalars(NamedTuple):
    """Losses and metrics of a run by name, and the unit of the metrics' steps."""

    losses: Dict[str, Curve]
    metrics: Dict[str, Curve]
    metric_unit: str


def read_scalars(work_dir: Path) -> Scalars:
    """Return the scalars that a training run logged in ``work_dir``, resumed parts joined.

    Raises:
        FileNotFoundError: The folder has no logs of a training run.
    """
    scalars = Scalars({}, {}, 'iteration')
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        records = list(_records(path))
        trained = [record for record in records if 'loss' in record]
        if not trained and not any(record['step'] for record in records):  # an evaluation only
            continue
        # A run that was resumed after its last iteration logs only its validation.
        first = trained[0]['step'] if trained else float('inf')
        unit = scalars.metric_unit if not trained else (
            'epoch' if 'epoch' in trained[0] else 'iteration')
        # The resumed run has repeated what an earlier run logged from here on.
        losses = {k: {s: v for s, v in curve.items() if s < first}
                  for k, curve in scalars.losses.items()}
        kept = max((s for curve in losses.values() for s in curve), default=0)
        scalars = Scalars(losses, scalars.metrics if kept else {}, unit)
        for record in records:
            group = scalars.losses if 'loss' in record else scalars.metrics
            for name, value in record.items():
                if isinstance(value, (int, float)) and (
                        'loss' in name if group is scalars.losses
                        else name not in ('step', 'time', 'data_time')):
                    group.setdefault(name, {})[record['step']] = value
    if not scalars.losses:
        raise FileNotFoundError(f'{work_dir} holds no */vis_data/scalars.json with losses: '
                                'expected the work_dir of a training run')
    return scalars


def _records(path: Path) -> Iterator[dict]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed
            return


def learning_curve(work_dir: Path, out: Path) -> None:
    """Plot the losses and the metrics of a training run to ``out``.

    Raises:
        FileNotFoundError: ``work_dir`` has no logs of a training run.
    """
    losses, metrics, metric_unit = read_scalars(work_dir)
    # Metrics by object size are many, and say little about the course of the training.
    metrics = {k: v for k, v in metrics.items() if not k.endswith(('_s', '_m', '_l'))}
    with figure(out, (12, 4.5), 1, 2) as (_, left, right):
        for ax, curves, title, unit in ((left, losses, 'training loss', 'iteration'),
                                        (right, metrics, 'evaluation', metric_unit)):
            for name, curve in sorted(curves.items()):
                main = name == 'loss' or name.endswith(('mAP_50', 'mIoU'))
                ax.plot([*curve], [*curve.values()], label=name, linewidth=2.2 if main else 1,
                        marker='o' if len(curve) < 30 else None)
            ax.set(title=title, xlabel=unit)
            ax.margins(y=.05)
            ax.set_ylim(bottom=0)
            if curves:
                ax.legend(ncol=2)


def page(images: Sequence[np.ndarray], out: Path, columns: int = 4) -> None:
    """Save the first ``MAX_ON_A_PAGE`` uint8 RGB images (H, W, 3), ``columns`` per row."""
    images = images[:MAX_ON_A_PAGE]
    rows = -(-len(images) // columns)
    with figure(out, (3 * columns, 3 * rows), rows, columns) as (_, *axes):
        for ax in axes:
            ax.axis('off')
        for ax, image in zip(axes, images):
            ax.imshow(image)


def histogram(sizes: np.ndarray, out: Path, title: str, limit: float = 8) -> None:
    """Plot how often ``sizes``, px, occur, with their median and a lower limit, to ``out``."""
    low, high = min(limit, sizes.min()) * .9, max(sizes.max(), limit) * 1.1
    with figure(out, (8, 4)) as (_, ax):
        ax.hist(sizes, bins=np.geomspace(low, high, 40), color='tab:blue')
        ax.axvline(np.median(sizes), color='tab:orange', label=f'median {np.median(sizes):.3g} px')
        ax.axvline(limit, color='grey', linestyle='--', label=f'{limit:g} px')
        ax.set(xscale='log', xlim=(low, high), xlabel='side, px', ylabel='objects', title=title)
        _log_ticks(ax.xaxis, (1, 2, 4))
        ax.legend()


class Mark(NamedTuple):
    """A network in a plot: its cost, and its published and measured quality."""

    label: str
    family: str
    cost: float
    published: Optional[float]
    measured: Optional[float]
    spread: Optional[Tuple[float, float]] = None  # range of a cost that was measured


# Published marks are hollow and larger, to be seen where both coincide.
STYLES: Dict[str, Dict[str, Any]] = {
    'published': dict(markerfacecolor='white', markersize=10, linestyle=':', zorder=2),
    'measured': dict(markersize=6, linestyle='', zorder=3)}


def pareto_front(points: Iterable[Tuple[float, float]]) -> List[Tuple[float, float]]:
    """Return the points (cost, quality) that no other beats at their cost or less, by cost."""
    front: List[Tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def tradeoff(panels: Dict[Tuple[str, str], Sequence[Mark]], cost: str, out: Path,
             front: bool = False, caption: str = '',
             levels: Optional[Mapping[str, float]] = None) -> None:
    """Plot quality against cost: published values hollow, measured values filled.

    Args:
        panels: Marks of each panel by its title and its quality with unit.
        cost: Name and unit of the cost, on a logarithmic axis.
        out: The picture's file.
        front: Draw the Pareto front of the published values.
        caption: Text below the panels.
        levels: Quality of others whose cost is unknown, by name: dashed lines in each panel.
    """
    families = list(dict.fromkeys(mark.family for marks in panels.values() for mark in marks))
    colours = {family: f'C{i}' for i, family in enumerate(families)}
    with figure(out, (4.6 * len(panels), 4.6), 1, len(panels), caption) as (fig, *axes):
        curves = {}
        for ax, ((title, unit), marks) in zip(axes, panels.items()):
            curves[ax] = _plot_marks(ax, marks, colours)
            for quality in (levels or {}).values():
                ax.axhline(quality, color='grey', linestyle='--', linewidth=1, zorder=1)
            if front:
                _plot_front(ax, marks)
            ax.set(xscale='log', xlabel=cost, ylabel=unit, title=title)
            low, high = ax.get_xlim()
            _log_ticks(ax.xaxis, (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7))
            ax.margins(.12)
        handles = [lines.Line2D([], [], color=colour, marker='s', linestyle='', label=family)
                   for family, colour in colours.items()]
        handles += [lines.Line2D([], [], color='grey', marker='o', label=name, **style)
                    for name, style in STYLES.items() if any(
                        getattr(mark, name) is not None
                        for marks in panels.values() for mark in marks)]
        widest = max((len(str(handle.get_label())) for handle in handles), default=0) + 6
        fig.legend(handles=handles, loc='outside upper center', frameon=False,
                   ncol=max(1, min(len(handles), 50 * len(panels) // widest)))  # 50 letters each
        fig.canvas.draw()  # positions are known from here on
        for ax, marks in zip(axes, panels.values()):
            _label_levels(ax, levels or {})
            _label(ax, marks, curves[ax], colours)


def _label_levels(ax: plt.Axes, levels: Mapping[str, float]) -> None:
    """Write names to the right of the axes, moved up where they would overlap."""
    lowest = -math.inf  # of the next name, px
    for name, quality in sorted(levels.items(), key=lambda level: level[1]):
        y = ax.transData.transform((1, quality))[1]
        text = ax.annotate(name, (1, quality), (4, 0), xycoords=('axes fraction', 'data'),
                           textcoords='offset points', va='center', fontsize=7, color='dimgrey')
        height = text.get_window_extent().height
        up = max(0, lowest - y)
        text.xyann = 4, up * 72 / ax.figure.dpi
        lowest = y + up + height


def _height(mark: Mark) -> float:
    return next(value for value in (mark.published, mark.measured) if value is not None)


def _plot_marks(ax: plt.Axes, marks: Sequence[Mark], colours: Dict[str, str]
                ) -> List[lines.Line2D]:
    curves = []
    for family, colour in colours.items():
        for name, style in STYLES.items():
            points = sorted((mark.cost, getattr(mark, name)) for mark in marks
                            if mark.family == family and getattr(mark, name) is not None)
            if points:
                curves += ax.plot(*zip(*points), color=colour, marker='o', **style)
    for mark in marks:
        if mark.spread:
            ax.hlines(_height(mark), *mark.spread, color=colours[mark.family], zorder=4)
    return curves


def _plot_front(ax: plt.Axes, marks: Sequence[Mark]) -> None:
    best = pareto_front((mark.cost, mark.published) for mark in marks
                        if mark.published is not None)
    if best:  # extended to the right, where more cost brings no more quality
        best.append((max(mark.cost for mark in marks), best[-1][1]))
        ax.step(*zip(*best), where='post', color='lightgrey', linewidth=4, zorder=1)


def _label(ax: plt.Axes, marks: Sequence[Mark], curves: Sequence[lines.Line2D],
           colours: Dict[str, str]) -> None:
    """Write each label next to its mark, where it overlaps fewest labels, marks and curves."""
    corners = {curve: ax.transData.transform(curve.get_xydata()) for curve in curves}
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for xy in corners.values() for x, y in xy]
    dots = np.concatenate([np.empty((0, 2)), *(
        np.linspace(start, end, 100) for curve, xy in corners.items()
        if curve.get_linestyle() != 'None' for start, end in zip(xy, xy[1:]))])
    around = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, -1), (-1, 1), (1, 1), (-1, -1)]
    for mark in marks:
        text = ax.annotate(mark.label, (mark.cost, _height(mark)), (0, 0), fontsize=9,
                           textcoords='offset points', color=colours[mark.family], ha='center',
                           va='center')
        width = text.get_window_extent().width
        positions = []
        for far in (1, 1.5, 2):
            for right, up in around:
                text.xyann = offset = far * right * (6 + width / 3), far * up * 11
                box = text.get_window_extent()
                overlaps = 100 * sum(box.overlaps(other) for other in taken)
                positions.append((overlaps + box.count_contains(dots), offset, box))
        _, text.xyann, box = min(positions, key=lambda found: found[0])
        taken.append(box)


def agreement(points: Sequence[Tuple[str, float, float]], out: Path, title: str,
              caption: str = '') -> None:
    """Plot predicted against measured times to ``out``.

    Args:
        points: Name, predicted and measured ms. Networks named 'random...' get no label.
    """
    names, predicted, measured = zip(*points)
    with figure(out, (6, 6), caption=caption) as (_, ax):
        ends = np.array([min(*predicted, *measured) * .85, max(*predicted, *measured) * 1.15])
        ax.plot(ends, ends, color='grey', linewidth=1, label='equal')
        ax.fill_between(ends, ends * .9, ends * 1.1, color='grey', alpha=.15, label='within 10 %')
        for name, x, y in zip(names, measured, predicted):
            named = not name.startswith('random')
            ax.scatter(x, y, s=24, color='C1' if named else 'C0', zorder=4 if named else 3)
            if named:
                ax.annotate(name, (x, y), (6, -12), textcoords='offset points', fontsize=9,
                            color='C1')
        ax.set(xscale='log', yscale='log', xlim=ends, ylim=ends, aspect='equal',
               xlabel='measured, ms', ylabel='predicted, ms', title=title)
        for axis in (ax.xaxis, ax.yaxis):
            _log_ticks(axis, (1, 2, 3, 5))
        ax.legend(loc='upper left')


def search_path(path: Sequence[Tuple[float, float]], measured: Sequence[Tuple[float, float]],
                others: Dict[str, Tuple[float, Optional[float]]], target: float, metric: str,
                title: str, out: Path) -> None:
    """Plot the networks on a search's path, accuracy against latency, to ``out``.

    Args:
        path: Predicted ms and accuracy of each.
        measured: Measured ms and accuracy of each; empty if they were not measured.
        others: Measured ms of other networks by name, and their accuracy if known.
        target: Target latency, ms.
        metric: Name of the accuracy.
    """
    with figure(out, (8, 5)) as (_, ax):
        ax.plot(*zip(*path), color='tab:blue', marker='o', markersize=4, linewidth=1,
                label='path, by the table')
        if measured:
            ax.plot(*zip(*measured), color='tab:orange', marker='x', linestyle='',
                    label='path, measured')
        ax.axvline(target, color='tab:green', linestyle='--', linewidth=1,
                   label=f'target, {target:.3g} ms')
        for name, (ms, accuracy) in others.items():
            if accuracy is None:
                ax.axvline(ms, color='grey', linestyle=':', linewidth=1)
            else:
                ax.plot(ms, accuracy, color='black', marker='s', linestyle='')
            ax.annotate(name, (ms, accuracy if accuracy is not None else 1), (4, -10),
                        xycoords='data' if accuracy is not None else ('data', 'axes fraction'),
                        textcoords='offset points', fontsize=9, color='dimgrey')
        low, high = ax.get_ylim()
        if high - low < .02 * abs(high):  # do not magnify noise
            ax.set_ylim(low - .01 * abs(high), high + .01 * abs(high))
        ax.set(xscale='log', xlabel='latency of the backbone, ms',
               ylabel=f'{metric}, without further training', title=title)
        _log_ticks(ax.xaxis, (1, 1.5, 2, 3, 5, 7))
        ax.legend(loc='lower right')


def stacked_bars(bars: Dict[str, Tuple[Dict[str, float], float]], unit: str, title: str,
                 out: Path, whole: str, caption: str = '') -> None:
    """Plot one bar of parts per network to ``out``, with the shares of the large parts.

    Args:
        bars: By network, its parts by name (the same names for all), and a whole that is
            measured separately.
        unit: Name and unit of the parts.
        whole: Name of the whole, for the legend.
    """
    with figure(out, (11, 2.2 + .55 * len(bars)), caption=caption) as (fig, ax):
        names = list(next(iter(bars.values()))[0])
        sizes = np.array([[parts[name] for name in names] for parts, _ in bars.values()])
        sizes, rows = sizes.clip(min=0), np.arange(len(bars))
        totals = np.array([total for _, total in bars.values()])
        longest = max(sizes.sum(1).max(), totals.max())
        for i, name in enumerate(names):
            drawn = ax.barh(rows, sizes[:, i], left=sizes[:, :i].sum(1), color=f'C{i}',
                            height=.75, label=name)
            shares = sizes[:, i] / sizes.sum(1)
            ax.bar_label(drawn, [f'{share:.0%}' if size > .035 * longest else ''
                                 for share, size in zip(shares, sizes[:, i])],
                         label_type='center', fontsize=8, color='white')
        ax.vlines(totals, rows - .45, rows + .45, color='black', linewidth=2, label=whole)
        ax.set_yticks(rows, list(bars))
        ax.invert_yaxis()
        ax.set(xlabel=unit, xlim=(0, 1.03 * longest), title=title)
        ax.grid(visible=False, axis='y')
        fig.legend(loc='outside upper center', ncol=6, frameon=False)
