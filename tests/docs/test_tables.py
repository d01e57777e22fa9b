"""docs/operations.md lists every setting and every metric as the code has them; docs/capacity.md has its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from docs import tables
from docs.markers import marked, with_marked
from server.telemetry.metrics import Metrics


@pytest.mark.parametrize(("page", "name"), tables.TABLES, ids=lambda part: getattr(part, "stem", part))
def test_the_page_has_the_table_that_the_code_gives(page: Path, name: str) -> None:
    table = tables.TABLES[page, name]()
    assert marked(page.read_text(), f"table: {name}") == table, "write it anew: python -m docs.tables --write"


def test_the_source_shows_every_metric_that_a_registry_collects() -> None:
    found = {one.name: (one.kind, one.help) for one in tables.metrics()}
    collected = {
        family.name + ("_total" if family.type == "counter" else ""): (family.type, family.documentation)
        for family in Metrics().registry.collect()
    }
    assert collected
    assert collected.items() <= found.items()


class _Inner(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    bytes_max: Annotated[int, Field(ge=1024)] = 3 << 20
    """Maximum
    size."""


class _Settings(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    inner: _Inner = _Inner()
    named: dict[str, _Inner] = {}
    port: Annotated[int, Field(ge=0, le=65535)] = 50051
    """Port."""
    wait_s: Annotated[float, Field(gt=0)]
    """Time."""
    paths: tuple[Path, ...] = ()
    """Paths, a | b."""
    mode: Literal["a", "b"] | None = None
    """Mode."""
    on: bool = True
    """On."""


def test_a_setting_is_told_with_its_values_unit_default_and_docstring() -> None:
    assert tables.settings_table(_Settings).splitlines()[2:] == [
        "| `port` | integer, 0 to 65535 | 50051 | Port. |",
        "| `wait_s` | seconds, above 0 | required | Time. |",
        r"| `paths` | list of paths | [] | Paths, a \| b. |",
        "| `mode` | `a` or `b` | none | Mode. |",
        "| `on` | true or false | true | On. |",
        "| `inner.bytes_max` | bytes, at least 1 KiB | 3 MiB | Maximum size. |",
        "| `named.NAME.bytes_max` | bytes, at least 1 KiB | 3 MiB | Maximum size. |",
    ]


def test_a_setting_without_a_docstring_is_refused() -> None:
    class Silent(BaseModel):
        wait_s: float = 1

    with pytest.raises(ValueError, match="wait_s has no docstring"):
        tables.settings_table(Silent)


@pytest.mark.parametrize(
    ("source", "kind", "labels"),
    [
        ('Counter("pinrank_x", "Told", ["a", "b"], registry=r)', "counter", ("a", "b")),
        ('core.GaugeMetricFamily("pinrank_x", "Told", labels=["a"])', "gauge", ("a",)),
        ('Histograms("pinrank_x", "To" "ld", None, (1, 2), r)', "histogram", ()),
        ('Histograms("pinrank_x", "Told", "stage", bounds, r)', "histogram", ("stage",)),
        ('Gauge("pinrank_x", documentation="Told")', "gauge", ()),
    ],
    ids=["labels in place", "labels by keyword", "no label", "one label", "help by keyword"],
)
def test_a_metric_is_found_where_the_source_makes_it(
    tmp_path: Path, source: str, kind: str, labels: tuple[str, ...]
) -> None:
    (tmp_path / "some.py").write_text(source)
    name = "pinrank_x_total" if kind == "counter" else "pinrank_x"
    assert tables.metrics(tmp_path) == [tables.Metric(name, kind, labels, "Told")]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ('made("pinrank_x", "Told")', "says none"),
        ('Gauge("pinrank_x", told)', "help text is not written out"),
        ('Gauge("pinrank_x", "Told", [label])', "label label is not written out"),
        ('Gauge("pinrank_x", "Told")\nGauge("pinrank_x", "Told", ["a"])', "made twice"),
    ],
    ids=["unknown type", "computed help", "computed label", "made twice"],
)
def test_a_metric_that_cannot_be_read_from_the_source_is_named(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "some.py").write_text(source)
    with pytest.raises(ValueError, match=f"pinrank_x.*{says}"):
        tables.metrics(tmp_path)


def test_a_marked_part_is_replaced_and_the_rest_of_the_page_stays() -> None:
    page = "before\n<!-- table: a -->\nold\n<!-- end -->\nafter\n<!-- table: b -->\nkept\n<!-- end -->\n"
    changed = with_marked(page, "table: a", "new\nlines")
    assert marked(changed, "table: a") == "new\nlines"
    assert changed == page.replace("old", "new\nlines")


@pytest.mark.parametrize("page", ["", "<!-- table: a -->\nnever ended"])
def test_a_page_without_the_marker_is_refused(page: str) -> None:
    with pytest.raises(ValueError, match="table: a"):
        marked(page, "table: a")
