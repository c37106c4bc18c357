"""`atelier card`: a model card with the numbers, their intervals and the recipe."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("card", rich_help_panel="Judging")
    def card(
        policy: str = typer.Argument(..., help="A policy folder or a finished run."),
        results: list[Path] | None = typer.Argument(
            None, metavar="RESULTS...", help="Result folders of this policy."
        ),
        name: str | None = typer.Option(None, help="Name of the model. (default: the folder's)"),
        license: str | None = typer.Option(None, help="Licence, by its name on the hub."),
        base_model: str | None = typer.Option(None, help="Hub name of what it was trained from."),
        out: Path | None = typer.Option(None, help="File. (default: README.md in the policy)"),
    ) -> None:
        """Write a model card in the Hugging Face format.

        The recipe is taken from the run that the policy lies in.

        Results of another policy are refused.
        """
        from cli import console
        from cli.policy_folder import find_policy, recipe_of
        from evals.card import (
            CARD,
            PolicyFacts,
            check_hashes,
            model_card,
            number_format,
            write_card,
        )
        from evals.results import load_results
        from policy.anatomy import read_parts
        from policy.config import PolicyConfig

        folder = find_policy(policy)
        config = PolicyConfig.load(folder)
        given = [load_results(place) for place in results or []]
        with console.progress() as progress:
            progress.start("card", None)
            if given:
                check_hashes(given, _hashes(folder, {number_format(result) for result in given}))
            place = folder.resolve()  # "." has no name and no parent
            recipe = recipe_of(place)
            facts = PolicyFacts(
                name=name or (place.parent.name if recipe else place.name),
                image_size=config.image_size,
                num_tokens=config.num_tokens,
                edits=config.edit_template is not None,
                parameters={part: x.parameters for part, x in read_parts(folder).items()},
                provenance=config.provenance,
                license=license,
                base_model=base_model,
            )
            file = out or folder / CARD
            write_card(file, model_card(facts, given, recipe))
            progress.finish("card")
        console.say(f"wrote {file}", style="bold green")
        console.say(f"next: atelier push {policy} OWNER/NAME")


def _hashes(folder: Path, formats: set[str]) -> dict[str, str]:
    import torch

    from evals.policy_hash import policy_hash
    from policy import Policy

    return {
        dtype: policy_hash(Policy.from_pretrained(folder, getattr(torch, dtype)))
        for dtype in formats
    }
