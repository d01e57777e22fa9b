from __future__ import annotations

import pytest

from tests import tiny
from tests.s3_server import s3_server


@pytest.fixture(scope="session")
def s3_endpoint():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket_url(s3_endpoint, monkeypatch, tmp_path):
    import boto3

    settings = {
        "AWS_ENDPOINT": s3_endpoint,
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    name = f"models-{abs(hash(tmp_path)):x}"
    client = boto3.client(
        "s3", endpoint_url=s3_endpoint, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
    )
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}/rankers"


@pytest.fixture
def bundles(tmp_path):
    """Folders of tiny@1, tiny@2 and tiny@3."""
    for version in (1, 2, 3):
        tiny.write_tiny_bundle(tmp_path / "bundles" / str(version), version)
    return tmp_path / "bundles"
