"""report: tables, figures and one self-contained HTML page of a run, or of a demo over several seeds.

    latent-thoughts report RUN

Reads RUN/results.json, verdict.json and what lies beside them; writes RUN/figures and RUN/report.html.
"""

from __future__ import annotations

from pathlib import Path

from latent_thoughts.stages.report.pack import TEXTS
from latent_thoughts.stages.report.page import write_page
from latent_thoughts.stages.report.plots import write_figures
from latent_thoughts.stages.report.summary import load
from latent_thoughts.stages.report.table import show

__all__ = ["report"]


def report(folder: Path, texts: int = TEXTS) -> None:
    """With the draws of at most `texts` chunks to read. Raises UserError where `folder` holds no results.json."""
    results = load(folder)
    show(results)
    figures = write_figures(results, folder / "figures")
    write_page(results, folder, figures, texts)
    print(f"{folder / 'report.html'}\n{folder / 'figures'}")
