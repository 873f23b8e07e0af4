"""What Slurm says of jobs: the queue through squeue, which needs no accounting, and sacct for what it has forgotten. No torch.

squeue remembers a job that has ended for ``MinJobAge`` (300 s unless the cluster says otherwise), and tells its exit status.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
ENDED = (
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "PREEMPTED", "DEADLINE", "REVOKED",
)  # fmt: skip
"""States from which a job comes back only when somebody requeues it."""
NEVER = re.compile(
    r"held|Held|Invalid|NotAllowed|BadConstraints|NeverSatisfied|PartitionTimeLimit|PartitionNodeLimit|Down$"
)
"""Reasons for which a job waits until a person does something."""
_FIELDS = {"JobArrayID": 40, "State": 20, "exit_code": 14, "Reason": 60, "RestartCnt": 8, "StartTime": 24, "NodeList": 120, "Comment": 40}  # fmt: skip
_TIME = "%Y-%m-%dT%H:%M:%S"
_ANSWER_S = 120.0  # a controller with much to do lets its clients wait for 100 s before it gives up


@dataclass(frozen=True)
class Seen:
    """One job, or one task of an array, as Slurm has it."""

    id: str
    """``17``, or ``17_3`` in an array."""
    state: str
    exit_code: str
    reason: str
    restarts: int
    """Times it was requeued."""
    started: float | None
    """When its present part began, in seconds since 1970."""
    nodes: str
    comment: str

    @property
    def status(self) -> int | None:
        """How the batch script ended, as of a shell, where srun's 137 for a killed task is -9; None: it has no status."""
        code, _, killed_by = self.exit_code.partition(":")  # newer versions; older ones write what wait() returned
        if not code.isdigit():
            return None
        raw = (int(code) << 8 | int(killed_by)) if killed_by.isdigit() else int(code)
        status = os.waitstatus_to_exitcode(raw)
        return 128 - status if 128 < status < 128 + 65 and status != 130 else status  # 130 is our own word for Ctrl-C


def slurm_environment() -> dict[str, str]:
    """Environment in which Slurm's commands answer as we read them, whatever filters and formats the user has set."""
    ours = ("SQUEUE_", "SACCT_", "SCONTROL_")
    return {k: v for k, v in os.environ.items() if not k.startswith(ours)} | {"SLURM_TIME_FORMAT": "standard"}


def ask(*args: str, within_s: float = _ANSWER_S) -> tuple[str | None, str]:
    """(output, "") of one of Slurm's commands, or (None, why) where it failed."""
    try:
        done = subprocess.run(
            args, env=slurm_environment(), capture_output=True, text=True, timeout=within_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"{args[0]} did not answer within {within_s:.0f} s"
    except OSError as error:
        return None, f"{args[0]}: {error.strerror}"
    return (done.stdout, "") if done.returncode == 0 else (None, _reason(done.stderr) or f"{args[0]} failed")


def _reason(text: str) -> str:
    """The last line of what a command said, without its name."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: )?", "", lines[-1]) if lines else ""


def squeue_command(*which: str) -> tuple[str, ...]:
    """squeue, one line for each task of an array, those that have ended included."""
    fields = ",".join(f"{name}:{width}|" for name, width in _FIELDS.items())
    return ("squeue", "--noheader", "--array", "--states=all", *which, f"--Format={fields}")


def read_queue(text: str) -> dict[str, Seen]:
    """What squeue_command printed, by job."""
    found = {}
    for line in text.splitlines():
        values = [value.strip() for value in line.split("|", len(_FIELDS) - 1)]
        if len(values) == len(_FIELDS):
            id_, state, code, reason, restarts, started, nodes, comment = values
            count = int(restarts) if restarts.isdigit() else 0
            found[id_] = Seen(id_, state, code, reason, count, _seconds(started), nodes, comment.rstrip("|").strip())
    return found


def _seconds(text: str) -> float | None:
    with suppress(ValueError):
        return time.mktime(time.strptime(text, _TIME))
    return None


class Question:
    """squeue, asked without waiting for it: a loop comes back for the answer."""

    def __init__(self, command: Sequence[str]) -> None:
        # Not pipes, which would be full at some thousand jobs. drop() closes them.
        self._out: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._err: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._asked_at = time.monotonic()
        self._process = subprocess.Popen(
            command, env=slurm_environment(), stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err,
            start_new_session=True,  # Ctrl-C is for the launcher
        )  # fmt: skip

    def answer(self) -> tuple[dict[str, Seen] | None, str] | None:
        """None while there is none; then (the queue, ""), or (None, why) where it failed."""
        status = self._process.poll()
        late = time.monotonic() - self._asked_at > _ANSWER_S
        if status is None and not late:
            return None
        said, wrong = self._read(self._out), self._read(self._err)
        self.drop()
        if status == 0:
            return read_queue(said), ""
        return None, (f"squeue did not answer within {_ANSWER_S:.0f} s" if late else _reason(wrong) or "squeue failed")

    def _read(self, handle: IO[str]) -> str:
        handle.seek(0)
        return handle.read()

    def drop(self) -> None:
        """Want no answer any more."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._out.close()
        self._err.close()


def ask_accounting(ids: Iterable[str]) -> dict[str, Seen]:
    """What sacct knows of jobs that have left the queue; nothing where the cluster keeps no accounts."""
    wanted = sorted(set(ids))
    fields = "JobID,State,ExitCode,Start,NodeList,Restarts"
    text, _ = ask("sacct", "-n", "-P", "-X", f"--jobs={','.join(wanted)}", f"--format={fields}", within_s=20.0)
    if text is None:  # versions before 23.11 have no Restarts
        fields = fields.removesuffix(",Restarts")
        text, _ = ask("sacct", "-n", "-P", "-X", f"--jobs={','.join(wanted)}", f"--format={fields}", within_s=20.0)
    found = {}
    for line in (text or "").splitlines():
        id_, state, code, started, nodes, *more = (*line.split("|"), *[""] * 5)[:6]
        if id_ in wanted and state:
            count = int(more[0]) if more and more[0].isdigit() else 0
            found[id_] = Seen(id_, state.split()[0], code, "", count, _seconds(started), nodes, "")  # CANCELLED by 1000
    return found
