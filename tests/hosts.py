"""Several hosts on one machine, for tests: Linux namespaces joined by nothing but a network.

Each host has its own processes, host name, addresses, loopback, /tmp and /dev/shm. They hang on a
switch that leads nowhere else. When the test's process ends, however that happens, all of it goes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Process 1 of a host: it reaps, and with it, or with its standard input, the host ends.
_INIT = "import signal, sys; signal.signal(17, signal.SIG_IGN); print(); sys.stdin.read()"
# /tmp is emptied, and what must be seen of the old one is put back to where it was.
_MOUNTS = """
mount --make-rprivate /
mount -t tmpfs none /mnt
chmod 1777 /mnt
{visible}
mount --rbind /mnt /tmp
umount -l /mnt
mount -t tmpfs none /dev/shm
printf '127.0.0.1 localhost\\n127.0.1.1 {name}\\n' > /tmp/.hosts
mount --bind /tmp/.hosts /etc/hosts
hostname {name}
ip link set lo up
"""
_VISIBLE = """
mkdir -p /mnt/{path}
mount --bind /tmp/{path} /mnt/{path}
mount -o remount,bind,{mode} /mnt/{path}
"""


def missing() -> str | None:
    """Why no hosts can be made here; None if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts are Linux namespaces, which only root makes"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"hosts need the command {tool} (iproute2, util-linux)"
    try:
        with make_hosts(1):
            return None
    except OSError as error:
        return f"namespaces are not allowed here: {error}"


class Host:
    """One host.

    Attributes:
        name: its host name, which the others cannot resolve; address: what they reach it by.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._init = subprocess.Popen(
            ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc",
             sys.executable, "-S", "-c", _INIT],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._init.stdout is not None and self._init.stderr is not None
        if not self._init.stdout.readline():  # it has started, or could not
            raise OSError(self._init.stderr.read().strip())
        (self.pid,) = _children(self._init.pid)

    def argv(self, *command: object) -> list[str]:
        """What runs a command on this host."""
        return ["nsenter", "--target", str(self.pid), "--net", "--uts", "--ipc", "--mount",
                "--pid", f"--wd={ROOT}", "--", *map(str, command)]  # fmt: skip

    def start(
        self, *command: object, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command; what it says goes into `log`."""
        with log.open("w") as output:
            return subprocess.Popen(
                self.argv(*command), stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                text=True, env={**self._environment(), **(environment or {})},
            )  # fmt: skip

    def run(
        self, *command: object, environment: Mapping[str, str] | None = None, timeout: float = 300
    ) -> str:
        """Run a command to its end, which must be good, and return what it wrote."""
        done = subprocess.run(
            self.argv(*command), capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL, env={**self._environment(), **(environment or {})},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def path(self, inside: str | Path) -> Path:
        """Where this process finds a path of the host; while the host lives."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def pids(self, *words: str) -> list[int]:
        """The host's processes with all of these words on their command lines."""
        found = []
        if not Path(f"/proc/{self.pid}/ns/pid").is_symlink():
            return found
        ours = os.readlink(f"/proc/{self.pid}/ns/pid")
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and os.readlink(folder / "ns/pid") == ours:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if all(word in line for word in words):
                        found.append(int(folder.name))
        return found

    def kill(self) -> None:
        """SIGKILL to all of its processes at once; the kernel still closes their connections."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._init.wait()

    def unplug(self) -> None:
        """Cut its cable: nothing is closed, packets just do not arrive any more."""
        subprocess.run(
            ["nsenter", "--target", str(self.pid), "--net", "ip", "link", "set", "eth0", "down"],
            check=True,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "HOME": "/tmp", "OMP_NUM_THREADS": "1"}


@contextmanager
def make_hosts(count: int, *visible: Path, shared: Sequence[Path] = ()) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, ...

    Args:
        visible: folders under /tmp that all may read; shared: that all may write, a common disk.

    Raises:
        OSError: they could not be made.
    """
    with ExitStack() as stack:
        switch = Host("switch", "")
        stack.callback(switch.kill)
        _enter(switch, "ip link add switch type bridge; ip link set switch up")
        hosts = []
        for number in range(1, count + 1):
            host = Host(f"host{number}", f"10.77.0.{number}")
            stack.callback(host.kill)
            hosts.append(host)
            mounts = {path.resolve(): "ro" for path in (ROOT, Path(sys.prefix), *visible)}
            mounts |= {path.resolve(): "rw" for path in shared}
            lines = [
                _VISIBLE.format(path=path.relative_to("/tmp"), mode=mode)
                for path, mode in mounts.items() if path.is_relative_to("/tmp")
            ]  # fmt: skip
            _enter(host, _MOUNTS.format(name=host.name, visible="".join(lines)))
            _enter(
                switch,
                f"ip link add port{number} type veth peer name eth0 netns /proc/{os.getpid()}/fd/"
                f"{stack.enter_context(open(f'/proc/{host.pid}/ns/net')).fileno()}\n"
                f"ip link set port{number} master switch up",
                mounts=False,
            )
            _enter(host, f"ip address add {host.address}/24 dev eth0; ip link set eth0 up")
        yield hosts


def _enter(host: Host, script: str, mounts: bool = True) -> None:
    parts = ["--net", "--uts", "--mount", "--pid"] if mounts else ["--net"]
    done = subprocess.run(
        ["nsenter", "--target", str(host.pid), *parts, "--", "sh", "-ec", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise OSError(f"{host.name}: {done.stderr.strip()}")


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
