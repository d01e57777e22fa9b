"""Confine the process that proves a bundle: no network, no programs, no other processes, no changes to files.

The process parses what strangers made. If that takes it over, it can still compute, and write its answer into the pipe
that it already has. Linux refuses everything else: seccomp by system call, and Landlock by path. Both need no
privileges and cannot be undone. Where the kernel has one of them only, or neither, the caller learns it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from server.proving import system_calls as calls

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC = 1, 1
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_AF_UNIX, _CLONE_THREAD = 1, 0x10000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
#: The first two put characters into the terminal's input, as if somebody had typed them. The others let the kernel send
#: a signal to another process when something happens to a file.
_TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP = 0x5412, 0x541C, 0x8901, 0x8902
_F_SETOWN, _F_SETSIG, _F_SETOWN_EX = 8, 10, 15

_LANDLOCK_VERSION, _PATH_BENEATH = 1, 1
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
#: The rights over files that each version of Landlock knows, as the number of their bits; those over networks; scopes.
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_NETWORK_RIGHTS, _SCOPES = 0b11, 0b11
#: What libraries read while they run: themselves, and what the machine has.
_READ = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", "/dev/zero"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/version"),
    *("/sys/devices", "/sys/fs/cgroup", "/sys/kernel/mm"),
)

#: One instruction of a filter: code, jump if true, jump if false, operand.
_Instruction = tuple[int, int, int, int]


def confine(*, on_gpu: bool) -> str:
    """Confine this process and all its threads, for ever.

    Args:
        on_gpu: the process computes on a GPU, whose libraries open devices, keep files and start compilers. It is then
            kept from the network and from other processes only.

    Returns:
        Why it is not, or not wholly, confined; empty if it is.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in calls.MACHINES:
        return f"there is no confinement for {sys.platform} on {machine}"
    lacking = []
    try:
        _checked(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    except OSError as error:
        return f"no_new_privs: {error.strerror}"
    if not on_gpu:
        try:
            _limit_files(calls.MACHINES[machine][1])
        except OSError as error:
            lacking.append(f"Landlock: {error.strerror}")
    try:
        _limit_calls(*calls.MACHINES[machine], on_gpu=on_gpu)
    except OSError as error:
        lacking.append(f"seccomp: {error.strerror}")
    return "; ".join(lacking)


def _limit_calls(architecture: int, machine: int, *, on_gpu: bool) -> None:
    program = _filter(architecture, machine, on_gpu=on_gpu)
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed, len(packed))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    given = Program(len(program), ctypes.addressof(code))
    number = calls.SECCOMP[machine]
    _checked(_LIBC.syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(given)))


def _filter(architecture: int, machine: int, *, on_gpu: bool) -> list[_Instruction]:
    """Return a program in classic BPF that refuses calls with EPERM."""
    refused = _ERROR | errno.EPERM
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, refused),  # a call of another architecture, such as int 0x80, has other numbers
        (_LOAD, 0, 0, _NUMBER_AT),
        (_GREATER, 0, 1, calls.LAST_KNOWN),  # also the calls of x32, which start at 2**30
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]

    def add(number: int | None, *block: _Instruction) -> None:
        """Add a block for one call; each way through it ends in a return, as it changes the loaded word."""
        if number is not None:
            program.extend([(_EQUAL, 0, len(block), number), *block])

    def where(place: int, test: int, operand: int, then: int, otherwise: int) -> tuple[_Instruction, ...]:
        argument = _ARGUMENTS_AT + 8 * place  # its lower word, on machines with the lower word first
        return (_LOAD, 0, 0, argument), (test, 0, 1, operand), (_RETURN, 0, 0, then), (_RETURN, 0, 0, otherwise)

    def unless(place: int, *operands: int) -> tuple[_Instruction, ...]:
        """Allow the call unless an argument is one of the operands."""
        argument = _ARGUMENTS_AT + 8 * place
        tests = ((_EQUAL, len(operands) - i, 0, operand) for i, operand in enumerate(operands))
        return (_LOAD, 0, 0, argument), *tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, refused)

    for numbers in (*calls.NEVER.values(), *(() if on_gpu else calls.NEVER_ON_CPU.values())):
        add(numbers[machine], (_RETURN, 0, 0, refused))
    own = os.getpid()
    add(calls.TGKILL[machine], *where(0, _EQUAL, own, _ALLOW, refused))  # abort()
    add(calls.PRLIMIT[machine], *where(0, _EQUAL, 0, _ALLOW, refused))
    add(calls.IOCTL[machine], *unless(1, _TIOCSTI, _TIOCLINUX, _FIOSETOWN, _SIOCSPGRP))
    add(calls.FCNTL[machine], *unless(1, _F_SETOWN, _F_SETSIG, _F_SETOWN_EX))
    if on_gpu:
        add(calls.SOCKET[machine], *where(0, _EQUAL, _AF_UNIX, _ALLOW, refused))  # CUDA's own services
    else:
        add(calls.SOCKET[machine], (_RETURN, 0, 0, refused))
        add(calls.CLONE[machine], *where(0, _ANY_BIT, _CLONE_THREAD, _ALLOW, refused))
        # Their flags lie behind a pointer. glibc falls back to the calls above.
        for numbers in (calls.CLONE3, calls.OPENAT2):
            add(numbers[machine], (_RETURN, 0, 0, _ERROR | errno.ENOSYS))
        for numbers, place in ((calls.OPEN, 1), (calls.OPENAT, 2)):
            add(numbers[machine], *where(place, _ANY_BIT, _WRITES, refused, _ALLOW))
    program.append((_RETURN, 0, 0, _ALLOW))
    return program


def _limit_files(machine: int) -> None:
    """Let this process read what libraries need, and nothing else; and write nothing."""
    create, add, restrict = (
        numbers[machine] for numbers in (calls.LANDLOCK_CREATE, calls.LANDLOCK_ADD, calls.LANDLOCK_RESTRICT)
    )
    version = _checked(_LIBC.syscall(create, None, 0, _LANDLOCK_VERSION))
    files = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    parts = [files, *([_NETWORK_RIGHTS] if version >= 4 else []), *([_SCOPES] if version >= 6 else [])]
    attributes = struct.pack(f"={len(parts)}Q", *parts)
    ruleset = _checked(_LIBC.syscall(create, attributes, ctypes.c_size_t(len(attributes)), 0))
    try:
        for path in _readable():
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
                try:
                    rights = _READ_FILE | (_READ_DIR if Path(path).is_dir() else 0)
                    rule = struct.pack("=Qi", rights, descriptor)
                    _checked(_LIBC.syscall(add, ruleset, _PATH_BENEATH, rule, 0))
                finally:
                    os.close(descriptor)
        _checked(_LIBC.syscall(restrict, ruleset, 0))
    finally:
        os.close(ruleset)


def _readable() -> Iterable[str]:
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    ours = str(Path(__file__).parents[2])
    return dict.fromkeys(filter(None, (*_READ, sys.prefix, sys.base_prefix, ours, *sys.path, *libraries)))


def _checked(result: int) -> int:
    """Return the result of a call, or raise OSError for what it set in errno."""
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
