"""The process that proves a bundle is kept from the network, from programs, from other processes and from files."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from model_store.bundle.files import BundleError, read_bundle
from server.proving import system_calls
from server.proving.confinement import confine
from server.proving.prover import ProofLimits, Prover
from tests import tiny

ROOT = str(Path(__file__).parents[3])
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in system_calls.MACHINES, reason="seccomp is Linux's"
)
#: What somebody who has taken over the process could try. `PORT`, `SECRET`, `NEW` and `OTHER` are given.
ATTEMPTS = """
import ctypes, fcntl, os, socket, struct, sys, threading
pair = socket.socketpair()
watching = ctypes.CDLL(None).inotify_init1(0)
def attempts(port, secret, new, other):
    libc = ctypes.CDLL(None, use_errno=True)
    def call(function, *arguments):
        ctypes.set_errno(0)
        if function(*arguments) == -1:
            raise OSError(ctypes.get_errno(), "refused")
    def thread():
        done = []
        one = threading.Thread(target=lambda: done.append(open("/proc/self/status").read(4)))
        one.start(); one.join()
        assert done
    def in_a_thread():
        failed = []
        def run():
            try:
                socket.create_connection(("127.0.0.1", port))
            except OSError as error:
                failed.append(error)
        one = threading.Thread(target=run)
        one.start(); one.join()
        raise failed[0]
    tried = {
        "connect": lambda: socket.create_connection(("127.0.0.1", port)),
        "connect in a thread": in_a_thread,
        "bind": lambda: socket.socket().bind(("127.0.0.1", 0)),
        "a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "run a program": lambda: os.execv("/bin/true", ["true"]),
        "fork": lambda: os._exit(0) if os.fork() == 0 else None,
        "write a new file": lambda: open(new, "w"),
        "write a file": lambda: open(secret, "a"),
        "delete a file": lambda: os.unlink(secret),
        "rename a file": lambda: os.rename(secret, new),
        "make a folder": lambda: os.mkdir(new),
        "open a file": lambda: open(secret),
        "list the root": lambda: os.listdir("/"),
        "read another process": lambda: open(f"/proc/{other}/environ", "rb").read(1),
        "write its own memory": lambda: open("/proc/self/mem", "r+b"),
        "trace another process": lambda: call(libc.ptrace, 16, other, None, None),
        "signal another process": lambda: os.kill(other, 0),
        "limit another process": lambda: __import__("resource").prlimit(other, 7, (10, 10)),
        "a key ring": lambda: call(libc.syscall, {"x86_64": 250, "aarch64": 219}[os.uname().machine], 0, -3, 0),
        "bpf": lambda: call(libc.syscall, {"x86_64": 321, "aarch64": 280}[os.uname().machine], 0, None, 0),
        "a call from after the tables": lambda: call(libc.syscall, 463, 0, 0, 0),
        "type into the terminal": lambda: fcntl.ioctl(2, 0x5412, b"x"),
        "own a file's signals": lambda: fcntl.fcntl(2, fcntl.F_SETOWN, other),
        "own a file's signals, as a group": lambda: fcntl.fcntl(2, 15, struct.pack("=2i", 1, other)),  # F_SETOWN_EX
        "choose a file's signal": lambda: fcntl.fcntl(2, 10, 9),  # F_SETSIG
        "own a socket's signals": lambda: fcntl.ioctl(pair[0], 0x8901, struct.pack("=i", other)),  # FIOSETOWN
        "own a socket's signals, as a group": lambda: fcntl.ioctl(pair[0], 0x8902, struct.pack("=i", other)),
        "watch a folder": lambda: call(libc.inotify_add_watch, watching, os.path.dirname(secret).encode(), 0xFFF),
        "THREAD": thread,
        "READ ITS LIBRARIES": lambda: open(os.__file__).close(),
        "READ ITS STATUS": lambda: open("/proc/self/status").close(),
    }
    succeeded = []
    for name, attempt in tried.items():
        try:
            attempt()
            succeeded.append(name)
        except OSError:
            pass
    return succeeded
"""
#: What the runtimes need, and what a process that computes on a GPU may do besides.
NEEDED = ["THREAD", "READ ITS LIBRARIES", "READ ITS STATUS"]


@pytest.fixture
def target(tmp_path):
    """A listening port, a file, the name of a file that is not there, and a process, to be tried by the confined."""
    secret = tmp_path / "secret"
    secret.write_text("s")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1], str(secret), str(tmp_path / "new"), os.getpid()
    assert secret.read_text() == "s"
    assert not (tmp_path / "new").exists()


def confined(target, *, on_gpu, before=""):
    script = (
        f"{ATTEMPTS}\nimport json\nfrom server.proving.confinement import confine\n{before}\n"
        f"lacking = confine(on_gpu={on_gpu})\nprint(json.dumps([lacking, attempts(*{target!r})]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def test_a_confined_process_computes_and_can_do_nothing_else(target):
    lacking, succeeded = confined(target, on_gpu=False)
    if "Landlock" in lacking:  # an older kernel
        succeeded = [name for name in succeeded if name not in {"open a file", "list the root", "read another process"}]
    assert succeeded == NEEDED
    assert "seccomp" not in lacking


AN_OLD_THREAD = """
import queue, threading
go, done = queue.Queue(), queue.Queue()
def wait():
    go.get()
    try:
        socket.socket()
        done.put("connected")
    except PermissionError:
        done.put("refused")
threading.Thread(target=wait, daemon=True).start()
def attempts(*_):
    go.put(1)
    return done.get(timeout=30)
"""


def test_a_thread_that_was_there_before_is_confined_too(target):
    assert confined(target, on_gpu=False, before=AN_OLD_THREAD)[1] == "refused"


ON_A_GPU = """
import subprocess
def attempts(port, secret, new, other):
    subprocess.run(["/bin/true"], check=True)  # a compiler
    open(new, "w").close()  # its cache
    os.unlink(new)
    socket.socket(socket.AF_UNIX).close()
    succeeded = []
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
        try:
            succeeded.append(str(socket.socket(family)))
        except PermissionError:
            pass
    try:
        os.kill(other, 0)
        succeeded.append("kill")
    except PermissionError:
        pass
    return succeeded
"""


def test_what_a_gpu_needs_is_left_to_its_process_and_the_network_is_not(target):
    assert confined(target, on_gpu=True, before=ON_A_GPU) == ["", []]


def test_another_machine_says_that_it_confines_nothing(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "s390x")
    assert confine(on_gpu=False) == "there is no confinement for linux on s390x"


def test_the_process_that_proves_is_confined_when_it_reads_the_network(target, tmp_path, monkeypatch):
    """A stand-in for OpenVINO is the stranger's code here: it tries all of it where the network is parsed."""
    package = tmp_path / "stand-in/openvino"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"{ATTEMPTS}\nclass Core:\n    def read_model(self, network):\n"
        f"        raise RuntimeError('succeeded: ' + str(attempts(*{target!r})))\n"
        "class InferRequest: pass\nclass Tensor: pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), ROOT, f"{ROOT}/proto"]))
    tiny.write_tiny_bundle(tmp_path / "bundle", 1)
    bundle = read_bundle(tmp_path / "bundle")
    limits = ProofLimits("openvino", None, 4 << 30, 60.0)
    with closing(Prover("openvino", nice=0)) as prover, pytest.raises(BundleError, match="succeeded: ") as failed:
        prover.prove(bundle, limits, None)
    succeeded = str(failed.value).partition("succeeded: ")[2]
    assert "connect" not in succeeded
    assert succeeded.strip() == str(NEEDED)
