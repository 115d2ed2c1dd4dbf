"""Lookup in a latency table: sums, interpolation, and missing entries."""
import json
import random

import pytest
from support.latency import simulated_ms, simulated_table

from mmeffformer.latency.table import LatencyTable, Part, lattice, parts
from mmeffformer.models import ARCHS, ARCHS_V2
from mmeffformer.models.arch import Arch


def test_prediction_is_the_sum():
    table = simulated_table()
    arch = Arch((16, 32, 16, 32), (2, 1, 3, 2), (0, 0, 1, 2))
    expected = (1.016 + 4 + 2 * (2 + .016) + (2.1 + .032) + 2 * (2.2 + .016) + (3.2 + .016)
                + 2 * (3.3 + .032)
                + (.1 + .16 + .64 + 1.536) + (.2 + .32 + .32 + 1.536) + (.3 + .16 + .64 + 1.536))
    assert table.predict(arch) == pytest.approx(expected, rel=1e-12)
    as_dict = dict(widths=(16, 32, 16, 32), depths=(2, 1, 3, 2), attention_blocks=(0, 0, 1, 2))
    assert table.predict(as_dict) == table.predict(arch)
    assert table.block_ms('MB4D', 3, 32) == 2.332 and table.block_ms('MB3D', 2, 16) == 3.216


def test_embeddings_are_interpolated_bilinearly():
    table = simulated_table(max_widths=(64, 128, 320, 512))
    assert lattice(range(16, 513, 16)) == [16, 112, 208, 320, 416, 512]
    assert lattice([16, 32]) == [16, 32]
    draw = random.Random(0)
    for _ in range(50):
        stage = draw.randint(1, 3)
        widths = tuple(draw.randrange(16, most + 1)
                       for most in table.header['max_widths'][stage - 1:stage + 1])
        part = Part('embedding', stage, widths)
        assert table.part_ms(part) == pytest.approx(simulated_ms(part), rel=1e-9), part
    assert table.predict('l1') == pytest.approx(sum(map(simulated_ms, parts(ARCHS['l1']))))


def test_missing_entries_name_the_nearest_widths():
    table = simulated_table(max_widths=(64, 128, 320, 512))
    with pytest.raises(ValueError, match='no MB4D stage3 100; nearest widths: 96 and 112; choose '
                       'among these widths and stages, or make a table with other --max-widths'):
        table.block_ms('MB4D', 2, 100)
    with pytest.raises(ValueError, match='no MB4D stage4 528; nearest widths: 512; choose'):
        table.block_ms('MB4D', 3, 528)
    with pytest.raises(ValueError, match='no MB3D stage1 48; nearest widths: none of this kind '
                       'and stage; choose'):
        table.predict(Arch((48, 96, 224, 448), (3, 2, 6, 4), (1, 0, 0, 1)))
    with pytest.raises(ValueError, match='no embedding stage2 96-96; nearest widths: 64 to 80 '
                       'and 112; choose'):
        table.part_ms(Part('embedding', 1, (96, 96)))
    with pytest.raises(ValueError, match="block 'MB5D' of stage 0: expected MB4D or MB3D"):
        table.block_ms('MB5D', 0, 16)
    del table.entries['MB4D stage3 224'], table.entries['embedding stage2 16-128']
    with pytest.raises(ValueError, match='nearest widths: 208 and 240; run tools/latency_table.py '
                       'with the same arguments'):
        table.predict('l1')
    with pytest.raises(ValueError, match='no embedding stage2 20-127'):  # a corner is missing
        table.part_ms(Part('embedding', 1, (20, 127)))


def test_archs_of_another_expansion_or_family_are_refused():
    table = simulated_table()
    with pytest.raises(ValueError, match='arch expansion=3: the table is of blocks with expansion '
                       '4, stage 1 of width 16 has hidden channels 48'):
        table.predict(Arch((16, 16, 16, 16), (1, 1, 1, 1), expansion=3))
    with pytest.raises(ValueError, match='neither a name nor a dict'):
        table.predict(ARCHS_V2['s0'])


def test_files_that_are_not_tables_are_refused(tmp_path):
    path = tmp_path / 'table.json'
    table = simulated_table()
    table.save(path)
    assert LatencyTable.load(path).entries == table.entries
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match='damaged or not a latency table.*delete it, or name'):
        LatencyTable.load(path)
    path.write_text(json.dumps(dict(header={}, candidates=[])))
    with pytest.raises(ValueError, match='not a latency table'):
        LatencyTable.load(path)
    with pytest.raises(FileNotFoundError, match='tools/latency_table.py makes one'):
        LatencyTable.load(tmp_path / 'none.json')
