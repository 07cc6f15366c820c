"""Staging: a bundle is written beside its place and moved there whole; what was there is kept unless it may go."""

from pathlib import Path

import pytest

from c2c_export.errors import C2CError, UsageError
from c2c_export.staging import staged_bundle


def make_bundle(folder: Path, content: str) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text('{"schema_version": 1}')
    (folder / "content").write_text(content)


def test_the_folder_is_moved_into_place_and_nothing_is_left_beside(tmp_path: Path) -> None:
    with staged_bundle(tmp_path / "a.bundle", overwrite=False) as folder:
        (folder / "content").write_text("new")
        assert not (tmp_path / "a.bundle").exists()
    assert (tmp_path / "a.bundle" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_or_an_interrupt_keeps_the_old_bundle(tmp_path: Path, error: type[BaseException]) -> None:
    make_bundle(tmp_path / "a.bundle", "old")
    with pytest.raises(error), staged_bundle(tmp_path / "a.bundle", overwrite=True):
        raise error
    assert (tmp_path / "a.bundle" / "content").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


def test_overwriting_replaces_a_bundle_of_any_version(tmp_path: Path) -> None:
    make_bundle(tmp_path / "a.bundle", "old")
    with staged_bundle(tmp_path / "a.bundle", overwrite=True) as folder:
        (folder / "content").write_text("new")
    assert (tmp_path / "a.bundle" / "content").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


def test_what_appears_there_meanwhile_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "a.bundle"
    with pytest.raises(UsageError, match="exists already"), staged_bundle(output, overwrite=False):
        make_bundle(output, "of somebody else")
    assert (output / "content").read_text() == "of somebody else"


@pytest.mark.parametrize("manifest", ["{}", "[]", "not JSON", '{"manifest_version": 3}'])
def test_only_bundles_are_overwritten(tmp_path: Path, manifest: str) -> None:
    output = tmp_path / "extension"
    output.mkdir()
    (output / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match="is not a bundle"), staged_bundle(output, overwrite=True):
        raise AssertionError("the block must not run")
    assert (output / "manifest.json").read_text() == manifest


def test_an_error_of_writing_is_told_without_an_errno_too(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="3 requested and 1 written"), staged_bundle(tmp_path / "b", overwrite=False):
        raise OSError("3 requested and 1 written")
    assert not list(tmp_path.iterdir())
