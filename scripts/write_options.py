"""Writes docs/options.md from the parsers of the commands: python -m scripts.write_options"""

import argparse
import importlib
from argparse import ArgumentParser
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "options.md"

HEAD = """\
# Options

This page lists every option of every command. `python -m scripts.write_options` writes it from the commands' own help.
[Back to README](../README.md)

"The checkpoint's" means the value that the checkpoint records; "else" follows for checkpoints that record none, and for
runs without a checkpoint. Options that mean the same in a command above are named at the end.
"""

COMMANDS = {
    "train_deep_globe": "The scripts `./train_*.sh` and `./eval_deep_globe.sh` pass these options on.",
    "predict": "[Prediction](prediction.md) explains results and formats.",
    "prediction.export": "Writes [files for other runtimes](export.md).",
    "dataset.describe": "Writes the JSON file of [your own images](data.md#your-own-images).",
    "dataset.alto": "Makes a set of [scanned pages](data.md#scanned-pages-with-zones).",
    "dataset.synthetic": "Generates a land-cover set in [DeepGlobe's layout](data.md#deepglobe).",
    "dataset.dubai": "Joins the parts of [Dubai](data.md#dubai) to whole pictures, for prediction.",
    "models.checkpoint": "Converts to [released checkpoints](evaluation.md#the-released-checkpoints).",
}
"""Modules of the commands, and what the page says about each."""

PLACEHOLDERS: dict[object, str] = {int: "N", float: "X", Path: "PATH"}
"""Names of values by their type."""


class Captured(BaseException):
    """Carries a parser out of the command that uses it."""

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def parser_of(module: str) -> ArgumentParser:
    """Return the parser of a command line.

    Args:
        module: name of a module, such as `dataset.describe`, with a function `main` that parses the command line, or a
            function `build_parser`.

    Raises:
        LookupError: the module has neither.
    """
    command = importlib.import_module(module)
    if not hasattr(command, "main") and hasattr(command, "build_parser"):
        parser: ArgumentParser = command.build_parser()
        return parser

    def capture(parser: ArgumentParser, *_: object) -> None:
        raise Captured(parser)

    try:
        with patch.object(ArgumentParser, "parse_args", capture):
            command.main()
    except Captured as captured:
        return captured.parser
    raise LookupError(f"{module} parses no command line")


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Return the parsers of a parser's subcommands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def page() -> str:
    """Return the text of docs/options.md."""
    sections = [HEAD]
    listed: set[str] = set()
    for module, text in COMMANDS.items():
        parser = parser_of(module)
        sections.append(f"## {parser.prog}\n\n{text}\n")
        commands = subcommands(parser)
        if not commands:
            sections += tables(parser, listed)
        for command in commands.values():
            sections.append(f"### {command.prog.removeprefix('python -m ')}\n")
            sections += tables(command, listed)
    return "\n".join(sections)


def tables(parser: ArgumentParser, listed: set[str]) -> list[str]:
    """Return one Markdown table for each group of a parser's arguments, and a line with those that are `listed`.

    Args:
        parser: of a command.
        listed: the rows of commands above; those of this one are added.
    """
    found, repeated = [], []
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        rows = {action: row(parser, action) for action in actions}
        repeated += [f"`{action.option_strings[0]}`" for action in actions if rows[action] in listed]
        new = [text for text in rows.values() if text not in listed]
        listed.update(new)
        if not new:
            continue
        title = "" if group.title in ("positional arguments", "options") else f"**{group.title}**\n\n"
        found.append(f"{title}| option | meaning |\n|---|---|\n{''.join(new)}")
    if repeated:
        found.append(f"As above: {', '.join(repeated)}.\n")
    return found


def row(parser: ArgumentParser, action: argparse.Action) -> str:
    """Return the line of one argument in a table: names and value, help text."""
    text = " ".join(parser._get_formatter()._expand_help(action).split())
    if action.nargs == 0:
        text = text.removesuffix(" (default: False)")
    if action.required and action.option_strings:
        text = f"required; {text}"
    invocation = " ".join(filter(None, (", ".join(action.option_strings), value(action))))
    return "| `{}` | {} |\n".format(*(cell.replace("|", "\\|") for cell in (invocation, text)))


def value(action: argparse.Action) -> str:
    """Return the placeholder of an argument's value, such as `N` or `{none,flip,d4}`."""
    if action.nargs == 0:
        return ""
    if action.metavar:
        name = str(action.metavar)
    elif action.choices:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    elif action.option_strings:
        # a function that parses a value says by its annotation what it returns
        kind = getattr(action.type, "__annotations__", {}).get("return", action.type)
        name = PLACEHOLDERS.get(kind, "TEXT")
    else:
        name = action.dest.upper()
    return f"{name} ..." if action.nargs in ("+", "*") else name


def main() -> None:
    OUTPUT.write_text(page(), encoding="utf-8")
    print(f"Written: {OUTPUT}")


if __name__ == "__main__":
    main()
