"""k-means files as they are published: float64 arrays are read as the reference reads them, joblib files and faiss indices are refused."""

import struct

import joblib
import numpy as np
import pytest
import torch
from sklearn.cluster import MiniBatchKMeans

from tests.code_blocks import find_code
from tests.helpers import REPOSITORY
from tests.units.small_models import UNITS, Evil, convert_small
from usdm_sft.units.folder import unit_model_digest
from usdm_sft.units.model import UnitModel

WIDTH = 64
# Values between two float32 neighbours, halfway between them (to the even one), below the smallest, and large.
INEXACT = [0.1, 1 / 3, 1 + 2**-24, 1 + 3 * 2**-24, -(1 + 2**-24 + 2**-50), 1e-46, 3e-42, 1e18 * (1 + 2**-26)]


def reference(array):
    """The centroids and their norms in `KmeansModel` of seamless_communication (models/unit_extractor/kmeans.py), float32."""
    centroids = torch.from_numpy(array.transpose()).to(dtype=torch.float32)
    return centroids.T.contiguous(), (centroids**2).sum(0)


def test_float64_is_rounded_as_in_the_reference(tmp_path):
    array = np.random.default_rng(0).standard_normal((9, WIDTH))
    array[0, : len(INEXACT)] = INEXACT
    assert (array.astype(np.float32) != array).sum() > 500
    for name, order in (("C", array), ("F", np.asfortranarray(array))):
        np.save(tmp_path / f"{name}.npy", order)
        folder = convert_small(tmp_path / name, kmeans=tmp_path / f"{name}.npy")
        saved = np.load(folder / "kmeans.npy")
        assert saved.dtype == np.float32
        centroids, norms = reference(array)
        assert np.array_equal(saved, centroids.numpy())
        model = UnitModel.from_pretrained(folder)
        assert torch.equal(model.centroids, centroids)
        torch.testing.assert_close(model.centroid_norms, norms, rtol=1e-6, atol=0)
        assert convert_small(folder, kmeans=tmp_path / f"{name}.npy") == folder


def test_float64_gives_the_unit_model_of_its_float32_values(tmp_path):
    np.save(tmp_path / "k.npy", np.load(UNITS / "kmeans.npy").astype(np.float64))
    wide, narrow = convert_small(tmp_path / "wide", kmeans=tmp_path / "k.npy"), convert_small(tmp_path / "narrow")
    assert (wide / "kmeans.npy").read_bytes() == (narrow / "kmeans.npy").read_bytes()
    assert unit_model_digest(wide) == unit_model_digest(narrow)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39], ids=str)
def test_float64_that_is_not_finite_in_float32_is_refused(tmp_path, value, recwarn):
    array = np.zeros((3, WIDTH))
    array[1, 2] = value
    np.save(tmp_path / "k.npy", array)
    with pytest.raises(ValueError, match=r"k\.npy holds NaN or infinite values, or values too large for float32"):
        convert_small(tmp_path / "m", kmeans=tmp_path / "k.npy")
    assert not recwarn.list and not (tmp_path / "m").exists()


def faiss_header(name):
    """The start of a faiss index of 768 dimensions and 1,000 entries (write_index_header in faiss/impl/index_write.cpp)."""
    return name + struct.pack("<iqqq?i", 768, 1000, 1 << 20, 1 << 20, True, 1)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: joblib.dump(Evil(), path), "is a pickle, as joblib writes it, and reading it would run code"),
        (lambda path: joblib.dump(Evil(), path, compress=("zlib", 3)), "is compressed, as joblib writes pickles"),
        (lambda path: joblib.dump(Evil(), path, compress=("gzip", 3)), "is compressed, as joblib writes pickles"),
        (lambda path: joblib.dump(Evil(), path, compress=("bz2", 3)), "is compressed, as joblib writes pickles"),
        (lambda path: joblib.dump(Evil(), path, compress=("xz", 3)), "is compressed, as joblib writes pickles"),
        (lambda path: joblib.dump(Evil(), path, compress=("lzma", 3)), "is compressed, as joblib writes pickles"),
        (lambda path: path.write_bytes(faiss_header(b"IxPT")), "is a faiss index"),
        (lambda path: path.write_bytes(faiss_header(b"IwPf")), "is a faiss index"),
        (lambda path: path.write_bytes(faiss_header(b"IxF2")), "is a faiss index"),
    ],
    ids=["joblib", "zlib", "gzip", "bz2", "xz", "lzma", "faiss with OPQ", "faiss lists", "faiss flat"],
)
def test_other_formats_name_the_conversion(tmp_path, capfd, write, message):
    write(tmp_path / "k.bin")
    with pytest.raises(ValueError, match=rf"k\.bin {message}.*once and in an environment of your own") as raised:
        convert_small(tmp_path / "m", kmeans=tmp_path / "k.bin")
    assert "code ran" not in capfd.readouterr().out
    assert not (tmp_path / "m").exists()
    section = str(raised.value).split("'")[1]
    assert f"\n## {section}\n" in (REPOSITORY / "docs" / "unit-models.md").read_text(encoding="utf-8")


def test_documented_conversion_of_a_joblib_file(tmp_path, monkeypatch):
    """The lines of the page turn the k-means of scikit-learn into centroids that `convert` takes."""
    monkeypatch.chdir(tmp_path)
    features = np.random.default_rng(0).standard_normal((200, WIDTH))
    fitted = MiniBatchKMeans(7, random_state=0, n_init=1).fit(features)
    joblib.dump(fitted, "km.bin")
    exec(find_code("joblib.load"), {})
    folder = convert_small(tmp_path / "m", kmeans=tmp_path / "kmeans.npy")
    assert np.array_equal(np.load(folder / "kmeans.npy"), fitted.cluster_centers_.astype(np.float32))
