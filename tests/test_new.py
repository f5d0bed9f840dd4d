"""What ``python -m fedsparse.new`` writes, and what it refuses; ``test_people.py`` types what its README says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedsparse import new
from fedsparse.job import shipped

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Type a command in an empty folder: ``typed("project")``."""
    monkeypatch.chdir(tmp_path)

    def go(*words):
        monkeypatch.setattr(sys, "argv", ["fedsparse.new", *words])
        new.main()

    return go


def written(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_project_is_sixty_lines_and_its_readme_says_what_to_type(typed, tmp_path, capsys):
    typed("some/my-project")
    files = written(tmp_path / "some" / "my-project")
    assert sum(len(text.splitlines()) for text in files.values()) <= 60
    assert files["README.md"].startswith("# my-project\n")
    commands = [line.strip() for line in files["README.md"].splitlines() if line.startswith("    ")]
    assert len(commands) == 3
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[1:]] == ["cd some/my-project", *commands]


def test_its_parts_are_those_that_are_held_against_sums_by_hand(typed, tmp_path):
    """``test_outside.py`` does; the rule is that of the page on parts of one's own."""
    typed("project")
    files, held = written(tmp_path / "project"), written(OUTSIDE)
    shared = sorted(set(files) & set(held))
    assert shared == [
        *("conf/client/smoothed.yaml", "conf/data/bright_columns.yaml", "mine/losses.py", "mine/sets.py"),
    ]
    assert {name: files[name] for name in shared} == {name: held[name] for name in shared}
    for group, option in (Path(name).parts[1:] for name in files if name.startswith("conf/")):
        assert option.removesuffix(".yaml") not in shipped.options(group)  # which would be refused


def test_an_empty_folder_is_taken_and_anything_in_it_is_refused(typed, tmp_path):
    (tmp_path / "project").mkdir()
    typed("project")
    before = written(tmp_path / "project")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".git").touch()
    (tmp_path / "file").touch()
    for name in ("project", "hidden", "file"):
        with pytest.raises(SystemExit) as said:
            typed(name)
        assert said.value.code == f"fedsparse: {name} is there and not empty; give the name of a new folder"
    assert written(tmp_path / "project") == before
    assert list(written(tmp_path / "hidden")) == [".git"]


def test_a_folder_that_cannot_be_made_is_one_line(typed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^fedsparse: .*file/project.*$"):
        typed("file/project")
