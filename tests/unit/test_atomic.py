"""Files and folders that appear whole or not at all."""

import os

import pytest

from common.atomic import atomic_dir, write_bytes, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_and_replaced(tmp_path):
    file = tmp_path / "a" / "b.txt"
    write_text(file, "één")
    write_text(file, "two")
    assert file.read_bytes() == b"two"
    assert names(file.parent) == ["b.txt"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    file = tmp_path / "b.txt"
    write_text(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_bytes(file, b"new")
    assert file.read_text() == "old"
    assert names(tmp_path) == ["b.txt"]


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "step-10"
    with atomic_dir(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == ["step-10"]


def test_an_error_inside_leaves_no_folder(tmp_path):
    def interrupted():
        with atomic_dir(tmp_path / "step-10") as folder:
            (folder / "x").write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


def test_an_existing_folder_is_kept_unless_replacing_is_asked_for(tmp_path):
    target = tmp_path / "step-10"
    with atomic_dir(target) as folder:
        (folder / "old").touch()
    with pytest.raises(FileExistsError), atomic_dir(target):
        pass
    assert names(target) == ["old"]
    with atomic_dir(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["step-10"]


def test_a_failed_replacement_puts_the_old_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "step-10"
    with atomic_dir(target) as folder:
        (folder / "old").touch()
    real, calls = os.replace, []

    def second_fails(source, destination):
        calls.append(destination)
        if len(calls) == 2:
            raise OSError(5, "I/O error")
        real(source, destination)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="I/O"), atomic_dir(target, replace=True) as folder:
        (folder / "new").touch()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["step-10"]


def test_a_crash_between_the_two_renames_is_repaired(tmp_path):
    (tmp_path / ".step-10.old").mkdir()
    (tmp_path / ".step-10.old" / "old").touch()
    with pytest.raises(FileExistsError), atomic_dir(tmp_path / "step-10"):
        pass
    assert names(tmp_path / "step-10") == ["old"]
