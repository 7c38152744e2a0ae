"""A FedPerfix round in the pattern of the paper's released code: our own reimplementation, not that code.

Written from a description of what the released code does (Sun et al., ICCV 2023, arXiv 2308.09160), as a competent
reader would write it in plain PyTorch:

- The server keeps one full model per client. At the start of a round it copies all of them, and at the end it takes
  a copy of every client's state dict: two copies of all models a round (the released code has several).
- A round goes through all clients, one after the other. Each loads the global tensors into its model, key by key,
  and moves it to the device and back. A sampled one trains with plain SGD; all are tested.
- Whether a tensor is global is decided by parts of its name.
- Attention is eager: the adapter's output is padded with zeros for the queries, scaled, added to the projection's
  output, and the N×N scores are materialised in float32.
- Images go through PIL, one by one, in a new DataLoader per client and epoch. The released code starts loader
  processes and reads the data from disk every round; here the data stay in memory and the loader has no processes
  on a CPU, which is faster there.
- The loss and the number of right answers are read from the device after every batch.
- The mean is a loop over keys and clients.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from bench.peers.contestant import Turns
from bench.peers.work import SIDE, Work
from fedperfix_kernels.nn import PrefixAttention

LOCAL = ("prefix", "head")  # a tensor whose name contains one of these stays with the client
_LOADER_PROCESSES = {"cpu": 0, "cuda": 2}


class EagerAttention(nn.Module):
    """Self-attention with an adapter that is added to keys and values, from the parts of a `PrefixAttention`."""

    def __init__(self, layer: PrefixAttention) -> None:
        super().__init__()
        self.heads, self.scale = layer.num_heads, layer.scale
        self.qkv, self.proj, self.prefix = layer.qkv, layer.proj, layer.prefix

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] from [B, N, C]."""
        batch, tokens, width = x.shape
        adapter = self.prefix.up(torch.tanh(self.prefix.down(x)))
        adapter = torch.cat([torch.zeros_like(x), adapter], dim=-1)
        qkv = self.qkv(x) + adapter * 1.0
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class Pictures(Dataset):
    """Some images of the pool, each transformed by PIL and torchvision when it is asked for."""

    def __init__(self, images: Sequence, labels: Tensor, rows: Tensor) -> None:
        self.images, self.labels, self.rows = images, labels.tolist(), rows.tolist()
        half = (0.5, 0.5, 0.5)
        self.transform = transforms.Compose(
            [transforms.Resize((SIDE, SIDE)), transforms.ToTensor(), transforms.Normalize(half, half)]
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.rows[index]
        return self.transform(Image.fromarray(self.images[row])), self.labels[row]


def eager_model(work: Work) -> nn.Module:
    """The start model with eager attention; its parameters keep their names."""
    model = work.new_model()
    for block in model.blocks:
        block.attn = EagerAttention(block.attn)
    return model


def is_local(key: str) -> bool:
    """Whether a tensor stays with the client, by its name."""
    return any(part in key for part in LOCAL)


def play(work: Work, rounds: int, turns: Turns) -> dict[str, Tensor]:
    """All rounds; arguments and result as `bench.peers.contestant.play`."""
    images = work.data.inputs.permute(0, 2, 3, 1).contiguous().numpy()
    model = eager_model(work)
    server = [copy.deepcopy(model) for _ in range(work.clients)]
    shared = {key: value.clone() for key, value in model.state_dict().items() if not is_local(key)}
    for round in range(1, rounds + 1):
        turns.begin()
        shared, accuracy = play_round(work, images, server, shared, round)
        turns.end(accuracy)
    return shared


def play_round(
    work: Work, images: Sequence, server: list[nn.Module], shared: dict[str, Tensor], round: int
) -> tuple[dict[str, Tensor], float]:
    """One round over all clients.

    Args:
        work: the task.
        images: uint8 [n, 32, 32, 3].
        server: one model per client; changed in place.
        shared: the global tensors.
        round: its number, from 1.

    Returns:
        The new global tensors, and the mean accuracy of all clients in percent.
    """
    device, sampled = torch.device(work.device), work.cohort(round)
    models = [copy.deepcopy(model) for model in server]
    states, accuracies = [], []
    for client, model in enumerate(models):
        state = model.state_dict()
        for key in state:
            if not is_local(key):
                state[key] = shared[key]
        model.load_state_dict(state)
        model.to(device)
        if client in sampled:
            for order in work.orders(client, round):
                train(model, _loader(work, images, order), work.lr, device)
        accuracies.append(test(model, _loader(work, images, work.data.test[client]), device))
        model.to("cpu")
        states.append(copy.deepcopy(model.state_dict()))
    for model, state in zip(server, states, strict=True):
        model.load_state_dict(state)
    sizes = [len(work.data.train[client]) for client in sampled]
    mean = {}
    for key in shared:
        mean[key] = torch.zeros_like(shared[key])
        for client, size in zip(sampled, sizes, strict=True):
            mean[key] += states[client][key] * (size / sum(sizes))
    return mean, sum(accuracies) / len(accuracies)


def train(model: nn.Module, loader: DataLoader, lr: float, device: torch.device) -> float:
    """One epoch of plain SGD; the mean loss over its batches."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def test(model: nn.Module, loader: DataLoader, device: torch.device) -> float:
    """Accuracy in percent."""
    model.eval()
    right = total = 0
    for pixels, labels in loader:
        pixels, labels = pixels.to(device), labels.to(device)
        right += (model(pixels).argmax(1) == labels).sum().item()
        total += len(labels)
    return 100.0 * right / total


def _loader(work: Work, images: Sequence, rows: Tensor) -> DataLoader:
    """Batches of these images in this order; the released code shuffles, here `work` has done it."""
    pictures = Pictures(images, work.data.labels, rows)
    return DataLoader(pictures, batch_size=work.batch_size, num_workers=_LOADER_PROCESSES[work.device])
