"""Evaluation pictures a second: `Policy.generate` against the published way, equal settings.

    python -m benchmarks.evaluation [--turns 3]

64 different prompts (a batch of `atelier eval`), the shipped policy's own 6 steps and guidance 1.5.
"""

from benchmarks import published
from benchmarks.timing import Ratio, main, take_turns
from data.prompts import draw_records
from policy import Policy, base_path
from policy.policy import to_images

PICTURES = 64


def ratios(turns: int) -> list[Ratio]:
    """Return the ratio of the two."""
    policy = Policy.from_pretrained(base_path())
    records = draw_records("scenes", "held_out", None, steps=1, per_step=PICTURES, seed=0)
    prompts = [record["prompt"] for record in records]
    steps, guidance = policy.config.steps, policy.config.guidance

    def published_way() -> None:
        ids, _, _ = published.generate(policy, prompts)
        hidden = published.hidden_states(policy, ids)
        noise = policy.noise(range(PICTURES))
        to_images(published.decode(policy, hidden, noise, steps, guidance))

    times = take_turns(
        {"published": published_way, "ours": lambda: policy.generate(prompts, seed=1)}, turns
    )
    row = times.ratio("evaluation: published way, same settings", "published", "ours")
    rate = PICTURES / times.median("ours")
    return [Ratio(row.name, row.value, row.scatter, f"{rate:.1f} pictures/s, {row.detail}")]


if __name__ == "__main__":
    main(ratios, __doc__, turns=3)
