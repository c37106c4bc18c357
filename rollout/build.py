"""How an engine is made, in a form that can be sent to another process."""

from dataclasses import dataclass
from typing import Literal

import torch

from rollout.engine import Engine
from rollout.micro_batch import Events


@dataclass(frozen=True)
class EngineSpec:
    """One engine over the AR folder of a policy (`POLICY/ar`), and the facts about its tokens.

    `dtype` is a torch type's name such as "float32"; ids and counts are those of the policy's
    `PolicyConfig`.
    """

    engine: Literal["transformers", "vllm"]
    ar_folder: str
    image_start_id: int
    num_image_tokens: int
    completion_length: int
    pad_id: int
    dtype: str
    max_prompt_length: int
    device: str = "cpu"
    lora_rank: int | None = None
    """Of adapters that are pushed beside the folder's weights (vllm); None = whole models are."""
    cache_gib: float = 1.0
    compile_model: bool = False
    cache_dtype: Literal["auto", "fp8"] = "auto"
    sleep: bool = False
    weight_transfer: Literal["nccl", "ipc"] | None = None
    """These five are vLLM's."""

    def build(self, events: Events) -> Engine:
        """Load the weights and start the engine in this process; `events`: where it tells halvings.

        vLLM manages its memory itself and tells none.
        """
        dtype = getattr(torch, self.dtype)
        images = (self.image_start_id, self.num_image_tokens, self.completion_length)
        if self.engine == "vllm":
            from rollout.vllm_engine import VllmEngine

            return VllmEngine(
                self.ar_folder,
                *images,
                dtype=dtype,
                max_prompt_length=self.max_prompt_length,
                cache_gib=self.cache_gib,
                compile_model=self.compile_model,
                cache_dtype=self.cache_dtype,
                sleep=self.sleep,
                lora_rank=self.lora_rank,
                weight_transfer=self.weight_transfer,
            )
        from transformers import Qwen3ForCausalLM

        from rollout.transformers_engine import TransformersEngine

        model = Qwen3ForCausalLM.from_pretrained(self.ar_folder, dtype=dtype).to(self.device)
        return TransformersEngine(model.eval(), *images, self.pad_id, events=events)
