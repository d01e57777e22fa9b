"""What is of S3-compatible buckets alone: how they are found, and what one must keep to be a model store."""

from __future__ import annotations

import os
import sys

import obstore
import pytest

from model_store.registry.objects import ModelStoreError
from model_store.registry.store import open_model_store
from tests.s3_server import s3_server


@pytest.fixture
def careless_endpoint():
    with s3_server(ignores_conditions=True) as endpoint:
        yield endpoint


def test_a_bucket_that_ignores_conditions_is_refused_before_a_change_could_vanish(
    careless_endpoint, bucket_url, monkeypatch, bundles
):
    monkeypatch.setenv("AWS_ENDPOINT", careless_endpoint)
    store = open_model_store(bucket_url)
    with pytest.raises(ModelStoreError, match="this bucket ignores If-None-Match and overwrites existing objects"):
        store.publish(bundles / "1")
    assert store.head("tiny") is None
    # Also one that was copied there from a store that was found good.
    with pytest.raises(ModelStoreError, match="ignores If-None-Match"):
        open_model_store(bucket_url).publish(bundles / "1")


def test_a_bucket_is_tried_once_and_its_next_writer_asks_once(bucket_url, bundles, monkeypatch):
    store = open_model_store(bucket_url)
    asked, put = [], obstore.put

    def noted(store, name, content, **options):
        if options.get("mode") == "create":
            asked.append(name)
        return put(store, name, content, **options)

    monkeypatch.setattr(obstore, "put", noted)
    for version in (1, 2):
        store.publish(bundles / str(version))
    assert asked == [
        "conditional-writes",
        "conditional-writes",
        "tiny/log/000000000001.json",
        "tiny/log/000000000002.json",
    ]
    asked.clear()
    open_model_store(bucket_url).set_label("tiny", "stable", 1)
    assert asked == ["conditional-writes", "tiny/log/000000000003.json"]
    assert store.models() == ["tiny"]


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_endpoint_is_taken_from_each_usual_name_the_most_specific_first(name, bucket_url, monkeypatch):
    endpoint = os.environ["AWS_ENDPOINT"]
    for other in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL"):
        monkeypatch.setenv(other, "http://127.0.0.1:9")
    if name == "AWS_ENDPOINT":
        monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setenv(name, endpoint)
    assert open_model_store(bucket_url).models() == []


@pytest.fixture
def profile(bucket_url, tmp_path, monkeypatch):
    """Everything that the bucket takes in a profile, nothing of it in the environment."""
    (tmp_path / "config").write_text(
        f"[profile work]\nregion = us-east-1\nendpoint_url = {os.environ['AWS_ENDPOINT']}\n"
    )
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = k\naws_secret_access_key = s\n")
    for name in ("AWS_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    return bucket_url


def test_a_profile_says_credentials_region_and_endpoint(profile, bundles):
    store = open_model_store(profile)
    store.publish(bundles / "1")
    assert store.versions("tiny") == [1]


def test_a_profile_that_cannot_be_used_is_named_with_what_to_set(profile, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "gone")
    with pytest.raises(ModelStoreError, match=r"AWS_PROFILE: .*\(gone\).* set AWS_ACCESS_KEY_ID"):
        open_model_store(profile)
    monkeypatch.setitem(sys.modules, "boto3", None)
    monkeypatch.delitem(sys.modules, "obstore.auth.boto3", raising=False)
    with pytest.raises(
        ModelStoreError, match="AWS_PROFILE is 'gone', and profiles need boto3: pip install boto3; or set"
    ):
        open_model_store(profile)
