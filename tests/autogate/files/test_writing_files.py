"""A file is written whole or not at all."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import autogate
from autogate import AutogateError
from tests.autogate.files.slim_nets import slim_small


@pytest.mark.parametrize("write", [autogate.save, autogate.to_torch_export])
def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, write: Callable[..., object]):
    path = tmp_path / "slim.pt2"
    write(slim_small(), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(AutogateError, match=r"could not be written.*is unchanged"):
            write(slim_small(seed=1), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "slim.safetensors"
    autogate.save(slim_small(), path)
    before, other = path.read_bytes(), slim_small(seed=1)
    child = os.fork()
    if not child:
        monkeypatch.setattr(os, "fsync", lambda descriptor: os.kill(os.getpid(), signal.SIGKILL))
        try:
            autogate.save(other, path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before


def test_a_link_is_followed_and_permissions_are_the_usual_ones(tmp_path: Path):
    (tmp_path / "to").symlink_to(tmp_path / "slim.safetensors")
    autogate.save(slim_small(), tmp_path / "to")
    assert (tmp_path / "to").is_symlink()
    (tmp_path / "plain").touch()
    assert (tmp_path / "slim.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
