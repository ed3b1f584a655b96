"""Features in two dimensions, for a picture: principal components, or t-SNE of them where scikit-learn is installed."""

import torch
from torch import Tensor


def evenly_spaced(total: int, count: int) -> Tensor:
    """At most `count` of the ids 0 … total - 1, int64, the first and the last among them."""
    return torch.linspace(0, total - 1, min(total, count), dtype=torch.float64).long().unique()


def principal_components(features_nF: Tensor, num_components: int) -> Tensor:
    """Scores (n, c), float32, of the L2-normalised features along their directions of most variance.

    c is `num_components`, or as many as n and F allow. Uses the eigenvectors of the n x n Gram matrix, as n is small
    where F is large (raw pixels). The score of largest magnitude in each column is positive.
    """
    unit_nF = torch.nn.functional.normalize(features_nF.double(), dim=1, eps=1e-300)
    unit_nF -= unit_nF.mean(dim=0)
    count = min(num_components, *features_nF.shape)
    values, vectors = torch.linalg.eigh(unit_nF @ unit_nF.T)
    scores_nc = vectors[:, -count:].flip(1) * values[-count:].flip(0).clamp_min(0).sqrt()
    largest_c = scores_nc.gather(0, scores_nc.abs().argmax(dim=0, keepdim=True))
    return (scores_nc * torch.where(largest_c < 0, -1.0, 1.0)).float()


def plane(components_nc: Tensor) -> tuple[Tensor, str]:
    """Returns points (n, 2) and the method's name: t-SNE of principal components, or else the first two of them.

    t-SNE (van der Maaten and Hinton 2008) is scikit-learn's: perplexity 30, or less for few points.
    """
    count, width = components_nc.shape
    components_nc = torch.nn.functional.pad(components_nc, (0, max(0, 2 - width)))
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        TSNE = None
    if TSNE is None or count < 10:
        return components_nc[:, :2], "PCA"
    points = TSNE(perplexity=min(30.0, (count - 1) / 3), init="pca", random_state=0).fit_transform(
        components_nc.numpy()
    )
    return torch.from_numpy(points), "t-SNE"
