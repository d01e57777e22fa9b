"""Shared by tests that swap versions under traffic: bundles, settings without delays, and calls to a server."""

from __future__ import annotations

from pinrank.v1 import models_pb2, models_pb2_grpc, ranking_pb2, ranking_pb2_grpc
from server.config_sections import SwapConfig
from tests import tiny

TOKEN = "tell-nobody"
#: Loads versions with half of a core, and polls the store at once.
SWAP = SwapConfig(poll_s=0.05, retry_s=0.1, rank_correlation_min=-1, cpu_share=0.5)
#: The same network for several versions, so that they rank alike.
ALIKE = tiny.network(seed=1)


class Calls:
    """Calls to the services of a server."""

    def __init__(self, channel, token):
        self._ranking = ranking_pb2_grpc.RankingServiceStub(channel)
        self._models = models_pb2_grpc.ModelServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def rank(self, user=1, pins=range(1, 31), **fields):
        request = ranking_pb2.RankRequest(user_id=user, pin_ids=pins, surface="home", **fields)
        return await self._ranking.Rank(request, timeout=20)

    async def version(self, **fields):
        return (await self.rank(**fields)).versions.model_version

    async def do(self, name, **fields):
        request = getattr(models_pb2, f"{name}Request")(**fields)
        return await getattr(self._models, name)(request, timeout=20, metadata=self._metadata)

    async def status(self):
        return await self.do("Status")

    async def phases(self):
        return {one.version: one.phase for one in (await self.status()).versions}

    async def reason(self, version):
        return {one.version: one.reason for one in (await self.status()).versions}[version]


def publish(store, tmp_path, version, **changes):
    folder = tmp_path / "bundles" / str(version)
    tiny.write_tiny_bundle(folder, version, **changes)
    return store.publish(folder)


def held(server, version):
    found = server.status.versions.get(version)
    return str(found.phase) if found else "gone"


def sample(server, metric, /, **labels):
    return server.metrics.value(metric, **labels) or 0


def own_golden(content):
    """Return a network with golden requests that it answers correctly, so that only the tested fault is wrong."""
    return {"network.onnx": content, "golden.npz": tiny.encode_golden(tiny.golden(content, tiny.manifest_fields()))}
