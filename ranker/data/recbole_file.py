"""One file in RecBole's atomic format: tab-separated text whose header says `name:type`; every value stays text.

Errors name the file, the line as an editor counts it, and the column. Finding the line takes a walk over the file, so
that is done only where there is something to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ranker.errors import DatasetError

KINDS = ("token", "token_seq", "float", "float_seq")
#: RE2's syntax. Neither `nan` nor `inf`, no separators, no other digits than ASCII's.
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MARK = b"\xef\xbb\xbf"
_GZIP, _UTF16 = b"\x1f\x8b", (b"\xff\xfe", b"\xfe\xff")
#: A file is parsed in blocks of this size; a line that is longer than a block cannot be parsed.
BLOCK_BYTES = 16 << 20
_SHOWN_MAX = 80


@dataclass(frozen=True, slots=True)
class AtomicFile:
    """A file whose header is good; `read` parses the rest.

    Attributes:
        path: for messages.
        content: the whole file.
        kinds: each column's declared type, in the file's order.
        start: where the second line begins.
        block_bytes: size of the blocks in which the file is parsed.
    """

    path: Path
    content: bytes
    kinds: Mapping[str, str]
    start: int
    block_bytes: int = BLOCK_BYTES

    def require(self, name: str, kinds: Sequence[str]) -> None:
        """Raise DatasetError unless a column is there and declared as one of these types."""
        if name not in self.kinds:
            raise self.fault(1, f"no column {name!r}; it has {', '.join(self.kinds)}. Rename the one that means it")
        if self.kinds[name] not in kinds:
            raise self.fault(1, f"column {name!r} must be declared {' or '.join(f'{name}:{kind}' for kind in kinds)}")

    def read(self, names: Iterable[str]) -> TextRows:
        """Parse these columns. Raises DatasetError when a line has another number of fields than the header."""
        wanted = list(dict.fromkeys(names))
        if not re.compile(rb"[^\r\n]").search(self.content, self.start):
            return TextRows(self, {name: pa.chunked_array([], pa.string()) for name in wanted})
        try:
            table = pyarrow.csv.read_csv(
                pa.BufferReader(pa.py_buffer(self.content).slice(self.start)),
                read_options=pyarrow.csv.ReadOptions(
                    column_names=list(self.kinds),
                    block_size=self.block_bytes,
                    use_threads=len(self.content) > self.block_bytes,
                ),
                parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
                convert_options=pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(self.kinds, pa.string()),
                    strings_can_be_null=False,
                    include_columns=wanted,
                ),
            )
        except pa.ArrowInvalid as error:
            raise self._uneven() or DatasetError(f"cannot read {self.path}: {error}") from error
        return TextRows(self, {name: table[name] for name in wanted})

    def fault(self, line: int, message: str) -> DatasetError:
        return DatasetError(f"{self.path}, line {line}: {message}")

    def line_of(self, row: int) -> int:
        """Return the line of a row, counted from 0."""
        for number, (line, _) in enumerate(self._lines()):
            if number == row:
                return line
        raise IndexError(row)

    def blank_lines(self) -> tuple[int, int | None]:
        """Count the blank lines between others, and return the first of them."""
        if b"\n\n" not in self.content and b"\n\r\n" not in self.content:
            return 0, None
        end = len(self.content.rstrip(b"\r\n"))
        blank = [found.end() for found in re.finditer(rb"\n(?=\r?\n)", self.content[:end])]
        return len(blank), self.content.count(b"\n", 0, blank[0]) + 1 if blank else None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield each line after the first that is not blank, with its number."""
        start, number = self.start, 2
        while start < len(self.content):
            end = self.content.find(b"\n", start)
            end = len(self.content) if end < 0 else end
            if line := self.content[start:end].removesuffix(b"\r"):
                yield number, line
            start, number = end + 1, number + 1

    def _uneven(self) -> DatasetError | None:
        for number, line in self._lines():
            if (fields := line.count(b"\t") + 1) != len(self.kinds):
                hint = "; remove the tab at its end" if line.endswith(b"\t") and fields > len(self.kinds) else ""
                return self.fault(number, f"{fields} fields, but the header names {len(self.kinds)} columns{hint}")
        return None


@dataclass(frozen=True, slots=True)
class TextRows:
    """Some columns of a file, as text."""

    file: AtomicFile
    texts: Mapping[str, pa.ChunkedArray]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    def fault(self, row: int, name: str, message: str) -> DatasetError:
        """Return the error of one field, to be raised."""
        value = _shown(self.texts[name][row].as_py())
        return self.file.fault(self.file.line_of(row), f"column {name!r} holds {value}: {message}")

    def encoded(self, name: str) -> tuple[list[str], np.ndarray]:
        """Return a column's distinct values, in order of appearance, and int64[E] positions in them."""
        if not len(self):
            return [], np.zeros(0, np.int64)
        encoded = self.texts[name].dictionary_encode().combine_chunks()
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
        return encoded.dictionary.to_pylist(), np.asarray(encoded.indices, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """Return float64[E]. Raises DatasetError at the first value that is no finite decimal number."""
        texts = pc.utf8_trim(self.texts[name], " ")
        plain = np.asarray(pc.match_substring_regex(texts, _NUMBER), bool)
        values = np.full(len(texts), np.nan)
        if plain.all() and len(texts):
            values = np.asarray(pc.cast(texts, pa.float64()), np.float64)
            plain = np.isfinite(values)
        if not plain.all():
            raise self.fault(
                int(np.argmin(plain)), name, "that is no number; write it as 1234.5, or leave the line out"
            )
        return values


def _shown(text: str) -> str:
    """Return a value for a message: of a damaged file it may be megabytes."""
    return repr(text) if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]!r}... ({len(text):,} characters)"


def open_atomic(path: Path, block_bytes: int = BLOCK_BYTES) -> AtomicFile:
    """Read a file and its header.

    Raises:
        DatasetError: it cannot be read, is no UTF-8 text, or has no good header.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error
    _check_text(path, content)
    begin = len(_MARK) if content.startswith(_MARK) else 0
    end = content.find(b"\n", begin)
    header = content[begin : end if end >= 0 else len(content)].removesuffix(b"\r").decode()
    start = end + 1 if end >= 0 else len(content)
    return AtomicFile(path, content, _kinds(path, header), start, block_bytes)


def _check_text(path: Path, content: bytes) -> None:
    """Refuse what is no plain text, with its line: readers would cut it elsewhere than an editor shows it."""
    if content.startswith(_GZIP):
        raise DatasetError(f"{path} is compressed; unpack it: gunzip < {path.name} > unpacked")
    if content.startswith(_UTF16):
        raise DatasetError(f"{path}, line 1: the file is UTF-16; save it as UTF-8")
    at, message = _damage(content)
    if message:
        line = content.count(b"\n", 0, at) + 1
        raise DatasetError(f"{path}, line {line}: {message}")


def _damage(content: bytes) -> tuple[int, str]:
    """Return where and what the first damage of its kind is; an empty text where there is none."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start, "the file is no UTF-8 text here; save it as UTF-8"
    if (at := content.find(b"\0")) >= 0:
        return at, "the file holds a NUL byte, so it is damaged or no text; write it anew"
    if (at := content.find(_MARK, 1)) >= 0:
        return at, "a byte order mark inside of the file, as where files were joined; remove it"
    if b"\r" in content and (lone := re.search(rb"\r(?!\n)", content)):
        return lone.start(), "a carriage return that ends no line; end lines with \\n, and have none inside of them"
    return 0, ""


def _kinds(path: Path, header: str) -> dict[str, str]:
    """Read `name:type` descriptions. Raises DatasetError for each that cannot be told apart or understood."""
    if not header:
        raise DatasetError(f"{path}, line 1: there is no header; it names each column as name:type")
    kinds: dict[str, str] = {}
    for place, described in enumerate(header.split("\t"), start=1):
        name, _, kind = described.rpartition(":")
        if not name or name != name.strip() or kind not in KINDS:
            raise DatasetError(
                f"{path}, line 1: the header must name each column as name:type with type {', '.join(KINDS)}; "
                f"column {place} is {_shown(described)}"
            )
        if name in kinds:
            raise DatasetError(
                f"{path}, line 1: columns {list(kinds).index(name) + 1} and {place} are both named {name!r}; "
                "remove or rename one, in the header and in every line"
            )
        kinds[name] = kind
    return kinds
