"""README.md and docs/ agree with the repository: commands, options, links, paths and functions exist."""

import ast
import importlib
import re
import shlex
from argparse import ArgumentParser, _SubParsersAction
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest

from scripts import draw_network

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = {"export", "unset", "source", "pip", "ls", "mkdir", "cp", "tensorboard", "for", "done", "nvidia-smi"}
"""First words of documented commands that are not commands of this project."""
COMMANDS = (
    "train_deep_globe", "predict", "prediction.export", "models.checkpoint", "benchmarks.__main__",
    *(f"dataset.{name}" for name in ("alto", "describe", "dubai", "synthetic")),
    *(f"evaluation.{name}" for name in ("compare", "released_weights")),
    *(f"experiments.{name}" for name in ("ablation", "baselines", "figures", "lite0_weights", "strip", "unsure")),
)  # fmt: skip
"""Modules with a command line."""
NOT_A_PATH = re.compile(r"[^\w./-]")


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def document(request) -> Path:
    return request.param


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|^    .*?$", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.replace("\\|", "|").split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def shell_commands(text: str) -> list[list[str]]:
    """Return the words of every command in the bash blocks of a Markdown text, variables filled in."""
    found, variables = [], {}
    for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name} ", f"{value} ")
            for words in split_commands(line):
                while words and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
                    variables[assignment[1]] = assignment[2]
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def split_commands(line: str) -> list[list[str]]:
    """Return the words of each command of a line that `;`, `&&` and `do` join."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= {";", "&"} or (word == "do" and not commands[-1]):
            commands.append([])
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def module_of(name: str) -> str | None:
    """Return the module of a Python script or of a shell script that ends in it; None if the script parses nothing."""
    if name.endswith(".py"):
        return name.removeprefix("./").removesuffix(".py").replace("/", ".")
    return "train_deep_globe" if "common.sh" in (ROOT / name).read_text() else None


def resolve(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the module that a command runs (None if it is not of this project) and its arguments."""
    for index, (word, following) in enumerate(pairwise([*words, ""])):
        if re.fullmatch(r"\./[\w-]+\.sh|(\./)?[\w/]+\.py", word):
            assert (ROOT / word).is_file(), f"{word} does not exist"
            return module_of(word), words[index + 1 :]
        if word == "-m" and (ROOT / following.split(".")[0]).is_dir():
            following = following if "." in following else f"{following}.__main__"
            assert (ROOT / f"{following.replace('.', '/')}.py").is_file(), f"there is no module {following}"
            return following, words[index + 2 :]
    return None, []


class Captured(BaseException):
    """Carries a parser out of the command that uses it."""


@cache
def parser_of(module: str) -> ArgumentParser:
    """Return the parser of a module whose function `main` parses the command line."""

    def capture(parser: ArgumentParser, *_: object) -> None:
        raise Captured(parser)

    with patch.object(ArgumentParser, "parse_args", capture), pytest.raises(Captured) as captured:
        importlib.import_module(module).main()
    return captured.value.args[0]


def subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """Return the parsers of a parser's subcommands by name."""
    return next((dict(action.choices) for action in parser._actions if isinstance(action, _SubParsersAction)), {})


def check_arguments(module: str, arguments: list[str]) -> None:
    """Assert that the options among the arguments exist, and that values of options with choices are choices."""
    if not arguments:
        return
    parser = parser_of(module)
    if (commands := subcommands(parser)) and arguments[0] != "--help":
        assert arguments[0] in commands, f"{module} has no command {arguments[0]}"
        parser = commands[arguments[0]]
    actions = parser._option_string_actions
    for word, following in pairwise([*arguments, ""]):
        if not word.startswith("--") or word == "--":
            continue
        name, _, value = word.partition("=")
        assert name in actions, f"{module} has no option {name}"
        value = value or following
        if actions[name].choices and value and not value.startswith("$"):
            assert value in map(str, actions[name].choices), f"{name} of {module} does not take {value}"


@pytest.mark.parametrize("module", COMMANDS)
def test_help_says_what_every_option_does(module):
    parser = parser_of(module)
    for command in (parser, *subcommands(parser).values()):
        for action in command._actions:
            assert action.help or isinstance(action, _SubParsersAction), action.dest


@pytest.mark.parametrize("module", [name for name in COMMANDS if not name.startswith(("benchmarks", "experiments"))])
def test_help_of_a_users_option_names_the_thing_before_its_default(module):
    texts = [action.help for action in parser_of(module)._actions if action.help]
    assert [text for text in texts if re.match(r"\(|default", text)] == []


@pytest.mark.parametrize("module", ["train_deep_globe", "predict"])
def test_help_of_the_two_commands_groups_all_options(module):
    ungrouped = parser_of(module)._optionals
    assert [action.dest for action in ungrouped._group_actions] == ["help"]


def test_drawing_is_current():
    assert draw_network.OUTPUT.read_text(encoding="utf-8") == draw_network.draw(), "run python -m scripts.draw_network"


def test_commands_exist_and_have_the_options_that_the_documents_name(document):
    for words in shell_commands(document.read_text(encoding="utf-8")):
        module, arguments = resolve(words)
        if module is not None:
            check_arguments(module, arguments)
        elif not re.fullmatch(r"\./(demo|test)\.sh", words[0]):
            assert words[0] in SHELL or words[:2] in (["python3", "-m"], ["python", "-c"]), f"unknown command: {words}"


def test_commands_in_the_text_exist_and_have_their_options(document):
    for code in inline_code(document.read_text(encoding="utf-8")):
        if re.match(r"(\./[\w-]+\.sh|python3? |torchrun )(?!\*)", code):
            module, arguments = resolve(shlex.split(code))
            if module is not None:
                check_arguments(module, arguments)


def test_options_in_the_text_exist(document):
    known: set[str] = set()
    for module in COMMANDS:
        parser = parser_of(module)
        known.update(*(command._option_string_actions for command in (parser, *subcommands(parser).values())))
    for code in inline_code(document.read_text(encoding="utf-8")):
        for option in re.findall(r"^--[\w-]+", code):
            assert option in known, f"no command has {option}"


def anchors(path: Path) -> set[str]:
    """Return the anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_images_exist(document):
    for target in re.findall(r"\]\(([^)]+)\)", prose(document.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(path), f"{path.name} has no heading #{anchor}"


def test_every_document_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in PAGES[1:] if str(path.relative_to(ROOT)) not in readme]


def test_paths_in_the_text_exist(document):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} & {
        "benchmarks", "dataset", "docs", "engine", "evaluation", "experiments", "imaging", "models", "prediction",
        "scripts", "tests", "training", "utils",
    }  # fmt: skip
    for code in inline_code(document.read_text(encoding="utf-8")):
        path = code.partition(":")[0]
        ours = path.split("/")[0] in folders and "/" in path
        if not NOT_A_PATH.search(path) and (ours or path.endswith((".py", ".sh"))):
            assert (ROOT / path).exists(), f"{path} does not exist"


def defined(path: Path) -> set[str]:
    """Return the functions, classes, methods and constants of a module; methods as `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def test_functions_in_the_text_exist(document):
    """A function is written as `file.py:function` or `file.py:Class.method`."""
    for code in inline_code(document.read_text(encoding="utf-8")):
        if match := re.fullmatch(r"([\w/]+\.py):([\w.]+)", code):
            path, name = match.groups()
            assert (ROOT / path).is_file(), f"{path} does not exist"
            assert name in defined(ROOT / path), f"{path} has no {name}"


def test_architecture_quotes_the_forward_pass_as_it_is():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = [line.strip() for line in (ROOT / "models" / "glnet.py").read_text(encoding="utf-8").splitlines()]
    (block,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert [line for line in block.splitlines() if line.strip() not in code] == []
