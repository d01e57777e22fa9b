from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from model_store.bundle.files import BundleError
from model_store.registry.history import LabelMoved, TrafficSet, VersionPublished, VersionsRetired, share_of
from model_store.registry.objects import ModelStoreError, NoObjectError
from model_store.registry.open_objects import open_objects
from model_store.registry.signing import Signer, SigningError, TrustedKeys
from model_store.registry.store import open_model_store
from tests import tiny


@pytest.fixture(params=["folder", "bucket"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "folder" else request.getfixturevalue("bucket_url")


@pytest.fixture
def store(url, bundles):
    opened = open_model_store(url)
    for version in (1, 2):
        opened.publish(bundles / str(version), by="anna")
    return opened


def test_a_published_version_comes_back_as_it_was(store, url, bundles):
    fresh = open_model_store(url)
    assert (fresh.models(), fresh.versions("tiny")) == (["tiny"], [1, 2])
    bundle = fresh.read("tiny", 2)
    for name, content in bundle.files.items():
        assert content == (bundles / "2" / name).read_bytes()
    assert bundle.digest == fresh.release("tiny", 2).digest


def test_versions_are_immutable(store, bundles, tmp_path):
    before = store.head("tiny").number
    store.publish(bundles / "1")  # the same again is no error, and no change
    assert store.head("tiny").number == before
    tiny.write_tiny_bundle(tmp_path / "other", 1, golden_tolerance=0.5)
    with pytest.raises(ModelStoreError, match=r"tiny@1 is already published with other content.*publish as version 3"):
        store.publish(tmp_path / "other")


def test_labels_move_with_an_audit_trail(store):
    store.set_label("tiny", "stable", 1, by="anna", why="first")
    store.set_label("tiny", "stable", 2, by="ben", why="better saves")
    assert store.set_label("tiny", "stable", 2, by="carl") is None
    assert store.resolve("tiny", "stable") == 2
    entry = store.rollback("tiny", "stable", by="dora", why="complaints")
    assert (entry.by, entry.why) == ("dora", "complaints")
    assert entry.change == LabelMoved(label="stable", version=1, before=2)
    assert store.rollback("tiny", "stable").change == LabelMoved(label="stable", version=2, before=1)
    trail = [(e.number, e.by, e.why, e.change.kind) for e in store.history("tiny")]
    assert [one[0] for one in trail] == [1, 2, 3, 4, 5, 6]
    assert trail[2:5] == [
        (3, "anna", "first", "labelled"),
        (4, "ben", "better saves", "labelled"),
        (5, "dora", "complaints", "labelled"),
    ]
    store.set_label("tiny", "stable", None, why="done")
    assert store.labels("tiny") == {}


def test_a_move_that_expects_another_version_changes_nothing(store):
    store.set_label("tiny", "stable", 1)
    with pytest.raises(ModelStoreError, match="stable now names version 1, not 7"):
        store.set_label("tiny", "stable", 2, expected=7)
    assert store.resolve("tiny", "stable") == 1


def test_traffic_is_part_of_the_same_history(store):
    for label, version in (("stable", 1), ("canary", 2)):
        store.set_label("tiny", label, version)
    store.set_traffic("tiny", "*", "canary", 0.05, by="anna")
    store.set_traffic("tiny", "home", "canary", 0.5)
    state = store.state("tiny")
    assert share_of(state, "home") == {"canary": 0.5}
    assert share_of(state, "related") == {"canary": 0.05}
    for change, message in (
        (lambda: store.set_traffic("tiny", "home", "stable", 0.6), "each share and the sum of all must be from 0 to 1"),
        (lambda: store.set_traffic("tiny", "home", "beta", 0.1), "no label 'beta'"),
        (lambda: store.set_label("tiny", "canary", None), r"label 'canary' has traffic on \*, home"),
    ):
        with pytest.raises(ModelStoreError, match=message):
            change()
    store.set_traffic("tiny", "home", "canary", 0)
    store.set_traffic("tiny", "*", "canary", 0)
    assert store.state("tiny").traffic == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: s.set_label("tiny", "stable", 7), "no version 7"),
        (lambda s: s.set_label("tiny", "../x", 1), "label '../x'"),
        (lambda s: s.resolve("tiny", "beta"), "no label 'beta'"),
        (lambda s: s.read("../etc", 1), "model name"),
        (lambda s: s.read("tiny", 9), r"no version 9 \(versions: 1, 2\)"),
        (lambda s: s.read("tiny", 1, bytes_max=100), r"tiny@1 has .* bytes, the limit is 100"),
        (lambda s: s.rollback("tiny", "beta"), "no label 'beta'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(store, wrong, message):
    with pytest.raises((ModelStoreError, BundleError), match=message):
        wrong(store)


def test_rollback_without_a_version_before_says_so(store):
    store.set_label("tiny", "stable", 1)
    with pytest.raises(ModelStoreError, match="stable never named a version other than 1"):
        store.rollback("tiny", "stable")


def test_a_damaged_blob_is_found_and_publishing_again_mends_it(store, url, bundles):
    digest = store.read("tiny", 1).manifest.files["network.onnx"].sha256
    objects = open_objects(url)
    objects.put(f"tiny/blobs/{digest}", b"something else")
    with pytest.raises(BundleError, match="network.onnx was changed or damaged"):
        store.read("tiny", 1)
    objects.delete(f"tiny/blobs/{digest}")
    with pytest.raises(BundleError, match="network.onnx is missing.*publish it again"):
        store.read("tiny", 1)
    store.publish(bundles / "1")
    assert store.read("tiny", 1).manifest.version == 1


def test_a_damaged_entry_is_named(store, url):
    open_objects(url).put("tiny/log/000000000003.json", b"{")
    with pytest.raises(ModelStoreError, match=r"log/000000000003.json is damaged .* return to the entry before it"):
        open_model_store(url).state("tiny")


def test_gc_keeps_what_labels_name_and_the_newest_and_never_reuses_a_number(store, url, bundles):
    store.publish(bundles / "3")
    store.set_label("tiny", "stable", 1)
    objects = open_objects(url)
    objects.put("tiny/blobs/" + "0" * 64, b"of a publish that was killed")
    kept = store.gc("tiny", keep=1, grace_s=3600)
    assert (kept.versions, kept.blobs) == ((2,), 0)  # young files stay
    swept = store.gc("tiny", keep=1, grace_s=0)
    assert swept.versions == ()
    assert swept.blobs >= 3  # the killed one's, and of version 2 at least its manifest and network
    assert store.versions("tiny") == [1, 3]
    for version in (1, 3):
        store.read("tiny", version)
    with pytest.raises(ModelStoreError, match="tiny@2 is retired.*publish as version 4"):
        store.publish(bundles / "2")


def test_of_many_writers_at_once_none_is_lost(store, url):
    store.set_label("tiny", "stable", 1)
    before = store.head("tiny").number
    failures = []

    def move(who):
        own = open_model_store(url)
        try:
            for i in range(5):
                own.set_label("tiny", f"label-{who}", 1 + i % 2, by=str(who))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=move, args=(who,)) for who in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    history = open_model_store(url).history("tiny")
    assert [entry.number for entry in history] == list(range(1, before + 31))
    assert {f"label-{who}": 1 for who in range(6)}.items() <= store.labels("tiny").items()


def test_create_has_one_winner(url):
    objects = [open_objects(url) for _ in range(8)]
    wins = []
    barrier = threading.Barrier(len(objects))

    def create(number):
        barrier.wait()
        if objects[number].create("a/b", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(len(objects))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert objects[0].get("a/b", 10) == str(wins[0]).encode()
    with pytest.raises(NoObjectError):
        objects[0].get("a/c", 10)
    assert objects[0].listed("nothing") == []


def test_listing_goes_on_after_a_name(url):
    objects = open_objects(url)
    for name in ("x/b", "x/a", "x/c"):
        objects.put(name, b"1")
    assert [found.name for found in objects.listed("x", after="a")] == ["b", "c"]
    objects.put("x/deeper/d", b"1")
    assert "d" not in [found.name for found in objects.listed("x")]
    assert objects.folders() == ["x"]


def test_a_name_that_leads_outside_is_refused(tmp_path):
    objects = open_objects(tmp_path)
    for name in ("../x", "a/../../x", "/etc/passwd", "a//b", ".hidden", "a\x00b"):
        with pytest.raises(ModelStoreError, match="object name"):
            objects.put(name, b"")


def test_unreachable_stores_say_what_to_set(monkeypatch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        monkeypatch.setenv("AWS_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        with pytest.raises(ModelStoreError, match=r"s3://bucket/x: .*AWS_\* variables"):
            open_model_store("s3://bucket/x").state("tiny")
    with pytest.raises(ModelStoreError, match="no model store at"):
        open_model_store(tmp_path / "absent").models()
    with pytest.raises(ModelStoreError, match="use a folder, or s3"):
        open_model_store("ftp://host/x")


def test_changes_are_json_that_people_can_read(tmp_path, bundles):
    store = open_model_store(tmp_path / "s")
    store.publish(bundles / "1", by="anna", why="a start")
    entry = json.loads((tmp_path / "s/tiny/log/000000000001.json").read_text())
    assert (entry["by"], entry["why"], entry["change"]["kind"]) == ("anna", "a start", "published")
    assert entry["change"]["digest"] == store.release("tiny", 1).digest


def test_files_reach_the_disk_before_their_name_and_the_name_before_the_answer(tmp_path, bundles, monkeypatch):
    """What a power cut keeps: data written and flushed, then named, then the folder flushed."""
    trace = []
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "link", "replace")}
    paths = {}

    def opened(path, *args, **kwargs):
        paths[descriptor := real["open"](path, *args, **kwargs)] = str(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", lambda d, b: trace.append(("write", paths[d])) or real["write"](d, b))
    monkeypatch.setattr(os, "fsync", lambda d: trace.append(("fsync", paths[d])) or real["fsync"](d))
    for name in ("link", "replace"):
        monkeypatch.setattr(
            os, name, lambda a, b, *_, real=real[name], **__: trace.append(("name", str(a), str(b))) or real(a, b)
        )
    store = open_model_store(tmp_path / "s")
    store.publish(bundles / "1")
    store.set_label("tiny", "stable", 1)
    named = [(i, event) for i, event in enumerate(trace) if event[0] == "name"]
    assert len(named) == 4 + 1 + 1  # the manifest and three files; two entries
    for i, (_, source, target) in named:
        own = [event[0] for event in trace[:i] if event[1] == source]
        assert own[-1] == "fsync"
        assert "write" in own
        following = next(event for event in trace[i + 1 :] if event[0] != "write")
        assert following == ("fsync", str(Path(target).parent))


def test_history_is_decided_purely():
    from datetime import UTC, datetime

    from model_store.registry.history import ModelState

    now = datetime.now(UTC)
    state = ModelState()
    for change in (
        VersionPublished(version=4, digest="a" * 64),
        VersionPublished(version=9, digest="b" * 64),
        LabelMoved(label="stable", version=4),
        TrafficSet(surface="*", label="stable", share=1.0),
        VersionsRetired(versions=(9,)),
    ):
        state = change.after(state, "m", now, "me")
    assert (set(state.versions), state.retired, state.next_version()) == ({4}, (9,), 10)
    with pytest.raises(ModelStoreError, match="label 'stable' names m@4; move the label first"):
        VersionsRetired(versions=(4,)).after(state, "m", now, "me")
    with pytest.raises(ModelStoreError, match="m@9 is retired"):
        VersionPublished(version=9, digest="b" * 64).after(state, "m", now, "me")


def signing_key(tmp_path, name):
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_only_a_trusted_publishers_signature_of_this_version_counts(tmp_path, bundles):
    private, public = signing_key(tmp_path, "anna")
    _, other = signing_key(tmp_path, "ben")
    store = open_model_store(tmp_path / "s")
    store.publish(bundles / "1", signer=Signer.read(private))
    store.publish(bundles / "2")
    one, two = (store.release("tiny", version) for version in (1, 2))
    TrustedKeys.read([other, public]).check("tiny@1", one.digest, one.signature)
    for trust, ref, digest, signature, message in (
        ([other], "tiny@1", one.digest, one.signature, "no trusted publisher"),
        ([public], "tiny@2", one.digest, one.signature, "no trusted publisher"),
        ([public], "tiny@1", two.digest, one.signature, "no trusted publisher"),
        ([public], "tiny@2", two.digest, two.signature, "tiny@2 is not signed; publish it with --sign"),
        ([public], "tiny@1", one.digest, "!", "not base64"),
    ):
        with pytest.raises(SigningError, match=message):
            TrustedKeys.read(trust).check(ref, digest, signature)
    with pytest.raises(SigningError, match="not a PEM public key"):
        TrustedKeys.read([private])
    with pytest.raises(SigningError, match="not an unencrypted PEM private key"):
        Signer.read(public)


def test_a_store_is_safe_to_read_while_it_is_written(tmp_path, bundles):
    """A reader that polls sees only whole states, each no older than the one before."""
    writer, reader = open_model_store(tmp_path / "s"), open_model_store(tmp_path / "s")
    writer.publish(bundles / "1")
    writer.publish(bundles / "2")
    done = threading.Event()

    def write():
        for i in range(60):
            writer.set_label("tiny", "stable", 1 + i % 2)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = []
    until_s = time.monotonic() + 60
    while not done.is_set() and time.monotonic() < until_s:
        seen.append(reader.head("tiny").number)
    thread.join()
    assert seen == sorted(seen)
    assert reader.head("tiny").number == 62
