"""Pushes to a bucket of the Hub, with a stand-in for its files."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import BucketNotFoundError

from usdm_sft.folder import push as push_module
from usdm_sft.folder.push import push

COUNTS = {
    "key": "0", "config": "pairs", "num_units": 1, "settings": {"template": {}, "history": 0, "max_length": 1}, "digests": {},
    "splits": {"train": {}}, "statistics": {},
}  # fmt: skip

pytestmark = pytest.mark.skipif(not hasattr(HfApi, "batch_bucket_files"), reason="this huggingface_hub has no buckets")


class Bucket:
    """The files of the bucket user/calls, and the calls that change them."""

    def __init__(self):
        self.files, self.calls, self.private = {}, [], False

    def create(self, api, bucket_id, *, private, exist_ok):
        assert bucket_id == "user/calls" and exist_ok
        self.private |= private is True and not self.files

    def tree(self, api, bucket_id, prefix, *, recursive):
        assert recursive and (prefix is None or not prefix.endswith("/"))
        return [SimpleNamespace(type="file", path=path) for path in self.files if path.startswith(prefix or "")]

    def batch(self, api, bucket_id, *, add=(), delete=()):
        self.calls.append(([path for _, path in add], list(delete)))
        self.files |= {path: file.read_bytes() for file, path in add}
        for path in delete:
            del self.files[path]

    def download(self, api, bucket_id, files):
        for path, file in files:
            file.write_bytes(self.files[path])


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    for name, method in {
        "create_bucket": made.create, "list_bucket_tree": made.tree, "batch_bucket_files": made.batch,
        "download_bucket_files": made.download, "bucket_info": lambda api, bucket_id: SimpleNamespace(private=made.private),
    }.items():  # fmt: skip
        monkeypatch.setattr(HfApi, name, lambda *args, method=method, **options: method(*args, **options))
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
    assert bucket.files["pairs/b"] == b"b"
    bucket.files["pairs2/c"] = b"of another folder"
    bucket.calls.clear()
    push(folder("a", "c"), "buckets/user/calls/pairs/")
    assert bucket.calls == [(["pairs/a", "pairs/c"], []), (["pairs/counts.json"], ["pairs/b"])]
    assert sorted(bucket.files) == ["pairs/a", "pairs/c", "pairs/counts.json", "pairs2/c"]


def test_push_after_an_interrupted_one(bucket, folder):
    bucket.files = {"a": b"half of a push"}
    push(folder("a", "b"), "buckets/user/calls")
    assert sorted(bucket.files) == ["a", "b", "counts.json"]


def test_other_files_of_a_bucket_are_kept(bucket, folder):
    bucket.files = {"notes.txt": b""}
    with pytest.raises(
        ValueError, match=r"^user/calls has notes\.txt, which no push .* wrote: name another folder in it"
    ):
        push(folder("a"), "buckets/user/calls")
    assert bucket.calls == []


def test_private_push_to_a_public_bucket_is_refused(bucket, folder):
    push(folder("a"), "buckets/user/calls")
    with pytest.raises(ValueError, match="user/calls exists and is public: make it private"):
        push(folder("a"), "buckets/user/calls", private=True)


@pytest.mark.parametrize("name", ["buckets/", "buckets/user", "buckets/user/", "buckets//calls"])
def test_name_of_a_bucket(bucket, folder, name):
    with pytest.raises(ValueError, match=rf"^'{name}' is not the name of a bucket: give buckets/USER/NAME"):
        push(folder("a"), name)


def test_bucket_has_no_commits(folder):
    for option in ({"revision": "v1"}, {"commit_message": "x"}, {"create_pr": True}):
        with pytest.raises(ValueError, match="is a bucket, which has no commits: leave out revision"):
            push(folder("a"), "buckets/user/calls", **option)


def test_errors_of_a_bucket_are_one_line(bucket, folder, monkeypatch):
    def refuse(*args, **options):
        raise BucketNotFoundError("404", response=SimpleNamespace(status_code=404, headers={}, request=None))

    monkeypatch.setattr(HfApi, "create_bucket", refuse)
    with pytest.raises(OSError, match=r"^the Hub does not let you write to buckets/user/calls \(status 404\): log in"):
        push(folder("a"), "buckets/user/calls")


def test_huggingface_hub_without_buckets(bucket, folder, monkeypatch):
    monkeypatch.delattr(HfApi, "batch_bucket_files")
    with pytest.raises(ImportError, match="has no buckets: pip install -U huggingface_hub"):
        push(folder("a"), "buckets/user/calls")
