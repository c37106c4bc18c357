"""Any reward over a prompt file of your own: preference models over DrawBench, PartiPrompts, ..."""

from dataclasses import replace
from pathlib import Path

from data.prompts import training_records
from evals.suites.files import read_prompts
from evals.suites.rewarded import reward_suite
from evals.suites.suite import Suite


def prompt_file(prompts: str, reward: str, **reward_args: str) -> Suite:
    """Build the suite: the mean of `reward` over the prompts of a file.

    A line of a .jsonl file has `prompt`, perhaps `prompt_id`, and the columns that the reward asks
    for; `metadata.tag` names its task (default: the file's name). Other files are lists of prompts
    alone (see `read_prompts`). `reward` is a registered name such as
    pick_score, hps_v2 or image_reward, or "file.py:function"; further options are its arguments,
    read as in a recipe (YAML), such as the place of its weights. Raises DataError for the file and
    RewardError for a reward that cannot be loaded or cannot score a record.
    """
    file = Path(prompts)
    found = training_records(prompts, "all") if file.suffix == ".jsonl" else read_prompts(file)
    records = [
        {
            "cluster": record["prompt"],  # the same prompt twice is one fact
            **record,
            "metadata": {"tag": file.stem, **record["metadata"]},
        }
        for record in found
    ]
    suite = reward_suite(
        f"prompt-file/{file.stem}",
        reward,
        records,
        reward,
        reward_args,
        "the prompt file is the user's own",
        folder=file.parent,
    )
    [metric] = suite.metrics
    # The other options are texts of the suite's own, which `load_suite` records.
    settings = {"reward": suite.settings["reward_source"]}
    return replace(suite, title=f"{metric} over {file.stem}", settings=settings)
