"""`atelier serve-reward`: a reward as an HTTP service."""

from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("serve-reward", rich_help_panel="Judging")
    def serve_reward(
        name: str = typer.Argument(
            ..., metavar="REWARD", help="Name of a reward, or file.py:function."
        ),
        arg: list[str] | None = typer.Option(
            None, metavar="KEY=VALUE", help="An argument of the reward; may be repeated."
        ),
        host: str = typer.Option("127.0.0.1", help="Address to listen at."),
        port: int = typer.Option(8765, min=1, max=65535, help="Port to listen at."),
        token_file: Path | None = typer.Option(
            None, help="File with the bearer token to ask for; needed off loopback."
        ),
        workers: int = typer.Option(
            0, min=0, max=256, help="Processes that score; 0 = a thread of this one."
        ),
        timeout: float = typer.Option(60.0, min=0.1, help="Seconds for one batch."),
        max_mb: int = typer.Option(64, min=1, max=1024, help="Largest request, in MiB."),
        max_images: int = typer.Option(256, min=1, help="Most pictures in a request."),
    ) -> None:
        """Serve a reward over HTTP, for the reward `remote` of other runs."""
        from cli import console, reward_arguments
        from common.errors import UsageError
        from rewards.serving import Limits, build_app, is_loopback

        if token_file is None and not is_loopback(host):
            raise UsageError(
                f"{host} can be reached from other machines, and no token is asked for.\n"
                "    Fix: --token-file FILE, or --host 127.0.0.1"
            )
        import socket

        import uvicorn

        from rewards.remote import read_token
        from rewards.runner import RewardRunner, RewardSpec

        token = None if token_file is None else read_token(token_file)
        args = reward_arguments.parse(arg or []).get("", {})
        spec = RewardSpec(name, args=args, timeout_s=timeout, workers=workers)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise UsageError(
                f"{host}:{port} cannot be listened at: {error.strerror}.\n"
                "    Fix: --port with one that is free, --host with an address of this machine"
            ) from error
        with listening, RewardRunner([spec]) as runner:
            service = build_app(runner, token, Limits(max_mb * 2**20, max_images))
            shown = f"[{host}]" if ":" in host else host
            console.say(f"serving {runner.names[0]} at http://{shown}:{port}", style="bold green")
            facts = [("token", "asked for" if token else "none: this machine alone")]
            console.pairs([*facts, ("end", "Ctrl-C")])
            config = uvicorn.Config(service, log_level="warning", server_header=False)
            uvicorn.Server(config).run([listening])
