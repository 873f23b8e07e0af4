"""What every command shares: one line on stderr for a mistake, and the exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130
EXIT_PREEMPTED = os.EX_TEMPFAIL
"""75, "temporary failure, try again": a run that was asked to stop, saved its state, and can go on."""


class RunError(RuntimeError):
    """What stops a run that was rightly asked for: a full disk, lost data, a loss that is not finite. One line."""


class StoppedError(Exception):
    """Training stopped as a signal asked, its state saved."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by signal {signum} after step {step}, state saved")
        self.signum, self.step = signum, step


def run(body: Callable[[list[str]], int], argv: Sequence[str] | None, *, help_text: str | None = None) -> int:
    """Run a command's body on its arguments; what the user got wrong becomes one line and exit status 2.

    A command with ``help_text`` prints it where it was asked to, or was told nothing.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if help_text is not None and (not arguments or "--help" in arguments or "-h" in arguments):
        try:
            print(help_text, flush=True)
        except BrokenPipeError:
            _reader_has_gone()
        return 0
    from eit_lab.config import ConfigError

    try:
        return body(arguments)
    except ConfigError as error:
        print(f"eit_lab: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except RunError as error:
        print(f"eit_lab: {error}", file=sys.stderr)
        return EXIT_FAILED
    except StoppedError as error:
        print(f"eit_lab: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED if error.signum == signal.SIGINT else EXIT_PREEMPTED
    except KeyboardInterrupt:
        print("eit_lab: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _reader_has_gone()
        return 0


def _reader_has_gone() -> None:
    """As with ``| head``: what is still to be written goes nowhere, without an error when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
