from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ranker.embedding.pins.held_out import held_out
from ranker.embedding.pins.tasks import CO_SAVE, Task, Tasks, chosen, examples_of, read_tasks
from ranker.errors import DatasetError, SettingError
from tests.ranker.embedding.edges import EdgeList, graph_of

TASKS = """
[[tasks]]
name = "co-save"
sets = "graph"

[[tasks]]
name = "substitute"
pairs = "substitutes.parquet"
weight = 0.5
"""


@pytest.fixture
def graph(tmp_path):
    return graph_of(tmp_path, EdgeList([(1, 10), (1, 20), (1, 20), (2, 30), (3, 40), (3, 10), (3, 30)]))


def lists_in(examples):
    found = examples.lists
    return [found.pins[a:b].tolist() for a, b in zip(found.splits[:-1], found.splits[1:], strict=True)]


def pairs_in(examples):
    rows, pins = examples.lists.of(np.arange(examples.count))
    return list(zip(examples.asking[rows].tolist(), pins.tolist(), strict=True))


def write_pairs(path, pairs):
    columns = dict(zip(("context_id", "pin_id"), zip(*pairs, strict=True), strict=True))
    pq.write_table(pa.table({name: pa.array(ids, pa.uint64()) for name, ids in columns.items()}), path)


def test_sets_are_contexts_of_at_least_two_pins_and_pairs_are_gathered_by_the_pin_that_asks(graph, tmp_path):
    (tmp_path / "tasks.toml").write_text(TASKS)
    pairs = [(20, 30), (20, 10), (10, 40), (10, 40), (99, 10), (40, 99), (10, 10)]
    write_pairs(tmp_path / "substitutes.parquet", pairs)
    co_save, substitute = examples_of(read_tasks(tmp_path / "tasks.toml"), graph, tmp_path)
    assert lists_in(co_save) == [[0, 1], [0, 2, 3]]  # the edge that is there twice once, and no list of a single pin
    assert co_save.asking is None
    # Pins 99 are not in the graph, and no pin belongs to itself.
    assert (substitute.asking.tolist(), lists_in(substitute)) == ([0, 1], [[3], [0, 2]])
    assert substitute.task.weight == 0.5
    own = chosen(substitute, np.array([1]))
    assert (own.asking.tolist(), lists_in(own)) == ([1], [[0, 2]])
    assert own.content != substitute.content


def test_sets_may_come_from_a_file_of_lists(graph, tmp_path):
    (tmp_path / "lists.txt").write_text("7 10 20 99\n8 30\n9 40 30\n")
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "list"\nsets = "lists.txt"\n')
    (found,) = examples_of(read_tasks(tmp_path / "tasks.toml"), graph, tmp_path)
    assert lists_in(found) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[tasks]]\nname = "a"\n', "task 'a' needs either sets or pairs"),
        ('[[tasks]]\nname = "a"\nsets = "graph"\npairs = "p.parquet"\n', "task 'a' needs either sets or pairs"),
        ('[[tasks]]\nname = "a"\nsets = "graph"\n' * 2, "two tasks have the same name"),
        ('[[tasks]]\nname = "a"\nsets = "graph"\nwieght = 2\n', r"tasks\[0\].wieght: Extra inputs"),
        ('[[tasks]]\nname = "A b"\nsets = "graph"\n', r"tasks\[0\].name: String should match"),
        ("tasks = []\n", "tasks: Tuple should have at least 1 item"),
    ],
)
def test_mistakes_in_tasks_are_named(tmp_path, text, message):
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises(SettingError, match=message):
        read_tasks(tmp_path / "tasks.toml")


def test_a_task_without_examples_is_an_error_that_names_it(graph, tmp_path):
    (tmp_path / "lists.txt").write_text("7 98 99\n8 10\n")
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "list"\nsets = "lists.txt"\n')
    with pytest.raises(DatasetError, match="task 'list': lists.txt has no example whose pins are in the graph"):
        examples_of(read_tasks(tmp_path / "tasks.toml"), graph, tmp_path)


def test_examples_are_learned_from_or_judge_and_never_both(tmp_path):
    graph = graph_of(tmp_path, EdgeList([(context, pin) for context in range(100) for pin in (context, context + 1)]))
    ((learned, judges),) = held_out(examples_of(CO_SAVE, graph, tmp_path), 0.2, 10, seed=3)
    assert (learned.count, judges.count) == (90, 10)
    assert sorted(lists_in(learned) + lists_in(judges)) == [[context, context + 1] for context in range(100)]
    ((other, _),) = held_out(examples_of(CO_SAVE, graph, tmp_path), 0.2, 10, seed=4)
    assert lists_in(other) != lists_in(learned)


def test_what_judges_is_learned_in_neither_direction_and_by_no_task(tmp_path):
    graph = graph_of(tmp_path, EdgeList([(0, pin) for pin in range(30)]))
    names = ("complement", "substitute")
    for number, name in enumerate(names, start=1):
        pairs = [(pin, (pin + step) % 30) for pin in range(30) for step in (number, -number, 5, -5)]
        write_pairs(tmp_path / f"{name}.parquet", pairs)
    tasks = Tasks(tasks=tuple(Task(name=name, pairs=f"{name}.parquet") for name in names))
    examples = examples_of(tasks, graph, tmp_path)
    divided = held_out(examples, 0.2, 1_000, seed=3)
    learned, judges = ({pair for one in part for pair in pairs_in(one)} for part in zip(*divided, strict=True))
    assert learned | judges == {pair for one in examples for pair in pairs_in(one)}
    assert not learned & judges
    assert not {(second, first) for first, second in learned} & judges
    # A fifth of each task's 60 pairs, in both directions, and those that judge the other.
    assert all(24 <= len(pairs_in(judge)) <= len(judges) <= 48 for _, judge in divided)
    for own, judge in divided:
        known = {pair for pair in pairs_in(own) if pair[0] in judge.asking}
        assert set(pairs_in(replace(judge, lists=judge.known))) == known


def divided_pairs(tmp_path, pins, tasks, share, count_max, seed):
    graph = graph_of(tmp_path, EdgeList([(0, pin) for pin in range(pins)]))
    for name, pairs in tasks.items():
        write_pairs(tmp_path / f"{name}.parquet", pairs)
    found = Tasks(tasks=tuple(Task(name=name, pairs=f"{name}.parquet") for name in tasks))
    divided = held_out(examples_of(found, graph, tmp_path), share, count_max, seed)
    return [tuple(set(pairs_in(part)) for part in parts) for parts in divided]


def test_a_small_task_is_judged_by_its_share_beside_a_large_one_that_is_judged_by_the_most_allowed(tmp_path):
    large = [(first, second) for first in range(60) for second in range(first)]
    tasks = {"large": large, "small": large[:300]}
    (large_learned, large_judges), (small_learned, small_judges) = divided_pairs(tmp_path, 60, tasks, 0.1, 100, 3)
    assert (len(large_judges), len(small_judges)) == (100, 30)
    assert not (large_judges | small_judges) & (large_learned | small_learned)
    assert len(large) - len(large_learned) <= 130


def test_a_task_keeps_something_to_learn_from_and_nobody_is_judged_by_it(tmp_path):
    large = [(first, second) for first in range(60) for second in range(first)]
    for seed in range(30):  # its only pair is often among those of the large task that would judge
        (_, judges), (learned, none) = divided_pairs(
            tmp_path / str(seed), 60, {"large": large, "tiny": [(1, 0)]}, 0.4, 1_000, seed
        )
        assert (learned, none) == ({(1, 0)}, set())
        assert (1, 0) not in judges
