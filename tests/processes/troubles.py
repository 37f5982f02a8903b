"""What can befall a hospital or the server: its link, its packets, disk and clock.

Real ones: sockets between the processes, a network namespace, a mounted disk, and the
clock that a process reads.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
import random
import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from fedgex.common.trust import pki

UP, DOWN = "up", "down"
"""Towards the server, and from it."""
UnderWay = queue.SimpleQueue[tuple[float, bytes]]
"""Chunks with the time at which each is due, monotonic seconds."""


@dataclass
class Link:
    """A TCP proxy in user space: passes bytes on, late, slowly, changed, or not at all.

    One link stands for one hospital's way to the server. All its connections share the
    bytes per second, in each direction.
    """

    host: str
    """Address that it listens on and is reached under."""
    target: tuple[str, int] = ("", 0)
    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    silent: bool = False
    """Bytes vanish, and neither end is notified."""
    one_way: bool = False
    """Bytes from the server vanish; those towards it arrive."""
    refusing: bool = False
    """New connections are closed at once."""
    flip_after: int | None = None
    """Change one byte once so many more have passed towards the server."""
    flipped: int = 0
    passed: Counter[str] = field(default_factory=Counter)
    """Bytes that have passed, by direction."""
    _free_at: dict[str, float] = field(default_factory=lambda: {UP: 0.0, DOWN: 0.0})
    """When each direction has sent what it was given; monotonic seconds."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listener: socket.socket = field(default_factory=socket.socket)
    _sockets: list[socket.socket] = field(default_factory=list)

    def open(self) -> str:
        """Listen; return host:port for the hospital."""
        self._listener.bind((self.host, 0))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()
        return f"{self.host}:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Close every connection, as a firewall that restarts does."""
        for each in self._sockets:
            _end(each)
        self._sockets.clear()

    def close(self) -> None:
        """Stop listening, and close every connection."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(self.target)
            except OSError:  # the server is being started again
                near.close()
                continue
            self._sockets += [near, far]
            for source, sink, way in ((near, far, UP), (far, near, DOWN)):
                under_way = UnderWay()
                for work in (
                    partial(self._take, source, under_way, way),
                    partial(_deliver, sink, under_way),
                ):
                    threading.Thread(target=work, daemon=True).start()

    def _take(self, source: socket.socket, under_way: UnderWay, way: str) -> None:
        """Queue each chunk with the time at which its last byte arrives."""
        try:
            while content := bytearray(source.recv(16384)):
                due = self._due(len(content), way)
                if self.silent or (self.one_way and way == DOWN):
                    continue
                self.passed[way] += len(content)
                if way == UP and self.flip_after is not None:
                    self.flip_after -= len(content)
                    if self.flip_after <= 0:
                        content[len(content) // 2] ^= 1
                        self.flip_after = None
                        self.flipped += 1
                under_way.put((due, bytes(content)))
        except OSError:
            pass
        finally:
            _end(source)
            under_way.put((0.0, b""))

    def _due(self, n_bytes: int, way: str) -> float:
        with self._lock:
            begins = max(time.monotonic(), self._free_at[way])
            self._free_at[way] = begins + n_bytes / self.bytes_per_s
            return self._free_at[way] + self.delay_s


def _deliver(sink: socket.socket, under_way: UnderWay) -> None:
    """Send each chunk when it is due, until an empty one ends the connection."""
    try:
        while (each := under_way.get())[1]:
            time.sleep(max(0.0, each[0] - time.monotonic()))
            sink.sendall(each[1])
    except OSError:
        pass
    finally:
        _end(sink)


def _end(each: socket.socket) -> None:
    """Close a connection; closing alone does not wake a thread that reads from it."""
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


def intercepting_proxy(folder: Path, host: str, asked: list[str]) -> str:
    """Serve a CONNECT proxy that opens TLS under the hospital's own authority."""
    folder.mkdir()
    key, authority = pki.new_authority("hospital-it")
    own = pki.new_key()
    request = pki.request(own, "hospital-it", "server")
    certificate = pki.issue(
        key, authority, request,
        name="hospital-it", role="server", days=30, hosts=[host],
    )  # fmt: skip
    (folder / "ca.pem").write_text(pki.to_pem(authority))
    (folder / "own.crt").write_text(pki.to_pem(certificate))
    pki.save_key(own, folder / "own.key")
    near_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near_side.load_cert_chain(folder / "own.crt", folder / "own.key")
    far_side = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    far_side.check_hostname = False
    far_side.verify_mode = (
        ssl.CERT_NONE
    )  # its own business; the site verifies the proxy
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(near: socket.socket) -> None:
        try:
            pass_on(near)
        except OSError:  # either side went away
            near.close()

    def pass_on(near: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += near.recv(4096)
        place = head.split()[1].decode()
        asked.append(place)
        host, _, port = place.partition(":")
        far = far_side.wrap_socket(socket.create_connection((host, int(port))))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        inner = near_side.wrap_socket(near, server_side=True)
        with inner, far:
            _relay(inner, far)

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            threading.Thread(target=serve, args=(near,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _relay(near: ssl.SSLSocket, far: ssl.SSLSocket) -> None:
    """Pass on both ways until one side ends; one thread, as OpenSSL wants of a socket.

    Two threads, one that reads and one that writes, spoil a record now and then.
    """
    other = {near: far, far: near}
    while True:
        ready = [each for each in other if each.pending()]
        for source in ready or select.select([*other], [], [])[0]:
            source.setblocking(False)
            try:
                content = source.recv(16384)
            except ssl.SSLWantReadError:  # half a record, or none of the application's
                continue
            finally:
                source.setblocking(True)
            if not content:
                return
            other[source].sendall(content)


LOSS = 0.05
TUN = Path("/dev/net/tun")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_BYTES = 2**16
TCP = 6


@dataclass
class Road:
    """The only way between this machine and a network namespace: two TUN devices.

    What the kernel sends into one of them we write to the other, less what gets lost.
    """

    namespace: str
    number: int = 0
    """Of several roads on this machine; each has addresses of its own."""
    up: int = -1
    """The namespace's device; what is read of it goes to the server."""
    down: int = -1
    """This machine's device."""
    lossy: bool = False
    """One packet in twenty of TCP gets lost from now on, in either direction."""
    lost: Counter[str] = field(default_factory=Counter)
    """How many did, "up" towards the server and "down" from it."""
    why_not: str = ""
    """Why there is no such road on this machine, if so."""
    _closing: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @property
    def here(self) -> str:
        """This machine's address on it; both are set apart for tests of networks."""
        return f"198.18.{self.number}.1"

    @property
    def beyond(self) -> str:
        """The address at the other end."""
        return f"198.18.{self.number}.2"

    @property
    def prefix(self) -> list[str]:
        """Words before a command that is to run at the other end."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}"]

    def open(self) -> None:
        """Make namespace and devices, and pass packets on from now on.

        Raises
        ------
        OSError
            If this machine does not permit it; the error says what.
        """
        if taken := _ip("route", "show", "to", "root", f"198.18.{self.number}.0/24"):
            raise OSError(f"its addresses are in use: {taken}")
        _ip("netns", "add", self.namespace)
        near, far = f"{self.namespace}-s", f"{self.namespace}-h"
        self.down, self.up = _tun(near), _tun(far)
        _ip("address", "add", self.here, "peer", self.beyond, "dev", near)
        _ip("link", "set", near, "up")
        _ip("link", "set", far, "netns", self.namespace)
        inside = ("-netns", self.namespace)
        _ip(*inside, "address", "add", self.beyond, "peer", self.here, "dev", far)
        for device in ("lo", far):
            _ip(*inside, "link", "set", device, "up")
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take everything down again, as far as it was made."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        for device in (self.up, self.down):
            if device >= 0:
                os.close(device)
        with contextlib.suppress(OSError):
            _ip("netns", "del", self.namespace)

    def _pass_on(self) -> None:
        chance = random.Random(1)
        ways = {self.up: ("up", self.down), self.down: ("down", self.up)}
        while not self._closing.is_set():
            for device in select.select([*ways], [], [], 0.2)[0]:
                way, other = ways[device]
                packet = os.read(device, PACKET_BYTES)
                is_tcp = packet[0] >> 4 == 4 and packet[9] == TCP
                if self.lossy and is_tcp and chance.random() < LOSS:
                    self.lost[way] += 1
                    continue
                with contextlib.suppress(OSError):  # a device is being taken down
                    os.write(other, packet)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _tun(name: str) -> int:
    """Make a device, which is there until its file is closed."""
    device = os.open(TUN, os.O_RDWR)
    try:
        wanted = struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI)
        fcntl.ioctl(device, TUNSETIFF, wanted)
    except OSError:
        os.close(device)
        raise
    return device


SESSION = f"fedgex{os.getpid()}"
"""Name of this session's disks and network, as long as a device's may be."""


def clear_away() -> None:
    """Remove disks and namespaces of sessions that were killed."""

    def left(name: str) -> bool:
        number = name.removeprefix("fedgex")
        return number.isdecimal() and not Path("/proc", number).exists()

    for line in Path("/proc/mounts").read_text().splitlines():
        source, folder, *_ = line.split()
        if left(source):
            subprocess.run(["umount", "--lazy", folder], capture_output=True)
    for path in Path("/run/netns").glob("fedgex*"):
        if left(path.name):
            _ip("netns", "del", path.name)


DISK_MB = 512
"""Holds the checkpoints of a session's runs."""
BLOCK = bytes(2**20)
DAY_S = 86_400


@dataclass(frozen=True)
class Disk:
    """A small disk under a folder, real enough to be full to its last byte."""

    folder: Path

    def mount(self) -> str:
        """Put what the folder holds on a disk of its own; say why not, if so."""
        kept = self.folder.with_name(f"{self.folder.name}-before")
        self.folder.rename(kept)
        self.folder.mkdir(mode=0o700)
        options = f"size={DISK_MB}m,mode=700"
        command = ["mount", "-t", "tmpfs", "-o", options, SESSION, self.folder]
        done = subprocess.run(command, capture_output=True, text=True)
        shutil.copytree(kept, self.folder, dirs_exist_ok=True)
        return f"no disk can be mounted: {done.stderr}" if done.returncode else ""

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], capture_output=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Leave no block free, whatever others remove, until the end."""
        filler, ending = self.folder / "filler", threading.Event()

        def fill() -> None:
            with filler.open("wb", buffering=0) as file:
                while not ending.wait(0.02):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(BLOCK)

        thread = threading.Thread(target=fill)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
            filler.unlink()


@dataclass(frozen=True)
class Clock:
    """The clock of whatever runs in its environment."""

    offset: Path

    @property
    def environment(self) -> Mapping[str, str]:
        found = find_spec("libfaketime")
        if found is None or found.origin is None:
            return {}
        vendored = Path(found.origin).parent / "vendor/libfaketime/src"
        return {
            "LD_PRELOAD": str(vendored / "libfaketime.so.1"),
            "FAKETIME_TIMESTAMP_FILE": str(self.offset),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

    def jump(self, offset_s: int) -> None:
        """Be so far from the right time from now on."""
        new = self.offset.with_suffix(".new")
        new.write_text(f"{offset_s:+d}\n")
        new.replace(self.offset)

    def why_not(self) -> str:
        """Say why processes do not go by this clock, if so."""
        if not self.environment:
            return "libfaketime is not installed"
        self.jump(DAY_S)
        environment = {**os.environ, **self.environment}
        done = subprocess.run(["date", "+%s"], env=environment, capture_output=True)
        self.jump(0)
        moved = abs(int(done.stdout) - time.time() - DAY_S) < 60
        return "" if moved else "libfaketime moves no clock here"
