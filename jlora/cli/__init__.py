"""The command line: parse, call, print. One file a command; `main.main` is the entry point."""

__all__: list[str] = []
