"""A Hugging Face Hub on the disk: uploads go where the Hub's client, which is offline, keeps its downloads."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub

COMMIT = '0' * 40


class FakeHub(huggingface_hub.HfApi):
    """Takes the calls by which models are uploaded; `folder_of` names the files of a repository."""

    @staticmethod
    def folder_of(repo_id):
        name = huggingface_hub.file_download.repo_folder_name(repo_id=repo_id, repo_type='model')
        return Path(huggingface_hub.constants.HF_HUB_CACHE, name, 'snapshots', COMMIT)

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        folder = self.folder_of(repo_id)
        folder.mkdir(parents=True, exist_ok=exist_ok)
        (folder.parents[1] / 'refs').mkdir(exist_ok=True)
        (folder.parents[1] / 'refs/main').write_text(COMMIT)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, filename, *, revision=None):
        return (self.folder_of(repo_id) / filename).is_file()

    def upload_folder(
        self, *, repo_id, folder_path, commit_message, revision=None, create_pr=None, ignore_patterns=None
    ):
        ignore = shutil.ignore_patterns(*(ignore_patterns or ()))
        shutil.copytree(folder_path, self.folder_of(repo_id), ignore=ignore, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f'https://huggingface.co/{repo_id}/commit/{COMMIT}')


def use(monkeypatch, folder, *users):
    """Puts the cache of the Hub's client into a folder, offline; replaces `HfApi` under the names of its users."""
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(folder))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    for user in users:
        monkeypatch.setattr(user, FakeHub)
    return FakeHub
