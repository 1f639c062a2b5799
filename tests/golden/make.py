"""Golden descriptors from ONNX Runtime; the Rust tests compare theirs to <= 1e-4.

    python3 -m venv v && v/bin/pip install numpy onnx onnxruntime safetensors && v/bin/python tests/golden/make.py

Weights are made from a hash on both sides (`noise` here, `test_noise` in src/test_noise.rs), so that no
weight file is in the repository; the third case is the shipped model.
"""
import json
import pathlib
import struct
import sys

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file

here = pathlib.Path(__file__).parent
root = here.parent.parent
sys.path.insert(0, str(root / "scripts/peers"))
import mobilenet_onnx  # noqa: E402


def noise(seed, n):
    """splitmix64 of seed and index, uniform in [-1, 1)."""
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def random_tensors(batch_norm):
    """Ours, folded. Seeds: 10 * layer + {0 weight, 1 gamma or bias, 2 beta, 3 mean, 4 variance}."""
    out = {}
    for i, (name, kind, cin, cout, *_rest) in enumerate(mobilenet_onnx.layers()):
        k = 1 if kind in ("point", "linear") else 3
        shape = (cout, 1 if kind == "depth" else cin, k, k)
        fan_in = shape[1] * k * k
        w = noise(10 * i, int(np.prod(shape))).reshape(shape) * np.float32((6.0 / fan_in) ** 0.5)
        if batch_norm:
            gamma, beta = 1 + 0.2 * noise(10 * i + 1, cout), 0.1 * noise(10 * i + 2, cout)
            mean, var = 0.1 * noise(10 * i + 3, cout), 1 + 0.3 * noise(10 * i + 4, cout)
            scale = gamma.astype(np.float64) / np.sqrt(var.astype(np.float64) + 1e-5)
            b = beta - mean * scale
            w = w * scale[:, None, None, None]
        else:
            b = 0.1 * noise(10 * i + 1, cout)
        out[f"{name}.weight"], out[f"{name}.bias"] = w.astype(np.float32), b.astype(np.float32)
    return out


def run(tensors, x, same, p=3.0, tap_norm=True):
    model = mobilenet_onnx.build(tensors, x.shape[2], x.shape[3], same, p, tap_norm)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def save(name, value):
    np.save(here / name, value.astype(np.float32))
    print(name, value.shape, "first", value.ravel()[:3])


x = noise(999, 3 * 96 * 128).reshape(1, 3, 96, 128)
save("torchvision_symmetric.npy", run(random_tensors(True), x, same=False))
# Odd sizes: SAME pads one side more than the other.
x = noise(998, 3 * 97 * 131).reshape(1, 3, 97, 131)
save("tensorflow_same.npy", run(random_tensors(False), x, same=True))

path = root / "models/structvpr-street-v3.safetensors"
with open(path, "rb") as f:
    spec = json.loads(json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))["__metadata__"]["structvpr.format"])["spec"]
h, w = spec["input_height"], spec["input_width"]
# A picture of smooth stripes: what the network sees is then no noise.
v, u = np.mgrid[0:h, 0:w]
pixels = np.stack([(u * 3 + v * c * 2) % 256 for c in range(1, 4)], axis=-1).astype(np.uint8)
mean, std = np.float32(spec["mean"]), np.float32(spec["std"])
x = ((pixels.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)[None]
tensors = {k: t.astype(np.float32) for k, t in load_file(path).items()}
save("shipped.npy", run(tensors, np.ascontiguousarray(x), spec["padding"] == "same", spec["pooling"]["p"], spec["tap_norm"]))
