"""Pages of the site that are made from what lies elsewhere: the README files and the help of the command line."""

from __future__ import annotations

import argparse
import re
from functools import partial
from pathlib import Path

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from alignfast.cli import app
from alignfast.compat.reproduce import parser

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Where the site has them.
READMES = {ROOT / "README.md": "readme.md", ROOT / "bench" / "README.md": "bench.md"}
LINK = re.compile(r"\[([^]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)")
WIDTH = 100


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs once it has found the pages of this folder."""
    for path, name in READMES.items():
        files.append(File.generated(config, name, content=readme(path)))
    files.append(File.generated(config, "reference/command-line.md", content=command_line()))
    return files


def readme(path: Path) -> str:
    """A README file's text. Its links lead to where the site has things; where it has not, their text alone is left."""
    return LINK.sub(partial(_link, path.parent), path.read_text(encoding="utf-8"))


def command_line() -> str:
    """Every command with its options, as Markdown."""
    command = typer.main.get_command(app)
    pages = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="alignfast"), title="Command line")
    made = parser()
    made.formatter_class = partial(argparse.HelpFormatter, width=WIDTH)
    # This command has a parser of its own, with the authors' arguments.
    head, title, tail = pages.partition("## `alignfast reproduce`")
    about, _, rest = tail.partition("\n## ")
    return f"{head}{title}\n\n{_about(about)}\n\n```text\n{made.format_help()}```\n\n## {rest}"


def _about(section: str) -> str:
    return section.partition("**Usage**")[0].strip()


def _link(folder: Path, found: re.Match[str]) -> str:
    text, target, anchor = found[1], (folder / found[2]).resolve(), found[3] or ""
    if target in READMES:
        return f"[{text}]({READMES[target]}{anchor})"
    return f"[{text}]({target.relative_to(DOCS)}{anchor})" if target.is_relative_to(DOCS) else text
