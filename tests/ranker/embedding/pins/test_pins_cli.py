"""`pinrank embed pins`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ranker.embedding.vector_file import read_vectors
from tests.ranker.commands import run


def test_vectors_of_pins_and_neighbours_are_trained_and_made_again_with_the_same_network(
    data: Path, vectors: Path, tmp_path: Path
) -> None:
    walked, joined, out = tmp_path / "n", tmp_path / "m", tmp_path / "pins"
    assert run("embed", "walks", data, "--out", walked, "--before", "training")[0] == 0
    assert run("embed", "materialise", walked, "--features", vectors, "--out", joined)[0] == 0
    made = ("embed", "pins", joined, "--graph", walked)
    sizes = (
        "--variant",
        "pooled",
        "--dim",
        "8",
        "--trained-dim",
        "4",
        "--epochs",
        "3",
        "--batch",
        "16",
        "--keep-features",
    )
    code, output = run(*made, *sizes, "--out", out)
    assert code == 0, output
    assert "epoch 3: training loss" in output
    found = read_vectors(out / "co-save.parquet")
    assert f"in {found.origin.space.ref} to" in output
    assert found.embeddings.space.dim == read_vectors(vectors).embeddings.space.dim + 8
    assert found.origin.until_ms == read_vectors(vectors).origin.until_ms
    code, output = run("embed", "evaluate", out / "co-save.parquet", "--data", data)
    assert code == 0, output
    again = tmp_path / "again"
    code, output = run(*made, "--network", out / "network.npz", "--out", again)
    assert code == 0, output
    assert np.array_equal(read_vectors(again / "co-save.parquet").embeddings.vectors, found.embeddings.vectors)
    assert not (again / "network.npz").exists()
    code, output = run(*made, "--out", out)
    assert (code, "network.npz exists; choose another folder, or remove it" in output) == (1, True)
    (tmp_path / "tasks.toml").write_text('[[tasks]]\nname = "a"\n')
    code, output = run(*made, "--tasks", tmp_path / "tasks.toml", "--out", tmp_path / "other")
    assert (code, "task 'a' needs either sets or pairs" in output) == (1, True)


def test_options_of_a_training_say_nothing_to_a_network_that_is_trained_and_are_refused(tmp_path: Path) -> None:
    made = ("embed", "pins", tmp_path, "--graph", tmp_path, "--network", tmp_path / "n.npz", "--out", tmp_path / "out")
    code, output = run(*made, "--dim", "64", "--keep-features")
    assert (code, "--network trains nothing, so leave out --dim, --keep-features" in output) == (1, True)
