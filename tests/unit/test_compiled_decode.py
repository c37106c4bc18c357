"""`decode.compile`: the head's steps through torch.compile, traced for real without a compiler."""

import pytest
import torch

from policy import diffusion
from policy.denoiser import Denoiser
from recipes import load_recipe
from rl.run import decoding
from rollout.decode import Decode, rendered


@pytest.fixture
def traced(monkeypatch) -> list[torch.fx.GraphModule]:
    """The graphs that tracing has made so far; a break in one would be an error."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(Denoiser.velocity, backend=keep, fullgraph=True)
    monkeypatch.setattr(diffusion, "_compiled", lambda: step)
    return graphs


def hidden_rows(policy, batch: int) -> torch.Tensor:
    shape = (batch, 1 + policy.config.num_tokens, policy.ar.config.hidden_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_compiled_steps_give_the_same_pictures(policy, traced, guidance):
    hidden = hidden_rows(policy, 3)
    options = {"seed": 5, "steps": 3, "guidance": guidance, "guidance_interval": (0.5, 1.0)}
    expected = policy.render(hidden, **options)
    assert not traced
    found = policy.render(hidden, compiled=True, **options)
    assert traced
    assert torch.allclose(found, expected, atol=1e-5)


def test_all_renderings_share_two_graphs(policy, traced):
    """One for a fixed number of pictures and one for any other; time, weights, noise are inputs."""
    for batch, steps in ((3, 2), (3, 5), (4, 2), (7, 2), (5, 3)):
        policy.render(hidden_rows(policy, batch), seed=batch, steps=steps, compiled=True)
    assert len(traced) == 2


def test_the_recipe_s_key_reaches_the_head(policy, traced):
    for compiled in (False, True):
        recipe = load_recipe("geneval-scenes", [f"decode.compile={str(compiled).lower()}"]).recipe
        for section in (recipe.decode.train, recipe.decode.eval):
            rendered(policy, hidden_rows(policy, 2), [1, 2], decoding(recipe, section))
        assert bool(traced) == compiled
    assert not Decode(2, 1.0).compiled
