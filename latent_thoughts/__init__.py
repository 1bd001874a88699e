"""Train language models on the thoughts behind the text (BoLT, arXiv 2503.18866)."""

__version__ = "0.1.0"
