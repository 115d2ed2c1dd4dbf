"""Parts exported for a phone, and the table of times that are made up for it."""
import csv
import json
import runpy
import sys

import coremltools
import pytest
from support.latency import simulated_ms

from mmeffformer.latency import phone
from mmeffformer.latency.measuring import measure_networks
from mmeffformer.latency.parts import copies
from mmeffformer.latency.table import LatencyTable, Part, parts, parts_of
from mmeffformer.models import ARCHS
from mmeffformer.models.arch import Arch

MAX_WIDTHS = (16, 32, 32, 32)


@pytest.fixture
def header():
    return phone.phone_header('executorch', (64, 64), MAX_WIDTHS, 16)


@pytest.fixture
def written(monkeypatch):
    """Write the names of parts instead of programs, and list them; stop at the tenth."""
    names = []

    def export(row, path, header):
        if len(names) == 9:
            names.append('stopped')
            raise KeyboardInterrupt
        path.write_text(row.name)
        names.append(row.name)

    monkeypatch.setattr(phone, '_export', export)
    return names


def fill_in(listed, change=lambda rows: None):
    """Fill in what a simulated phone takes, which has no drift and an overhead."""
    with listed.open(newline='') as lines:
        rows = [*csv.DictReader(lines)]
    header = json.loads(listed.with_name('header.json').read_text())
    what = {row.name: row.what for row in phone.rows_of(header)}
    for row in rows:
        each = what[row['part']]
        row['ms'] = (sum(map(simulated_ms, parts(each))) if isinstance(each, Arch)
                     else int(row['copies']) * simulated_ms(each))
    change(rows)
    with listed.open('w', newline='') as file:
        lines = csv.DictWriter(file, [*rows[0]])
        lines.writeheader()
        lines.writerows(rows)


def test_from_files_to_a_table(header, written, tmp_path):
    folder, steps = tmp_path / 'parts', []
    with pytest.raises(KeyboardInterrupt):
        phone.export_parts(header, folder)
    assert len([*folder.glob('*.pte')]) == 9 and not [*folder.glob('.tmp*')]
    listed = phone.export_parts(header, folder, lambda text, done, n: steps.append((done, n)))
    assert written.count('stem 16') == 1 and steps[0] == (0, 26) and steps[-1] == (26, 26)
    rows = [*csv.DictReader(listed.open())]
    assert [row['part'] for row in rows] == [
        *map(str, parts_of(header)[:-1]), 'overhead 1', 'overhead 2', 'overhead 3', 'reference']
    assert all((folder / row['file']).read_text() == row['part'] for row in rows)
    by_part = {row['part']: row for row in rows}
    assert by_part['MB3D stage4 32'] == dict(
        file='MB3D_stage4_32.pte', part='MB3D stage4 32', ms='',
        copies=str(copies(Part('MB3D', 3, (32, )), (64, 64))))

    fill_in(listed)
    before = listed.read_bytes()
    phone.export_parts(header, folder)  # keeps the times
    assert listed.read_bytes() == before
    table = phone.import_times(listed, 'Pixel')
    for part in parts_of(header):
        assert table.entries[str(part)]['ms'] == pytest.approx(simulated_ms(part)), part
    assert table.predict(Arch(*table.header['reference'])) == pytest.approx(
        table.header['reference_ms'])
    table.save(tmp_path / 'table.json')
    table = LatencyTable.load(tmp_path / 'table.json')
    arch = Arch((16, 32, 16, 32), (1, 2, 1, 2), (0, 0, 0, 1))
    assert table.predict(arch) == pytest.approx(sum(map(simulated_ms, parts(arch))))
    with pytest.raises(ValueError, match='with other settings: device Pixel there'):
        measure_networks({'l1': ARCHS['l1']}, table.header, 2)
    other = phone.phone_header('executorch', (64, 96), MAX_WIDTHS, 16)
    with pytest.raises(ValueError, match=r'parts with other settings: shape \[64, 64\] there'):
        phone.export_parts(other, folder)


def clear(rows):
    rows[0]['ms'], rows[3]['ms'], rows[-1]['ms'] = '', 'slow', '-1'


def recount(rows):
    rows[2]['copies'] = '3'
    del rows[5]


@pytest.mark.parametrize('change, message', [
    (clear, r'3 of 26 times are missing or not positive numbers of ms: stem 16 \(empty\), '
     r'MB4D stage2 32 \(slow\), reference \(-1\)'),
    (recount, 'is not the list of that table: MB4D stage2 16, MB4D stage3 32 differ'),
    (lambda rows: [row.pop('ms') for row in rows], 'has no column ms: expected file, part')])
def test_lists_that_are_not_filled_in(change, message, header, monkeypatch, tmp_path):
    monkeypatch.setattr(phone, '_export', lambda row, path, header: path.touch())
    listed = phone.export_parts(header, tmp_path)
    fill_in(listed, change)
    with pytest.raises(ValueError, match=message):
        phone.import_times(listed, 'Pixel')


@pytest.fixture
def run(monkeypatch, capsys, repo_root):
    """A function that runs the tool, and returns what it prints or the message it ends with."""

    def run_main(*options):
        monkeypatch.setattr(sys, 'argv', ['latency_table.py', *map(str, options)])
        try:
            runpy.run_path(str(repo_root / 'tools/latency_table.py'), run_name='__main__')
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr().out

    return run_main


def test_tool(run, header, monkeypatch, tmp_path):
    monkeypatch.setattr(phone, '_export', lambda row, path, header: path.touch())
    listed = phone.export_parts(header, tmp_path)
    options = ['--import', listed, '--out', tmp_path / 'table.json']
    assert '--import needs --device-name' in run(*options)
    options += ['--device-name', 'Pixel']
    assert '26 of 26 times are missing' in run(*options)
    fill_in(listed)
    printed = run(*options)
    assert '23 entries' in printed
    ms = f'{json.loads((tmp_path / "table.json").read_text())["header"]["reference_ms"]:.4g}'
    assert f'reference network: {ms} ms predicted, {ms} ms measured' in printed
    assert LatencyTable.load(tmp_path / 'table.json').header['device'] == 'Pixel'

    assert "'onnx' for a phone: expected one of coreml, executorch" in run(
        '--export-parts', 'onnx', tmp_path / 'no')
    monkeypatch.setitem(sys.modules, 'coremltools', None)
    assert 'coreml needs the package coremltools' in run(
        '--export-parts', 'coreml', tmp_path / 'no')
    assert not (tmp_path / 'no').exists()


def test_files_of_core_ml(header, tmp_path):
    """Copies are separate outputs, so that no program leaves one out."""
    header = phone.phone_header('coreml', (64, 64), (16, 16, 16, 16), 16)
    stem, reference = (next(row for row in phone.rows_of(header) if row.name == name)
                       for name in ('stem 16', 'reference'))
    for row in (stem, reference):
        path = tmp_path / f'{row.name}.mlpackage'
        phone._export(row, path, header)
        model = coremltools.models.MLModel(str(path), skip_model_load=True)
        outputs = model.get_spec().description.output
        assert len(outputs) == (12 if row is stem else 4)
        assert json.loads(model.user_defined_metadata['mmeffformer'])['precision'] == 'fp16'
