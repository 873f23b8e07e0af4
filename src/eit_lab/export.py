"""Trained weights for other programs: ``python -m eit_lab.export run=FOLDER format=torch|onnx|safetensors``.

torch: torch.export's ExportedProgram (.pt2); onnx: an ONNX graph by torch's own exporter; both take any batch size.
safetensors: the weights alone, under this project's names, for create_model(checkpoint=...). Each carries what is needed to
use it: model, num_classes, img_size, in_chans, mean, std, identity. The input is normalised images, the output logits.

A file counts as written only when it was read back and gave the module's own logits, within TOLERANCE.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from torch import Tensor

    from eit_lab.models.image_model import ImageModel
    from eit_lab.trained import Trained

    Logits = Callable[[Tensor], Tensor]

TOLERANCE = {"torch": 1e-5, "onnx": 1e-4, "safetensors": 0.0}
"""Largest difference of a logit, times the largest logit where that is above 1. Other kernels round otherwise."""
OPSET = 20
_SUFFIX = {"torch": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors"}
_CHECKED_BATCHES = (1, 3)
_HELP = """\
Write a trained model for other programs, read it back, and compare its logits with the model's.

  python -m eit_lab.export run=FOLDER format=torch|onnx|safetensors [out=PATH] [weights=raw|ema] [checkpoint=...]
  python -m eit_lab.export checkpoint=FILE model=eit_base format=onnx ...

  format   torch: torch.export (.pt2); onnx: ONNX (needs pip install 'eit_lab[export]'); safetensors: the weights alone
  out      the file to write                                                 [the run's folder, or here, by the model's name]
  data.img_size=N   for images of another size

The other options are those of python -m eit_lab.evaluate.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 when the file's logits are not the model's, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.trained import find, take_apart

    words = take_apart(argv, command="export", options={"format": tuple(_SUFFIX), "out": None})
    if "format" not in words.options:
        raise ConfigError(f"format must be given, one of {', '.join(_SUFFIX)}")
    kind = words.options["format"]
    trained = find(words, command="export")
    out = words.options.get("out")
    path = Path(out).expanduser() if out else (trained.run or Path()) / f"{trained.config.model.name}{_SUFFIX[kind]}"
    if path.suffix != _SUFFIX[kind]:
        raise ConfigError(f"out must end in {_SUFFIX[kind]} with format={kind}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"out must lie in a folder that exists, got {str(path)!r}")
    if kind == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ConfigError(f"format=onnx needs {', '.join(missing)}: pip install 'eit_lab[export]'")
    return _export(trained, kind, path)


def _export(trained: Trained, kind: str, path: Path) -> int:
    import torch
    from safetensors import SafetensorError

    from eit_lab.config import ConfigError, TimmConfig, as_hw
    from eit_lab.models.checkpoints import load_backbone

    data = trained.config.data
    model = load_backbone(
        trained.config.model,
        trained.files,
        img_size=data.img_size,
        in_chans=data.in_chans,
        num_classes=trained.num_classes,
        weights=trained.weights,
    )
    told = _metadata(trained, model)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    print(f"model  {trained.describe()}", flush=True)
    write, read_back = {
        "torch": (_write_torch, _read_torch),
        "onnx": (_write_onnx, _read_onnx),
        "safetensors": (_write_safetensors, _read_safetensors),
    }[kind]
    generator, checks = torch.Generator().manual_seed(0), []
    try:
        try:
            write(model, part, told)
        except Exception as error:
            if isinstance(error, OSError | SafetensorError) or not isinstance(trained.config.model, TimmConfig):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"format={kind} cannot hold model.timm_name={trained.config.model.timm_name}, which torch cannot trace for "
                f"any batch size ({reason}); nearest: format=safetensors"
            ) from None
        logits = read_back(part)
        worst = allowed = 0.0
        for batch in _CHECKED_BATCHES:
            images = torch.randn((batch, data.in_chans, *as_hw(data.img_size)), generator=generator)
            with torch.inference_mode():
                wanted = model(images)
            worst = (logits(images) - wanted).abs().max().item()
            allowed = TOLERANCE[kind] * max(1.0, wanted.abs().max().item())
            if not worst <= allowed:  # NaN too
                print(
                    f"eit_lab: the {kind} file gives other logits than the model, largest difference {worst:.3g} "
                    f"(allowed {allowed:.3g}); it was removed",
                    file=sys.stderr,
                )
                return command.EXIT_FAILED
            checks.append(f"{worst:.3g} at batch {batch}")
        part.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise command.RunError(f"out: {path} cannot be written: {reason}") from None
    finally:
        part.unlink(missing_ok=True)
    size = path.stat().st_size / 1e6
    how = f", opset {OPSET}, any batch size" if kind == "onnx" else ", any batch size" if kind == "torch" else ""
    print(f"wrote  {path} ({size:.1f} MB{how})")
    print(f"check  read back: largest difference of a logit {', '.join(checks)} (allowed {allowed:.3g})")
    return 0


def _metadata(trained: Trained, model: ImageModel) -> dict[str, Any]:
    """What a file says of itself; finetune.read_metadata reads it again."""
    from eit_lab.config import ImageNetData
    from eit_lab.loading import dump
    from eit_lab.runs import read_record

    data = trained.config.data
    record = read_record(trained.run) if trained.run else None
    return {
        "model": dump(trained.config.model),
        "num_classes": model.num_classes,
        "class_names": list(trained.class_names) if trained.class_names else None,
        "img_size": list(data.img_size) if isinstance(data.img_size, tuple) else data.img_size,
        "in_chans": data.in_chans,
        "mean": list(data.mean),
        "std": list(data.std),
        "eval_resize_share": data.eval_resize_share if isinstance(data, ImageNetData) else 1.0,
        "weights": trained.weights,
        "averaged_files": len(trained.files),
        "identity": (record or {}).get("identity"),
    }


# ---------------------------------------------------------------------------------------------------------------- formats


def _write_torch(model: ImageModel, path: Path, told: dict[str, Any]) -> None:
    import torch

    torch.export.save(_program(model, told), path, extra_files={"eit_lab.json": json.dumps(told)})


def _program(model: ImageModel, told: dict[str, Any]) -> Any:
    """The model as a graph for any batch size."""
    import torch

    size = told["img_size"]
    hw = (size, size) if isinstance(size, int) else size
    example = torch.zeros((2, told["in_chans"], *hw))  # 2: an example of 1 would fix the batch at 1
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))


def _read_torch(path: Path) -> Logits:
    import torch

    module = torch.export.load(path).module()

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = module(images)
        return found

    return logits


def _write_onnx(model: ImageModel, path: Path, told: dict[str, Any]) -> None:
    import onnx
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own packages
        written = torch.onnx.export(
            _program(model, told),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )
        assert written is not None
        proto = written.model_proto
    onnx.helper.set_model_props(proto, {"eit_lab": json.dumps(told)})
    onnx.save(proto, path)


def _read_onnx(path: Path) -> Logits:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_safetensors(model: ImageModel, path: Path, told: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    from eit_lab.finetune import METADATA_KEY

    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", METADATA_KEY: json.dumps(told)})


def _read_safetensors(path: Path) -> Logits:
    """A model made of the file alone."""
    import torch

    from eit_lab.finetune import read_metadata
    from eit_lab.loading import load_model
    from eit_lab.models.checkpoints import load_backbone

    told = read_metadata(path)
    assert told is not None
    size = told["img_size"]
    model = load_backbone(
        load_model(told["model"]),
        path,
        img_size=size if isinstance(size, int) else (size[0], size[1]),
        in_chans=told["in_chans"],
        num_classes=told["num_classes"],
    )

    def logits(images: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(images)
        return found

    return logits


if __name__ == "__main__":
    sys.exit(main())
