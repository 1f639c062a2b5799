"""Golden values of the networks for local features and matching, from PyTorch and ONNX Runtime.

    python3 -m venv v && v/bin/pip install torch numpy opencv-python-headless onnxruntime kornia && v/bin/python tests/golden/local.py WEIGHTS IMAGE

Random weights come from a hash on both sides (`noise` here, `test_noise` in src/test_noise.rs). WEIGHTS is a folder with
magicpoint_vgg.pth, sp_squeeze_b1.onnx and xfeat_vga.onnx, IMAGE a photograph: neither is in the repository, and the tests
that need them skip by name where they are not.
"""
import pathlib
import sys

import cv2
import kornia
import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F

here = pathlib.Path(__file__).parent
weights, image = pathlib.Path(sys.argv[1]), sys.argv[2]


def noise(seed, n):
    """splitmix64 of seed and index, uniform in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def sample(t):
    """97 values, evenly through the tensor."""
    flat = np.asarray(t, np.float32).ravel()
    return flat[(np.arange(97) * len(flat)) // 97]


def save(name, values):
    out = np.concatenate([sample(v) for v in values])
    np.save(here / name, out)
    print(name, out.shape, out[:3])


def rand(seed, shape, scale):
    return torch.tensor(noise(seed, int(np.prod(shape))).reshape(shape) * np.float32(scale))


# SuperPoint, VGG, as in the paper's demo: every encoder layer, both heads.
convs = [("1a", 1, 64), ("1b", 64, 64), ("2a", 64, 64), ("2b", 64, 64), ("3a", 64, 128), ("3b", 128, 128), ("4a", 128, 128), ("4b", 128, 128)]
heads = [("Pa", 128, 256, 3), ("Pb", 256, 65, 1), ("Da", 128, 256, 3), ("Db", 256, 256, 1)]
w = {}
for i, (name, cin, cout, k) in enumerate([(n, a, b, 3) for n, a, b in convs] + heads):
    w[name] = (rand(10 * i, (cout, cin, k, k), (6.0 / (cin * k * k)) ** 0.5), rand(10 * i + 1, (cout,), 0.1))
x = torch.tensor(noise(777, 48 * 72).reshape(1, 1, 48, 72)) * 0.5 + 0.5
layers = []
for name, *_ in convs:
    x = F.relu(F.conv2d(x, *w[name], padding=1))
    if name in ("1b", "2b", "3b"):
        x = F.max_pool2d(x, 2)
    layers.append(x)
semi = F.conv2d(F.relu(F.conv2d(x, *w["Pa"], padding=1)), *w["Pb"])
desc = F.conv2d(F.relu(F.conv2d(x, *w["Da"], padding=1)), *w["Db"])
desc = desc / desc.norm(dim=1, keepdim=True)
save("superpoint_vgg.npy", [*layers, semi, desc])


def simple_nms(scores, radius):
    pool = lambda s: F.max_pool2d(s, 2 * radius + 1, 1, radius)  # noqa: E731
    zeros, mask = torch.zeros_like(scores), scores == pool(scores)
    for _ in range(2):
        near = pool(mask.float()) > 0
        rest = torch.where(near, zeros, scores)
        mask = mask | ((rest == pool(rest)) & ~near)
    return torch.where(mask, scores, zeros)


# Detection and sampling, as in the reference of SuperGlue's authors.
prob = semi.softmax(1)[:, :-1]
b, _, h, wd = prob.shape
heat = prob.permute(0, 2, 3, 1).reshape(b, h, wd, 8, 8).permute(0, 1, 3, 2, 4).reshape(b, h * 8, wd * 8)
kept = simple_nms(heat, 4)[0]
ys, xs = torch.nonzero(kept > 0.005, as_tuple=True)
inside = (ys >= 4) & (ys < h * 8 - 4) & (xs >= 4) & (xs < wd * 8 - 4)
ys, xs = ys[inside], xs[inside]
order = sorted(range(len(ys)), key=lambda i: (-float(kept[ys[i], xs[i]]), int(ys[i]), int(xs[i])))[:20]
points = torch.stack([xs[order], ys[order]], 1).float()
grid = (points - 4 + 0.5) / torch.tensor([wd * 8 - 4 - 0.5, h * 8 - 4 - 0.5]) * 2 - 1
sampled = F.normalize(F.grid_sample(desc, grid[None, None], mode="bilinear", align_corners=True)[0, :, 0].T, dim=1)
np.save(here / "superpoint_points.npy", np.concatenate([points.numpy(), kept[ys[order], xs[order]].numpy()[:, None], sampled[:, :8].numpy()], 1))
print("superpoint_points.npy", len(order), "of", len(ys))

# SuperGlue (Sarlin et al.): small images, real layout of the checkpoint.
N, M, D, H = 23, 31, 256, 4
seeds = iter(range(5000, 9000))


def conv1(x, cin, cout, bn=False):
    a = rand(next(seeds), (cout, cin, 1), (1.0 / cin) ** 0.5)
    c = rand(next(seeds), (cout,), 0.1)
    y = F.conv1d(x, a, c)
    if bn:
        g, s, m, v = (rand(next(seeds), (cout,), k) for k in (0.2, 0.1, 0.1, 0.3))
        y = F.batch_norm(y, m, v + 1, g + 1, s, eps=1e-5)
    return y


def side(seed, n):
    kp = torch.tensor(noise(seed, 2 * n).reshape(n, 2)) * torch.tensor([310.0, 230.0]) + torch.tensor([320.0, 240.0])
    sc = torch.tensor(noise(seed + 1, n)) * 0.5 + 0.5
    d = F.normalize(torch.tensor(noise(seed + 2, n * D).reshape(n, D)), dim=1)
    return kp, sc, d.T[None]


def encode(sides):
    """The two sides share weights: the seeds are taken once."""
    outs, start = [], None
    global seeds
    saved = next(seeds)
    for kp, sc, d in sides:
        seeds = iter(range(saved + 1, 9000))
        size = torch.tensor([640.0, 480.0])
        x = torch.cat([((kp - size / 2) / (size.max() * 0.7)).T, sc[None]])[None]
        dims = [3, 32, 64, 128, 256, 256]
        for i in range(5):
            last = i == 4
            x = conv1(x, dims[i], dims[i + 1], not last)
            x = x if last else F.relu(x)
        outs.append(d + x)
    return outs


def shared(function, args):
    """Calls function for each argument with the same seeds."""
    global seeds
    saved = next(seeds)
    outs = []
    for a in args:
        seeds = iter(range(saved + 1, 9000))
        outs.append(function(*a))
    return outs


def propagate(x, source):
    # The checkpoint's order of tensors: merge, three projections, mlp.
    merge_w, merge_b = rand(next(seeds), (D, D, 1), (1.0 / D) ** 0.5), rand(next(seeds), (D,), 0.1)
    q, k, v = (conv1(t, D, D).view(1, D // H, H, -1) for t in (x, source, source))
    p = (torch.einsum("bdhn,bdhm->bhnm", q, k) / (D // H) ** 0.5).softmax(-1)
    message = F.conv1d(torch.einsum("bhnm,bdhm->bdhn", p, v).reshape(1, D, -1), merge_w, merge_b)
    y = F.relu(conv1(torch.cat([x, message], 1), 2 * D, 2 * D, True))
    return conv1(y, 2 * D, D)


a, b = encode([side(4000, N), side(4100, M)])
for layer in range(18):
    pairs = [(a, b), (b, a)] if layer % 2 else [(a, a), (b, b)]
    da, db = shared(propagate, pairs)
    a, b = a + da, b + db
a, b = shared(lambda x: conv1(x, D, D), [(a,), (b,)])
scores = (torch.einsum("bdn,bdm->bnm", a, b) / D**0.5)[0]
bin_score = torch.tensor(1.3)
z = torch.cat([torch.cat([scores, bin_score.expand(N, 1)], 1), bin_score.expand(1, M + 1)])
norm = -torch.tensor(float(N + M)).log()
mu = torch.cat([norm.expand(N), torch.tensor(float(M)).log()[None] + norm])
nu = torch.cat([norm.expand(M), torch.tensor(float(N)).log()[None] + norm])
u, v = torch.zeros_like(mu), torch.zeros_like(nu)
for _ in range(100):
    u = mu - torch.logsumexp(z + v[None], 1)
    v = nu - torch.logsumexp(z + u[:, None], 0)
np.save(here / "superglue.npy", (z + u[:, None] + v[None] - norm).numpy())
print("superglue.npy", scores.abs().max())

# LightGlue (Lindenberger et al.) and LighterGlue, in kornia's implementation, by the names of the released files.
def lightglue(file, seed, **conf):
    net = kornia.feature.LightGlue(features=None, weights=None, flash=False, mp=False, depth_confidence=-1, width_confidence=-1, **conf).eval()
    state = net.state_dict()
    with torch.no_grad():
        for at, name in enumerate(sorted(n for n in state if not n.startswith(("token_confidence", "confidence_thresholds")))):
            shape = tuple(state[name].shape)
            norm, bias = ".ffn.1." in name, name.endswith("bias")
            scale = 0.2 if norm else 0.1 if bias else 1.0 if len(shape) < 2 else (1.0 / shape[1]) ** 0.5
            state[name].copy_(rand(seed + at, shape, scale) + (1 if norm and not bias else 0))
    size = torch.tensor([[640.0, 480.0]])
    kp, d = [], []
    for s, n in ((4000, N), (4100, M)):
        p, _, _ = side(s, n)
        kp.append(p[None])
        d.append(F.normalize(torch.tensor(noise(s + 2, n * conf["input_dim"]).reshape(n, -1)), dim=1)[None])
    kp = [kornia.feature.lightglue.normalize_keypoints(k, size) for k in kp]
    e0, e1 = net.posenc(kp[0]), net.posenc(kp[1])
    with torch.no_grad():
        x0, x1 = net.input_proj(d[0]), net.input_proj(d[1])
        for layer in net.transformers:
            x0, x1 = layer(x0, x1, e0, e1)
        scores, _ = net.log_assignment[conf["n_layers"] - 1](x0, x1)
    np.save(here / file, scores[0, :-1, :-1].numpy())
    print(file, scores.exp().max())


lightglue("lightglue.npy", 20000, input_dim=256, descriptor_dim=256, n_layers=9, num_heads=4)
lightglue("lighterglue.npy", 30000, input_dim=64, descriptor_dim=96, n_layers=6, num_heads=1)

# Real weights on a photograph, wrapped to 640 x 480.
grey = cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2GRAY)
v, u = np.mgrid[0:480, 0:640]
luma = (grey[v % grey.shape[0], u % grey.shape[1]].astype(np.float32) / 255)[None, None]
det, desc = ort.InferenceSession(str(weights / "sp_squeeze_b1.onnx")).run(None, {"input": luma})
save("sp_squeeze.npy", [det, desc])
features, points, heat = ort.InferenceSession(str(weights / "xfeat_vga.onnx")).run(None, {"l_x_": luma})
save("xfeat.npy", [features, points, heat])

sd = torch.load(weights / "magicpoint_vgg.pth", map_location="cpu", weights_only=True)
x, layers = torch.tensor(luma), []
for block in range(1, 5):
    for conv in range(2):
        p = f"encoder.block{block}.{conv}"
        x = F.conv2d(x, sd[p + ".0.weight"], sd[p + ".0.bias"], padding=1)
        n = [sd[f"{p}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(x, *n, eps=1e-5))
        if conv == 1 and block < 4:
            x = F.max_pool2d(x, 2)
        layers.append(x)
x = F.relu(F.conv2d(x, sd["detector.conv.weight"], sd["detector.conv.bias"], padding=1))
save("magicpoint.npy", [*layers, F.conv2d(x, sd["detector.out.weight"], sd["detector.out.bias"])])
