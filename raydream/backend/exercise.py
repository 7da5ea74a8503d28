"""One call of every kernel, forward and backward, on next to nothing."""

import torch

from raydream.backend.edges import find_edges
from raydream.backend.layout import make_hash_grid_layout
from raydream.types import Backend, Rays


def exercise(backend: Backend, device: str) -> None:
    """What has to be compiled is compiled then, and what cannot run on ``device`` has failed."""
    layout = make_hash_grid_layout(1, 2, 4, 2, 2)
    table = torch.zeros(layout.num_entries, 2, device=device, requires_grad=True)
    points = torch.full((1, 3), 0.3, device=device)
    hidden = torch.ones(16, layout.num_features, device=device, requires_grad=True)
    head = torch.ones(4, 16, device=device, requires_grad=True)
    backend.field(points, table, layout, hidden, head).sum().backward()
    output, gradient = backend.field_gradient(points, table, layout, hidden, head)
    (output.sum() + gradient.sum()).backward()
    rays = Rays(*torch.tensor([[[0.0, 0.0, 2.0]], [[0.0, 0.0, -1.0]]], device=device))
    occupancy = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
    samples = backend.march(rays, occupancy, 1.0, 0.5, torch.zeros(1, device=device))
    density = torch.ones(len(samples.t_start), device=device, requires_grad=True)
    backend.prune(density.detach(), samples, torch.full((), 0.01, device=device), 1e-4)
    accumulated, opacity, weights = backend.composite(density, density[:, None].expand(-1, 4), samples)
    (accumulated.sum() + opacity.sum() + weights.sum()).backward()
    clip = torch.tensor([[[-1.0, -1.0, 0.0, 1.0], [3.0, -1.0, 0.0, 1.0], [-1.0, 3.0, 0.0, 1.0]]], device=device)
    faces = torch.tensor([[0, 1, 2]], device=device)
    places, colors = clip.requires_grad_(), torch.ones(3, 3, device=device, requires_grad=True)
    fragments = backend.rasterize(places, faces, 4, 4)
    image = backend.interpolate(colors, faces, fragments)
    backend.antialias(image, places, find_edges(faces), fragments).sum().backward()
