"""CSV and TSV files with a header row, plain or packed.

Guarantees: every value is text, as it stands in the file; an empty cell is empty text. A row with more or
fewer cells than the header, or a quote that does not end, is named with its line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError
from penstock.inputs.compressed import DAMAGED, open_file
from penstock.inputs.encoding import encode_row
from penstock.inputs.source import Row, Source

CELL_LENGTH: Final = (1 << 31) - 1
"""Characters of a cell at most: the csv module's own bound, for the whole process, is a mere 131,072."""


class DelimitedInput(Source):
    """A file of rows and cells in UTF-8, quoted as RFC 4180 says; read again at each call of `lines`."""

    def __init__(self, path: Path, delimiter: str = ",") -> None:
        self.path = path
        self.name = str(path)
        self._delimiter = delimiter

    def lines(self) -> Iterator[Row]:
        line = 0
        csv.field_size_limit(max(csv.field_size_limit(), CELL_LENGTH))
        try:
            with open_file(self.path) as file:
                text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
                reader = csv.reader(text, delimiter=self._delimiter, strict=True)
                header = self._header(next(reader, []))
                line = reader.line_num
                for cells in reader:
                    where, line = f"{self.path} line {line + 1}", reader.line_num
                    if cells:
                        yield where, self._row(where, header, cells)
        except FileNotFoundError:
            raise ConfigError(f"There is no input file {self.path}.") from None
        except csv.Error as error:
            raise ConfigError(f"{self.path} is not CSV after line {line} ({error}).") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self.path} is not UTF-8 text after line {line} ({error}).") from None
        except DAMAGED as error:
            raise ConfigError(f"{self.path} is damaged after line {line} ({error}).") from None
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read ({error.strerror}).") from None

    def _header(self, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"{self.path} has two columns named {twice!r}.")
        return names

    def _row(self, where: str, header: list[str], cells: list[str]) -> bytes:
        if len(cells) != len(header):
            raise ConfigError(f"{where} has {len(cells)} cells; the header has {len(header)}.")
        return encode_row(where, dict(zip(header, cells, strict=True)))
