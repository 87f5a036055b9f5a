"""What the pages show: commands are commands, links lead somewhere, Python compiles."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
from pathlib import Path

import pytest

from demo.__main__ import DemoConfig
from exporter.__main__ import COMMANDS as EXPORTER
from serve import cli
from serve.__main__ import COMMANDS as SERVE
from serve.cli import Command
from trainer.__main__ import commands as trainer_commands

ROOT = Path(cli.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "trainer/backbones/mini/README.md"]
OURS = {"trainer", "exporter", "serve", "demo", "benchmarks"}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def calls(text: str) -> list[list[str]]:
    """The words after each `-m` that runs a package of ours, up to a pipe or a redirection."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for words in re.findall(r"-m ((?:trainer|exporter|serve|demo|benchmarks)\b.*)", line):
            lexer = shlex.shlex(words, posix=True, punctuation_chars="|;&<>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            found.append(list(itertools.takewhile(lambda word: word[0] not in "|;&<>", lexer)))
    return found


SHOWN = [
    pytest.param(call, id=f"{page.stem}: {' '.join(call)[:60]}")
    for page in PAGES
    for block in blocks(page, "sh")
    for call in calls(block)
]


def test_the_pages_show_commands() -> None:
    assert len(SHOWN) > 30
    text = "x | python -m serve classify b --task t < f  # why\npython -m demo"
    assert calls(text) == [["serve", "classify", "b", "--task", "t"], ["demo"]]


@pytest.mark.parametrize("call", SHOWN)
def test_a_command_that_is_shown_can_be_given(
    call: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    package, words = call[0], call[1:]
    if package.startswith("benchmarks"):
        assert importlib.util.find_spec(package) is not None
        return
    reached = []
    known = {
        "exporter": EXPORTER, "serve": SERVE, "trainer": trainer_commands(words),
        "demo": {"demo": Command(DemoConfig, reached.append)},
    }[package]  # fmt: skip
    stubs = {name: Command(command.config, reached.append) for name, command in known.items()}
    words = ["demo", *words] if package == "demo" else words
    code = cli.run(f"python -m {package}", "", stubs, [word for word in words if word != "..."])
    told = capsys.readouterr().err
    if "..." in words:  # then something may be left out, but nothing unknown be given
        assert code == 0 or " is missing: " in told, told
    else:
        assert (code, len(reached)) == (0, 1), told


def test_a_flag_that_does_not_exist_would_be_found(capsys: pytest.CaptureFixture[str]) -> None:
    stubs = {name: Command(command.config, lambda _: None) for name, command in SERVE.items()}
    assert cli.run("python -m serve", "", stubs, ["http", "bundle", "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_compiles_and_imports_what_is_there(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")
        for module, names in re.findall(r"^from (\S+) import ([\w, ]+)", block, re.MULTILINE):
            if module.split(".")[0] in OURS:
                found = importlib.import_module(module)
                assert all(hasattr(found, name.strip()) for name in names.split(","))
