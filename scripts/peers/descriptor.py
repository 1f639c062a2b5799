"""ONNX Runtime as a peer of `structvpr bench`: one image per line read, seconds per line written.

Usage: descriptor.py DIR THREADS, with DIR/model.safetensors (ours) and DIR/input.npy (3H x W).
Writes DIR/descriptor.npy.
"""
import json
import struct
import sys
import time

import numpy as np
import onnxruntime as ort
from safetensors.numpy import load_file

import mobilenet_onnx

folder, threads = sys.argv[1], int(sys.argv[2])
path = f"{folder}/model.safetensors"
with open(path, "rb") as f:
    header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
spec = json.loads(header["__metadata__"]["structvpr.format"])["spec"]
assert spec["pooling"]["kind"] == "gem", "only GeM has a peer"
flat = np.load(f"{folder}/input.npy")
x = flat.reshape(1, 3, flat.shape[0] // 3, flat.shape[1])
model = mobilenet_onnx.build(load_file(path), x.shape[2], x.shape[3], spec["padding"] == "same", spec["pooling"]["p"], spec["tap_norm"])
options = ort.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
np.save(f"{folder}/descriptor.npy", session.run(None, {"x": x})[0])
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    session.run(None, {"x": x})
    print(time.perf_counter() - began, flush=True)
