"""Learning: GRPO, pretraining, codec training and run state."""

from common.heavy import prepare_torchvision

prepare_torchvision()
