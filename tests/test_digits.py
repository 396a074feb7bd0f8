"""A small separable network learns handwritten digits, with xsep's layers as well as with torch's."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from xsep import SeparableConv2d


def xsep_separable(in_channels, out_channels):
    return SeparableConv2d(in_channels, out_channels, 3, padding=1, bias=False)


def torch_separable(in_channels, out_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False),
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
    )


def accuracy(separable, device):
    """Test accuracy after training with ``separable`` layers, from a fixed seed."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target, device=device)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.3, random_state=0, stratify=digits.target)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        separable(16, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        separable(32, 64),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).to(device)
    epochs, batch = 15, 64
    optimizer = torch.optim.AdamW(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, epochs * (len(train) // batch))
    for _ in range(epochs):
        for indices in train[torch.randperm(len(train))][: len(train) // batch * batch].split(batch):
            loss = F.cross_entropy(net(images[indices]), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        return (net(images[test]).argmax(1) == labels[test]).double().mean().item()


def test_digits(threads, backend):
    threads(1)
    ours, theirs = accuracy(xsep_separable, backend.device), accuracy(torch_separable, backend.device)
    assert ours >= 0.95
    assert ours == pytest.approx(theirs, abs=0.015)
