"""What every command shares: one line on stderr for a mistake, and the exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def run(body: Callable[[list[str]], int], argv: Sequence[str] | None) -> int:
    """Run a command's body on its arguments; what the user got wrong becomes one line and exit status 2."""
    from eit_lab.config import ConfigError

    try:
        return body(list(sys.argv[1:] if argv is None else argv))
    except ConfigError as error:
        print(f"eit_lab: {error}", file=sys.stderr)
        return EXIT_WRONG_INPUT
    except KeyboardInterrupt:
        print("eit_lab: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
