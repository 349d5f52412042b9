"""`jlora generate`: the model's answer to a prompt."""

import argparse
from typing import Any

from jlora import hub
from jlora.cli.model import load_model
from jlora.errors import UserError, number_of
from jlora.generate import generate
from jlora.lora import Bank
from jlora.types import Params


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns 0; mistakes and failures raise."""
    if len(options.adapter) > 1 and len(options.adapter) != len(options.prompt):
        raise UserError(
            f"--adapter: found {len(options.adapter)} for {number_of(len(options.prompt), 'prompt')}, expected one, or "
            "one for each"
        )
    model, params, tokenizer = load_model(options)
    params, adapters = _adapted(params, options.adapter, options.model)
    texts = generate(
        model,
        params,
        tokenizer,
        [_prompt(prompt, options, tokenizer) for prompt in options.prompt],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        adapters=adapters,
    )
    for text in texts:
        print(text)
    return 0


def _adapted(params: Params, folders: list[str], base: str) -> tuple[Params | Bank, list[str | None] | None]:
    """The params with the one adapter, or a bank of several and each prompt's choice from it."""
    if len(set(folders)) < 2:
        return (hub.load_adapter(params, folders[0], base) if folders and folders[0] else params), None
    adapters = {folder: hub.load_adapter(params, folder, base) for folder in dict.fromkeys(folders) if folder}
    return Bank.of(params, adapters), [folder or None for folder in folders]


def _prompt(text: str, options: argparse.Namespace, tokenizer: Any) -> str | list[dict[str, str]]:
    """Chat messages for a chat model; the text itself for a base model or with --raw."""
    if options.raw or not tokenizer.chat_template:
        if options.system is not None:
            raise UserError("--system needs a chat template: the model's tokenizer has none, or --raw was given")
        return text
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return [*system, {"role": "user", "content": text}]
