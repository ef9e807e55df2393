"""``advisor completion``: the script with which a shell completes commands, flags, models and GPUs."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from advisor.errors import AdvisorError

COMPLETION_VARIABLE = "_ADVISOR_COMPLETE"
"""How click asks a program for its completions: from the program's name."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, /, shell: str) -> None:
    """Print the script that completes commands in your shell.

    Names of models and GPUs are completed too.

    \b
    Examples, to switch it on:
      echo 'eval "$(advisor completion bash)"' >> ~/.bashrc
      echo 'eval "$(advisor completion zsh)"' >> ~/.zshrc
      advisor completion fish > ~/.config/fish/completions/advisor.fish
    """
    script = get_completion_class(shell)
    if script is None:
        raise AdvisorError(f"this version of click writes no completion for {shell}; pip install -U click")
    click.echo(script(context.find_root().command, {}, "advisor", COMPLETION_VARIABLE).source())
