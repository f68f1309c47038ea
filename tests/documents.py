"""The code blocks of the project's Markdown files, and what it takes to run them.

A block has a language of `LANGUAGES`. `python` blocks of a page run one after another in one scope and one folder, and
so do `sh` blocks, whose commands are those of `alignfast`. A `text` block right behind one that ran is what that one
prints. `yaml` is a matrix file; with `# NAME.yaml` as its first line it lies in the folder under this name.

A block that begins with `# not run: REASON` is compiled, or its commands are parsed. One that begins with
`# from: FILE` is a part of that file. A block without a language is one of commands that are parsed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml
from markdown_it import MarkdownIt

from alignfast import cli
from alignfast.compat.reproduce import parse as parse_reproduce
from alignfast.config import MatrixConfig

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = (README, ROOT / "bench" / "README.md", *sorted(DOCS.rglob("*.md")))

LANGUAGES = ("python", "sh", "text", "yaml")
NOT_RUN, FROM = "# not run: ", "# from: "
NAMED = re.compile(r"# ([\w-]+\.ya?ml)\n")
# What stands for more arguments in a command that is not written out.
MORE = "..."
VARIABLE = re.compile(r"[A-Z_]+=\S*")
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. line: of its first line of text, from 1."""

    page: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def language(self) -> str:
        return self.info or "sh"

    @property
    def runs(self) -> bool:
        return self.language in ("python", "sh") and bool(self.info) and not self.text.startswith((NOT_RUN, FROM))


def blocks_of(page: Path) -> list[Block]:
    """Every block of code of a page, also those that are indented, which have no language."""
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    return [
        Block(page, (token.map or [0])[0] + (2 if token.type == "fence" else 1), token.info.strip(), token.content)
        for token in tokens
        if token.type in ("fence", "code_block")
    ]


def run_page(page: Path, folder: Path) -> dict[str, Any]:
    """Run or read all blocks of a page, in `folder` as the current one; returns what its Python blocks have defined."""
    scope: dict[str, Any] = {"__name__": page.stem}
    printed: str | None = None
    with contextlib.chdir(folder):
        for block in blocks_of(page):
            printed = run_block(block, scope, printed)
    return scope


def run_block(block: Block, scope: dict[str, Any], printed: str | None = None) -> str | None:
    """printed: by the block before, where that one ran. Returns what this one prints, where it runs.

    Raises:
        AssertionError: another language, text that was not printed, a command that fails or is unknown; else whatever
            the block raises.
    """
    assert block.language in LANGUAGES, f"{block}: {block.language} is none of {', '.join(LANGUAGES)}"
    if block.text.startswith(FROM):
        first, _, rest = block.text.partition("\n")
        assert rest in (ROOT / first.removeprefix(FROM)).read_text(encoding="utf-8"), f"{block}: not in that file"
    elif block.language == "python":
        return _python(block, scope)
    elif block.language == "sh":
        return _shell(block)
    elif block.language == "yaml":
        _yaml(block)
    elif printed is not None:
        missing = missing_lines(block.text, printed)
        assert not missing, f"{block}: not printed, or not in this order: {missing[0]}"
    return None


def missing_lines(text: str, printed: str) -> list[str]:
    """The lines of `text` that are not among those printed, in their order; numbers and spaces may differ."""
    left = iter(_plain(printed))
    return [line for line in _plain(text) if line not in left]


def _plain(text: str) -> list[str]:
    lines = (re.sub(r"─+", "─", NUMBER.sub("0", line)).replace("<", "=") for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def _python(block: Block, scope: dict[str, Any]) -> str | None:
    # Lines are counted as in the page.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec", dont_inherit=True)
    if not block.runs:
        return None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, scope)
    return printed.getvalue()


def _shell(block: Block) -> str | None:
    printed = ""
    for command in commands_of(block.text):
        check_command(command, str(block))
        if block.runs:
            assert command[0] == "alignfast", f"{block}: {command[0]} does not run in tests; mark it {NOT_RUN!r}"
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as said:
                code = cli.run(command[1:])
            assert code == 0, f"{block}: {shlex.join(command)}: {said.getvalue()}"
            printed += out.getvalue()
    return printed if block.runs else None


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell block by their words, without comments and without variables in front."""
    lines = text.replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [list(_without_variables(words)) for words in split if words]


def _without_variables(words: list[str]) -> Iterator[str]:
    inside = False
    for word in words:
        inside = inside or not VARIABLE.fullmatch(word)
        if inside:
            yield word


def check_command(words: list[str], where: str) -> None:
    """Whether a command could be given: AssertionError for one that is unknown, or with an option that there is not."""
    name, *rest = words
    if name == "alignfast":
        _check_alignfast(rest, where)
    elif name == "torchrun":
        assert "alignfast" in rest or any(_is_script(word) for word in rest), f"{where}: torchrun starts nothing known"
        if "alignfast" in rest:
            _check_alignfast(rest[rest.index("alignfast") + 1 :], where)
    elif name == "make":
        made = re.findall(r"^([\w-]+(?: [\w-]+)*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        targets = {target for line in made for target in line.split()}
        assert {word for word in rest if "=" not in word} <= targets, f"{where}: no such target of make: {rest}"
    elif name == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"{where}: no module {rest[1]}"
    elif name == "python":
        assert _is_script(rest[0]), f"{where}: no file {rest[0]}"
    else:
        assert name in ("pip", "pytest"), f"{where}: {name} is no command that the tests know"


def _is_script(word: str) -> bool:
    return word.endswith(".py") and (ROOT / word).is_file()


def _check_alignfast(words: list[str], where: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    name, *given = cli.spread(words)
    assert name in group.commands, f"{where}: alignfast has no command {name}"
    whole = MORE not in given
    try:
        if name == "reproduce":
            if whole:
                parse_reproduce(given)
            return
        if whole:
            group.commands[name].make_context(name, given)
            return
    except (cli.UsageError, ValueError) as error:
        raise AssertionError(f"{where}: alignfast {shlex.join(words)}: {error}") from error
    except typer.Exit:
        return
    options = {option for parameter in group.commands[name].params for option in parameter.opts}
    unknown = [word for word in given if word.startswith("--") and word not in options]
    assert not unknown, f"{where}: alignfast {name} has no {unknown}"


def _yaml(block: Block) -> None:
    if block.text.startswith(NOT_RUN):
        yaml.safe_load(block.text)
        return
    named = NAMED.match(block.text)
    path = Path(named[1] if named else "block.yaml")
    path.write_text(block.text, encoding="utf-8")
    MatrixConfig.read(path)
