"""What servers refuse in a network."""

from __future__ import annotations

from onnx import NodeProto


class NetworkError(Exception):
    """A network contains something that servers refuse. The message names the node or tensor."""


def where(node: NodeProto) -> str:
    """Name a node for a message."""
    return f"node {node.name or node.op_type!r}"
