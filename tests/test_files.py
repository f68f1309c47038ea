import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignfast import files
from alignfast.files import check_unused, claim_folder, read_run, replacing, write_json, write_text

RUN = {"attack": "mifgsm", "eps": 8 / 255, "size": (4, 4), "targets": ["a", "b"], "note": None}


@pytest.fixture
def umask():
    before = os.umask(0)
    yield os.umask
    os.umask(before)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_whole_and_keeps_its_suffix(tmp_path):
    path = tmp_path / "a.tar.npz"
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        assert temporary != path
        temporary.write_bytes(b"half")
        assert not path.exists()
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert names(tmp_path) == ["a.tar.npz"]


def test_an_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    write_text(tmp_path / "a", "old")
    with replacing(str(tmp_path / "a")) as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    "error", [ValueError("x"), OSError("full"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()]
)
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_leaves_what_was_there(tmp_path, error, old):
    if old is not None:
        write_text(tmp_path / "a.txt", old)

    def write():
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write()
    assert names(tmp_path) == ([] if old is None else ["a.txt"])
    assert old is None or (tmp_path / "a.txt").read_text() == old


def test_a_failing_rename_leaves_what_was_there(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")

    def refuse(self, target):
        raise PermissionError("no")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError):
        write_text(tmp_path / "a.txt", "new")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_failure_is_told_even_if_the_temporary_file_is_gone(tmp_path):
    def write():
        with replacing(tmp_path / "a") as temporary:
            temporary.unlink()
            raise KeyError("why")

    with pytest.raises(KeyError, match="why"):
        write()
    assert names(tmp_path) == []


def test_a_killed_process_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    program = (
        "import os, runpy, signal, sys\n"
        "with runpy.run_path(sys.argv[1])['replacing'](sys.argv[2]) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, files.__file__, str(tmp_path / "a.txt")], check=False)
    assert done.returncode == -9
    assert (tmp_path / "a.txt").read_text() == "old"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o000, 0o666)])
def test_permissions_are_what_the_umask_leaves(tmp_path, umask, mask, mode):
    umask(mask)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode
    assert umask(mask) == mask


def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    """It is that of the process, so that a thread which set it to read it would change what others write."""
    monkeypatch.setattr(os, "umask", None)
    write_text(tmp_path / "a", "x")


def test_an_unused_folder_is_told_beforehand(tmp_path):
    check_unused(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    claim_folder(tmp_path / "new", RUN)
    check_unused(tmp_path / "new")
    write_text(tmp_path / "new" / "a", "x")
    with pytest.raises(ValueError, match="new already holds files"):
        check_unused(tmp_path / "new")
    with pytest.raises(ValueError, match="a is a file"):
        check_unused(tmp_path / "new" / "a")


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.txt", "x")


def test_text_is_utf_8_and_json_ends_in_a_newline(tmp_path):
    write_text(tmp_path / "a.txt", "\u03b5 \u2264 8/255\n")
    assert (tmp_path / "a.txt").read_bytes() == "\u03b5 \u2264 8/255\n".encode()
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, None]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"b": 1, "a": [1.5, None]}
    assert text.endswith("}\n")
    assert text.index('"b"') < text.index('"a"')


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"model": object()})
    assert names(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("existing", [False, True])
def test_a_new_or_empty_folder_is_taken(tmp_path, existing, resume):
    folder = tmp_path / "runs" / "a"
    if existing:
        folder.mkdir(parents=True)
    assert claim_folder(str(folder), RUN, resume=resume) == folder
    assert names(folder) == ["config.json"]
    assert read_run(folder) == json.loads(json.dumps(RUN))


def test_a_folder_in_use_is_refused_without_resume(tmp_path):
    claim_folder(tmp_path, RUN)
    (tmp_path / "result").write_text("x")
    with pytest.raises(ValueError, match=r"^out: .* already holds files; give a new or an empty folder"):
        claim_folder(tmp_path, RUN)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".hidden").write_text("")
    with pytest.raises(ValueError, match="already holds files"):
        claim_folder(tmp_path / "other", RUN)
    assert names(tmp_path / "other") == [".hidden"]


def test_the_same_run_is_resumed(tmp_path):
    claim_folder(tmp_path, RUN)
    (tmp_path / "result").write_text("x")
    assert claim_folder(tmp_path, dict(reversed(RUN.items())), resume=True) == tmp_path
    assert claim_folder(tmp_path, {**RUN, "size": [4, 4]}, resume=True) == tmp_path
    assert names(tmp_path) == ["config.json", "result"]


def test_a_run_with_a_number_that_is_not_one_is_resumed(tmp_path):
    run = {"clip": math.nan, "limit": math.inf}
    claim_folder(tmp_path, run)
    assert claim_folder(tmp_path, run, resume=True) == tmp_path
    with pytest.raises(ValueError, match="results of a different run"):
        claim_folder(tmp_path, {**run, "clip": 1.0}, resume=True)


@pytest.mark.parametrize("change", [{"eps": 4 / 255}, {"targets": ["b", "a"]}, {"note": ""}, {"extra": 1}])
def test_another_run_is_not_resumed(tmp_path, change):
    claim_folder(tmp_path, RUN)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"^out: .* holds the results of a different run"):
        claim_folder(tmp_path, {**RUN, **change}, resume=True)
    assert (tmp_path / "config.json").read_text() == before
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_a_folder_whose_run_cannot_be_told_is_not_resumed(tmp_path, content):
    (tmp_path / "result").write_text("x")
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="holds the results of a different run"):
        claim_folder(tmp_path, RUN, resume=True)
    assert read_run(tmp_path) is None or read_run(tmp_path) == []


def test_files_and_unwritable_places_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^out: .*file is a file; give a folder"):
        claim_folder(tmp_path / "file", RUN)
    with pytest.raises(ValueError, match=r"^out: cannot write to .*below \(Not a directory\); give a writable folder"):
        claim_folder(tmp_path / "file" / "below", RUN)

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "write_json", refuse)
    with pytest.raises(ValueError, match=r"^out: cannot write to .*new \(Permission denied\)"):
        claim_folder(tmp_path / "new", RUN)
    monkeypatch.undo()
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=r"^out: cannot read .*closed \(Permission denied\)"):
        claim_folder(tmp_path / "closed", RUN)


def test_a_run_that_stopped_before_it_had_a_result_is_taken_again(tmp_path):
    claim_folder(tmp_path, {"seed": 1})
    claim_folder(tmp_path, {"seed": 1})
    with pytest.raises(ValueError, match="different run"):
        claim_folder(tmp_path, {"seed": 2})
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds files"):
        claim_folder(tmp_path, {"seed": 1})
