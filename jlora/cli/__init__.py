"""The command line: parse, call, print. One file per command; `main.main` is the entry point."""

__all__: list[str] = []
