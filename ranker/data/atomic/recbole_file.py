"""One file in RecBole's atomic format: tab-separated text with a `name:type` header; every value stays text.

Errors name the file, the line as an editor counts it, and the column. Finding the line requires a pass over the file,
so this happens only to report a problem.
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
#: In RE2 syntax. Excludes `nan`, `inf`, separators and digits that are not ASCII.
_NUMBER = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
_MARK = b"\xef\xbb\xbf"
_GZIP, _UTF16 = b"\x1f\x8b", (b"\xff\xfe", b"\xfe\xff")
#: A file is parsed in blocks of this size; a line that is longer than a block cannot be parsed.
BLOCK_BYTES = 16 << 20
_SHOWN_MAX = 80


@dataclass(frozen=True, slots=True)
class AtomicFile:
    """A file with a valid header; `read` parses the rest.

    Attributes:
        path: path of the file, for messages.
        content: the whole file.
        kinds: declared type of each column, in the order of the file.
        start: offset of the second line.
        block_bytes: size of the blocks in which the file is parsed.
    """

    path: Path
    content: bytes
    kinds: Mapping[str, str]
    start: int
    block_bytes: int = BLOCK_BYTES

    def require(self, name: str, kinds: Sequence[str]) -> None:
        """Raise DatasetError unless a column exists and is declared with one of these types."""
        if name not in self.kinds:
            raise self.fault(
                1,
                f"there is no column {name!r}; the columns are {', '.join(self.kinds)}. Rename the one that holds it",
            )
        if self.kinds[name] not in kinds:
            raise self.fault(1, f"column {name!r} must be declared {' or '.join(f'{name}:{kind}' for kind in kinds)}")

    def read(self, names: Iterable[str]) -> TextRows:
        """Parse the given columns. Raises DatasetError if a line and the header have different numbers of fields."""
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
        """Return the line number of a row; rows are counted from 0."""
        for number, (line, _) in enumerate(self._lines()):
            if number == row:
                return line
        raise IndexError(row)

    def blank_lines(self) -> tuple[int, int | None]:
        """Return the number of blank lines between other lines, and the line number of the first."""
        if b"\n\n" not in self.content and b"\n\r\n" not in self.content:
            return 0, None
        end = len(self.content.rstrip(b"\r\n"))
        blank = [found.end() for found in re.finditer(rb"\n(?=\r?\n)", self.content[:end])]
        return len(blank), self.content.count(b"\n", 0, blank[0]) + 1 if blank else None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the number and content of each line after the header that is not blank."""
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
                hint = (
                    "; remove the tab at the end of the line"
                    if line.endswith(b"\t") and fields > len(self.kinds)
                    else ""
                )
                return self.fault(number, f"{fields} fields, but the header names {len(self.kinds)} columns{hint}")
        return None


@dataclass(frozen=True, slots=True)
class TextRows:
    """Columns of a file, as text."""

    file: AtomicFile
    texts: Mapping[str, pa.ChunkedArray]

    def __len__(self) -> int:
        return len(next(iter(self.texts.values())))

    def fault(self, row: int, name: str, message: str) -> DatasetError:
        """Return an error about one field, for the caller to raise."""
        value = _shown(self.texts[name][row].as_py())
        return self.file.fault(self.file.line_of(row), f"column {name!r} holds {value}: {message}")

    def encoded(self, name: str) -> tuple[list[str], np.ndarray]:
        """Return the distinct values of a column in order of appearance, and int64[E] positions in them."""
        if not len(self):
            return [], np.zeros(0, np.int64)
        encoded = self.texts[name].dictionary_encode().combine_chunks()
        encoded = encoded.chunk(0) if isinstance(encoded, pa.ChunkedArray) else encoded
        return encoded.dictionary.to_pylist(), np.asarray(encoded.indices, np.int64)

    def numbers(self, name: str) -> np.ndarray:
        """Return float64[E]. Raises DatasetError at the first value that is not a finite decimal number."""
        texts = pc.utf8_trim(self.texts[name], " ")
        plain = np.asarray(pc.match_substring_regex(texts, _NUMBER), bool)
        values = np.full(len(texts), np.nan)
        if plain.all() and len(texts):
            values = np.asarray(pc.cast(texts, pa.float64()), np.float64)
            plain = np.isfinite(values)
        if not plain.all():
            raise self.fault(int(np.argmin(plain)), name, "it is not a number; write it as 1234.5, or remove the line")
        return values


def _shown(text: str) -> str:
    """Return a value for a message, shortened: in a damaged file it may have megabytes."""
    return repr(text) if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]!r}... ({len(text):,} characters)"


def open_atomic(path: Path, block_bytes: int = BLOCK_BYTES) -> AtomicFile:
    """Read a file and its header.

    Raises:
        DatasetError: it cannot be read, is not UTF-8 text, or has no valid header.
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
    """Reject a file that is not plain text, with its line: a parser would split it other than an editor does."""
    if content.startswith(_GZIP):
        raise DatasetError(f"{path} is compressed; decompress it: gunzip < {path.name} > unpacked")
    if content.startswith(_UTF16):
        raise DatasetError(f"{path}, line 1: the file is UTF-16; save it as UTF-8")
    at, message = _damage(content)
    if message:
        line = content.count(b"\n", 0, at) + 1
        raise DatasetError(f"{path}, line {line}: {message}")


def _damage(content: bytes) -> tuple[int, str]:
    """Return the offset and description of the first damage; the description is empty if there is none."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return error.start, "the file is not UTF-8 text here; save it as UTF-8"
    if (at := content.find(b"\0")) >= 0:
        return at, "the file contains a NUL byte, so it is damaged or not text; export it again"
    if (at := content.find(_MARK, 1)) >= 0:
        return at, "there is a byte order mark inside the file, as if files had been joined; remove it"
    if b"\r" in content and (lone := re.search(rb"\r(?!\n)", content)):
        return lone.start(), "there is a carriage return within a line; remove it, and end lines with \\n"
    return 0, ""


def _kinds(path: Path, header: str) -> dict[str, str]:
    """Parse `name:type` descriptions. Raises DatasetError for a malformed or repeated one."""
    if not header:
        raise DatasetError(f"{path}, line 1: there is no header; it must name each column as name:type")
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
