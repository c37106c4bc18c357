"""Speed and memory: each script prints one ratio or one table."""

from common.heavy import prepare_torchvision

prepare_torchvision()
