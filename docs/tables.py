"""Write the tables of docs/operations.md and docs/capacity.md: settings and metrics of the code, numbers of benchmarks.

    python -m docs.tables            prints the tables
    python -m docs.tables --write    puts them into their pages, between their markers

Settings come from the models in server/config.py and config_sections.py: their types, bounds, defaults and docstrings.
Metrics come from the source of server/, where each is made by a call with its name, its help text and its labels; a
test compares them with what a registry collects.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from docs import capacity_tables
from docs.markers import with_marked
from kernels.engines import ENGINES
from server.config import ServerConfig

ROOT = Path(__file__).parents[1]
OPERATIONS, CAPACITY = ROOT / "docs" / "operations.md", ROOT / "docs" / "capacity.md"

#: Strings that are one of a few, which their types do not say.
_CHOICES = {"engine": sorted(ENGINES)}
_UNITS = {"s": "seconds", "ms": "milliseconds", "bytes": "bytes"}
_WORDS = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "string",
    SecretStr: "string, secret",
    Path: "path",
}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_KINDS = ("counter", "gauge", "histogram", "summary")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as the code makes it; `name` is what /metrics shows, a counter's `_total` included."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


def settings_table(model: type[BaseModel] = ServerConfig) -> str:
    """Return a row for each setting. Raises ValueError naming one that the code does not document."""
    rows = []
    for name, field in _settings(model, ""):
        if field.description is None:
            raise ValueError(f"{name} has no docstring in server/config.py or config_sections.py")
        rows.append((f"`{name}`", _values(name, field), _default(name, field), " ".join(field.description.split())))
    return _table(("setting", "values", "default", "meaning"), rows)


def metrics_table() -> str:
    """Return a row for each metric of the server, by name."""
    rows = [(f"`{one.name}`", one.kind, ", ".join(one.labels), one.help) for one in metrics()]
    return _table(("metric", "type", "labels", "meaning"), rows)


def metrics(folder: Path = ROOT / "server") -> list[Metric]:
    """Find every metric in a folder's source. Raises ValueError where a call leaves open what it makes."""
    found: dict[str, Metric] = {}
    for path in sorted(folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(args=[ast.Constant(value=str() as name), *others]) if name.startswith("pinrank_"):
                    try:
                        one = _metric(name, call, others)
                    except ValueError as error:
                        raise ValueError(f"{path.relative_to(folder.parent)}:{call.lineno}: {name}: {error}") from error
                    if found.setdefault(one.name, one) != one:
                        raise ValueError(f"{one.name} is made twice, differently: {found[one.name]}, {one}")
    return [found[name] for name in sorted(found)]


def _metric(name: str, call: ast.Call, others: Sequence[ast.expr]) -> Metric:
    callee = ast.unparse(call.func).rpartition(".")[2].lower()
    kinds = [kind for kind in _KINDS if kind in callee]
    if len(kinds) != 1:
        raise ValueError(f"{ast.unparse(call.func)} says none or several of {', '.join(_KINDS)}")
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    help_text = others[0] if others else keywords.get("documentation", keywords.get("help"))
    if not isinstance(help_text, ast.Constant) or not isinstance(help_text.value, str):
        raise ValueError("its help text is not written out where it is made")  # noqa: TRY004 - about the source, not a type
    return Metric(
        f"{name}_total" if kinds[0] == "counter" else name, kinds[0], tuple(_labels(others, keywords)), help_text.value
    )


def _labels(others: Sequence[ast.expr], keywords: dict[str | None, ast.expr]) -> Iterator[str]:
    """Return the words of `labels`, by keyword or in third place: a list of them, or one alone."""
    given = next((keywords[name] for name in ("labels", "labelnames", "label") if name in keywords), None)
    if given is None and len(others) > 1:
        given = others[1]
    match given:
        case ast.Constant(value=str() as label):
            yield label
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            for element in elements:
                if not isinstance(element, ast.Constant):
                    raise ValueError(f"its label {ast.unparse(element)} is not written out")  # noqa: TRY004 - as above
                yield str(element.value)


def _settings(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Return the settings by name, plain ones first, then those of each nested table."""
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        table = field.annotation
        if get_origin(table) is dict:
            name, table = f"{name}.NAME", get_args(table)[1]  # noqa: PLW2901 - what it is called on the page
        if isinstance(table, type) and issubclass(table, BaseModel):
            nested.append((f"{prefix}{name}.", table))
        else:
            yield f"{prefix}{name}", field
    for inner, table in nested:
        yield from _settings(table, inner)


def _values(name: str, field: FieldInfo) -> str:
    bounds = {
        bound: _number(name, getattr(metadata, bound))
        for metadata in field.metadata
        for bound in _BOUNDS
        if hasattr(metadata, bound)
    }
    if bounds.keys() == {"ge", "le"}:
        limits = [f"{bounds['ge']} to {bounds['le']}"]
    else:
        limits = [f"{said} {bounds[bound]}" for bound, said in _BOUNDS.items() if bound in bounds]
    word = " or ".join(f"`{choice}`" for choice in _CHOICES.get(name, [])) or _word(name, field.annotation)
    return ", ".join([word, *limits])


def _word(name: str, annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return "file" if "file" in repr(arguments[1:]) else _word(name, arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_word(name, one) for one in arguments if one is not NoneType)
    if origin is tuple:
        word = _word(name, arguments[0])
        return f"list of {word}" if word.endswith("`") else f"list of {word}s"
    unit = _unit(name)
    return unit if unit and annotation in (int, float) else _WORDS[annotation]


def _unit(name: str) -> str | None:
    """Return the unit that a setting's name says: `poll_s`, `warm_up_s_max`, `bytes_in_flight_max`; a rate has none."""
    words = name.rpartition(".")[2].split("_")
    if "per" in words:
        return None
    return next((_UNITS[word] for word in reversed(words) if word in _UNITS), None)


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case None | "":
            return "none"
        case bool() as value:
            return str(value).lower()
        case tuple() as values:
            return "[" + ", ".join(f'`"{value}"`' for value in values) + "]"
        case int() | float() as value:
            return _number(name, value)
    return f"`{field.default}`"


def _number(name: str, value: float) -> str:
    if _unit(name) == "bytes":
        for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
            if value and value % (1 << shift) == 0:
                return f"{int(value) >> shift} {unit}"
    return f"{value:.10g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


#: Each table by its page and its marker there.
TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (OPERATIONS, "settings"): settings_table,
    (OPERATIONS, "metrics"): metrics_table,
    **{(CAPACITY, name): table for name, table in capacity_tables.TABLES.items()},
}


def main() -> None:
    for (page, name), table in TABLES.items():
        if "--write" in sys.argv:
            page.write_text(with_marked(page.read_text(), f"table: {name}", table()))
        else:
            print(table(), end="\n\n")


if __name__ == "__main__":
    main()
