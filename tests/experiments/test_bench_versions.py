"""The benchmark of two versions of seqjax, at tiny sizes."""

import types

import pytest

from experiments.base.errors import UserError
from experiments.bench import versions


@pytest.mark.slow
def test_two_folders_are_compared(tmp_path):
    tree = tmp_path / "other"
    tree.symlink_to(versions.HERE)
    for row in (("linear_attention", (1, 8)), (versions.SCAN, (2, 8, 4))):
        found = versions.compare(tree, row, 1)
        assert found.keys() == {"forward", "with gradients"}
        assert all(isinstance(ratio, float) and ratio > 0 for ratio in found.values())


@pytest.mark.slow
def test_an_op_that_the_other_version_lacks_is_left_out(tmp_path):
    (tmp_path / "seqjax").mkdir()
    (tmp_path / "seqjax" / "__init__.py").touch()
    assert versions.compare(tmp_path, ("linear_attention", (1, 8)), 1) == {}


@pytest.mark.parametrize("tree", ["", "nowhere"])
def test_the_folder_must_contain_the_library(tree, monkeypatch):
    monkeypatch.setattr(versions, "TREE", types.SimpleNamespace(value=tree))
    with pytest.raises(UserError, match=f"--tree={tree}: must be a folder"):
        versions.bench_versions(1)
