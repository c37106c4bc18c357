"""What has to be true before a heavy library is imported. Importing this module imports none.

torchvision's wheel on the package index is built for CUDA. Beside the CPU build of torch its
compiled part cannot be loaded, so `torchvision::nms` is never defined, and `import torchvision`
stops at the line that registers a shape function for it: "operator torchvision::nms does not
exist". transformers imports torchvision wherever it is installed, and vLLM, TRL, PEFT, diffusers
and open_clip import transformers, so all of them stop with it. The two missing operators belong
to object detection and nothing here calls them; with their schemas defined, everything else in
torchvision works.
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# A torch.library.Library takes its definitions back when it is collected.
_kept_alive: list["torch.library.Library"] = []


def prepare_torchvision() -> None:
    """Make sure that a later `import torchvision`, by anyone in this process, succeeds.

    The first import of torchvision will define the schemas of `torchvision::nms` and `qnms` if its
    compiled operators cannot be loaded. The call itself is cheap and imports nothing. It does
    nothing where torchvision is absent or already imported, and nothing when repeated.

    Packages whose modules import vllm, trl, peft, diffusers, open_clip or transformers call it at
    the top of their `__init__.py`. A process started by another library (a Ray actor, a spawned
    worker) has to call it too, before its first such import. Calling one of the operators
    where it has only a schema raises NotImplementedError.
    """
    prepared = any(isinstance(finder, _TorchvisionFinder) for finder in sys.meta_path)
    if not prepared and "torchvision" not in sys.modules:
        sys.meta_path.insert(0, _TorchvisionFinder())


class _TorchvisionFinder(MetaPathFinder):
    """Finds torchvision where it is, and lets `_TorchvisionLoader` execute it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _TorchvisionLoader(fullname, spec.loader.path)
        return spec


class _TorchvisionLoader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        _define_missing_operators(Path(self.path).parent)
        super().exec_module(module)


def _define_missing_operators(package: Path) -> None:
    """Define the schemas, unless the compiled operators in the folder `package` can be loaded."""
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (extension := package / f"_C{suffix}").exists():
            try:
                torch.ops.load_library(extension)
                return
            except OSError:  # its CUDA libraries are not there: this is the case that needs us
                break
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept_alive.append(library)
