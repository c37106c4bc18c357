"""GenEval's six tasks in the scene world: held-out combinations, GenEval's own rules."""

from PIL import Image

from data.scenes import scene_prompts
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.geneval import geneval
from rewards.scene_detector import SceneDetector

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def geneval_scenes() -> Suite:
    """Build the suite. Headline `strict`: the official script's correct or not (1 or 0)."""
    detector = SceneDetector()

    def score(image: Image.Image, record: Record) -> SampleScore:
        judged = geneval([image], [record["metadata"]], detector=detector)[0]
        details = judged.details
        return SampleScore(
            {
                "strict": details.get("strict"),
                "soft": details.get("soft"),
                "extra_objects": details.get("extra"),
            },
            judged.reason or "every clause holds",
            details,
        )

    return Suite(
        name="geneval-scenes",
        title="GenEval in the scene world",
        version=1,
        records=tuple(scene_prompts("held_out", tasks=TASKS)),
        score=score,
        metrics={
            "strict": Metric("GenEval accuracy (strict)"),
            "soft": Metric("Soft score", "amount"),
            "extra_objects": Metric("Extra objects per picture", "amount", "lower"),
        },
        not_comparable=detector.leaderboard_comparable,
    )
