"""Archives of plain arrays (npz), read without trusting them: no pickles, and never more memory than they may take."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

#: What an archive's arrays may take together, and how many there may be.
BYTES_MAX = 4 << 30
MEMBERS_MAX = 100_000
#: How much smaller a member may be compressed: zeros shrink a thousandfold, numbers that mean something tenfold.
_RATIO_MAX = 200


def decode_arrays(content: bytes, bytes_max: int = BYTES_MAX) -> dict[str, np.ndarray]:
    """Return an archive's arrays by name.

    Args:
        content: of an npz file.
        bytes_max: of all arrays together.

    Raises:
        ValueError: it is no archive, or one that would take more memory than it may; the message names the member.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS_MAX:
                raise ValueError(f"{len(members)} members, the limit is {MEMBERS_MAX}")
            size = sum(member.file_size for member in members)
            if size > bytes_max:
                raise ValueError(f"its arrays take {size:,} bytes, the limit is {bytes_max:,}")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except (EOFError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"no archive of arrays: {error}") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.file_size > _RATIO_MAX * max(member.compress_size, 1) + 1_000:
        raise ValueError(f"{member.filename}: {member.compress_size} bytes that grow to {member.file_size}: a zip bomb")
    with archive.open(member) as file:
        # The header alone decides how much NumPy takes, so it must be what follows.
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"{member.filename} holds pickled objects; a bundle holds plain arrays")
        described, following = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if described != following:
            raise ValueError(f"{member.filename}: its header describes {described} bytes, {following} follow")
        content = bytearray(file.read(described))
    if len(content) != described:
        raise EOFError(f"{member.filename} ends after {len(content)} of {described} bytes")
    flat = np.frombuffer(content, dtype)
    return flat.reshape(shape[::-1]).transpose() if fortran else flat.reshape(shape)
