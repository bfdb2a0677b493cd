"""Networks with random weights, exported once by torch alone: what a user of plain ONNX Runtime has."""

from __future__ import annotations

from pathlib import Path

from marks import OUTPUT

SHAPES = {
    "simple_cnn": (1, 28, 28), "mobilenet_v2": (3, 224, 224), "resnet50": (3, 224, 224), "vit_b_16": (3, 224, 224),
}  # fmt: skip


def exported(name: str) -> Path:
    """The network's .onnx in build/bench, with "input", "logits" and a free "batch"."""
    path = OUTPUT / f"{name}.onnx"
    if path.is_file():
        return path
    import torch
    import torchvision

    from memopt_models.networks import simple_cnn

    torch.manual_seed(0)
    module = simple_cnn() if name == "simple_cnn" else getattr(torchvision.models, name)(weights=None)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp.onnx")
    torch.onnx.export(
        module.eval(), (torch.zeros(2, *SHAPES[name]),), str(beside), dynamo=True, external_data=False, verbose=False,
        input_names=["input"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return beside.rename(path)
