"""watch: a live view of a run, from its files alone.

    latent-thoughts watch RUN

It takes no lock and writes nothing, so it may look at a run that works, that is finished, idle or dead. What is
half written is left out until the next look.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from latent_thoughts.terminal import output
from latent_thoughts.types import UserError
from latent_thoughts.watch.reading import State, alive, find, read
from latent_thoughts.watch.showing import show

__all__ = ["watch"]


def watch(folder: Path, every: float = 1.0, once: bool = False, console: Console | None = None) -> None:
    """Shows the runs below `folder` until none of them works any more; once, where there is no terminal.

    Raises UserError where there is no run.
    """
    console = output() if console is None else console
    states = look(folder)
    if once or not console.is_terminal or over(folder, states):
        console.print(show(folder, states, time.time(), console.width))
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            live.update(show(folder, states, time.time(), console.width), refresh=True)
            if over(folder, states):
                return
            time.sleep(every)
            states = look(folder)


def over(folder: Path, states: list[State]) -> bool:
    """Whether nothing works: no run, and not what starts them one after the other either. (An experiment has results of
    its own before its cells run.)"""
    starts = [state.folder for state in states] != [folder] and alive(folder)
    return not starts and not any(state.working for state in states)


def look(folder: Path) -> list[State]:
    states = [read(run) for run in find(folder)]
    if not states:
        raise UserError(f"{folder} holds no run: name the folder that was given to --out")
    return states
