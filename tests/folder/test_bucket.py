"""Pushes to a bucket of the Hub, with a stand-in for its files."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketNotFoundError

from usdm_sft.folder import push as push_module
from usdm_sft.folder.own_parts import Card
from usdm_sft.folder.push import push

COUNTS = {
    "key": "0", "config": "pairs", "num_units": 1, "settings": {"template": {}, "history": 0, "max_length": 1},
    "digests": {}, "splits": {"train": {}}, "statistics": {},
}  # fmt: skip


class Bucket:
    """The files of the bucket user/calls, and the calls that change them; methods are those of `HfApi`."""

    def __init__(self):
        self.files, self.calls, self.private = {}, [], False

    def create_bucket(self, bucket_id, *, private, exist_ok):
        assert bucket_id == "user/calls" and exist_ok
        self.private |= private is True and not self.files

    def bucket_info(self, bucket_id):
        return SimpleNamespace(private=self.private)

    def list_bucket_tree(self, bucket_id, prefix, *, recursive):
        assert recursive and (prefix is None or not prefix.endswith("/"))
        return [SimpleNamespace(type="file", path=path) for path in self.files if path.startswith(prefix or "")]

    def batch_bucket_files(self, bucket_id, *, add=(), delete=()):
        self.calls.append(([path for _, path in add], list(delete)))
        self.files |= {path: file.read_bytes() for file, path in add}
        for path in delete:
            del self.files[path]

    def download_bucket_files(self, bucket_id, files):
        for path, file in files:
            file.write_bytes(self.files[path])


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr("usdm_sft.folder.bucket.HfApi", lambda token: made)
    monkeypatch.setattr(push_module, "verify", lambda folder: None)
    return made


@pytest.fixture
def folder(tmp_path):
    def make(*names):
        for name in names:
            (tmp_path / name).write_text(name)
        (tmp_path / "counts.json").write_text(json.dumps(COUNTS | {"files": dict.fromkeys(names, "")}))
        return tmp_path

    return make


def test_counts_are_written_last_and_replaced_files_are_removed(bucket, folder):
    assert push(folder("a", "b"), "buckets/user/calls/pairs") == "buckets/user/calls/pairs"
    assert bucket.calls == [(["pairs/a", "pairs/b"], []), (["pairs/counts.json"], [])]
    bucket.files["pairs2/c"] = b"of another folder"
    bucket.calls.clear()
    push(folder("a", "c"), "buckets/user/calls/pairs/")
    assert bucket.calls == [(["pairs/a", "pairs/c"], []), (["pairs/counts.json"], ["pairs/b"])]
    assert sorted(bucket.files) == ["pairs/a", "pairs/c", "pairs/counts.json", "pairs2/c"]


def test_push_after_an_interrupted_one(bucket, folder):
    bucket.files = {"a": b"half of a push"}
    push(folder("a", "b"), "buckets/user/calls")
    assert bucket.files.keys() == {"a", "b", "counts.json"} and bucket.files["a"] == b"a"


def test_other_files_of_a_bucket_are_kept(bucket, folder):
    bucket.files = {"notes.txt": b""}
    said = r"^user/calls has notes\.txt, which no push of a dataset folder wrote: name another folder in it"
    with pytest.raises(ValueError, match=said):
        push(folder("a"), "buckets/user/calls")
    with pytest.raises(ValueError, match="user/calls exists and is public: make it private"):
        push(folder("a"), "buckets/user/calls", private=True)
    assert bucket.calls == []


@pytest.mark.parametrize("name", ["buckets/", "buckets/user", "buckets/user/", "buckets//calls"])
def test_name_of_a_bucket(bucket, folder, name):
    with pytest.raises(ValueError, match=rf"^'{name}' is not the name of a bucket: give buckets/USER/NAME"):
        push(folder("a"), name)


@pytest.mark.parametrize("option", [{"revision": "v1"}, {"commit_message": "x"}, {"create_pr": True}])
def test_bucket_has_no_commits(folder, option):
    with pytest.raises(ValueError, match="is a bucket, which has no commits: leave out revision"):
        push(folder("a"), "buckets/user/calls", **option)


def test_card_options_of_a_bucket_are_refused(bucket, folder):
    said = r"^buckets/user/calls is a bucket, which gets the card of the folder as it is: leave out card\.license here, and"
    with pytest.raises(ValueError, match=said):
        push(folder("a"), "buckets/user/calls", card=Card(license="cc-by-4.0", source="Calls"))
    assert bucket.calls == []


def test_bucket_that_refuses_or_is_unknown_to_the_library(bucket, folder, monkeypatch):
    response = SimpleNamespace(status_code=404, headers={}, request=SimpleNamespace(headers={}))
    monkeypatch.setattr(bucket, "bucket_info", None)
    with monkeypatch.context() as patch:
        error = BucketNotFoundError("404", response=response)
        patch.setattr(bucket, "create_bucket", lambda *_, **__: (_ for _ in ()).throw(error))
        with pytest.raises(
            OSError, match=r"^the Hub does not let you write to buckets/user/calls \(status 404\): log in"
        ):
            push(folder("a"), "buckets/user/calls")
    monkeypatch.delattr(Bucket, "batch_bucket_files")
    with pytest.raises(ImportError, match="has no buckets: pip install -U huggingface_hub"):
        push(folder("a"), "buckets/user/calls")


def test_the_stand_in_has_methods_of_the_library():
    """Their names, where the installed huggingface_hub has buckets at all."""
    if hasattr(HfApi, "batch_bucket_files"):
        assert all(hasattr(HfApi, name) for name in vars(Bucket) if "bucket" in name)
