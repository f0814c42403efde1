#!/usr/bin/env python3
"""Writes tests/golden/torch_bin: checkpoints of torch.save in every shape that a reader meets, and what they hold.

Made with torch 2.15.0. Run from the repository's root: python tools/golden_torch_bin.py
"""

import json
import os
from collections import OrderedDict
from pathlib import Path

import torch

OUT = Path("tests/golden/torch_bin")


class Command:
    """What a hostile file would run."""

    def __reduce__(self):
        return os.system, ("echo never",)


def describe(tensor):
    values = tensor.detach().to(torch.float64).flatten().tolist()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "strides": list(tensor.stride()),
        "contiguous": tensor.is_contiguous(),
        "values": values,
    }


def views():
    """Tensors that do not lie plainly in storages of their own."""
    base = torch.arange(48, dtype=torch.float32).reshape(4, 12) / 8
    tied = torch.linspace(-2, 2, 6).reshape(3, 2)
    cube = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    return {
        "plain": torch.tensor([[1.5, -2.25, 1e-30], [3.4028234663852886e38, 0.0, -0.0]]),
        "transposed": base.t(),
        "columns": base[1:3, 2:11:3],
        "row": base[3],
        "permuted": cube.permute(2, 0, 1),
        "half": torch.tensor([1.0, 6.1e-5, -65504.0], dtype=torch.float16),
        "scalar": torch.tensor(0.375),
        "empty": torch.zeros(0, 4),
        "expanded": torch.tensor([[3.0], [4.0]]).expand(2, 5),
        "tied.first": tied,
        "tied.second": tied,
        "parameter": torch.nn.Parameter(torch.tensor([7.0, 8.0])),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
    }


def module():
    """A module's own state dict, which carries `_metadata`."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GELU(), torch.nn.Linear(2, 2, bias=False))
    return layers.to(torch.bfloat16)


def main():
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    expected = {"versions": {"torch": torch.__version__.split("+")[0]}, "files": {}}

    def save(name, value, tensors, **options):
        path = OUT / name
        path.parent.mkdir(exist_ok=True)
        torch.save(value, path, **options)
        expected["files"][name] = {key: describe(tensor) for key, tensor in tensors.items()}

    held = views()
    save("views.bin", held, held)
    save("views_protocol_4.bin", held, held, pickle_protocol=4)
    model = module()
    plain = model.state_dict()
    save("module.bin", plain, plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    plain = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trained = {"epoch": 3, "note": "best", "loss": 0.25, "optimizer": optimizer.state_dict(), "state_dict": plain}
    save("trainer.pt", trained, plain)
    save("nested.pt", {"model": {"encoder": {"weight": plain["0.weight"]}, "scale": plain["0.bias"]}},
         {"encoder.weight": plain["0.weight"], "scale": plain["0.bias"]})
    small = torch.tensor([1.0, 2.0])
    small.comment = "an attribute"
    save("attribute.bin", OrderedDict(small=small), {"small": small})
    save("float8.bin", {"eighth": torch.tensor([0.125, -448.0]).to(torch.float8_e4m3fn)}, {})

    shards = {"pytorch_model-00001-of-00002.bin": {"a": held["plain"], "b": held["half"]},
              "pytorch_model-00002-of-00002.bin": {"c": held["row"]}}
    for name, shard in shards.items():
        save(f"sharded/{name}", shard, shard)
    index = {"metadata": {"total_size": 42}, "weight_map": {key: name for name, shard in shards.items() for key in shard}}
    (OUT / "sharded/pytorch_model.bin.index.json").write_text(json.dumps(index))

    save("legacy.bin", {"a": small.clone()}, {}, _use_new_zipfile_serialization=False)
    save("hostile.bin", {"a": small.clone(), "b": Command()}, {})
    save("whole_module.bin", model, {})
    save("sparse.bin", {"a": torch.eye(2).to_sparse()}, {})
    (OUT / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
