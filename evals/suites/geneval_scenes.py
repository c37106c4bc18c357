"""GenEval's six tasks in the scene world: held-out combinations, GenEval's own rules.

A class alone is no combination, so it cannot be held out: the six prompts of `single_object` occur
in training too. The other five tasks have no prompt of training.
"""

from dataclasses import replace

from data.prompts import GENEVAL_TASKS
from data.scenes import scene_prompts
from evals.suites.geneval import asked_for, geneval_suite
from evals.suites.suite import Suite
from rewards.detector import load_detector


def geneval_scenes() -> Suite:
    """Build the suite. Headline `strict`: the official script's correct or not (1 or 0)."""
    records = [
        {**record, "cluster": asked_for(record["metadata"])}
        for record in scene_prompts("held_out", tasks=GENEVAL_TASKS)
    ]
    title = "GenEval in the scene world"
    suite = geneval_suite("geneval-scenes", title, records, load_detector("scenes"))
    return replace(suite, version=2)  # the held-out combinations of 1 were others
