"""The tests under every Python that is supported and here: `nox` (what is missing is skipped)."""

import nox

nox.options.error_on_missing_interpreters = False
TORCH = "torch==2.13.0"  # a CPU build is enough


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    session.install(TORCH)
    session.install("-e", ".[dev]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python=["3.11", "3.12", "3.13"])
def wheel(session: nox.Session) -> None:
    """The wheel alone, without the extras: it imports, and every command says what it is for."""
    session.install(TORCH)
    session.install(".")
    session.chdir(session.create_tmp())
    session.run("latent-thoughts", "--help")
    session.run("python", "-c", "from latent_thoughts import *; load_recipe(recipe_path('castle.yaml'))")
