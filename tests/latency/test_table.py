"""The latency table, measured by a clock that is made up: what a part takes is known by hand."""
import itertools
import json
import random

import numpy as np
import pytest
import torch

from mmeffformer.latency import table as latency
from mmeffformer.latency.table import (
    LatencyTable,
    Part,
    copies,
    in_turns,
    lattice,
    measure,
    measured,
    new_header,
    parts,
    parts_of,
    random_archs,
    resumed,
    spearman,
)
from mmeffformer.models import ARCHS, ARCHS_V2
from mmeffformer.models.arch import Arch
from mmeffformer.utils.plots import agreement

TINY = dict(shape=(64, 64), max_widths=(16, 32, 32, 32), rounds=3)


def made_up_ms(part: Part) -> float:
    """What a part takes, different for all; an embedding's is bilinear in its widths."""
    if part.kind == 'embedding':
        before, width = part.widths
        return .1 * part.stage + .01 * before + .02 * width + .003 * before * width
    number = ['stem', 'MB4D', 'MB3D', 'overhead'].index(part.kind) + 1
    return number + .1 * part.stage + .001 * sum(part.widths)


def filled(**options) -> LatencyTable:
    header = new_header(**{**TINY, **options})
    return LatencyTable(header, {
        str(part): dict(kind=part.kind, stage=part.stage + 1, widths=list(part.widths),
                        ms=made_up_ms(part)) for part in parts_of(header)})


@pytest.fixture
def machine(monkeypatch):
    """Whole networks and parts that take made up times, on a machine whose speed drifts.

    Lists in ``opened`` what was opened; ``stop_at`` interrupts at so many parts.
    """

    class Machine:
        def __init__(self):
            self.opened, self.stop_at, self.now = [], None, itertools.count()

        def open_part(self, part, header, folder):
            if len(self.opened) == self.stop_at:
                raise KeyboardInterrupt
            self.opened.append(str(part))
            return copies(part, header['shape']) * made_up_ms(part), copies(part, header['shape'])

        def open_network(self, arch, header, folder):
            return sum(map(made_up_ms, parts(arch)))

        def timer(self, ms):
            return lambda: ms * (1 + .5 * (next(self.now) // 40 % 2))

    made = Machine()
    for name in ('open_part', 'open_network', 'timer'):
        monkeypatch.setattr(latency, name, getattr(made, name))
    return made


def test_a_table_has_all_parts(machine, tmp_path):
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
    # The machine was half as fast at times, and what is in the table is not.
    scale = table.header['reference_ms'] / sum(map(made_up_ms, parts(latency.REFERENCE)))
    for part in parts_of(table.header):
        ms = table.entries[str(part)]['ms']
        assert ms == pytest.approx(scale * made_up_ms(part), rel=1e-9), part
    read = LatencyTable.load(tmp_path / 'table.json')
    assert (read.header, read.entries, read.check) == (table.header, table.entries, None)


def test_a_slow_start_is_not_in_the_table(machine, tmp_path):
    machine.now = itertools.count(40)  # half as fast at first
    table = LatencyTable(new_header(**TINY))
    measure(table, tmp_path / 'table.json')
    reference_ms = sum(map(made_up_ms, parts(latency.REFERENCE)))
    assert table.header['reference_ms'] == pytest.approx(reference_ms, rel=1e-9)
    for part in parts_of(table.header):
        assert table.entries[str(part)]['ms'] == pytest.approx(made_up_ms(part), rel=1e-9), part


def test_prediction_is_the_sum():
    table = filled()
    arch = Arch((16, 32, 16, 32), (2, 1, 3, 2), (0, 0, 1, 2))
    expected = (1.016 + 4 + 2 * (2 + .016) + (2.1 + .032) + 2 * (2.2 + .016) + (3.2 + .016)
                + 2 * (3.3 + .032)
                + (.1 + .16 + .64 + 1.536) + (.2 + .32 + .32 + 1.536) + (.3 + .16 + .64 + 1.536))
    assert table.predict(arch) == pytest.approx(expected, rel=1e-12)
    as_dict = dict(widths=(16, 32, 16, 32), depths=(2, 1, 3, 2), attention_blocks=(0, 0, 1, 2))
    assert table.predict(as_dict) == table.predict(arch)
    assert table.block_ms('MB4D', 3, 32) == 2.332 and table.block_ms('MB3D', 2, 16) == 3.216


def test_embeddings_are_interpolated_bilinearly():
    table = filled(max_widths=(64, 128, 320, 512))
    assert lattice(range(16, 513, 16)) == [16, 112, 208, 320, 416, 512]
    assert lattice([16, 32]) == [16, 32]
    draw = random.Random(0)
    for _ in range(50):
        stage = draw.randint(1, 3)
        widths = tuple(draw.randrange(16, most + 1)
                       for most in table.header['max_widths'][stage - 1:stage + 1])
        part = Part('embedding', stage, widths)
        assert table.part_ms(part) == pytest.approx(made_up_ms(part), rel=1e-9), part
    assert table.predict('l1') == pytest.approx(sum(map(made_up_ms, parts(ARCHS['l1']))))


def test_what_is_missing_is_told():
    table = filled(max_widths=(64, 128, 320, 512))
    with pytest.raises(ValueError, match=r'no MB4D stage3 100: measured nearest to it 96 and 112; '
                       'choose a multiple of 16 up to 320, or make a table with other'):
        table.block_ms('MB4D', 2, 100)
    with pytest.raises(ValueError, match='no MB4D stage4 528: measured nearest to it 512; choose'):
        table.block_ms('MB4D', 3, 528)
    with pytest.raises(ValueError, match='no MB3D stage1 48: there is none of any width, but '
                       'MB3D stage3, MB3D stage4, MB4D stage1.*let the network do without'):
        table.predict(Arch((48, 96, 224, 448), (3, 2, 6, 4), (1, 0, 0, 1)))
    with pytest.raises(ValueError, match='no embedding stage2 96-96: measured nearest to it 64 '
                       'to 80 and 112; choose a multiple of 16 up to 64 to 128, or'):
        table.part_ms(Part('embedding', 1, (96, 96)))
    with pytest.raises(ValueError, match="block 'MB5D' of stage 0: expected MB4D or MB3D"):
        table.block_ms('MB5D', 0, 16)
    del table.entries['MB4D stage3 224']
    with pytest.raises(ValueError, match='nearest to it 208 and 240; run tools/latency_table.py '
                       'again'):
        table.predict('l1')
    with pytest.raises(ValueError, match='arch expansion=3: the table is of blocks with expansion '
                       '4, stage 1 of width 16 has hidden channels 48'):
        table.predict(Arch((16, 16, 16, 16), (1, 1, 1, 1), expansion=3))
    with pytest.raises(ValueError, match='neither a name nor a dict'):
        table.predict(ARCHS_V2['s0'])


def test_stopped_it_goes_on_with_what_is_missing(machine, tmp_path):
    path = tmp_path / 'deep' / 'table.json'
    machine.stop_at = 9
    with pytest.raises(KeyboardInterrupt):
        measure(resumed(path, new_header(**TINY)), path)
    there = LatencyTable.load(path)
    # Groups are of one kind and stage; the one that was stopped is lost.
    assert [*there.entries] == machine.opened[:8] and len(machine.opened) == 9
    path.with_name('.tmp-table.json').write_text('{"header')  # killed while it was written

    machine.opened.clear()
    machine.stop_at = None
    table = resumed(path, new_header(**TINY))
    measure(table, path)
    everything = [str(part) for part in parts_of(table.header)]
    assert machine.opened == everything[8:-1]  # all but the overhead
    assert table.header['reference_ms'] == there.header['reference_ms']
    assert [*path.parent.iterdir()] == [path]

    machine.opened.clear()
    entries = dict(table.entries)
    del entries['MB3D stage4 16'], entries['stem 16']
    LatencyTable(table.header, entries, dict(count=3)).save(path)  # somebody cut it
    measure(resumed(path, new_header(**TINY)), path)
    assert machine.opened == ['stem 16', 'MB3D stage4 16']
    assert LatencyTable.load(path).check is None  # it was of other entries
    machine.opened.clear()
    measure(resumed(path, new_header(**TINY)), path)
    assert machine.opened == []


def test_what_was_measured_otherwise_is_not_mixed(machine, tmp_path):
    path = tmp_path / 'table.json'
    table = filled()
    table.header['versions'] = dict(table.header['versions'], torch='1.0')
    table.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"was measured otherwise: versions .*'torch': '1.0'.* "
                       r'there, .* here; shape \[64, 64\] there, \[96, 64\] here; rounds 3 there, '
                       '5 here. Write to another --out'):
        resumed(path, new_header(**{**TINY, 'shape': (96, 64), 'rounds': 5}))
    with pytest.raises(ValueError, match='make a table here'):
        measured({'l1': ARCHS['l1']}, table.header, 2)
    assert path.read_bytes() == before
    path.write_bytes(before[:-100])
    with pytest.raises(ValueError, match='a damaged one.*delete it, or name another'):
        resumed(path, new_header(**TINY))
    path.write_text(json.dumps(dict(candidates=[])))
    with pytest.raises(ValueError, match='no latency table'):
        LatencyTable.load(path)
    with pytest.raises(FileNotFoundError, match='tools/latency_table.py makes one'):
        LatencyTable.load(tmp_path / 'none.json')


@pytest.mark.parametrize('options, message', [
    (dict(runtime='coreml'), "runtime 'coreml': expected one of pytorch, onnx, openvino"),
    (dict(step=15), 'step 15: expected an even number'),
    (dict(max_widths=(16, 40, 32, 32)), 'max-widths 16 40 32 32: expected 4 multiples of 16'),
    (dict(max_widths=(16, 32, 32)), 'max-widths 16 32 32: expected 4'),
    (dict(rounds=0), 'rounds 0'),
    (dict(shape=(16, 64)), 'shape of 16 x 64 px'),
])
def test_settings_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        new_header(**{**TINY, **options})


def test_what_was_disturbed_is_timed_again():
    times = {'calm': itertools.repeat(4.), 'disturbed': itertools.chain(
        [1., 9., 30.], itertools.repeat(6.)), 'never calm': itertools.cycle([1., 5., 9.])}
    calls = dict.fromkeys(times, 0)

    def timer(name):
        def call():
            calls[name] += 1
            return next(times[name])
        return call

    found = in_turns({name: timer(name) for name in times}, lambda: 2., dict(reference_ms=1.), 3)
    assert found['calm'] == (2, 2, 2) and found['disturbed'] == (3, 3, 3)
    assert found['never calm'].median == 2.5
    assert calls == {'calm': 3, 'disturbed': 6, 'never calm': 9}


def test_networks_are_measured_at_the_speed_of_the_table(machine):
    header = dict(new_header(**TINY), reference_ms=10.)
    found = measured({'a': ARCHS['l1'], 'b': ARCHS['l3']}, header, 5)
    one = sum(map(made_up_ms, parts(latency.REFERENCE))) / 10
    for name, arch in dict(a='l1', b='l3').items():
        expected = sum(map(made_up_ms, parts(ARCHS[arch]))) / one
        assert found[name].median == pytest.approx(expected)


def test_check_of_a_table_that_is_right(machine, tmp_path):
    table = LatencyTable(new_header(**{**TINY, 'max_widths': (48, 96, 224, 448)}))
    measure(table, tmp_path / 'table.json')
    # L3 is wider than the table. Networks are made of parts here, so that the sum is exact.
    found = latency.check(table, count=4, seed=1)
    names = [each['name'] for each in found['networks']]
    assert names == ['l1', 'random0', 'random1', 'random2', 'random3']
    assert found['median_error'] < 1e-9 and found['spearman'] == pytest.approx(1)
    table.entries['overhead']['ms'] += 1000
    assert latency.check(table, count=4, seed=1)['median_error'] > 1
    agreement([(each['name'], each['predicted_ms'], each['measured_ms'])
               for each in found['networks']], tmp_path / 'new' / 'check.png', 'title', 'caption')
    assert (tmp_path / 'new' / 'check.png').stat().st_size > 5000


def test_random_networks_change_to_tokens_once():
    header = new_header(max_widths=(64, 128, 320, 512))
    archs = random_archs(300, header, seed=3)
    assert archs == random_archs(300, header, seed=3) != random_archs(300, header, seed=4)
    for arch in archs:
        assert all(width % 16 == 0 and width <= most
                   for width, most in zip(arch.widths, (64, 128, 320, 512)))
        assert all(depth <= most for depth, most in zip(arch.depths, (4, 4, 12, 6)))
        assert arch.attention_blocks[:2] == (0, 0)
        assert arch.attention_blocks[2] == 0 or arch.attention_blocks[3] == arch.depths[3]
        assert sum(arch.attention_blocks) <= 6
    assert {arch.attention_blocks[2] > 0 for arch in archs} == {False, True}
    assert {arch.attention_blocks[3] for arch in archs} == {*range(7)}
    assert {arch.widths[3] for arch in archs} == {*range(16, 513, 16)}


def test_spearman():
    assert spearman([1, 2, 3], [10, 30, 20]) == pytest.approx(.5)
    assert spearman([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(.9 ** .5)  # equal ones


@pytest.mark.parametrize('runtime', latency.RUNTIMES)
@pytest.mark.parametrize('part', [
    Part('MB4D', 1, (32, )), Part('MB3D', 3, (32, )), Part('embedding', 2, (16, 32)),
    Part('stem', 0, (16, ))], ids=str)
def test_parts_in_all_runtimes(part, runtime, tmp_path):
    """What is timed computes what so many of a network's blocks compute."""
    shape = (64, 96)
    count = copies(part, shape)
    torch.manual_seed(0)
    module, image = latency.build_part(part, count, shape)
    pointers = {p.data_ptr() for name, p in module.named_parameters() if name.endswith('weight')}
    layers = [name for name, _ in module.named_parameters() if name.endswith('weight')]
    assert len(pointers) == len(layers) >= count == 12  # own weights
    with torch.no_grad():
        expected = module(image)
    grid = dict(MB4D=(8, 12), MB3D=(2, 3), embedding=(4, 6), stem=(16, 24))[part.kind]
    assert expected.shape == (1, part.widths[-1], *grid)

    torch.manual_seed(0)
    call, found = latency.open_part(part, new_header(runtime, shape), tmp_path)
    actual = call()
    assert found == count
    if runtime != 'pytorch':
        outputs = list(actual.values() if hasattr(actual, 'values') else actual)
        assert len(outputs) == (1 if part.kind in latency.BLOCKS else count)
        assert len({array.tobytes() for array in map(np.array, outputs)}) == len(outputs)
        actual = torch.from_numpy(np.array(outputs[-1]))
        if part.kind not in latency.BLOCKS:
            expected = expected.mean((2, 3), keepdim=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_copies_are_more_than_a_cache_holds():
    assert copies(Part('MB4D', 3, (512, )), (224, 224)) == 8  # of 8 MiB each
    assert copies(Part('MB4D', 0, (64, )), (224, 224)) == 12
    # 4,200 tokens: 565 MB of bias each.
    assert copies(Part('MB3D', 2, (64, )), (800, 1344)) == 2
    groups = [*latency._groups([Part('MB3D', 2, (16 * i, )) for i in range(1, 5)], (800, 1344))]
    assert list(map(len, groups)) == [2, 2]
