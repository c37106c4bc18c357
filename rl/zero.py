"""DeepSpeed's ZeRO: its configuration, and what slicing the vocabulary needs under ZeRO-3."""

from typing import Any

from transformers import TrainerCallback

from rl.joint_loss import JointLoss

WHOLE_BELOW = 10_000
"""Weights with fewer values stay whole under ZeRO-3: gathering vectors costs more than it saves."""


def zero_config(kind: str | None, bf16_weights: bool = False) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration for `zero1`, `zero2` or `zero3`; "auto" is the trainer's.

    `bf16_weights`: the model is in bfloat16 already, whatever the trainer's mixed precision is.
    """
    if kind is None:
        return None
    stage = int(kind.removeprefix("zero"))
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = WHOLE_BELOW
        # A checkpoint then holds the trained weights whole, and any policy can be made of it.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": True if bf16_weights else "auto"},
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


class WholeHead(TrainerCallback):
    """Has ZeRO-3 gather the vocabulary's weights for `JointLoss`, which reads the image rows only.

    ZeRO-3 gathers a module's weights when that module runs, and the language model's head never
    does: all its rows would be computed for the few that are legal.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Register them, now that DeepSpeed has divided the weights."""
        import deepspeed

        joint: JointLoss = kwargs["model"]
        deepspeed.zero.register_external_parameter(joint, joint.ar.lm_head.weight)
