"""What may lie in a model store by mistake or malice: it is named, harms nobody, and once it is gone all goes on."""

from __future__ import annotations

import itertools
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from model_store.bundle.files import BundleError, read_bundle
from model_store.registry.history import VersionPublished
from model_store.registry.objects import ModelStoreError, NoVersionError
from model_store.registry.store import open_model_store
from tests import tiny

HUGE = 40 << 30


@pytest.fixture
def bundle(tmp_path):
    tiny.write_tiny_bundle(tmp_path / "bundle", 1)
    return tmp_path / "bundle"


@pytest.fixture
def root(tmp_path, bundle):
    store = open_model_store(tmp_path / "store")
    store.publish(bundle, by="anna")
    store.set_label("tiny", "stable", 1, by="anna")
    return tmp_path / "store"


def sparse(path):
    path.touch()
    os.truncate(path, HUGE)


def listening(path):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))


def entry(path, **changes):
    before = json.loads(max(path.parent.glob("0*.json")).read_text())
    path.write_text(json.dumps({**before, "number": int(path.stem), **changes}))


def state(path, **changes):
    before = json.loads(max(path.parent.glob("0*.json")).read_text())["state"]
    entry(path, state={**before, **changes})


NEXT, FAR = "000000000003.json", "999999999999.json"
POISONS = {
    "sparse file of 40 GB": (NEXT, sparse, "bytes, the limit is"),
    "pipe": (NEXT, os.mkfifo, "it is a pipe, not a regular file"),
    "folder": (NEXT, Path.mkdir, "it is a folder, not a regular file"),
    "socket": (NEXT, listening, "No such device or address"),
    "link to a device": (NEXT, lambda path: path.symlink_to("/dev/zero"), "it is a device, not a regular file"),
    "link to itself": (NEXT, lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "link to nothing": (NEXT, lambda path: path.symlink_to("nothing"), "has no object tiny/log/000000000003.json"),
    "empty": (NEXT, Path.touch, "is damaged (Invalid JSON"),
    "no UTF-8": (NEXT, lambda path: path.write_bytes(b'{"by": "\xff"}'), "is damaged (Invalid JSON"),
    "deep": (NEXT, lambda path: path.write_text("[" * 1_000_000), "recursion limit exceeded"),
    "far ahead": (FAR, entry, "lacks entries between 000000000002.json and 999999999999.json"),
    "another number within": (NEXT, lambda path: entry(path, number=7), "its content is entry 7"),
    "number 0": (NEXT, lambda path: entry(path, number=0), "greater than or equal to 1"),
    "a negative version": (NEXT, lambda path: state(path, labels={"stable": -1}), "greater than or equal to 1"),
    "a label to nowhere": (
        NEXT, lambda path: state(path, labels={"stable": 9}), "label 'stable' names version 9, which does not exist",
    ),
    "traffic to nowhere": (
        NEXT, lambda path: state(path, traffic={"*": {"beta": 0.5}}), "goes to a label that does not exist",
    ),
    "traffic that is no share": (
        NEXT, lambda path: state(path, traffic={"*": {"stable": 1e300}}), "less than or equal to 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_newest_entry_is_named_and_once_it_is_gone_all_goes_on(poison, root, monkeypatch):
    name, make, message = POISONS[poison]
    running = open_model_store(root)
    before = running.head("tiny")
    monkeypatch.chdir(root)
    path = root / "tiny" / "log" / name
    make(path)
    for store in (running, open_model_store(root)):
        with pytest.raises(ModelStoreError) as raised:
            store.head("tiny")
        assert message in str(raised.value)
        with pytest.raises(ModelStoreError):
            store.set_label("tiny", "canary", 1)
    path.rmdir() if path.is_dir() else path.unlink()
    assert running.head("tiny") == before
    running.set_label("tiny", "canary", 1)
    assert open_model_store(root).head("tiny").number == before.number + 1


def test_an_entry_that_may_not_be_read_is_named(root, monkeypatch):
    def denied(path, flags, *arguments):
        if str(path).endswith("000000000002.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *arguments)

    opened = os.open
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ModelStoreError, match=r"000000000002.json: Permission denied"):
        open_model_store(root).head("tiny")


def test_names_that_are_no_entries_are_passed_over(root):
    log = root / "tiny" / "log"
    for name in ("3.json", "0000000000003.json", "-00000000003.json", "000000000003.json~", "notes.txt", ".hidden"):
        (log / name).write_text("{")
    (log / "old").mkdir()
    assert open_model_store(root).head("tiny").number == 2


def test_a_good_entry_that_is_deleted_gives_way_to_the_one_before_and_to_one_of_its_number(root):
    running, other = open_model_store(root), open_model_store(root)
    running.set_label("tiny", "canary", 1)
    assert running.labels("tiny") == {"stable": 1, "canary": 1}
    assert other.labels("tiny") == {"stable": 1, "canary": 1}
    (root / "tiny/log/000000000003.json").unlink()
    assert running.labels("tiny") == {"stable": 1}
    open_model_store(root).set_label("tiny", "beta", 1)
    assert running.labels("tiny") == {"stable": 1, "beta": 1}
    assert other.labels("tiny") == {"stable": 1, "beta": 1}  # which has not looked in between


def test_a_missing_entry_is_a_gap_for_whoever_reads_anew(root):
    open_model_store(root).set_label("tiny", "canary", 1)
    (root / "tiny/log/000000000002.json").unlink()
    with pytest.raises(ModelStoreError, match=r"between 000000000001.json and 000000000003.json; restore them"):
        open_model_store(root).head("tiny")


def test_a_rollback_reads_no_further_back_than_it_must(root, bundle):
    store = open_model_store(root)
    tiny.write_tiny_bundle(bundle.parent / "2", 2)
    store.publish(bundle.parent / "2")
    store.set_label("tiny", "stable", 2)
    (root / "tiny/log/000000000001.json").write_text("{")
    assert store.rollback("tiny", "stable").state.labels == {"stable": 1}
    assert list(itertools.islice(open_model_store(root).named("tiny", "stable"), 2)) == [1, 2]


@pytest.mark.parametrize("poison", ["sparse file of 40 GB", "pipe", "folder", "link to a device", "link to itself"])
def test_a_poisoned_blob_fails_its_version_and_publishing_again_mends_it(poison, root, bundle):
    store = open_model_store(root)
    digest = store.manifest("tiny", 1).files["network.onnx"].sha256
    path = root / "tiny" / "blobs" / digest
    path.unlink()
    POISONS[poison][1](path)
    with pytest.raises((BundleError, ModelStoreError)):
        store.read("tiny", 1)
    if poison == "folder":
        path.rmdir()
    store.publish(bundle)
    store.read("tiny", 1)


@pytest.mark.parametrize("poison", ["sparse file of 40 GB", "pipe", "folder", "link to a device", "link to itself"])
@pytest.mark.parametrize("name", ["manifest.json", "network.onnx"])
def test_a_poisoned_file_of_a_bundles_folder_is_named(poison, name, bundle):
    (bundle / name).unlink()
    POISONS[poison][1](bundle / name)
    with pytest.raises(BundleError, match=name):
        read_bundle(bundle)


def test_no_poison_takes_memory_or_time(root):
    """In a process that may take 1 GB: a look at the store fails by name, it does not run out of memory or hang."""
    sparse(root / "tiny/log/000000000003.json")
    script = (
        "import sys\nfrom model_store.registry.store import open_model_store\n"
        "try:\n    open_model_store(sys.argv[1]).head('tiny')\n"
        "except Exception as error:\n    print(type(error).__name__)"
    )

    def bounded():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    told = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=60, check=True,
        preexec_fn=bounded, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert told.stdout.strip() == "ModelStoreError"


def test_a_store_of_which_everything_is_gone_has_no_versions(root):
    store = open_model_store(root)
    assert store.versions("tiny") == [1]
    for path in (root / "tiny/log").iterdir():
        path.unlink()
    assert store.head("tiny") is None
    with pytest.raises(NoVersionError):
        store.release("tiny", 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [({"by": "a\udcff"}, "cannot be recorded"), ({"why": "x" * (65 << 20)}, "the limit is 67,108,864")],
    ids=["no UTF-8", "too long"],
)
def test_a_change_that_no_reader_would_take_is_not_written(words, message, root):
    store = open_model_store(root)
    with pytest.raises(ModelStoreError, match=message):
        store.set_label("tiny", "canary", 1, **words)
    assert open_model_store(root).head("tiny").number == 2
    with pytest.raises(ValidationError, match="less than"):
        VersionPublished(version=1 << 63, digest="a" * 64)
