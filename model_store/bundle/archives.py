"""Read untrusted npz archives: plain arrays only, no pickles, within a memory limit."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

#: Limits on an archive: the total size of its arrays, and their number.
BYTES_MAX = 4 << 30
MEMBERS_MAX = 100_000
#: Highest compression ratio of a member. Zeros compress a thousandfold, real data about tenfold.
_RATIO_MAX = 200


def decode_arrays(content: bytes, bytes_max: int = BYTES_MAX) -> dict[str, np.ndarray]:
    """Return an archive's arrays by name.

    Args:
        content: the bytes of an npz file.
        bytes_max: limit on the total size of all arrays.

    Raises:
        ValueError: the content is not an archive of plain arrays, or exceeds a limit. The message names the member.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = archive.infolist()
            if len(members) > MEMBERS_MAX:
                raise ValueError(f"the archive has {len(members)} members, the limit is {MEMBERS_MAX}")
            size = sum(member.file_size for member in members)
            if size > bytes_max:
                raise ValueError(f"its arrays take {size:,} bytes, the limit is {bytes_max:,}")
            return {member.filename.removesuffix(".npy"): _array(archive, member) for member in members}
    except (EOFError, NotImplementedError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(f"not an archive of arrays: {error}") from error


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    if member.file_size > _RATIO_MAX * max(member.compress_size, 1) + 1_000:
        raise ValueError(f"{member.filename}: {member.compress_size} bytes expand to {member.file_size}: a zip bomb")
    with archive.open(member) as file:
        # NumPy allocates what the header describes, so the header must match the data that follows.
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
