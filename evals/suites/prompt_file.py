"""Any reward over a prompt file of your own."""

from pathlib import Path

from data.prompts import training_records
from evals.suites.rewarded import reward_suite
from evals.suites.suite import Suite


def prompt_file(prompts: str, reward: str, **arguments: str) -> Suite:
    """Build the suite: the mean of `reward` over the prompts of a JSONL file.

    A line has `prompt`, perhaps `prompt_id`, and the columns that the reward asks for;
    `metadata.tag` names its task (default: the file's name). `reward` is a registered name or
    "file.py:function"; further options are its arguments. Raises DataError for the file and
    RewardError for a reward that cannot be loaded or cannot score a record.
    """
    file = Path(prompts)
    records = [
        {**record, "metadata": {"tag": file.stem, **record["metadata"]}}
        for record in training_records(str(file), "all")
    ]
    return reward_suite(
        f"prompt-file/{file.stem}",
        f"{reward.rpartition(':')[2]} over {file.stem}",
        records,
        reward,
        arguments,
        "the prompt file is the user's own",
    )
