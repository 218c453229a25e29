"""Network namespaces that stand in for the hosts of a cluster: each with an address, a name and processes of its own.

A switch joins them, so that a host can be lost without a word: its port goes down first, then all its processes are
killed at once, and nobody hears of it. The file system is shared, as on a cluster. A namespace lives as long as the
process that holds it, and that one as long as its input is open: none is left when a test ends, however it ends.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PREFIX = "10.77.0."
_TOOLS = ("ip", "unshare", "nsenter", "mount")


@dataclass
class _Namespace:
    """A process that holds namespaces open, and the number of the one to enter them by."""

    holder: subprocess.Popen[bytes]
    pid: int

    def words(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--pid", "--mount", "--", *command]

    def call(self, *command: str) -> None:
        _call(self.words(*command))

    def ip(self, *arguments: str) -> None:
        """Run `ip` on this network alone, so that processes bear the numbers that the test knows them by."""
        _call(["nsenter", f"--target={self.pid}", "--net", "ip", *arguments])

    def close(self) -> None:
        """Kill its first process, and so, at once, every other in it."""
        if self.holder.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.holder.communicate(timeout=20)


def _call(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def _namespace() -> _Namespace:
    flags = ["--net", "--uts", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    holder = subprocess.Popen(["unshare", *flags, "cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    deadline = time.monotonic() + 10
    while holder.poll() is None and time.monotonic() < deadline:
        inside = children.read_text().split()
        # Before it has become `cat`, it is still mounting its own /proc.
        if inside and Path(f"/proc/{inside[0]}/comm").read_text().strip() == "cat":
            return _Namespace(holder, int(inside[0]))
        time.sleep(0.01)
    holder.kill()
    _, said = holder.communicate()
    raise OSError(f"unshare {' '.join(flags)}: {said.decode().strip() or 'nothing in ten seconds'}")


@dataclass
class Host:
    """One host, running or lost."""

    name: str
    address: str
    port: str
    network: "Network"
    inside: _Namespace

    def __post_init__(self) -> None:
        self._space = Path(f"/proc/{self.inside.pid}/ns/pid").readlink()
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, words: list[str], cwd: Path, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command here; what it prints is added to `log`. It ends with the host, if not before."""
        words = self.inside.words("env", f"--chdir={cwd}", *words)  # entering a mount namespace leaves the folder
        with log.open("ab") as out:
            started = subprocess.Popen(
                words, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )
        self._started.append(started)
        return started

    def processes(self, words: str = "") -> list[int]:
        """The numbers, as the test sees them, of processes here whose command line holds these words."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):  # ended, or not ours
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if line and words in line and (entry / "ns" / "pid").readlink() == self._space:
                    found.append(int(entry.name))
        return sorted(found)

    def lose(self) -> None:
        """Cut the line, then kill every process: no other host is told that a connection has ended."""
        self.network.switch.ip("link", "set", self.port, "down")
        self.close()

    def close(self) -> None:
        """End all that runs here, and the host."""
        self.inside.close()
        for process in self._started:
            process.wait(timeout=20)


@dataclass
class Network:
    """A switch, and the hosts that were joined to it."""

    folder: Path
    names: list[str]
    switch: _Namespace
    _joined: list[Host] = field(default_factory=list)

    def host(self, number: int) -> Host:
        """Bring up host `number`, from 0, for the first time or anew after it was lost: same name, same address."""
        inside = _namespace()
        port = f"port{len(self._joined)}"
        host = Host(self.names[number], f"{PREFIX}{number + 1}", port, self, inside)
        self._joined.append(host)
        known = self.folder / "hosts"  # in place of a cluster's name service
        lines = (f"{PREFIX}{n + 1} {name}\n" for n, name in enumerate(self.names))
        known.write_text("127.0.0.1 localhost\n" + "".join(lines))
        inside.call("mount", "--bind", str(known), "/etc/hosts")
        inside.call("hostname", host.name)
        inside.ip("link", "set", "lo", "up")
        # The same hardware address after a return, as a machine has it: the others go on sending to the one they know.
        card = ["name", "eth0", "address", f"02:00:00:00:00:{number + 1:02x}", "netns", str(inside.pid)]
        self.switch.ip("link", "add", port, "type", "veth", "peer", *card)
        self.switch.ip("link", "set", port, "master", "switch", "up")
        inside.ip("address", "add", f"{host.address}/24", "dev", "eth0")
        inside.ip("link", "set", "eth0", "up")
        return host

    def close(self) -> None:
        """End all that runs on the hosts, and the hosts."""
        for host in self._joined:
            host.close()
        self.switch.close()


def why_not() -> str | None:
    """What this machine lacks to have such hosts; None where it lacks nothing."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    try:
        inside = _namespace()
    except OSError as error:
        return f"no namespaces on this machine ({error})"
    inside.close()
    return None


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[Network]:
    """A switch for hosts of these names; at the end, nothing of it is left.

    Args:
        folder: For the file by which the hosts know each other.
        names: Of the hosts, by number.
    """
    switch = _namespace()
    net = Network(folder, list(names), switch)
    try:
        switch.ip("link", "add", "switch", "type", "bridge")
        switch.ip("link", "set", "switch", "up")
        yield net
    finally:
        net.close()
