"""What a source says where its path has none of its files: what lies there, and who reads that."""

from pathlib import Path

import pytest

from datasets.config import DataError
from datasets.sources.files_at import files_at
from datasets.sources.folder import listing

PICTURES, TARS = "data=folder reads pictures", "data=webdataset reads tars"


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], ""),
        (["a.tar", "b.TAR", "c.json"], f" (.tar 2, .json 1; {TARS})"),
        (["a.jpg", "b.png", "b.tgz"], f" (.jpg 1, .png 1, .tgz 1; {PICTURES}; {TARS})"),
        (["README", "deep/er/x.csv"], " (no suffix 1, .csv 1)"),
        ([f"x.{kind}" for kind in "abcdefg"], " (.a 1, .b 1, .c 1, .d 1, .e 1, ...)"),
    ],
)
def test_what_lies_there_instead_is_named_with_its_source(tmp_path: Path, files: list[str], told: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError) as refused:
        files_at(str(tmp_path), "data.metadata", ".parquet", "Parquet file", "a file")
    assert str(refused.value) == f"data.metadata: there is no Parquet file at {tmp_path}{told}; give a file"


def test_a_folder_of_tars_is_pointed_to_their_source(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").touch()
    with pytest.raises(DataError, match=r"no pictures in .* \(\.tar 1; data=webdataset reads tars\); give the folder"):
        listing(str(tmp_path), "data.folder.path")


def test_files_that_are_there_are_given_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.jpg").touch()
    found = files_at(str(tmp_path), "data.metadata", ".parquet", "Parquet file", "a file")
    assert found == {"a.parquet": f"{tmp_path}/a.parquet"}
