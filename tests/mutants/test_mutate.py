from __future__ import annotations

import pytest

from tests.mutants.mutate import mutants


def names(source):
    return [one.name for one in mutants(source)]


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        pytest.param("a < b", ["a <= b", "a >= b"], id="a bound"),
        pytest.param("a == b", ["a != b"], id="equality"),
        pytest.param("a in b", ["a not in b"], id="membership"),
        pytest.param("a and b", ["a or b"], id="and"),
        pytest.param("not a", ["a"], id="not"),
        pytest.param("a + b", ["a - b"], id="arithmetic"),
        pytest.param("min(a, b)", ["max(a, b)"], id="an extreme"),
        pytest.param("a.any()", ["a.all()"], id="a method"),
        pytest.param("7", ["8", "6"], id="a number"),
        pytest.param("True", ["False"], id="a truth"),
        pytest.param("'text'", [], id="a text"),
        pytest.param("zip(a, b, strict=True)", [], id="a check of lengths"),
    ],
)
def test_an_expression_is_changed_in_each_way_that_it_can_be(source, changed):
    assert names(f"x = {source}") == [f"module: x = {source} -> x = {other}" for other in changed]


def test_statements_are_dropped_where_the_program_can_go_on_without_them():
    source = '''
def f(self, a):
    """Text."""
    b = a
    c = False
    for _ in a:
        c = b
        self.d = c
        break
    g(a)
    a += b
    return c
'''
    assert [name for name in names(source) if name.endswith("dropped")] == [
        "f: c = False -> dropped",
        "f: c = b -> dropped",
        "f: self.d = c -> dropped",
        "f: break -> dropped",
        "f: g(a) -> dropped",
        "f: a += b -> dropped",
    ]


def test_a_fault_is_one_change_of_the_file_at_its_line():
    source = "def f(a):\n    if a:\n        return 1 < a\n"
    assert [(one.line, one.source) for one in mutants(source)] == [
        (2, "def f(a):\n    if not a:\n        return 1 < a"),
        (3, "def f(a):\n    if a:\n        return 1 <= a"),
        (3, "def f(a):\n    if a:\n        return 1 >= a"),
        (3, "def f(a):\n    if a:\n        return 2 < a"),
        (3, "def f(a):\n    if a:\n        return 0 < a"),
    ]


def test_names_are_distinct_and_long_statements_are_cut():
    assert names("x = 1 + 1") == [
        "module: x = 1 + 1 -> x = 1 - 1",
        "module: x = 1 + 1 -> x = 2 + 1",
        "module: x = 1 + 1 -> x = 0 + 1",
        "module: x = 1 + 1 -> x = 1 + 2",
        "module: x = 1 + 1 -> x = 1 + 0",
    ]
    assert names("x = f(1, 1, '" + "x" * 80 + "')") == [
        f"module: 1 -> {other} in x = f(1, 1, '{'x' * 67}...{number}" for number in ("", " (2)") for other in (2, 0)
    ]
