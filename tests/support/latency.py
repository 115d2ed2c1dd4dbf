"""A latency table whose entries are computed by hand."""
from mmeffformer.latency.measuring import new_header
from mmeffformer.latency.table import LatencyTable, Part, parts_of

TINY = dict(shape=(64, 64), max_widths=(16, 32, 32, 32), rounds=3)


def simulated_ms(part: Part) -> float:
    """Return the ms of a part, different for all; of an embedding bilinear in its widths."""
    if part.kind == 'embedding':
        before, width = part.widths
        return .1 * part.stage + .01 * before + .02 * width + .003 * before * width
    number = ['stem', 'MB4D', 'MB3D', 'overhead'].index(part.kind) + 1
    return number + .1 * part.stage + .001 * sum(part.widths)


def simulated_table(**options) -> LatencyTable:
    header = new_header(**{**TINY, **options})
    return LatencyTable(header, {
        str(part): dict(kind=part.kind, stage=part.stage + 1, widths=list(part.widths),
                        ms=simulated_ms(part)) for part in parts_of(header)})
