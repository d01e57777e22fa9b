"""Both servers behind the gRPC port, for tests that hold for each of them."""

from __future__ import annotations

import pytest

from kernels.native.library import NativeLibraryError, http2_library
from server.edge.grpcio_endpoint import GrpcioEndpoint
from server.edge.native_endpoint import NativeEndpoint

try:
    http2_library()
    _WHY = ""
except NativeLibraryError as error:
    _WHY = str(error)
needs_native_edge = pytest.mark.skipif(bool(_WHY), reason=_WHY)

EDGES = (pytest.param(NativeEndpoint, marks=needs_native_edge, id="native"), pytest.param(GrpcioEndpoint, id="grpcio"))
