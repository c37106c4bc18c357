"""What `rl/grpo.py` takes for granted about TRL, held against the pinned release.

A new release of TRL fails here first, and the message says which assumption to look at.
"""

import inspect
import re
import sys
from pathlib import Path

import pytest

from rl.grpo import ImageGRPOTrainer
from rl.trl_release import GRPOConfig, GRPOTrainer

ROOT = Path(__file__).resolve().parents[2]
PINNED = "1.16.0"

# Parameter lists of the private methods that are overridden, as they are in the pinned release.
OVERRIDDEN = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_per_token_logps_and_entropies": [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        "pixel_values",
        "image_grid_thw",
        "num_images",
        "pixel_attention_mask",
        "spatial_shapes",
        "num_tiles",
        "image_sizes",
        "token_type_ids",
        "mm_token_type_ids",
        "image_position_ids",
    ],
}


def source(name: str) -> str:
    """A method of TRL's trainer, without its comments."""
    lines = inspect.getsource(getattr(GRPOTrainer, name)).splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def test_the_installed_release_is_the_pinned_one():
    import trl

    assert trl.__version__ == PINNED
    assert f'"trl=={PINNED}"' in (ROOT / "pyproject.toml").read_text()


def test_the_private_methods_overridden_are_these_and_no_others():
    own = {
        name
        for name in vars(ImageGRPOTrainer)
        if name.startswith("_") and not name.startswith("__") and hasattr(GRPOTrainer, name)
    }
    assert own - {"_tag_names", "_name"} == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_trl_s_parameters_are_those_the_override_was_written_for(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == OVERRIDDEN[name]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_override_takes_every_call_that_trl_makes(name):
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters
    own = inspect.signature(getattr(ImageGRPOTrainer, name))
    own.bind(*[None] * len([p for p in theirs.values() if p.default is p.empty]))
    own.bind(**dict.fromkeys(theirs))
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert [p.name for p in named] == OVERRIDDEN[name][: len(named)]
    for parameter in named:
        assert parameter.default == theirs[parameter.name].default


def test_log_probs_come_back_as_logprobs_entropies_and_aux_loss():
    assert "return logps, entropies, aux_loss" in source("_get_per_token_logps_and_entropies")


def test_weights_are_synced_before_a_rollout_function_whenever_the_step_has_moved_on():
    generate = source("_generate")
    sync = re.search(
        r"if self\.rollout_func is not None:\s+"
        r"if self\.use_vllm and self\.state\.global_step != self\._last_loaded_step:\s+"
        r'with profiling_context\(self, "sync_weights"\):\s+'
        r"self\.vllm_generation\.sync_weights\(\)\s+"
        r"self\._last_loaded_step = self\.state\.global_step\s+"
        r"output = self\.rollout_func\(prompts, self\)",
        generate,
    )
    assert sync, "TRL no longer calls vllm_generation.sync_weights() before rollout_func"


def test_use_vllm_means_importance_correction_and_nothing_that_needs_trl_s_client():
    used = {
        name
        for name, member in vars(GRPOTrainer).items()
        if inspect.isfunction(member) and "self.use_vllm" in inspect.getsource(member)
    }
    assert used == {
        "__init__",
        "_generate_single_turn",  # only without a rollout function
        "_tool_call_loop",  # only with tools
        "_generate",
        "_generate_and_score_completions",
        "_compute_loss",
    }
    for name in ("_generate_and_score_completions", "_compute_loss"):
        asked = re.findall(r"self\.use_vllm\b[^\n]*", source(name))
        assert asked
        assert all("vllm_importance_sampling_correction" in line for line in asked)
        assert "vllm_generation" not in source(name)
    assert source("_generate").count("self.vllm_generation") == 1


def test_old_log_probs_are_asked_for_once_and_before_those_of_the_reference():
    # `_old_logprobs` answers the first request without gradients of a step.
    text = source("_generate_and_score_completions")
    old = text.index("old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies")
    reference = text.index("ref_per_token_logps, _, _ = self._get_per_token_logps_and_entropies")
    assert old < reference
    condition = text[:old].rsplit("if ", 1)[1]
    assert "self.use_vllm and self.vllm_importance_sampling_correction" in condition
    assert "gradient_accumulation_steps % generate_every != 0" in condition


def test_extra_columns_of_a_rollout_reach_the_rewards_before_they_are_called():
    text = source("_generate_and_score_completions")
    assert text.index("inp[key] = values[i]") < text.index("self._calculate_rewards(")


def test_micro_batches_are_shuffled_and_split_after_the_overridden_method():
    # `_informative` may drop rows and the shuffle seed is set at the end of that method.
    text = source("_prepare_inputs")
    made = text.index("self._generate_and_score_completions(generation_batch)")
    assert made < text.index("shuffle_sequence_dict") < text.index("split_tensor_dict")


def test_the_loss_is_a_mean_over_rows_divided_by_the_number_of_micro_batches():
    # `_informative` undoes the dilution of this mean by rows that only fill up.
    text = source("_compute_loss")
    assert "((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()" in text
    assert "loss = loss / normalizer" in text


def test_checkpoints_go_to_a_folder_inside_output_dir():
    # `_save_checkpoint` points output_dir at its staging folder for the time of the call.
    from transformers import Trainer
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    assert PREFIX_CHECKPOINT_DIR == "checkpoint"
    text = inspect.getsource(Trainer._save_checkpoint) + inspect.getsource(Trainer._get_output_dir)
    assert 'f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"' in text
    assert "run_dir = self.args.output_dir" in text


def test_the_options_whose_defaults_we_change_exist_and_still_default_to_something_else(tmp_path):
    from recipes import load_recipe
    from rl.run import trainer_config

    ours = trainer_config(load_recipe("geneval-scenes").recipe, tmp_path, 36)
    theirs = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    changed = {
        "vllm_importance_sampling_mode": "token_truncate",
        "gradient_checkpointing": False,
        "loss_type": "grpo",
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "logging_steps": 1,
    }
    for name, value in changed.items():
        assert getattr(ours, name) == value, name
    assert theirs.vllm_importance_sampling_mode != "token_truncate"
    assert theirs.gradient_checkpointing is True
    # Left at TRL's defaults, on which one update a step with ratio 1 relies.
    assert (ours.num_iterations, ours.importance_sampling_level) == (1, "token")
    assert ours.steps_per_generation == ours.gradient_accumulation_steps


def test_importing_the_trainer_does_not_import_vllm():
    import subprocess

    code = (
        "import warnings; warnings.simplefilter('error', UserWarning)\n"
        "import sys; import rl.grpo; import trl.import_utils as u\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)\n"
        "from importlib.util import find_spec; warnings.simplefilter('ignore')\n"
        "assert u.is_vllm_available() == (find_spec('vllm') is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
