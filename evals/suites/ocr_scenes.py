"""Text rendering in the scene world: signs with held-out words, read by RapidOCR."""

from PIL import Image

from common.scene_world import IMAGE_SIZE, PLAQUE_ROWS
from data.scenes import scene_prompts
from evals.suites.suite import Metric, Record, SampleScore, Suite
from rewards.ocr import ocr

_PLAQUE = (0.0, PLAQUE_ROWS[0] / IMAGE_SIZE, 1.0, PLAQUE_ROWS[1] / IMAGE_SIZE)


def ocr_scenes() -> Suite:
    """Build the suite. Headline `exact`: the word on the plaque is the word asked for (1 or 0)."""
    return Suite(
        name="ocr-scenes",
        title="Signs in the scene world",
        version=1,
        records=tuple(scene_prompts("held_out", tasks=("text",))),
        score=_score,
        metrics={
            "exact": Metric("Words read right"),
            "ocr": Metric("Published OCR score", "amount"),
        },
        not_comparable="signs of the scene world are not the published text-rendering prompts",
    )


def _score(image: Image.Image, record: Record) -> SampleScore:
    judged = ocr([image], [record["prompt"]], box=_PLAQUE)[0]
    exact = None if judged.value is None else float(judged.details["exact"])
    return SampleScore({"exact": exact, "ocr": judged.value}, judged.reason, judged.details)
