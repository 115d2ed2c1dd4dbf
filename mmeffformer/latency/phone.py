"""Latency tables of a phone: files of all parts to time there, and a table of their times.

A folder of parts has ``parts.csv``, the list of files to time, and ``header.json``, the header of
the table. A part's file has several copies of the part, see :mod:`.measuring`; its time is divided
by their number. The entry 'overhead' is the time of three shallow networks minus their parts. The
reference network is in no entry: its time shows how well the table predicts.
"""
import csv
import io
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Union

from ..deploy.export import export
from ..models.arch import Arch
from ..utils.files import atomic_write
from .exported import suffix, write_module
from .measuring import differences, entry, new_header, overhead_archs
from .parts import build_network, build_part, copies
from .table import OVERHEAD, LatencyTable, Part, parts, parts_of
from .timing import Progress, no_progress, spread

RUNTIMES = ('coreml', 'executorch')
LIST, HEADER = 'parts.csv', 'header.json'
COLUMNS = ('file', 'part', 'copies', 'ms')
REFERENCE = 'reference'


class Row(NamedTuple):
    """A file to time: a part in ``copies``, or a whole network."""

    name: str  # as in the column 'part'
    what: Union[Part, Arch]
    copies: int = 1


def phone_header(runtime: str, shape: Sequence[int], max_widths: Sequence[int], step: int
                 ) -> Dict[str, Any]:
    """Return the header of a phone's table, in which ``device`` is still None.

    Raises:
        ValueError: An argument is out of range.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime {runtime!r} for a phone: expected one of '
                         f'{", ".join(RUNTIMES)}')
    header = new_header(runtime, (shape[0], shape[1]), 1, max_widths, step, rounds=1)
    widths = overhead_archs(header)[1].widths  # within the table
    return dict(header, device=None, cores=None, warm_ups=None, reference=[
        [*widths], *header['reference'][1:]])


def rows_of(header: Mapping[str, Any]) -> List[Row]:
    """Return the files of a table: its parts, networks for the overhead, and the reference."""
    rows = [Row(str(part), part, copies(part, header['shape'])) for part in parts_of(header)
            if part.kind != OVERHEAD]
    rows += [Row(f'{OVERHEAD} {i}', arch) for i, arch in enumerate(overhead_archs(header), 1)]
    return [*rows, Row(REFERENCE, Arch(*header['reference']))]


def export_parts(header: Mapping[str, Any], folder: Path, progress: Progress = no_progress
                 ) -> Path:
    """Export the missing files of a table, and return the list of all, to be filled in.

    The next call resumes an interrupted export. An existing list stays as it is.

    Args:
        header: Header of :func:`phone_header`.
        folder: Folder of the files. Whole networks are compared with PyTorch where the runtime
            runs, parts are not compared.

    Raises:
        ValueError: The folder has parts of another table.
    """
    found, rows = folder / HEADER, rows_of(header)
    if found.exists():
        other = differences(json.loads(found.read_text()), header)
        if other:
            raise ValueError(f'{folder} has parts with other settings: {"; ".join(other)}. '
                             'Choose another folder, or the arguments of that one')
    else:
        with atomic_write(found) as path:
            path.write_text(json.dumps(header, indent=1))
    if not (folder / LIST).exists():
        text = io.StringIO()
        lines = csv.writer(text, lineterminator='\n')
        lines.writerows([COLUMNS, *(_cells(row, header) for row in rows)])
        with atomic_write(folder / LIST) as path:
            path.write_text(text.getvalue())
    for i, row in enumerate(rows):
        file = folder / _cells(row, header)[0]
        progress(row.name, i, len(rows))
        if not file.exists():
            with tempfile.TemporaryDirectory(prefix='.tmp-', dir=folder) as unfinished:
                _export(row, Path(unfinished) / file.name, header)
                shutil.move(Path(unfinished) / file.name, file)
    progress('exported', len(rows), len(rows))
    return folder / LIST


def _cells(row: Row, header: Mapping[str, Any]) -> List[str]:
    """Return a row of the list, with no time."""
    return [row.name.replace(' ', '_') + suffix(header['runtime']), row.name, str(row.copies), '']


def _export(row: Row, path: Path, header: Mapping[str, Any]) -> None:
    runtime, shape, precision = header['runtime'], header['shape'], header['precision']
    if isinstance(row.what, Part):
        module, image = build_part(row.what, row.copies, shape)
        write_module(module, image, path, runtime, precision)
    else:
        export(build_network(row.what), path, runtime, 'backbone', shape, precision=precision)


def import_times(path: Path, device: str) -> LatencyTable:
    """Return the table of a list of :func:`export_parts` whose column ``ms`` is filled in.

    Args:
        path: The list, next to its ``header.json``.
        device: Name of the phone.

    Raises:
        FileNotFoundError: The list or the header does not exist.
        ValueError: The list is not of that table, or a time is missing or not a number.
    """
    for file in (path, path.with_name(HEADER)):
        if not file.is_file():
            raise FileNotFoundError(f'{str(file)!r} does not exist; tools/latency_table.py '
                                    '--export-parts makes it')
    header = json.loads(path.with_name(HEADER).read_text())
    rows, times = rows_of(header), _read_times(path, header)
    table = LatencyTable(dict(header, device=device, reference_ms=times[REFERENCE]))
    for row in rows:
        if isinstance(row.what, Part):
            table.entries[row.name] = entry(row.what, spread([times[row.name]]), header['shape'],
                                            row.copies)
    beyond = [times[f'{OVERHEAD} {i}'] - sum(table.part_ms(part) for part in parts(arch)
                                             if part.kind != OVERHEAD)
              for i, arch in enumerate(overhead_archs(header), 1)]
    table.entries[OVERHEAD] = entry(Part(OVERHEAD), spread(beyond), header['shape'])
    return table


def _read_times(path: Path, header: Mapping[str, Any]) -> Dict[str, float]:
    """Return the ms of each file by the name of its part."""
    with path.open(newline='', encoding='utf-8-sig') as lines:  # spreadsheets write a mark first
        read = csv.DictReader(lines)
        missing = {*COLUMNS} - {*(read.fieldnames or [])}
        if missing:
            raise ValueError(f'{path} has no column {", ".join(sorted(missing))}: expected '
                             f'{", ".join(COLUMNS)}, with commas between')
        texts = {each['part']: (each['copies'], each['ms']) for each in read}
    expected = {row.name: str(row.copies) for row in rows_of(header)}
    wrong = [name for name in {**expected, **texts}
             if expected.get(name) != texts.get(name, (None, ))[0]]
    if wrong:
        raise ValueError(f'{path} is not the list of that table: {_some(wrong)} differ in part '
                         'or copies from what --export-parts wrote')
    times = {name: _number(ms) for name, (_, ms) in texts.items()}
    unknown = [f'{name} ({texts[name][1] or "empty"})' for name, ms in times.items()
               if not 0 < ms < math.inf]
    if unknown:
        raise ValueError(f'{path}: {len(unknown)} of {len(times)} times are missing or not '
                         f'positive numbers of ms: {_some(unknown)}')
    return times


def _number(text: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _some(names: Sequence[str], most: int = 8) -> str:
    more = [f'and {len(names) - most} more'] * (len(names) > most)
    return ', '.join([*names[:most], *more])
