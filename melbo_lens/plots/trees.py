"""Which rows are alike?  Average linkage on 1 - cosine orders them, or joins them into clusters."""

import numpy as np
from scipy.cluster.hierarchy import dendrogram, fcluster, linkage
from scipy.spatial.distance import squareform


def tree(cosines: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Returns the order and the joins; rows with NaN come last and are in no join."""
    fine = np.flatnonzero(np.isfinite(np.diagonal(cosines)))
    rest = [int(i) for i in np.flatnonzero(~np.isfinite(np.diagonal(cosines)))]
    if len(fine) < 2:
        return [*map(int, fine), *rest], np.zeros((0, 4, 2))
    links = linkage(_distances(cosines[np.ix_(fine, fine)]), "average", optimal_ordering=True)
    found = dendrogram(links, no_plot=True)
    places = (np.array(found["icoord"]) - 5) / 10  # scipy places leaf i at 10 i + 5
    return [*(int(fine[i]) for i in found["leaves"]), *rest], np.stack([places, np.array(found["dcoord"])], axis=-1)


def clusters(cosines: np.ndarray, most: int) -> tuple[np.ndarray, list[int], list[int]]:
    """Joins rows by average linkage until at most so many clusters are left; rows with NaN are left out.

    Returns:
        The mean cosines between the clusters' members, the most typical member of each, and how many it has.
    """
    fine = np.flatnonzero(np.isfinite(np.diagonal(cosines)))
    if not len(fine):
        raise ValueError("there are no rows without NaN to draw.")
    among = cosines[np.ix_(fine, fine)]
    if len(fine) <= most:
        return among, fine.tolist(), [1] * len(fine)
    labels = fcluster(linkage(_distances(among), "average"), most, "maxclust")
    belongs = (labels == np.unique(labels)[:, None]).astype(float)
    sizes = belongs.sum(1)
    likeness = belongs @ among  # of each cluster to each row
    firsts = np.where(belongs > 0, likeness, -np.inf).argmax(1)
    return likeness @ belongs.T / np.outer(sizes, sizes), fine[firsts].tolist(), sizes.astype(int).tolist()


def _distances(cosines: np.ndarray) -> np.ndarray:
    """Returns 1 - cosine of every pair, as `linkage` wants it."""
    distances = np.clip(1 - cosines, 0, 2)
    np.fill_diagonal(distances, 0)
    return squareform((distances + distances.T) / 2, checks=False)
