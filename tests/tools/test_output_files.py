"""Folders that one process at a time writes into."""

import errno
import os

import pytest
from folders import in_use

from vmamba.tools.output_files import lock_folder
from vmamba.tools.user_errors import UserError


def test_a_folder_that_is_in_use_is_refused_until_its_process_ends(tmp_path):
    folder = tmp_path / 'new/run'
    with in_use(folder) as process:
        with pytest.raises(UserError, match=f'is writing into {folder}: wait until it ends, or choose another'):
            lock_folder(folder)
        process.kill()
        process.join()
        lock_folder(folder).close()  # though a child of the process is still there


def test_a_lock_lasts_until_it_is_closed(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path), pytest.raises(ChildProcessError), in_use(tmp_path):
            pass
    with in_use(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=f'cannot write into {tmp_path}/file/run: .*; choose another --output'):
        lock_folder(tmp_path / 'file/run')


def test_file_systems_without_locks_are_written_to(tmp_path, monkeypatch):
    def lockf(*args):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr('fcntl.lockf', lockf)
    lock_folder(tmp_path / 'run').close()
    assert (tmp_path / 'run').is_dir()
