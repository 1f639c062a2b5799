"""Golden values of the segmenters from PyTorch, written from the papers and the checkpoints' names, not from our code.

    python3 -m venv v && v/bin/pip install torch numpy && v/bin/python training/tests/golden/segment.py

Weights are random numbers from a hash on both sides, by each tensor's place in NAME.txt. PSPNet is an eighth as wide as
the real one (the Rust side reads widths from the file); ESPNetv2 is whole.
"""
import math
import pathlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

here = pathlib.Path(__file__).parent


def noise(seed, n):
    """splitmix64 of seed and index, uniform in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def fill(net, file, first):
    lines = []
    for i, (name, t) in enumerate(net.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            continue
        v = noise(first + i, t.numel()).reshape(t.shape)
        if t.dim() == 4:
            v = v * np.float32(math.sqrt(4.5 / (t.shape[1] * t.shape[2] * t.shape[3])))
        elif name.endswith("running_var"):
            v = v * np.float32(0.5) + np.float32(1)
        elif name.endswith("running_mean") or name.endswith("bias"):
            v = v * np.float32(0.1)
        else:
            v = v * np.float32(0.25) + np.float32(0.5)
        t.copy_(torch.from_numpy(v))
        lines.append(f"{first + i} {name} {' '.join(map(str, t.shape))}\n")
    (here / file).write_text("".join(lines))
    net.eval()


def bn(n):
    return nn.BatchNorm2d(n)


# PSPNet: ResNet-50 with a stem of three convolutions, at /8 by dilation; pyramid pooling head.
class Bottleneck(nn.Module):
    def __init__(self, i, n, stride, dilation, shortcut):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, n, 1, bias=False), bn(n)
        self.conv2, self.bn2 = nn.Conv2d(n, n, 3, stride, dilation, dilation, bias=False), bn(n)
        self.conv3, self.bn3 = nn.Conv2d(n, 4 * n, 1, bias=False), bn(4 * n)
        self.downsample = nn.Sequential(nn.Conv2d(i, 4 * n, 1, stride, bias=False), bn(4 * n)) if shortcut else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (self.downsample(x) if self.downsample else x))


class Encoder(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, base, 3, 2, 1, bias=False), bn(base)
        self.conv2, self.bn2 = nn.Conv2d(base, base, 3, 1, 1, bias=False), bn(base)
        self.conv3, self.bn3 = nn.Conv2d(base, 2 * base, 3, 1, 1, bias=False), bn(2 * base)
        i = 2 * base
        for s, (blocks, stride, first, rest) in enumerate([(3, 1, 1, 1), (4, 2, 1, 1), (6, 1, 1, 2), (3, 1, 2, 4)]):
            n, layers = base << s, []
            for b in range(blocks):
                layers.append(Bottleneck(i, n, stride if b == 0 else 1, first if b == 0 else rest, b == 0))
                i = 4 * n
            setattr(self, f"layer{s + 1}", nn.Sequential(*layers))

    def forward(self, x):
        for c, b in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(b(c(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class Head(nn.Module):
    def __init__(self, i, n, classes):
        super().__init__()
        self.ppm = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(s), nn.Conv2d(i, n, 1, bias=False), bn(n), nn.ReLU()) for s in (1, 2, 3, 6)
        )
        self.conv_last = nn.Sequential(
            nn.Conv2d(i + 4 * n, n, 3, 1, 1, bias=False), bn(n), nn.ReLU(), nn.Dropout2d(), nn.Conv2d(n, classes, 1)
        )

    def forward(self, x):
        size = x.shape[2:]
        return self.conv_last(torch.cat([x] + [F.interpolate(p(x), size, mode="bilinear", align_corners=False) for p in self.ppm], 1))


# ESPNetv2.
class CBR(nn.Module):
    def __init__(self, i, o, k, s=1, g=1, act=True):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), bn(o)
        if act:
            self.act = nn.PReLU(o)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.act(x) if hasattr(self, "act") else x


class BR(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.bn, self.act = bn(n), nn.PReLU(n)

    def forward(self, x):
        return self.act(self.bn(x))


class Dilated(nn.Module):
    def __init__(self, n, s, d):
        super().__init__()
        self.conv = nn.Conv2d(n, n, 3, s, d, d, n, bias=False)

    def forward(self, x):
        return self.conv(x)


class EESP(nn.Module):
    def __init__(self, i, o, s, dilations):
        super().__init__()
        n = o // 4
        self.stride = s
        self.proj_1x1 = CBR(i, n, 1, g=4)
        self.spp_dw = nn.ModuleList(Dilated(n, s, d) for d in dilations)
        self.conv_1x1_exp = CBR(o, o, 1, g=4, act=False)
        self.br_after_cat = BR(o)
        self.module_act = nn.PReLU(o)

    def forward(self, x):
        y, out = self.proj_1x1(x), []
        for branch in self.spp_dw:
            z = branch(y)
            out.append(z + out[-1] if out else z)
        z = self.conv_1x1_exp(self.br_after_cat(torch.cat(out, 1)))
        if self.stride == 2:
            return z
        return self.module_act(z + x if z.shape == x.shape else z)


class Down(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.eesp = EESP(i, o - i, 2, (1, 2, 3, 4))
        self.inp_reinf = nn.Sequential(CBR(3, 3, 3), CBR(3, o, 1, act=False))
        self.act = nn.PReLU(o)

    def forward(self, x, image):
        pool = lambda t: F.avg_pool2d(t, 3, 2, 1)
        mean = pool(x)
        y = torch.cat([mean, self.eesp(x)], 1)
        image = pool(image)
        while image.shape[2] != mean.shape[2]:
            image = pool(image)
        return self.act(y + self.inp_reinf(image))


class Seq(nn.Module):
    """conv, norm, PReLU under the names cbr.0, cbr.1, cbr.2."""

    def __init__(self, i, o, k, g=1):
        super().__init__()
        self.cbr = nn.Sequential(nn.Conv2d(i, o, k, 1, k // 2, groups=g, bias=False), bn(o), nn.PReLU(o))

    def forward(self, x):
        return self.cbr(x)


class Norm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.br = nn.Sequential(bn(n), nn.PReLU(n))

    def forward(self, x):
        return self.br(x)


class Shuffle(nn.Module):
    def forward(self, x):
        b, c, h, w = x.shape
        return x.reshape(b, 5, c // 5, h, w).transpose(1, 2).reshape(b, c, h, w)


class Pyramid(nn.Module):
    def __init__(self, i, n, o, last):
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(n, n, 3, 1, 1, groups=n, bias=False) for _ in range(5))
        self.projection_layer = Seq(i, n, 1)
        self.merge_layer = nn.Sequential(Norm(5 * n), Shuffle(), Seq(5 * n, n, 3, n), nn.Conv2d(n, o, 1, bias=last))
        if not last:
            self.br = Norm(o)

    def forward(self, x):
        x = self.projection_layer(x)
        h, w = x.shape[2:]
        out = []
        for scale, stage in zip((2.0, 1.5, 1.0, 0.5, 0.1), self.stages):
            size = (max(5, math.ceil(h * scale)), max(5, math.ceil(w * scale)))
            if scale < 1:
                y = F.interpolate(stage(F.adaptive_avg_pool2d(x, size)), (h, w), mode="bilinear", align_corners=True)
            elif scale > 1:
                y = F.adaptive_avg_pool2d(stage(F.interpolate(x, size, mode="bilinear", align_corners=True)), (h, w))
            else:
                y = stage(x)
            out.append(y)
        y = self.merge_layer(torch.cat(out, 1))
        return self.br(y) if hasattr(self, "br") else y


class Merge(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.wt_layer = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(i, o, 1, bias=False), nn.Sigmoid())
        self.expansion_layer = Seq(i, o, 3, math.gcd(i, o))

    def forward(self, x):
        return self.expansion_layer(x) * self.wt_layer(x)


class ESPNetv2(nn.Module):
    def __init__(self, classes=20):
        super().__init__()
        c = [32, 128, 256, 512]
        base = nn.Module()
        base.level1 = CBR(3, c[0], 3, 2)
        base.level2_0, base.level3_0 = Down(c[0], c[1]), Down(c[1], c[2])
        base.level3 = nn.ModuleList(EESP(c[2], c[2], 1, (1, 2, 3, 4)) for _ in range(3))
        base.level4_0 = Down(c[2], c[3])
        base.level4 = nn.ModuleList(EESP(c[3], c[3], 1, (1, 1, 2, 3)) for _ in range(7))
        self.base_net = base
        d = [64, 48, 32, classes]
        self.bu_dec_l1, self.bu_dec_l2 = Pyramid(c[3], 10, d[0], False), Pyramid(d[0], 10, d[1], False)
        self.bu_dec_l3, self.bu_dec_l4 = Pyramid(d[1], 10, d[2], False), Pyramid(d[2], 10, d[3], True)
        for level, (i, o) in enumerate(((c[2], d[0]), (c[1], d[1]), (c[0], d[2])), 2):
            setattr(self, f"merge_enc_dec_l{level}", Merge(i, o))
            setattr(self, f"bu_br_l{level}", nn.Sequential(bn(o), nn.PReLU(o)))

    def forward(self, x):
        b = self.base_net
        l1 = b.level1(x)
        l2 = b.level2_0(l1, x)
        l3 = b.level3_0(l2, x)
        for m in b.level3:
            l3 = m(l3)
        l4 = b.level4_0(l3, x)
        for m in b.level4:
            l4 = m(l4)
        y = self.bu_dec_l1(l4)
        for level, encoded, decode in ((2, l3, self.bu_dec_l2), (3, l2, self.bu_dec_l3), (4, l1, self.bu_dec_l4)):
            y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True)
            y = decode(getattr(self, f"bu_br_l{level}")(y + getattr(self, f"merge_enc_dec_l{level}")(encoded)))
        return y


def save(name, t):
    flat = t.numpy().ravel()
    out = flat[(np.arange(997) * len(flat)) // 997]
    np.save(here / name, out)
    print(name, t.shape, out[:3], out.std())


def main():
    torch.manual_seed(0)
    with torch.no_grad():
        image = torch.from_numpy(noise(777, 3 * 64 * 96).reshape(1, 3, 64, 96))
        encoder, head = Encoder(8), Head(256, 64, 150)
        fill(encoder, "pspnet_encoder.txt", 1000)
        fill(head, "pspnet_decoder.txt", 3000)
        save("pspnet.npy", F.interpolate(head(encoder(image)), (64, 96), mode="bilinear", align_corners=False))
        net = ESPNetv2()
        fill(net, "espnetv2.txt", 5000)
        save("espnetv2.npy", F.interpolate(net(image), (64, 96), mode="bilinear", align_corners=True))


if __name__ == "__main__":
    main()
