"""What is good: reward functions, how they are found, and how they are run.

Importing this package is cheap; models and detectors are loaded by the reward that needs them.
"""

from common.heavy import prepare_torchvision

prepare_torchvision()

from rewards.contract import RewardFunction, Score
from rewards.plugins import list_rewards, load_reward, reward

__all__ = ["RewardFunction", "Score", "list_rewards", "load_reward", "reward"]
