"""report: tables, figures and one self-contained HTML page of a run, or of a demo over several seeds.

    latent-thoughts report RUN

Reads RUN/results.json and what lies beside it; writes RUN/figures and RUN/report.html.
"""

from __future__ import annotations

from pathlib import Path

from latent_thoughts.stages.report.page import write_page
from latent_thoughts.stages.report.plots import write_figures
from latent_thoughts.stages.report.summary import load
from latent_thoughts.stages.report.table import show

__all__ = ["report"]


def report(folder: Path) -> None:
    """Raises UserError where `folder` holds no results.json."""
    results = load(folder)
    show(results)
    figures = write_figures(results, folder / "figures")
    write_page(results, folder, figures)
    print(f"{folder / 'report.html'}\n{folder / 'figures'}")
