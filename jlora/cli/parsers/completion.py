"""What `jlora completion` takes."""

import argparse

from jlora.cli.parsers.options import command

SHELLS = ("bash", "zsh", "fish")
EPILOG = """Commands, options, values, settings (--config.GROUP.KEY), recipes and files are completed. To keep it:

  bash   echo 'eval "$(jlora completion bash)"' >> ~/.bashrc
  zsh    echo 'eval "$(jlora completion zsh)"' >> ~/.zshrc   (after compinit)
  fish   jlora completion fish > ~/.config/fish/completions/jlora.fish"""


def parser() -> argparse.ArgumentParser:
    """The parser of `jlora completion`."""
    parser = command(
        "completion",
        "Print what makes a shell complete jlora's commands (pip install 'jlora[completion]').",
        epilog=EPILOG,
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("shell", choices=SHELLS)
    return parser
