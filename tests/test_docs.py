"""README.md and docs/ agree with the repository: commands, options, links, paths and functions exist."""

import ast
import re
import shlex
from argparse import ArgumentParser
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from scripts import draw_network
from scripts.write_options import OUTPUT, page, parser_of, subcommands

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = {"export", "unset", "source", "pip", "ls", "mkdir", "cp", "tensorboard", "for", "done", "nvidia-smi"}
"""First words of documented commands that are not commands of this project."""
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


@cache
def cached_parser(module: str) -> ArgumentParser:
    return parser_of(module)


def check_arguments(module: str, arguments: list[str]) -> None:
    """Assert that the options among the arguments exist, and that values of options with choices are choices."""
    if not arguments:
        return
    parser = cached_parser(module)
    if commands := subcommands(parser):
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


def test_options_page_and_drawing_are_current():
    assert OUTPUT.read_text(encoding="utf-8") == page(), "run python -m scripts.write_options"
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
    commands = [
        cached_parser(module) for module in ("train_deep_globe", "predict", "dataset.synthetic", "dataset.alto")
    ]
    commands += subcommands(cached_parser("benchmarks.__main__")).values()
    commands += [cached_parser(f"experiments.{name}") for name in ("figures", "strip", "ablation", "baselines")]
    commands += [cached_parser(f"evaluation.{name}") for name in ("compare", "released_weights")]
    known = {option for parser in commands for option in parser._option_string_actions}
    if document == OUTPUT:  # generated from the parsers; test_options_page_is_current compares it
        return
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
