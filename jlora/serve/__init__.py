"""A batch that requests join and leave while it runs: continuous batching over one base and many adapters."""

from jlora.serve.engine import Engine, Limits
from jlora.serve.request import Busy, Piece, Request, Sampling, Stopping, Token, Usage

__all__ = ["Busy", "Engine", "Limits", "Piece", "Request", "Sampling", "Stopping", "Token", "Usage"]
