"""The heavy libraries can be imported in one process, whichever torchvision is beside torch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_all_of_them_in_one_process() -> None:
    modules = ["vllm", "open_clip", "trl", "peft", "diffusers", "rapidocr", "torchvision"]
    output = run_python(
        "from common.heavy import prepare_torchvision\n"
        "prepare_torchvision()\n"
        f"import {', '.join(modules)}\n"
        "from transformers import Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor\n"
        "from transformers import OwlViTForObjectDetection, Qwen3ForCausalLM, SiglipVisionModel\n"
        "from PIL import Image\n"
        "pixels = Mask2FormerImageProcessor(size={'height': 64, 'width': 64})(\n"
        "    images=Image.new('RGB', (64, 64)), return_tensors='pt')['pixel_values']\n"
        "print(*pixels.shape)"
    )
    assert output.split()[-4:] == ["1", "3", "64", "64"]


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="no torchvision")
def test_torchvision_alone_and_its_transforms() -> None:
    output = run_python(
        "from common.heavy import prepare_torchvision\n"
        "prepare_torchvision()\n"
        "import torch, torchvision\n"
        "pixels = torch.arange(16.0).reshape(1, 1, 4, 4)\n"
        "small = torchvision.transforms.functional.resize(pixels, [2, 2], antialias=True)\n"
        "print(hasattr(torch.ops.torchvision, 'nms'), small.mean().item())"
    )
    defined, mean = output.split()
    assert defined == "True"
    assert float(mean) == pytest.approx(7.5)  # resizing keeps the mean of 0..15


def test_the_call_is_cheap_and_repeatable() -> None:
    output = run_python(
        "import sys\n"
        "from common.heavy import prepare_torchvision\n"
        "before = len(sys.meta_path)\n"
        "prepare_torchvision(); prepare_torchvision()\n"
        "print(len(sys.meta_path) - before, 'torch' in sys.modules, 'torchvision' in sys.modules)"
    )
    assert output.split() == ["1", "False", "False"]


def test_torchvision_that_is_not_installed_stays_so() -> None:
    output = run_python(
        "import importlib.util, sys\n"
        "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "from common.heavy import prepare_torchvision\n"
        "prepare_torchvision()\n"
        "print(importlib.util.find_spec('torchvision'))"
    )
    assert output.split() == ["None"]
