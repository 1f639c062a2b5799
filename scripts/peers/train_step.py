"""PyTorch as a peer of `training bench`: MobileNetV2 to its 320-channel stage, three taps, GeM, triplet loss, AdamW.

Usage: train_step.py DIR THREADS DEVICE PRECISION, with DIR/weights.npy (flat, in network order: weight, scale, shift of each convolution),
DIR/image.npy and DIR/shape.txt (N H W). One step for each line read; answers with seconds and the loss. DEVICE is cpu or cuda:N;
PRECISION is f32 (without TF32) or bf16 (autocast, on a GPU). On a GPU the image's way up counts, from page-locked memory.
"""
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

folder, threads, device, precision = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
away = device != "cpu"
mixed = away and precision == "bf16"
torch.backends.cudnn.benchmark = True
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
torch.set_num_threads(threads)
n, h, w = map(int, open(f"{folder}/shape.txt").read().split())
image = torch.from_numpy(np.load(f"{folder}/image.npy").astype(np.float32).reshape(n, 3, h, w))

STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]


def conv(i, o, k, s=1, g=1, act=True):
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([nn.ReLU6(inplace=True)] if act else []))


class Block(nn.Module):
    def __init__(self, i, o, s, t):
        super().__init__()
        hidden = i * t
        self.residual = s == 1 and i == o
        layers = [conv(i, hidden, 1)] if t != 1 else []
        self.body = nn.Sequential(*layers, conv(hidden, hidden, 3, s, hidden), conv(hidden, o, 1, act=False))

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        blocks, i = [conv(3, 32, 3, 2)], 32
        for t, c, count, s in STAGES:
            for k in range(count):
                blocks.append(Block(i, c, s if k == 0 else 1, t))
                i = c
        self.blocks = nn.ModuleList(blocks)
        self.p = nn.Parameter(torch.tensor([3.0]))

    def forward(self, x):
        out = []
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k in (6, 13, 17):
                pooled = x.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)
                out.append(F.normalize(pooled))
        return F.normalize(torch.cat(out, 1))


net = Net().train()
flat, at = torch.from_numpy(np.load(f"{folder}/weights.npy").astype(np.float32).ravel()), 0
decays, rest = [], [net.p]
for module in net.modules():
    if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
        for p in (module.weight, module.bias):
            if p is not None:
                p.data.copy_(flat[at : at + p.numel()].reshape(p.shape))
                at += p.numel()
                (decays if isinstance(module, nn.Conv2d) else rest).append(p)
assert at == flat.numel()
net.to(device)
# The foreach form is PyTorch's fast one on a CPU.
groups = [{"params": decays, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}]
optimiser = torch.optim.AdamW(groups, lr=1e-4, foreach=True)
b = n // 3


def step(x):
    began = time.perf_counter()
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=mixed):
        d = net(x.to(device, non_blocking=True)).float()
    q, p, m = d[:b], d[b : 2 * b], d[2 * b :]
    loss = (((q - p).norm(dim=1) - (q - m).norm(dim=1) + 0.1).clamp(min=0)).mean()
    loss.backward()
    optimiser.step()
    value = loss.item()
    if away:
        torch.cuda.synchronize()
    return time.perf_counter() - began, value


# Both layouts are PyTorch's own; whichever is faster on this machine is the peer.
start = [p.detach().clone() for p in net.parameters()]
times = {}
for layout in (torch.contiguous_format, torch.channels_last):
    net.to(memory_format=layout)
    x = image.contiguous(memory_format=layout)
    x = x.pin_memory() if away else x
    step(x)
    times[layout] = step(x)[0]
layout = min(times, key=times.get)
net.to(memory_format=layout)
image = image.contiguous(memory_format=layout)
image = image.pin_memory() if away else image
with torch.no_grad():
    for p, s in zip(net.parameters(), start):
        p.copy_(s)
optimiser.state.clear()

for line in sys.stdin:
    seconds, loss = step(image)
    print(seconds, loss, flush=True)
