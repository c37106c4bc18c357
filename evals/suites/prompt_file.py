"""Any reward over a prompt file of your own: preference models over DrawBench, PartiPrompts, ..."""

from pathlib import Path

from PIL import Image

from data.prompts import training_records
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.runner import RewardRunner, RewardSpec

TIMEOUT_S = 600.0


def prompt_file(prompts: str, reward: str) -> Suite:
    """Build the suite: the mean of `reward` over the prompts of a JSONL file.

    A line has `prompt`, perhaps `prompt_id`, and the columns that the reward asks for;
    `metadata.tag` names its task (default: the file's name). `reward` is a registered name such as
    pickscore, hpsv2 or imagereward, or "file.py:function". Raises DataError for the file and
    RewardError for a reward that cannot be loaded or cannot score a record.
    """
    file = Path(prompts)
    records = tuple(
        {**record, "metadata": {"tag": file.stem, **record["metadata"]}}
        for record in training_records(str(file), "all")
    )
    runner = RewardRunner([RewardSpec(reward, timeout_s=TIMEOUT_S)])
    runner.check_records(records)
    [name] = runner.names

    def score(image: Image.Image, record: Record) -> SampleScore:
        columns = {key: [value] for key, value in record.items() if key != "prompt"}
        [scored] = runner.score([image], [str(record["prompt"])], columns)
        details = scored.details.get(name) or {}
        return SampleScore({name: scored.total}, scored.reasons.get(name, ""), details)

    return Suite(
        name=f"prompt-file/{file.stem}",
        title=f"{name} over {file.stem}",
        version=1,
        records=records,
        score=score,
        metrics={name: Metric(name, "amount")},
        not_comparable="the prompt file is the user's own",
        settings={"reward": reward},
    )
