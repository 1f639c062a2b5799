"""Writes tests/golden/tensors.pth with PyTorch: a small checkpoint with every kind of tensor we read.

    python3 -m venv v && v/bin/pip install torch numpy && v/bin/python tests/golden/torch_checkpoint.py
"""
import pathlib
from collections import OrderedDict

import torch

base = torch.arange(6, dtype=torch.float32) * 0.5
torch.save(
    OrderedDict(
        f32=base.reshape(2, 3),
        f64=torch.tensor([0.25, -4.0], dtype=torch.float64),
        f16=torch.tensor([0.5, -2.0], dtype=torch.float16),
        bf16=torch.tensor([3.0, -0.125], dtype=torch.bfloat16),
        view=base[1:4].reshape(3, 1),
        transposed=base.reshape(2, 3).T,
        parameter=torch.nn.Parameter(torch.tensor([7.0])),
        counter=torch.tensor(5),
    ),
    pathlib.Path(__file__).parent / "tensors.pth",
)

# The same in the format before PyTorch 1.6, for src/model/local_tests.rs.
t = torch.arange(6, dtype=torch.float32).reshape(2, 3)
old = {"first.weight": t, "first.bias": torch.tensor([0.5, -1.5]), "view": t[:, 1], "half": torch.tensor([1.5, 2.5]).half(), "count": torch.tensor(7)}
torch.save(old, pathlib.Path(__file__).parent / "legacy.pth", _use_new_zipfile_serialization=False)
