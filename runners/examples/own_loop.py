"""A training loop of your own, in plain PyTorch: `torchrun --nproc_per_node 2 runners/examples/own_loop.py`."""

import os

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.nn.functional import affine_grid, grid_sample, normalize
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from instance_ssl import InstanceClassifier

world_size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))  # set by torchrun
if world_size > 1:
    distributed.init_process_group()
images, labels = (torch.as_tensor(array).float()[:1792] for array in load_digits(return_X_y=True))
data = TensorDataset(images.view(-1, 1, 8, 8) / 16, torch.arange(len(images)))  # an image's id is its place
classifier = InstanceClassifier(len(data), embedding_dim=64, gradient_reduction="mean")  # what DDP does
torch.manual_seed(rank)
backbone = nn.Sequential(nn.Conv2d(1, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
encoder: nn.Module = nn.Sequential(backbone, nn.Linear(256, 64)).to(classifier.device)
encoder = nn.parallel.DistributedDataParallel(encoder) if world_size > 1 else encoder
sampler: DistributedSampler[object] = DistributedSampler(data, world_size, rank)
loader, optimizer = DataLoader(data, 128 // world_size, sampler=sampler), torch.optim.AdamW(encoder.parameters(), 3e-3)
classifier.initialize(encoder, loader)
for epoch in range(6):
    sampler.set_epoch(epoch)
    classifier.refresh_hard_classes()
    for batch, ids in loader:
        maps = torch.eye(2, 3) + 0.1 * torch.randn(2 * len(ids), 2, 3)  # two views of each image, moved at random
        views = grid_sample(batch.tile(2, 1, 1, 1), affine_grid(maps, [len(maps), 1, 8, 8], False), align_corners=False)
        loss = classifier(encoder(views.to(classifier.device)), ids.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        classifier.step(learning_rate=1.0)
    features = normalize(backbone(data.tensors[0].to(classifier.device)).detach().cpu())
    nearest = labels[(features @ features.T).fill_diagonal_(-1).topk(5).indices].mode().values
    if rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.2f}, k-NN {(nearest == labels).float().mean():.1%}", flush=True)
