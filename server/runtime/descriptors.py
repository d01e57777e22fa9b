"""File descriptors: how many this process may have."""

from __future__ import annotations

import resource

#: More than a server needs. Some programs try every descriptor that they may have.
_DESCRIPTORS_MAX = 65_536


def raise_descriptor_limit() -> int:
    """Raise this process's limit of file descriptors as far as it may and needs; return the limit.

    Shells and service managers start programs with a low soft limit, often 1,024, for the sake of those that use
    select(2), and a hard one that a program may raise it to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS_MAX)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
