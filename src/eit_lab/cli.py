"""The console script: ``eit-lab train model=eit_base`` is ``python -m eit_lab.train model=eit_base``.

It exists for tab completion too, which shells give to scripts and not to ``python -m``:
``eval "$(eit-lab -sc install=bash)"`` (or zsh, fish), then ``eit-lab train model=<TAB>``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "train": "train one run, or with -m every point of a sweep",
    "sweep": "run a declared ablation; status and cancel of any sweep",
    "search": "search hyper-parameters, each trial an ordinary run",
    "evaluate": "test a run again, or on any folder of images",
    "analyze": "look inside networks: frequencies, heads, similarity, filters; figures and a page of images",
    "predict": "the five likeliest classes of an image",
    "export": "torch.export, ONNX or safetensors, checked",
    "shards": "pack a data set into shards, check them, look at them",
    "report": "tables, figures and statistics from records: HTML, Markdown, LaTeX, CSV",
    "dashboard": "a W&B dashboard as code, or a local web view of runs",
    "bench": "time the data loading, the sweep engine and the analysis on this machine; model what many GPUs would do",
    "selftest": "prove that a killed run comes back as the run that was never killed",
}

_PACKAGES = ("sweep", "search", "report", "dashboard")


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to a command; exit status 2 for one that does not exist."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["-sc"] or args[:1] == ["--shell-completion"]:
        return _complete(args)
    if not args or args[0] in ("-h", "--help"):
        print("eit-lab COMMAND ...\n")
        print("\n".join(f"  {name:<11}{text}" for name, text in COMMANDS.items()))
        print("\n  eit-lab COMMAND --help          each is also python -m eit_lab.COMMAND")
        print('  eval "$(eit-lab -sc install=bash)"   tab completion')
        return 0
    if args[0] == "--version":
        from eit_lab.version import __version__

        print(f"eit_lab {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from eit_lab.loading import nearest

        print(
            f"eit-lab: the command must be one of {', '.join(COMMANDS)}, got {args[0]!r}{nearest(args[0], list(COMMANDS))}",
            file=sys.stderr,
        )
        return 2
    name = f"{args[0]}.__main__" if args[0] in _PACKAGES else args[0]
    status: int = import_module(f"eit_lab.{name}").main(args[1:])
    return status


def _complete(args: list[str]) -> int:
    """Hydra's shell completion, behind a subcommand: the word after ``eit-lab`` is ours, the rest is Hydra's."""
    from eit_lab.compose import hand_over_to_hydra

    words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) == 2:
        print(" ".join(name for name in COMMANDS if name.startswith(words[1])))
        return 0
    if len(words) > 2:
        if words[1] != "train":
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])
    return hand_over_to_hydra(args)


if __name__ == "__main__":
    sys.exit(main())
