"""A throw-away SLURM on this host: munged, slurmctld, and several slurmd, one for each simulated node.

What one host needs for that: the nodes' names resolve to loopback (a line in /etc/hosts, taken out again), each slurmd
has a UTS namespace of its own so that gethostname() is its node's, and the nodes claim CPUs and memory that they do not
have. Nothing else of the machine is changed, and only processes that were started here are ended.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol")
_HOSTS, _NO_DAEMONS = Path("/etc/hosts"), Path("/usr/sbin/policy-rc.d")

_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits; the default is two minutes
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
ReturnToService=1
KillWait=5
MinJobAge=3600
SlurmdTimeout=20
SlurmctldTimeout=20
MessageTimeout=20
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def install() -> None:
    """Installs SLURM from Debian where it is not there.

    Raises:
        RuntimeError: that is not possible, with the reason.
    """
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if all(map(shutil.which, TOOLS)):
        return
    if os.geteuid() != 0:
        raise RuntimeError(f"SLURM is not installed, and only root can: apt-get install {' '.join(PACKAGES)}")
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"SLURM is not installed, and this is no Debian: install {', '.join(PACKAGES)}")
    keep = _NO_DAEMONS.exists()
    if not keep:  # the packages must not start daemons of their own
        _NO_DAEMONS.write_text("#!/bin/sh\nexit 101\n")
        _NO_DAEMONS.chmod(0o755)
    try:
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]):
            quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            done = subprocess.run(command, env=quiet, capture_output=True, text=True, timeout=240)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    finally:
        if not keep:
            _NO_DAEMONS.unlink()


class Cluster:
    """The daemons, from `up` to `down`.

    Args:
        folder: for their files; short, since it holds a socket.
        nodes: how many, named n1, n2, …
        cpus: that each of them claims.
    """

    def __init__(self, folder: Path, nodes: int, cpus: int = 2) -> None:
        self.folder, self.cpus = folder, cpus
        self.nodes = [f"n{number}" for number in range(1, nodes + 1)]
        self.conf = folder / "slurm.conf"
        self._tag = f"# tests/slurm {folder}"

    @property
    def environment(self) -> dict[str, str]:
        """For commands that shall speak with this cluster: no trace of another job."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_"))}
        return {**kept, "SLURM_CONF": str(self.conf)}

    def up(self) -> None:
        """Starts all daemons; returns when every node is idle.

        Raises:
            RuntimeError: not root, no UTS namespaces, or a daemon that does not come up; with the logs' last lines.
        """
        if os.geteuid() != 0:
            raise RuntimeError("a SLURM of one's own needs root: slurmd, /etc/hosts")
        if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
            raise RuntimeError("no UTS namespaces here: run the container with CAP_SYS_ADMIN")
        for name in ("log", "run", "state", "munge"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        names = [socket.gethostname(), *self.nodes]
        _HOSTS.write_text(f"127.0.0.1 {' '.join(names)} {self._tag}\n" + _HOSTS.read_text())  # in place: it is a mount
        port = _free_ports(len(names))
        lines = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + number} CPUs={self.cpus} "
            "RealMemory=1000000 State=UNKNOWN"
            for number, node in enumerate(self.nodes, 1)
        ]
        self.conf.write_text(_CONF.format(host=names[0], port=port, folder=self.folder, nodes="\n".join(lines)))
        key, munge = self.folder / "munge" / "key", self.folder / "munge"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge.chmod(0o755)
        self._start(
            "munged",
            [
                "munged",
                f"--key-file={key}",
                f"--socket={munge}/socket",
                f"--pid-file={self.folder}/run/munged.pid",
                f"--log-file={self.folder}/log/munged.log",
                f"--seed-file={munge}/seed",
            ],
        )
        self._start("slurmctld", ["slurmctld", "-f", str(self.conf)])
        for node in self.nodes:
            self.start_node(node)
        self._wait(lambda: len(self.states()) == len(self.nodes) and set(self.states().values()) == {"idle"}, "nodes")

    def start_node(self, node: str) -> None:
        named = 'hostname "$1" && exec slurmd -N "$1" -f "$2"'
        self._start(f"slurmd.{node}", ["unshare", "--uts", "sh", "-c", named, "sh", node, str(self.conf)])

    def down(self) -> None:
        """Ends all jobs, then the daemons, and removes what was written outside of the folder."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            jobs = self.run("squeue", "--noheader", "--format=%A").split()
            if jobs:
                subprocess.run(["scancel", "--signal=KILL", *jobs], env=self.environment, timeout=20, check=False)
                subprocess.run(["scancel", *jobs], env=self.environment, timeout=20, check=False)
            end = time.monotonic() + 20
            while self.run("squeue", "--noheader", "--format=%A").split() and time.monotonic() < end:
                time.sleep(0.2)
        for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"):
            pid = self.pid(name)
            if pid is None:
                continue
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 15
            while self.pid(name) == pid and time.monotonic() < end:
                time.sleep(0.1)
            if self.pid(name) == pid:
                os.kill(pid, signal.SIGKILL)
        kept = [line for line in _HOSTS.read_text().splitlines(keepends=True) if self._tag not in line]
        _HOSTS.write_text("".join(kept))

    def pid(self, daemon: str) -> int | None:
        """Of a daemon of ours that runs; a pid file alone may be another process's by now."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / "run" / f"{daemon}.pid").read_text())
            if str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def run(self, *command: str) -> str:
        """What a command of SLURM's prints.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    def states(self) -> dict[str, str]:
        """node → idle, allocated, down …"""
        with contextlib.suppress(subprocess.SubprocessError):
            answer = self.run("sinfo", "--noheader", "--Node", "--format=%N %T")
            return {node: state.rstrip("*~#$@+-") for node, state in (line.split() for line in answer.splitlines())}
        return {}

    def job(self, number: str) -> dict[str, str]:
        """The controller's description of a job: JobState, Restarts, ExitCode, NodeList …"""
        pairs = (pair.partition("=") for pair in self.run("scontrol", "show", "job", "-o", number).split())
        return {name: value for name, _, value in reversed(list(pairs))}

    def _start(self, daemon: str, command: Sequence[str]) -> None:
        subprocess.run(command, env=self.environment, timeout=30, check=True, capture_output=True)
        self._wait(lambda: self.pid(daemon) is not None, daemon)

    def _wait(self, holds: Callable[[], bool], what: str, seconds: float = 40) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                logs = "".join(f"--- {p.name}\n{p.read_text()[-1500:]}\n" for p in (self.folder / "log").iterdir())
                raise RuntimeError(f"{what} did not come up in {seconds:g} s\n{logs}")
            time.sleep(0.1)


def _free_ports(count: int) -> int:
    """The first of so many ports in a row that are free."""
    for first in range(16800 + os.getpid() % 500 * 20, 32000, 20):
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
        finally:
            for one in sockets:
                one.close()
    raise RuntimeError("no free ports")
