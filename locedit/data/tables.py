"""Tables: lines of cells under a header, with commas (.csv) or tabs (.tsv) between them."""

import csv
import io
from pathlib import Path

from locedit.data.fields import FIELDS, Place, Record, check_name, check_text, parse_json
from locedit.errors import LoceditError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
UNNAMED = "_row"
"what a column without a name is called, as the numbers of rows often are; passed over where nothing asks for it"
LISTS = {name for checks in FIELDS.values() for name, check in checks.items() if check not in (check_text, check_name)}
'fields that are no texts: their cells hold JSON, as in ["one", "two"]'


def read_table(path: Path, text: str) -> list[tuple[Place, Record]]:
    """One record for every row under the header, without its empty cells. Cells are quoted as in RFC 4180."""
    rows = _rows(path, text)
    place, header = rows[0]
    names = [name.strip() or UNNAMED for name in header]
    for name in names:
        if names.count(name) > 1:
            raise place.error(f"the column {name!r} is there twice")
    if len(rows) == 1:
        raise LoceditError(f"{path}: has a header and no rows")
    return [(place, _record(place, names, cells)) for place, cells in rows[1:]]


def unpack(place: Place, record: Record) -> Record:
    """The record with the cells of list fields read as JSON."""
    return {
        name: parse_json(place, value) if name in LISTS and isinstance(value, str) and value[:1] == "[" else value
        for name, value in record.items()
    }


def _rows(path: Path, text: str) -> list[tuple[Place, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix], strict=True)
    found: list[tuple[Place, list[str]]] = []
    line = 0
    try:
        for cells in reader:
            if cells:
                found.append((Place(file=str(path), number=line + 1, name=f"{path.name}:{line + 1}"), cells))
            line = reader.line_num
    except csv.Error as error:
        raise LoceditError(f"{path}:{line + 1}: not a table: {error}") from None
    return found


def _record(place: Place, names: list[str], cells: list[str]) -> Record:
    if len(cells) != len(names):
        raise place.error(f"has {len(cells)} cells, the header has {len(names)} columns: {', '.join(names)}")
    return {name: cell for name, cell in zip(names, cells, strict=True) if cell.strip()}
