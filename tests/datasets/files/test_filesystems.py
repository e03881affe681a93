"""Which file system a path lies on, and what is no path there."""

import pytest

from datasets.files import storage
from datasets.files.errors import StoreRefuses
from datasets.files.filesystems import is_hollow


@pytest.mark.parametrize("path", ["gs://bucket//pictures", "s3://bucket/a//b/"])
def test_a_path_with_a_part_of_no_name_is_refused_with_its_name_before_a_store_is_asked(path):
    assert is_hollow(path)
    with pytest.raises(StoreRefuses, match=f"^{path}: it has two slashes in a row, .*; leave one out"):
        storage.exists(path)


@pytest.mark.parametrize("path", ["s3://bucket/a/", "s3://bucket//", "memory://a//b", "/a//b", "file:///a//b"])
def test_other_paths_are_none_of_these(path):
    assert not is_hollow(path)
