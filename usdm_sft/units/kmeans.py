"""K-means centroids for features, by scikit-learn, and what the units that they give are like.

Batches of 10,000 frames, k-means++ and no reassignment are those of HuBERT (examples/hubert/simple_kmeans/learn_kmeans.py of fairseq).
HuBERT stops when sums of distances no longer fall, and takes the best of 20 starts. Several threads round such sums in an order that
changes from run to run, so here neither the centroids nor the number of steps follows from one: there is one start, and a fixed number of
passes. The remaining steps give the same bits for any number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from sklearn.cluster import MiniBatchKMeans

BATCH_FRAMES = 10_000
SETTINGS = {
    "init": "k-means++",
    "n_init": 1,
    "batch_size": BATCH_FRAMES,
    "max_no_improvement": None,
    "tol": 0.0,
    "reassignment_ratio": 0.0,
}
_SHOWN = 10  # units at each end of a list
_CHUNK = 10_000  # frames whose distances are computed at once


def require_scikit_learn() -> None:
    """Check that scikit-learn can be imported.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import sklearn.cluster  # noqa: F401  # an optional extra
    except ImportError as error:
        raise ImportError(f"fit needs scikit-learn ({error}): pip install 'dailytalk-usdm[fit]'") from error


def fit_kmeans(features: np.ndarray, num_units: int, *, seed: int, num_passes: int) -> MiniBatchKMeans:
    """Fit mini-batch k-means.

    Args:
        features: (num_frames, width) float32, in C order, which are not copied.
        num_units: Number of centroids, at most `num_frames`.
        seed: Seed of the first centroids and of the batches.
        num_passes: Number of batches, as a multiple of those that hold `num_frames` frames.

    Returns:
        `cluster_centers_`, (num_units, width) float32; `labels_`, (num_frames,) int32, the nearest centroid of each frame; and `predict`,
        which returns that of other features.
    """
    from sklearn.cluster import MiniBatchKMeans

    kmeans = MiniBatchKMeans(num_units, max_iter=num_passes, random_state=seed, **SETTINGS)
    # More threads round the products of k-means++ in another way.
    with threadpool_limits(limits=1, user_api="blas"):
        return kmeans.fit(features)


def describe_units(features: np.ndarray, units: np.ndarray, centroids: np.ndarray) -> dict[str, Any]:
    """Return numbers about units.

    Args:
        features: (num_frames, width) float32.
        units: (num_frames,) integers, the nearest centroid of each frame.
        centroids: (num_units, width) float32.

    Returns:
        num_frames: Number of frames.
        inertia: Sum over all frames of the squared distance to the nearest centroid.
        inertia_per_frame: Its mean.
        empty_clusters: Number of units that no frame has.
        entropy: Of the distribution of units, in bits.
        perplexity: 2 to the power of the entropy: the number of units that have this entropy if all are equally frequent.
        most_frequent: Up to ten units with their numbers of frames, the most frequent first.
        least_frequent: Up to ten units with their numbers of frames, the least frequent first.
    """
    inertia = 0.0
    for start in range(0, len(features), _CHUNK):
        rows = slice(start, start + _CHUNK)
        inertia += float(np.square(features[rows] - centroids[units[rows]], dtype=np.float64).sum())
    counts = np.bincount(units, minlength=len(centroids))
    shares = counts[counts > 0] / len(features)
    entropy = float(-(shares * np.log2(shares)).sum())
    order = np.lexsort((np.arange(len(counts)), -counts))
    return {
        "num_frames": len(features),
        "inertia": inertia,
        "inertia_per_frame": inertia / len(features),
        "empty_clusters": int((counts == 0).sum()),
        "entropy": entropy,
        "perplexity": 2.0**entropy,
        "most_frequent": [[int(unit), int(counts[unit])] for unit in order[:_SHOWN]],
        "least_frequent": [[int(unit), int(counts[unit])] for unit in order[::-1][:_SHOWN]],
    }
