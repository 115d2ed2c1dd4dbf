"""Classes, colours and the void label of label maps."""
import re
from collections import Counter
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from .files import Log, Options, list_files, names

_TABLES = re.compile(r'(label|class)[_-]?(names|colou?rs|dict|map|list)?(es|s)?|codes',
                     re.IGNORECASE)
_VOID = re.compile(r'void|unlabell?ed|ignored?', re.IGNORECASE)
_ROW = re.compile(r'\s*((?:\d+[\s,:;=]+)*)([^\W\d_][^#]*?)((?:[\s,:;=]+\d+){3,4})?[\s,:;]*')
Colour = Tuple[int, ...]


class Row(NamedTuple):
    """A class in a table: its name, its colour and its value, if the table has them."""

    name: str
    colour: Optional[Colour] = None
    value: Optional[int] = None


class Labels(NamedTuple):
    """Classes of label maps.

    ``void`` is the value that is ignored; ``table`` gives the index by value or colour where the
    files have to be converted, and is None where they can be used as they are.
    """

    classes: List[str]
    palette: Optional[List[Colour]]
    void: int
    reduce_zero_label: bool
    table: Optional[Dict[int, int]]

    def index(self, value: int) -> int:
        """Return the index of the class of a value, or 255 for void."""
        if self.table is None:
            return 255 if value == self.void else value - self.reduce_zero_label
        return self.table[value]


def find_labels(root: Path, found: Sequence[Tuple[str, Counter]],
                palette: Optional[List[Colour]], options: Options, log: Log) -> Labels:
    """Return the classes for the values that occur in the label maps.

    Args:
        root: Folder with a table of classes, unless ``options.classes`` has them.
        found: Kind and pixels by value of each label map; see ``count_values``.
        palette: Colours by value in the label maps.

    Raises:
        ValueError: There are no names, or values without a name that are not known to be void.
    """
    kinds, pixels = merge_counts(found)
    coloured = kinds == {'colours'}
    rows = read_rows(root, options)
    if not rows:
        raise ValueError(f'the labels have no names. {describe(pixels, coloured)}. Name the '
                         'classes in the order of their values with --classes, or give a file '
                         'with a name (and R G B) per line')
    keys = _keys(rows, pixels, coloured, options, log)
    void = _void(rows, keys, pixels, options, log)
    unknown = Counter({value: pixels[value] for value in pixels
                       if value not in keys and value not in void})
    if unknown:
        raise ValueError(f'labels without a class. {describe(unknown, coloured)}. Name them with '
                         '--classes, or ignore one with --void')
    kept = [i for i, key in enumerate(keys) if key not in void]
    classes = [rows[i].name for i in kept]
    table = {keys[i]: index for index, i in enumerate(kept)}
    colours = [rows[i].colour or (palette and keys[i] < len(palette) and palette[keys[i]])
               for i in kept]
    labels = Labels(classes, [c for c in colours if c] if all(colours) else None, 255, False,
                    {**table, **dict.fromkeys(void, 255)})
    if coloured or kinds == {'grey'}:
        return labels
    present = {*void} & {*pixels}
    identical = all(key == index for key, index in table.items())
    if identical and len(present) < 2 and all(value >= len(classes) for value in present):
        return labels._replace(void=present.pop() if present else 255, table=None)
    if present - {255} == {0} and all(key == index + 1 for key, index in table.items()):
        return labels._replace(reduce_zero_label=True, table=None)
    return labels


def merge_counts(found: Sequence[Tuple[str, Counter]]) -> Tuple[Set[str], Counter]:
    """Return the kinds of the label maps, and their pixels by value.

    Raises:
        ValueError: Only some label maps have three channels.
    """
    kinds, pixels = {kind for kind, _ in found}, Counter[int]()
    if 'colours' in kinds:
        kinds.discard('grey')  # a picture of grey classes only
    if len(kinds) > 1:
        raise ValueError('some label maps have one channel and others three: expected one kind')
    for kind, counts in found:
        factor = 0x010101 if kind == 'grey' and 'colours' in kinds else 1
        pixels.update({value * factor: count for value, count in counts.items()})
    return kinds, pixels


def describe(pixels: Counter, coloured: bool) -> str:
    """Return the values or colours with their share of the pixels, in words."""
    total = sum(pixels.values())
    words = [f'{_text(value, coloured)} ({pixels[value] / total:.1%})' for value in sorted(pixels)]
    return (f'{"Colours" if coloured else "Values"} found: {", ".join(words[:24])}'
            + (', ...' if len(words) > 24 else ''))


def _text(value: int, coloured: bool) -> str:
    return ' '.join(str(value >> shift & 255) for shift in (16, 8, 0)) if coloured else str(value)


def read_rows(root: Path, options: Options) -> List[Row]:
    """Return the classes of ``--classes``, or of the one file below ``root`` that lists them.

    Raises:
        ValueError: Several files list classes.
    """
    if len(options.classes) == 1:
        word, = options.classes
        if Path(word).is_file():
            return parse_rows(Path(word).read_text(errors='replace'))
        from mmseg.utils import get_classes, get_palette
        try:  # a data set that mmseg knows
            return [Row(name, tuple(colour))
                    for name, colour in zip(get_classes(word), get_palette(word))]
        except ValueError:
            pass
    if options.classes:
        return [Row(name) for name in options.classes]
    found = {path: parse_rows(path.read_text(errors='replace'))
             for path in list_files(root, ('.txt', '.csv')) if _TABLES.fullmatch(path.stem)}
    if len({tuple(row.name for row in rows) for rows in found.values()}) > 1:
        raise ValueError(f'several files list classes, {names(found)}; choose with --classes FILE')
    return max(found.values(), key=lambda rows: sum(row.colour is not None for row in rows),
               default=[])


def parse_rows(text: str) -> List[Row]:
    """Return the classes in a text with a name per line, and perhaps R G B or a value."""
    rows = []
    for line in text.splitlines():
        match = _ROW.fullmatch(line)
        if match:
            before, after = ([int(number) for number in re.findall(r'\d+', group or '')]
                             for group in (match[1], match[3]))
            numbers = after or before
            colour = tuple(numbers[-3:]) if len(numbers) > 2 and max(numbers) < 256 else None
            value = numbers[0] if len(numbers) in (1, 4) else None
            rows.append(Row(match[2].strip(), colour, value))
    if any(row.colour for row in rows):  # other lines are headings
        rows = [row for row in rows if row.colour]
    return rows


def _keys(rows: Sequence[Row], pixels: Counter, coloured: bool, options: Options,
          log: Log) -> List[int]:
    """Return the value or colour of each class in the label maps.

    Raises:
        ValueError: The label maps are coloured, but the table has no colours; or 255 may be a
            class or void.
    """
    if coloured:
        if not all(row.colour for row in rows):
            raise ValueError(f'the label maps are coloured. {describe(pixels, True)}. Give a file '
                             'with a name and R G B per line with --classes')
        return [row.colour[0] << 16 | row.colour[1] << 8 | row.colour[2] for row in rows]
    values = [row.value for row in rows]
    if None not in values and len({*values}) == len(values):
        return values
    found = sorted({*pixels} - {int(options.void) if (options.void or '').isdecimal() else None})
    if len(found) == len(rows) and found[-1] >= len(rows):
        if found[-1] == 255 and len(rows) > 2 and options.void is None:
            raise ValueError(f'is 255 void, or {rows[-1].name}? {describe(pixels, False)}. Choose '
                             'with --void 255 or --void none')
        log.notes.append('labels by class: ' + ', '.join(
            f'{value} {row.name}' for value, row in zip(found, rows)))
        return found
    return list(range(len(rows)))


def _void(rows: Sequence[Row], keys: Sequence[int], pixels: Counter, options: Options,
          log: Log) -> List[int]:
    """Return the values that are ignored."""
    if options.void == 'none':
        return []
    by_name = {row.name.lower(): key for row, key in zip(rows, keys)}
    if options.void is not None:
        word = options.void.lower()
        if word not in by_name and not word.isdecimal():
            raise ValueError(f'--void {options.void}: expected a value, none, or one of '
                             f'{", ".join(row.name for row in rows)}')
        return [by_name[word] if word in by_name else int(word)]
    void = [key for name, key in by_name.items() if _VOID.fullmatch(name)]
    if 255 in pixels and 255 not in keys:
        void.append(255)
    if void:
        log.notes.append(f'void: {", ".join(map(str, void))} is ignored; --void names another '
                         'value or none')
    return void
