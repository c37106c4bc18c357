"""`atelier push`: a policy and its card to the Hugging Face hub."""

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("push", rich_help_panel="Judging")
    def push(
        policy: str = typer.Argument(..., help="A policy folder or a finished run, with its card."),
        repository: str = typer.Argument(..., metavar="OWNER/NAME", help="Where to."),
        public: bool = typer.Option(False, "--public", help="A new repository is for everybody."),
        endpoint: str | None = typer.Option(
            None, help="Address of a server, or a folder. (default: the hub)"
        ),
        message: str = typer.Option("Policy and card", help="Message of the commit."),
    ) -> None:
        """Send a policy and its card to the Hugging Face hub; a new repository is private.

        The token is the one of `hf auth login`, or HF_TOKEN.
        """
        from cli import console
        from cli.policy_folder import find_policy
        from common.errors import UsageError
        from evals.card import CARD, is_card
        from policy import hub

        folder = find_policy(policy)
        if not (folder / CARD).is_file() or not is_card(folder / CARD):
            raise UsageError(
                f"{folder} has no card, so nobody could tell what it is.\n"
                f"    Fix: atelier card {policy} RESULTS..."
            )
        with console.progress() as progress:
            progress.start("push", None)
            place = hub.push(folder, repository, public=public, endpoint=endpoint, message=message)
            progress.finish("push")
        console.say(f"pushed to {place}", style="bold green")
