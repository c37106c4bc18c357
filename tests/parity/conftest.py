"""The reference checkpoints as policies; without the reference data these tests are skipped."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from policy import Policy
from policy.convert import convert

PARITY = Path(__file__).parents[2].parent / "shared" / "parity"


@dataclass
class Reference:
    """What the published code computed, and the policy converted from its checkpoint."""

    policy: Policy
    folder: Path
    checkpoint: Path
    tensors: dict[str, torch.Tensor]
    facts: dict[str, Any]


def reference(name: str, out: Path) -> Reference:
    source = PARITY / name
    if not source.is_dir():
        pytest.skip(f"the reference data are not here: {source}")
    checkpoint = source / "checkpoint"
    convert(checkpoint, str(source / "diffusion"), source / "ta_tok.pth", out)
    facts = json.loads((source / "reference.json").read_text())
    tensors = load_file(source / "reference.safetensors")
    return Reference(Policy.from_pretrained(out), out, checkpoint, tensors, facts)


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory) -> Reference:
    return reference("blip3o_tiny", tmp_path_factory.mktemp("t2i") / "policy")


@pytest.fixture(scope="session")
def editing(tmp_path_factory) -> Reference:
    return reference("blip3o_tiny_edit", tmp_path_factory.mktemp("edit") / "policy")
