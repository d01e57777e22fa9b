"""The security page: its example is a valid file, and each control's test is there."""

from __future__ import annotations

import json
import re

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from docs.transcripts import ROOT
from server.access.caller_file import read_callers
from server.access.callers import Permission

PAGE = (ROOT / "docs" / "security.md").read_text()


def test_the_example_of_a_file_of_callers_is_one(tmp_path):
    (example,) = re.findall(r"```toml\n# callers.toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "callers.toml").write_text(example)
    public = jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key())
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [json.loads(public) | {"kid": "1", "alg": "ES256"}]}))
    callers, verifier, _ = read_callers(tmp_path / "callers.toml")
    assert set(callers.by_flow) == {"home-feed", "tracker", "release"}
    assert callers.by_subject["release@ci"].may == {Permission.MODELS}
    assert verifier is not None


def test_each_control_names_a_test_that_is_there():
    table = PAGE[PAGE.index("## Controls") : PAGE.index("## Report")]
    rows = [line for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        found = re.findall(r"`((?:tests/)[\w/]+\.py)`", row)
        assert found or row.rstrip(" |").endswith("the same"), row
        assert all((ROOT / path).exists() for path in found), row
