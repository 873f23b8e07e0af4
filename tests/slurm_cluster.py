"""A real Slurm on this machine, for as long as a test needs it: a controller and two nodes, all at the machine's own address.

Needs Debian's or Ubuntu's packages ``slurm-wlm`` and ``munge``, and root, but no systemd, no cgroups and no accounting.
Everything it writes lies in one folder, every port is one that was free, its credentials come from a munged of its own, and
it ends the processes that it started, by their number: two test runs at once do not meet.

``python tests/slurm_cluster.py FOLDER`` holds one until Ctrl-C, to try things by hand.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_START_S = 30.0
_STOP_S = 10.0
# Slurm's own minutes are long for a test: what waits between two of its steps is set as short as it goes.
_CONFIG = """\
ClusterName=eitlab
SlurmctldHost={host}({address})
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is requeued waits until its credentials have expired: 120 s unless told.
AuthInfo=socket={root}/munge/socket,cred_expire=5
# Listen where this machine's name leads, and nowhere else.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdSpoolDir={root}/spool/%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
# Other jobs, and ports that Lightning derives from them, than a cluster beside this one.
FirstJobId={first_job}
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MinJobAge=300
KillWait=5
InactiveLimit=0
SlurmctldTimeout=60
SlurmdTimeout=60
GresTypes={gres_type}
# The nodes below may have more cores than this machine.
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr={address} Port={ports[1]} {node}
NodeName=n2 NodeHostname={host} NodeAddr={address} Port={ports[2]} {node}
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=1:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=n[1-2] MaxTime=1:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""
_NODE = "CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=8000 State=UNKNOWN"


def why_not() -> str | None:
    """Why there can be no Slurm here, in one line; None where there can."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]:
        return f"no Slurm on this machine (apt-get install slurm-wlm munge): {', '.join(missing)} not found"
    if os.geteuid() != 0:
        return "starting Slurm's daemons needs root"
    return None if _address() else f"the name of this machine, {socket.gethostname()}, leads to no address"


def _address() -> str:
    """Where Slurm listens: the address of this machine's name, a loopback's as a rule; "" where it has none."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


class SlurmCluster:
    """Starts on entering, ends on leaving. ``environment`` is what Slurm's commands need to find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf"), "PATH": _path()}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._controller: subprocess.Popen[bytes] | None = None
        self.has_gpus = False

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, *args: str, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(
            args, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert not check or done.returncode == 0, f"{' '.join(args)}: {done.stderr}"
        return done.stdout

    def _start(self) -> None:
        for name in ("state", "spool", "log", "run", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        (self.root / "munge").chmod(0o755)
        gpus = self._make_pretended_gpus()
        self.has_gpus = bool(gpus)
        text = _CONFIG.format(
            root=self.root,
            host=socket.gethostname().partition(".")[0],
            address=_address(),
            ports=_free_ports(3),
            first_job=random.SystemRandom().randrange(1, 10**6),
            gres_type="gpu" if gpus else "",
            node=f"{_NODE} Gres=gpu:2" if gpus else _NODE,
        )
        (self.root / "slurm.conf").write_text(text)
        (self.root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={gpus}\n" if gpus else "")
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        munge = [f"--{name}={self.root / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *munge)
        self._wait("munged", lambda: (self.root / "munge" / "socket").exists())
        self.start_controller()
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
        self._wait("the nodes", lambda: set(self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()) == {"idle"})

    def start_controller(self) -> None:
        """Start slurmctld; it goes on with the jobs that it had."""
        self._controller = self._daemon("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs go on, and no command is answered."""
        assert self._controller is not None
        self._daemons.remove(self._controller)
        _end(self._controller)

    def _make_pretended_gpus(self) -> str:
        """Two character devices that Slurm counts as GPUs; "" where none can be made."""
        paths = [self.root / f"gpu{number}" for number in (0, 1)]
        try:
            for number, path in enumerate(paths):
                os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(240, number))
        except OSError:
            return ""
        return f"{self.root}/gpu[0-1]"

    def _daemon(self, name: str, *args: str) -> subprocess.Popen[bytes]:
        program = shutil.which(name, path=_path())
        assert program is not None
        with (self.root / "log" / f"{name}.{len(self._daemons)}.out").open("ab") as out:
            daemon = subprocess.Popen(
                [program, *args],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._daemons.append(daemon)
        return daemon

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        until = time.monotonic() + _START_S
        while not ready():
            ended = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > until:
                raise RuntimeError(f"{what} did not come up; ended: {ended}; {self._last_words()}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        logs = sorted((self.root / "log").iterdir())
        return " | ".join(f"{log.name}: {log.read_text(errors='replace')[-500:]}" for log in logs)

    def _stop(self) -> None:
        if self._controller is not None and self._controller.poll() is None:
            self.run("scancel", "--user=root", check=False)
            until = time.monotonic() + _STOP_S
            while self.run("squeue", "-h", check=False).strip() and time.monotonic() < until:
                time.sleep(0.2)
        for daemon in reversed(self._daemons):
            _end(daemon)
        self._daemons.clear()


def _end(daemon: subprocess.Popen[bytes]) -> None:
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind((_address(), 0))
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def main() -> int:
    if (reason := why_not()) is not None or len(sys.argv) != 2:
        print(reason or "usage: python tests/slurm_cluster.py FOLDER", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with SlurmCluster(Path(sys.argv[1]).absolute()) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
