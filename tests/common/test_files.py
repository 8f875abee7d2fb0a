"""Files and folders written aside: a failure or a kill leaves the old content or the new one, never a part."""

import pytest

from prism_lightning.common.files import partial_file, partial_folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def write_folder(folder, text):
    folder.mkdir()
    (folder / "a").write_text(text)


def test_a_file_is_replaced_when_its_block_ends(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    (tmp_path / "a.partial").write_text("of a killed process")
    with partial_file(path) as partial:
        assert not partial.exists()
        partial.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"a": "new"}


def test_a_folder_is_replaced_when_its_block_ends(tmp_path):
    folder = tmp_path / "folder"
    write_folder(folder, "old")
    write_folder(tmp_path / "folder.partial", "of a killed process")
    with partial_folder(folder) as partial:
        write_folder(partial, "new")
        assert (folder / "a").read_text() == "old"
    assert contents(tmp_path) == {"folder/a": "new"}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_old_content_alone(tmp_path, error):
    write_folder(tmp_path / "folder", "old")
    with pytest.raises(error), partial_file(tmp_path / "folder" / "a") as partial:
        partial.write_text("ne")
        raise error
    with pytest.raises(error), partial_folder(tmp_path / "folder") as partial:
        write_folder(partial, "ne")
        raise error
    assert contents(tmp_path) == {"folder/a": "old"}
