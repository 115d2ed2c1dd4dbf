"""Pictures: learning curves, pages of drawn images, and what networks cost and achieve."""
import json
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np

matplotlib.use('Agg')
from matplotlib import lines, ticker  # noqa: E402  after the backend is chosen
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402

MAX_ON_A_PAGE = 64
Curve = Dict[int, float]  # step: value


class Scalars(NamedTuple):
    """Losses and metrics of a run by name, and what the steps of the metrics count."""

    losses: Dict[str, Curve]
    metrics: Dict[str, Curve]
    metric_unit: str


def read_scalars(work_dir: Path) -> Scalars:
    """Return what the training in ``work_dir`` logged, resumed parts put together.

    Raises:
        FileNotFoundError: No training has logged there.
    """
    scalars = Scalars({}, {}, 'iteration')
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        records = list(_records(path))
        trained = [record for record in records if 'loss' in record]
        if not trained and not any(record['step'] for record in records):  # an evaluation alone
            continue
        # A training that had come to its end, and lacked its validation only, trains no more.
        first = trained[0]['step'] if trained else float('inf')
        unit = scalars.metric_unit if not trained else (
            'epoch' if 'epoch' in trained[0] else 'iteration')
        # What an earlier run logged from here on has been trained anew.
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
                                'expected the work dir of a training run')
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
        FileNotFoundError: No training has logged into ``work_dir``.
    """
    losses, metrics, metric_unit = read_scalars(work_dir)
    # By size of object there are many, and they say little of how training went.
    metrics = {k: v for k, v in metrics.items() if not k.endswith(('_s', '_m', '_l'))}
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    for ax, curves, title, unit in ((axes[0], losses, 'training loss', 'iteration'),
                                    (axes[1], metrics, 'evaluation', metric_unit)):
        for name, curve in sorted(curves.items()):
            main = name == 'loss' or name.endswith(('mAP_50', 'mIoU'))
            ax.plot([*curve], [*curve.values()], label=name, linewidth=2.2 if main else 1,
                    marker='o' if len(curve) < 30 else None)
        ax.set(title=title, xlabel=unit)
        ax.margins(y=.05)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=.3)
        if curves:
            ax.legend(fontsize=8, ncol=2)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def page(images: Sequence[np.ndarray], out: Path, columns: int = 4) -> None:
    """Save the first ``MAX_ON_A_PAGE`` uint8 RGB images (H, W, 3), ``columns`` to a row."""
    images = images[:MAX_ON_A_PAGE]
    rows = -(-len(images) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(3 * columns, 3 * rows), squeeze=False,
                             layout='constrained')
    for ax in axes.flat:
        ax.axis('off')
    for ax, image in zip(axes.flat, images):
        ax.imshow(image)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


class Mark(NamedTuple):
    """A network in a plot: what it costs, and how good it is said and found to be."""

    label: str
    family: str
    cost: float
    published: Optional[float]
    measured: Optional[float]


class TimedMark(NamedTuple):
    """A mark whose cost was measured, in the range ``spread``."""

    label: str
    family: str
    cost: float
    published: Optional[float]
    measured: Optional[float]
    spread: Tuple[float, float]


def pareto_front(points: Iterable[Tuple[float, float]]) -> List[Tuple[float, float]]:
    """Return the points (cost, quality) that no other beats at their cost or less, by cost."""
    front: List[Tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or quality > front[-1][1]:
            front.append((cost, quality))
    return front


def tradeoff(panels: Dict[Tuple[str, str], Sequence[Mark]], cost: str, out: Path,
             front: bool = False, caption: str = '') -> None:
    """Plot quality against cost, the published values hollow, the measured ones filled.

    Args:
        panels: Marks by title, and by what their values are, with the unit; one panel each.
        cost: What their cost is, with the unit; on a logarithmic axis.
        out: The picture's file.
        front: Draw the Pareto front of the published values, behind all.
        caption: Text below the panels.
    """
    families = list(dict.fromkeys(mark.family for marks in panels.values() for mark in marks))
    colours = {family: f'C{i}' for i, family in enumerate(families)}
    # Hollow marks are the larger ones, to be seen where both are in one place.
    styles = {'published': dict(markerfacecolor='white', markersize=10, linestyle=':', zorder=2),
              'measured': dict(markersize=6, linestyle='', zorder=3)}
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.6), squeeze=False,
                             layout='constrained')
    curves, handles = {ax: [] for ax in axes.flat}, {}
    for ax, ((title, unit), marks) in zip(axes.flat, panels.items()):
        for family, colour in colours.items():
            for name, style in styles.items():
                points = sorted((mark.cost, getattr(mark, name)) for mark in marks
                                if mark.family == family and getattr(mark, name) is not None)
                if points:
                    curves[ax] += ax.plot(*zip(*points), color=colour, marker='o', **style)
                    handles[name] = lines.Line2D([], [], color='grey', marker='o', label=name,
                                                 **style)
        best = pareto_front((mark.cost, mark.published) for mark in marks
                            if mark.published is not None) if front else []
        if best:  # goes on to the right: more time has brought no more
            best.append((max(mark.cost for mark in marks), best[-1][1]))
            ax.step(*zip(*best), where='post', color='lightgrey', linewidth=4, zorder=1)
        for mark in marks:
            if isinstance(mark, TimedMark):
                y = mark.published if mark.published is not None else mark.measured
                ax.hlines(y, *mark.spread, color=colours[mark.family], zorder=4)
        ax.set(xscale='log', xlabel=cost, ylabel=unit, title=title)
        low, high = ax.get_xlim()
        ax.xaxis.set_major_locator(ticker.LogLocator(
            subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 7)))
        ax.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.margins(.12)
        ax.grid(alpha=.3)
    families = [lines.Line2D([], [], color=colour, marker='s', linestyle='', label=family)
                for family, colour in colours.items()]
    handles = [*families, *(handles[name] for name in styles if name in handles)]
    widest = max((len(handle.get_label()) for handle in handles), default=0) + 6
    fig.legend(handles=handles, loc='outside upper center', frameon=False,
               ncol=max(1, min(len(handles), 50 * len(panels) // widest)))  # 50 letters a panel
    if caption:
        fig.supxlabel(caption, fontsize=8, color='dimgrey')
    fig.canvas.draw()  # only now is it known where things are
    for ax, marks in zip(axes.flat, panels.values()):
        _label(ax, marks, curves[ax], colours)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def _label(ax, marks: Sequence[Mark], curves: Sequence[lines.Line2D],
           colours: Dict[str, str]) -> None:
    """Write each mark's label beside it, clear of other labels, of marks and of curves.

    Of the places around the mark, the first where least is in the way is taken.
    """
    corners = {curve: ax.transData.transform(curve.get_xydata()) for curve in curves}
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for xy in corners.values() for x, y in xy]
    dots = np.concatenate([np.empty((0, 2)), *(
        np.linspace(start, end, 100) for curve, xy in corners.items()
        if curve.get_linestyle() != 'None' for start, end in zip(xy, xy[1:]))])
    around = [(0, 1), (0, -1), (1, 0), (-1, 0), (1, -1), (-1, 1), (1, 1), (-1, -1)]
    for mark in marks:
        y = mark.published if mark.published is not None else mark.measured
        text = ax.annotate(mark.label, (mark.cost, y), (0, 0), textcoords='offset points',
                           fontsize=9, color=colours[mark.family], ha='center', va='center')
        width = text.get_window_extent().width
        places = []
        for far in (1, 1.5, 2):
            for right, up in around:
                text.xyann = place = far * right * (6 + width / 3), far * up * 11
                box = text.get_window_extent()
                in_the_way = 100 * sum(box.overlaps(other) for other in taken)
                places.append((in_the_way + box.count_contains(dots), place, box))
        _, text.xyann, box = min(places, key=lambda found: found[0])
        taken.append(box)


def agreement(points: Sequence[Tuple[str, float, float]], out: Path, title: str,
              caption: str = '') -> None:
    """Plot predicted against measured times to ``out``.

    Args:
        points: Name, predicted and measured ms. Networks named 'random...' are not labelled.
        title: On what it was measured.
        caption: How well the two agree.
    """
    names, predicted, measured = zip(*points)
    fig, ax = plt.subplots(figsize=(6, 6), layout='constrained')
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
           xlabel='measured, ms', ylabel='predicted, ms')
    ax.set_title(title, fontsize=10)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(ticker.FormatStrFormatter('%g'))
        axis.set_minor_locator(ticker.NullLocator())
    ax.grid(alpha=.3)
    ax.legend(loc='upper left', fontsize=8)
    if caption:
        fig.supxlabel(caption, fontsize=8, color='dimgrey')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def search_path(path: Sequence[Tuple[float, float]], measured: Sequence[Tuple[float, float]],
                beside: Dict[str, Tuple[float, Optional[float]]], target: float, metric: str,
                title: str, out: Path) -> None:
    """Plot the networks on a search's path, accuracy against latency, to ``out``.

    Args:
        path: Predicted ms and accuracy of each.
        measured: Measured ms and accuracy of each; none if they were not measured.
        beside: Measured ms of other networks by name, and their accuracy where it is known.
        target: The latency searched for, ms.
        metric: What the accuracy is.
        title: On what the latency is measured.
    """
    fig, ax = plt.subplots(figsize=(8, 5), layout='constrained')
    ax.plot(*zip(*path), color='tab:blue', marker='o', markersize=4, linewidth=1,
            label='path, by the table')
    if measured:
        ax.plot(*zip(*measured), color='tab:orange', marker='x', linestyle='',
                label='path, measured')
    ax.axvline(target, color='tab:green', linestyle='--', linewidth=1,
               label=f'target, {target:.3g} ms')
    for name, (ms, accuracy) in beside.items():
        if accuracy is None:
            ax.axvline(ms, color='grey', linestyle=':', linewidth=1)
        else:
            ax.plot(ms, accuracy, color='black', marker='s', linestyle='')
        ax.annotate(name, (ms, accuracy if accuracy is not None else 1), (4, -10),
                    xycoords='data' if accuracy is not None else ('data', 'axes fraction'),
                    textcoords='offset points', fontsize=9, color='dimgrey')
    low, high = ax.get_ylim()
    if high - low < .02 * abs(high):  # noise should not look like a cliff
        ax.set_ylim(low - .01 * abs(high), high + .01 * abs(high))
    ax.set(xscale='log', xlabel='latency of the backbone, ms',
           ylabel=f'{metric}, without further training')
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(ticker.FormatStrFormatter('%g'))
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_title(title, fontsize=10)
    ax.grid(alpha=.3)
    ax.legend(fontsize=8, loc='lower right')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def stacked_bars(bars: Dict[str, Tuple[Dict[str, float], float]], unit: str, title: str,
                 out: Path, whole: str, caption: str = '') -> None:
    """Plot a bar of parts for each network to ``out``, with the share of each large part.

    Args:
        bars: By network its parts, the same of all and in the same order, and the whole as it
            was measured by itself.
        unit: Of the parts, with what they are.
        title: On what they were measured.
        whole: What the whole is, for the legend.
        caption: What else is to be known.
    """
    fig, ax = plt.subplots(figsize=(11, 2.2 + .55 * len(bars)), layout='constrained')
    longest = max(max(sum(parts.values()), total) for parts, total in bars.values())
    for row, (parts, total) in enumerate(bars.values()):
        left, all_parts = 0., sum(parts.values())
        for i, (name, size) in enumerate(parts.items()):
            size = max(size, 0.)
            ax.barh(row, size, left=left, color=f'C{i}', height=.75,
                    label=None if row else name)
            if size > .035 * longest:
                ax.text(left + size / 2, row, f'{size / all_parts:.0%}', ha='center',
                        va='center', fontsize=8, color='white')
            left += size
        ax.vlines(total, row - .45, row + .45, color='black', linewidth=2,
                  label=None if row else whole)
    ax.set_yticks(range(len(bars)), list(bars))
    ax.invert_yaxis()
    ax.set(xlabel=unit, xlim=(0, 1.03 * longest))
    ax.grid(axis='x', alpha=.3)
    ax.set_axisbelow(True)
    ax.set_title(title, fontsize=10)
    fig.legend(loc='outside upper center', ncol=6, frameon=False, fontsize=9)
    if caption:
        fig.supxlabel(caption, fontsize=8, color='dimgrey')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)


def memory_curves(curves: Dict[str, Tuple[Sequence[int], Sequence[float]]], out: Path) -> None:
    """Plot the memory of processes, MiB, over iterations to ``out``."""
    fig, ax = plt.subplots(figsize=(8, 4.5), layout='constrained')
    for name, (iterations, mib) in curves.items():
        ax.plot(iterations, mib, label=name, linewidth=1.5)
    ax.set(xlabel='iteration, each of another image size', ylabel='resident memory, MiB',
           xlim=(0, None))
    ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    ax.grid(alpha=.3)
    ax.legend(fontsize=9, ncol=2, loc='lower right')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
