"""Jobs of a Ray cluster, or of a private one on this machine for as long as the sweep: Ray decides where and when.

Each job is a Ray actor that does one thing: it runs the frozen config in a process of its own, as the other engines do, and hands
signals on to it. So nothing of Ray, of an earlier job or of the launcher is in the process that trains. Jobs end with their
launcher: the actor ends with it, and the job's process with the actor.

A private cluster listens on the loopback only, asks for a password of its own, has no dashboard and reports nothing to anybody.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eit_lab.config import Config, ConfigError
from eit_lab.launchers import RayLauncher
from eit_lab.processes import LAUNCH_VARIABLES, PARENT, count_cores, count_ranks, visible_gpus
from eit_lab.sweep.engine import Ended, Job

_ROOM_S = 5.0  # between two looks at how large the cluster is
_STOP_S = 3.0
_CONNECT_S = 10.0
_SOCKET_PATH = 40  # longest folder whose sockets still have names that the kernel takes, in bytes


class JobProcess:
    """In a Ray actor: the process of one job."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def run(self, *, module: str, frozen: str, log: str, folder: str, threads: int) -> int:
        """Run the job to its end, in the launcher's working folder; its exit status, negative for a signal."""
        import ray

        kept = {k: v for k, v in os.environ.items() if k not in LAUNCH_VARIABLES and not k.startswith("RAY_")}
        kept.pop("PYTHONBREAKPOINT", None)  # Ray's debugger
        gpus = ",".join(map(str, ray.get_gpu_ids()))
        own = {PARENT: str(os.getpid()), "CUDA_VISIBLE_DEVICES": gpus, "OMP_NUM_THREADS": str(threads)}
        with Path(log).open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--frozen", frozen],
                cwd=folder,
                env={**kept, **own},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for signum in self._early:
            self._process.send_signal(signum)
        return self._process.wait()

    def send(self, signum: int) -> None:
        """Hand a signal on; one that comes before there is a process waits for it."""
        if self._process is None:
            self._early.append(signum)
        elif self._process.poll() is None:
            self._process.send_signal(signum)

    def ready(self) -> bool:
        """True, once this actor has its place."""
        return True


class RayEngine:
    """Hands jobs to Ray, as many at a time as the cluster has room for."""

    survives = False

    def __init__(self, launcher: RayLauncher, *, module: str = "eit_lab.train") -> None:
        if importlib.util.find_spec("ray") is None:
            raise ConfigError("hydra/launcher=ray needs Ray, which is not installed; pip install 'eit_lab[ray]'")
        self._launcher, self._module = launcher, module
        self._scratch: Path | None = None
        if launcher.address is None:
            _check_room(launcher)
        else:
            _check_address(launcher.address)
        self._ray = self._connect()
        self._runner = self._ray.remote(JobProcess)
        self._jobs: dict[Job, tuple[Any, Any, Any]] = {}
        """Of each job its actor, its coming status, and its coming word that it has a place."""
        self._begun: set[Job] = set()
        self._stopped: dict[Job, int] = {}
        self._slots, self._counted_at = 0, 0.0

    def _connect(self) -> Any:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        address = self._launcher.address
        private: dict[str, Any] = {}
        if address is None:
            # Read when Ray is imported. Without clusters over several machines Ray has no need to listen on any but the loopback.
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray writes one to the user's home
            os.environ.pop("RAY_ADDRESS", None)
            self._scratch = Path(tempfile.mkdtemp(prefix="eit-ray-"))
            if len(os.fsencode(self._scratch)) > _SOCKET_PATH:
                self._scratch.rmdir()
                self._scratch = Path(tempfile.mkdtemp(prefix="eit-ray-", dir="/tmp"))
            private = {
                "num_cpus": count_cores(),
                "num_gpus": len(visible_gpus()),
                "include_dashboard": False,
                "object_store_memory": 80 * 2**20,  # nothing goes through it but exit statuses
                "_temp_dir": str(self._scratch),
            }
        import ray

        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="eit_lab", **private)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"hydra.launcher.address: no Ray cluster at {address or 'this machine'}: {reason}"
            ) from None
        return ray

    def threads(self, config: Config) -> int | None:
        """Of each process of a job: its share of the job's cores."""
        number = config.trainer.devices not in ("auto", "-1", -1)
        ranks = count_ranks(config) if number else max(1, self._launcher.gpus_per_job)
        return int(os.environ.get("OMP_NUM_THREADS", 0)) or max(1, self._launcher.cpus_per_job // ranks)

    def capacity(self) -> int:
        """Jobs that the cluster has room for beside those it has; at least one may wait, for clusters that grow."""
        if not self._counted_at or time.monotonic() - self._counted_at > _ROOM_S:
            self._counted_at = time.monotonic()
            there = self._ray.cluster_resources()
            by_cpu = int(there.get("CPU", 0)) // self._launcher.cpus_per_job
            gpus = self._launcher.gpus_per_job
            self._slots = min(by_cpu, int(there.get("GPU", 0)) // gpus) if gpus else by_cpu
        return max(1, self._slots) - len(self._jobs)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Hand jobs to Ray; they begin when it has a place for them."""
        handles = []
        for job in jobs:
            _check_gpus(job.config, self._launcher)
            actor = self._runner.options(
                num_cpus=self._launcher.cpus_per_job,
                num_gpus=self._launcher.gpus_per_job,
                max_restarts=0,  # whether it is tried again is the sweep's to decide
                max_concurrency=4,  # run() takes as long as the job; signals come beside it
            ).remote()
            ready = actor.ready.remote()
            status = actor.run.remote(
                module=self._module,
                frozen=str(job.frozen.absolute()),
                log=str(job.log.absolute()),
                folder=str(Path.cwd()),
                threads=self.threads(job.config),
            )
            self._jobs[job] = (actor, status, ready)
            handles.append(f"ray:{actor._actor_id.hex()}")
        return handles

    def adopt(self, job: Job, handle: str) -> bool:
        """Never: these jobs end with their launcher."""
        return False

    def poll(self) -> list[tuple[Job, Ended]]:
        """The jobs that ended since the last call."""
        if not self._jobs:
            return []
        waiting = [ready for job, (_, _, ready) in self._jobs.items() if job not in self._begun]
        there = set(self._ready(waiting))
        self._begun.update(job for job, (_, _, ready) in self._jobs.items() if ready in there)
        done = set(self._ready([status for _, status, _ in self._jobs.values()]))
        ended = []
        for job, (actor, status, _) in list(self._jobs.items()):
            if status in done:
                ended.append((job, self._how(job, status)))
                self._ray.kill(actor)
                del self._jobs[job]
                self._begun.discard(job)
                self._stopped.pop(job, None)
        return ended

    def _ready(self, refs: list[Any]) -> list[Any]:
        if not refs:
            return []
        ready: list[Any] = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return ready

    def _how(self, job: Job, status: Any) -> Ended:
        try:
            code: int = self._ray.get(status)
        except self._ray.exceptions.RayTaskError as error:  # ours: the folder or the log cannot be opened there
            return Ended(None, f"its process could not be started: {str(error).strip().splitlines()[-1]}")
        except self._ray.exceptions.RayError as error:
            if job in self._stopped:
                return Ended(-self._stopped[job], "")
            return Ended(None, f"Ray lost its process: {str(error).strip().splitlines()[0]}")
        return Ended(code, f"killed by {signal.Signals(-code).name}" if code < 0 else "")

    def wait(self, seconds: float) -> None:
        """Until a job has ended, or so many seconds."""
        refs = [status for _, status, _ in self._jobs.values()]
        if refs:
            self._ray.wait(refs, num_returns=1, timeout=seconds)
        else:
            time.sleep(seconds)

    def is_running(self, job: Job) -> bool:
        """Whether Ray has given it a place."""
        return job in self._begun

    def stop(self, job: Job, signum: int) -> None:
        """Hand a signal on; a job that waits for a place is given up."""
        if job not in self._jobs:
            return
        actor, _, _ = self._jobs[job]
        if job in self._begun:
            actor.send.remote(signum)
        else:
            self._stopped[job] = signum
            self._ray.kill(actor)

    def close(self) -> None:
        """Kill what still runs, and end the private cluster."""
        sent = [actor.send.remote(signal.SIGKILL) for job, (actor, _, _) in self._jobs.items() if job in self._begun]
        if sent:
            self._ray.wait(sent, num_returns=len(sent), timeout=_STOP_S)
        for actor, _, _ in self._jobs.values():
            self._ray.kill(actor)
        self._jobs.clear()
        self._ray.shutdown()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _check_room(launcher: RayLauncher) -> None:
    """Raises ConfigError where this machine is too small for one job."""
    here: Mapping[str, tuple[int, int]] = {
        "cpus_per_job": (launcher.cpus_per_job, count_cores()),
        "gpus_per_job": (launcher.gpus_per_job, len(visible_gpus())),
    }
    for key, (wanted, there) in here.items():
        if wanted > there:
            raise ConfigError(
                f"hydra.launcher.{key} must be at most {there} on this machine, got {wanted}; nearest: {there}"
            )


def _check_address(address: str) -> None:
    """Raises ConfigError where nobody listens: Ray itself would try for many minutes."""
    if address == "auto":  # Ray looks for one that was started on this machine
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ConfigError(f"hydra.launcher.address must be auto, HOST:PORT or null, got {address!r}; nearest: auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"hydra.launcher.address: nobody answers at {address}: {error}") from None


def _check_gpus(config: Config, launcher: RayLauncher) -> None:
    trainer = config.trainer
    needed = (
        count_ranks(config) if trainer.accelerator in ("gpu", "cuda") and trainer.devices not in ("auto", -1) else 0
    )
    if needed > launcher.gpus_per_job:
        raise ConfigError(
            f"hydra.launcher.gpus_per_job must be {needed}, as trainer.devices has it, got {launcher.gpus_per_job}; "
            f"nearest: {needed}"
        )
