"""Measurement of a latency table, on a simulated machine and in all runtimes."""
import itertools

import pytest
from support.latency import TINY, simulated_ms, simulated_table

from mmeffformer.latency import measuring
from mmeffformer.latency.measuring import (
    measure,
    measure_networks,
    new_header,
    open_table,
    time_steadily,
)
from mmeffformer.latency.parts import copies
from mmeffformer.latency.table import LatencyTable, Part, parts, parts_of
from mmeffformer.latency.validation import check
from mmeffformer.models import ARCHS

REFERENCE_MS = sum(map(simulated_ms, parts(measuring.REFERENCE)))


@pytest.fixture
def machine(monkeypatch):
    """Simulate the times of networks and parts, on a machine whose speed drifts.

    ``opened`` lists the parts that were opened; ``stop_at`` interrupts at that number of parts.
    """

    class Machine:
        def __init__(self):
            self.opened, self.stop_at, self.now = [], None, itertools.count()

        def open_part(self, part, header, folder):
            if len(self.opened) == self.stop_at:
                raise KeyboardInterrupt
            self.opened.append(str(part))
            count = copies(part, header['shape'])
            return count * simulated_ms(part), count

        def open_network(self, arch, header, folder):
            return sum(map(simulated_ms, parts(arch)))

        def timer(self, ms):
            return lambda: ms * (1 + .5 * (next(self.now) // 40 % 2))

    made = Machine()
    for name in ('open_part', 'open_network'):
        monkeypatch.setattr(measuring, name, getattr(made, name))
    monkeypatch.setattr(measuring, 'Timer', made.timer)
    return made


@pytest.mark.parametrize('slow_at_first', [False, True])
def test_a_table_has_all_parts(machine, tmp_path, slow_at_first):
    machine.now = itertools.count(40 * slow_at_first)
    table = LatencyTable(new_header(**TINY))
    steps = []
    measure(table, tmp_path / 'table.json', lambda text, done, count: steps.append((done, count)))
    assert [*table.entries] == [str(part) for part in parts_of(table.header)]
    assert [*table.entries] == [
        'stem 16', 'MB4D stage1 16', 'MB4D stage2 16', 'MB4D stage2 32', 'MB4D stage3 16',
        'MB4D stage3 32', 'MB4D stage4 16', 'MB4D stage4 32', 'MB3D stage3 16', 'MB3D stage3 32',
        'MB3D stage4 16', 'MB3D stage4 32',
        *(f'embedding stage{stage} {before}-{width}' for stage in (2, 3, 4)
          for before in ((16, ) if stage == 2 else (16, 32)) for width in (16, 32)), 'overhead']
    assert table.entries['MB3D stage3 32']['grid'] == [4, 4]
    assert steps[0] == (0, 23) and steps[-1] == (23, 23)
    assert table.missing() == []
    # The entries are at one speed, although the machine's speed changed. A slow start is not in
    # the table.
    scale = 1 if slow_at_first else table.header['reference_ms'] / REFERENCE_MS
    for part in parts_of(table.header):
        ms = table.entries[str(part)]['ms']
        assert ms == pytest.approx(scale * simulated_ms(part), rel=1e-9), part
    read = LatencyTable.load(tmp_path / 'table.json')
    assert (read.header, read.entries, read.check) == (table.header, table.entries, None)


def test_an_interrupted_measurement_resumes(machine, tmp_path):
    path = tmp_path / 'deep' / 'table.json'
    machine.stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        measure(open_table(path, new_header(**TINY)), path)
    partial = LatencyTable.load(path)
    # Groups are of one kind and stage; the interrupted one is lost.
    assert [*partial.entries] == machine.opened[:8] and len(machine.opened) == 9
    path.with_name('.tmp-table.json').write_text('{"header')  # killed while writing

    machine.opened.clear()
    machine.stop_at = None
    table = open_table(path, new_header(**TINY))
    measure(table, path)
    everything = [str(part) for part in parts_of(table.header)]
    assert machine.opened == everything[8:-1]  # all except the overhead
    assert table.header['reference_ms'] == partial.header['reference_ms']
    assert [*path.parent.iterdir()] == [path]

    machine.opened.clear()
    entries = dict(table.entries)
    del entries['MB3D stage4 16'], entries['stem 16']
    LatencyTable(table.header, entries, dict(count=3)).save(path)
    measure(open_table(path, new_header(**TINY)), path)
    assert machine.opened == ['stem 16', 'MB3D stage4 16']
    assert LatencyTable.load(path).check is None  # it was of other entries


def test_other_settings_do_not_mix(tmp_path):
    path = tmp_path / 'table.json'
    table = simulated_table()
    table.header['versions'] = dict(table.header['versions'], torch='1.0')
    table.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"with other settings: versions .*'torch': '1.0'.* "
                       r'there, .* here; shape \[64, 64\] there, \[96, 64\] here; rounds 3 there, '
                       '5 here. Choose another --out'):
        open_table(path, new_header(**{**TINY, 'shape': (96, 64), 'rounds': 5}))
    with pytest.raises(ValueError, match='make a table here'):
        measure_networks({'l1': ARCHS['l1']}, table.header, 2)
    assert path.read_bytes() == before


@pytest.mark.parametrize('options, message', [
    (dict(runtime='tflite'), "runtime 'tflite': expected one of pytorch, onnx, openvino"),
    (dict(step=15), 'step 15: expected an even number'),
    (dict(max_widths=(16, 40, 32, 32)), 'max-widths 16 40 32 32: expected 4 multiples of 16'),
    (dict(max_widths=(16, 32, 32)), 'max-widths 16 32 32: expected 4'),
    (dict(rounds=0), 'rounds 0'),
    (dict(shape=(16, 64)), 'shape of 16 x 64 px'),
])
def test_table_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        new_header(**{**TINY, **options})


def test_disturbed_timers_are_timed_again():
    times = {'calm': itertools.repeat(4.), 'disturbed': itertools.chain(
        [1., 9., 30.], itertools.repeat(6.)), 'never calm': itertools.cycle([1., 5., 9.])}
    calls = dict.fromkeys(times, 0)

    def timer(name):
        def call():
            calls[name] += 1
            return next(times[name])
        return call

    found = time_steadily({name: timer(name) for name in times}, lambda: 2.,
                          dict(reference_ms=1.), 3)
    assert found['calm'] == (2, 2, 2) and found['disturbed'] == (3, 3, 3)
    assert found['never calm'].median == 2.5
    assert calls == {'calm': 3, 'disturbed': 6, 'never calm': 9}


def test_check_of_an_exact_table(machine, tmp_path):
    table = LatencyTable(new_header(**{**TINY, 'max_widths': (48, 96, 224, 448)}))
    measure(table, tmp_path / 'table.json')
    found = check(table, count=4, seed=1)  # L3 is wider than the table
    names = [each['name'] for each in found['networks']]
    assert names == ['l1', 'random0', 'random1', 'random2', 'random3']
    assert found['median_error'] < 1e-9 and found['spearman'] == pytest.approx(1)
    table.entries['overhead']['ms'] += 1000
    assert check(table, count=4, seed=1)['median_error'] > 1


def test_groups_fit_into_memory():
    large = [Part('MB3D', 2, (16 * i, )) for i in range(1, 5)]
    assert list(map(len, measuring.group_parts(large, (800, 1344)))) == [2, 2]
