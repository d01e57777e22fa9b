from __future__ import annotations

import numpy as np
import pytest
import torch

from ranker.embedding.users.model import UserModel, train_users
from ranker.embedding.users.network_file import read_network, write_network
from ranker.embedding.users.user_vectors import user_vectors_at
from ranker.errors import DatasetError
from tests.ranker.embedding.users.users import SMALL, pin_vectors, random_log

LOG = random_log()
GIVEN = pin_vectors(LOG)
END_MS = int(LOG.time_ms[-1]) + 1


@pytest.fixture(scope="module")
def model() -> UserModel:
    return train_users(LOG, GIVEN, END_MS, SMALL, "toy")


def test_a_network_comes_back_as_it_was(model, tmp_path):
    path = tmp_path / "weight.npz"
    write_network(path, model)
    found = read_network(path)
    for name in ("actions", "pin_space", "space", "until_ms", "settings"):
        assert getattr(found, name) == getattr(model, name)
    assert found.network.sizes == model.network.sizes
    users = np.arange(len(LOG.user_ids))
    at_ms = np.full(len(users), END_MS)
    expected = user_vectors_at(model, LOG, GIVEN, users, at_ms)
    assert np.array_equal(user_vectors_at(found, LOG, GIVEN, users, at_ms), expected)
    content = path.read_bytes()
    write_network(path, found)
    assert path.read_bytes() == content
    assert [one.name for one in tmp_path.iterdir()] == ["weight.npz"]


def test_equal_arguments_give_equal_networks_and_each_other_argument_another_space(model):
    again = train_users(LOG, GIVEN, END_MS, SMALL, "toy")
    assert again.space == model.space
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, again.network.state_dict()[name]), name
    others = [
        train_users(random_log(seed=9), GIVEN, END_MS, SMALL, "toy"),
        train_users(LOG, pin_vectors(LOG, seed=2), END_MS, SMALL, "toy"),
        train_users(LOG, None, END_MS, SMALL, "toy"),
        train_users(LOG, GIVEN, int(LOG.time_ms[400]), SMALL, "toy"),
        train_users(LOG, GIVEN, END_MS, SMALL.model_copy(update={"seed": 1}), "toy"),
        train_users(LOG, GIVEN, END_MS, SMALL.model_copy(update={"loss": "next"}), "toy"),
        train_users(LOG, GIVEN, END_MS, SMALL, "toy", timed=False),
    ]
    contents = {one.space.content for one in [model, *others]}
    assert len(contents) == 1 + len(others)
    assert {one.space.name for one in others} == {"toy-users"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content[:3_000] + bytes([content[3_000] ^ 1]) + content[3_001:],
        lambda _: b"text",
        lambda _: b"",
    ],
)
def test_a_damaged_file_is_refused_by_name(model, damage, tmp_path):
    path = tmp_path / "weight.npz"
    write_network(path, model)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DatasetError, match=r"weight.npz is no network of users, or is damaged: .*; train it again"):
        read_network(path)


def test_a_file_without_some_weights_or_with_other_pins_is_refused(model, tmp_path):
    path = tmp_path / "weight.npz"
    write_network(path, model)
    with np.load(path) as held:
        arrays = dict(held)
    for change in (
        lambda arrays: arrays.pop("weight.user_out.weight"),
        lambda arrays: arrays.pop("about"),
        lambda arrays: arrays.update(pin_ids=arrays["pin_ids"][1:]),
        lambda arrays: arrays.update(pin_ids=arrays["pin_ids"][::-1].copy()),
        lambda arrays: arrays.update(pin_ids=arrays["pin_ids"].astype(np.int32)),
    ):
        changed = dict(arrays)
        change(changed)
        np.savez(path, **changed)
        with pytest.raises(DatasetError, match="is damaged"):
            read_network(path)
    with pytest.raises(DatasetError, match="does not exist; train a network"):
        read_network(tmp_path / "none.npz")
