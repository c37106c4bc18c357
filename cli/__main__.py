"""`python -m cli` is `atelier`, for launchers such as torchrun."""

from cli.main import run

run()
