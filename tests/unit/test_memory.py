"""Bytes, compared with what PyTorch really holds: saved tensors, optimizer states, the cache, and
the peak that torch's own tracker sees."""

from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3Config, Qwen3ForCausalLM

from policy import Policy, base_path
from policy.anatomy import Part, read_anatomy
from policy.denoiser import Denoiser
from policy.grouped_attention import GroupCache
from policy.pixels import decode_latents
from policy.published import published_anatomy
from policy.sampling import ImageTokenSampler, Sampling
from recipes import load_recipe
from recipes.schema_grpo import GrpoRecipe
from rl import memory
from rl.memory import Sharding, grpo_memory

WIDTHS = {"float32": 4, "bfloat16": 2}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, PICTURES = 48, 2


def recipe_of(name: str = "geneval-scenes", *changes: str) -> GrpoRecipe:
    return load_recipe(name, list(changes)).recipe


@pytest.fixture(scope="module")
def anatomy():
    return read_anatomy(base_path())


@pytest.fixture(scope="module")
def published():
    return published_anatomy()


def language_model(dtype: str) -> tuple[Qwen3ForCausalLM, Part]:
    """The proportions of Qwen3-1.7B at an eighth of its width, with four of its layers."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return model, Part(shapes, config.to_dict())


def saved_bytes(model: torch.nn.Module, run) -> int:
    """Bytes of all storages that a forward pass keeps, those of the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    assert output.requires_grad
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [None, ALL, ["q_proj", "v_proj"]])
def test_activations_are_what_the_backward_pass_keeps(dtype, targets):
    from peft import LoraConfig, get_peft_model

    model, part = language_model(dtype)
    changes, own = ["policy.lora=null"], WIDTHS[dtype]
    adapted: torch.nn.Module = model
    if targets is not None:
        changes, own = [f"policy.lora.targets=[{', '.join(targets)}]", "policy.lora.rank=8"], 4
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=targets))
    ids = torch.ones(PICTURES, LENGTH, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    measured = saved_bytes(
        adapted, lambda: model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    )
    expected = memory.activations(
        part, LENGTH, WIDTHS[dtype], recipe_of("geneval-scenes", *changes).policy.lora, own
    )
    assert measured / PICTURES == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("dtype", "lora"), [("bfloat16", True), ("bfloat16", False)])
def test_gradients_and_optimizer_states_are_what_adamw_holds(dtype, lora):
    from peft import LoraConfig, get_peft_model

    policy = Policy.from_pretrained(base_path(), getattr(torch, dtype))
    model = policy.ar
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, target_modules=ALL))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    changes = [] if lora else ["policy.lora=null"]
    resident = grpo_memory(
        recipe_of("geneval-scenes", f"policy.dtype={dtype}", *changes), read_anatomy(base_path())
    ).resident
    assert resident["gradients"] == sum(p.grad.nbytes for p in trained)
    assert resident["optimizer states"] == sum(value.nbytes for value in states)
    assert resident["weights of ar"] == sum(p.nbytes for p in model.parameters())
    rest = (policy.image_tokenizer, policy.connector, policy.diffusion, policy.vae)
    assert resident["weights of the rest"] == sum(
        p.nbytes for part in rest for p in part.parameters()
    )


def test_the_cache_is_what_the_sampler_fills(anatomy, monkeypatch):
    policy = Policy.from_pretrained(base_path())
    config = policy.config
    caches: list[GroupCache] = []
    original = GroupCache.__init__

    def watched(self, steps):
        caches.append(self)
        original(self, steps)

    monkeypatch.setattr(GroupCache, "__init__", watched)
    sampler = ImageTokenSampler(
        policy.ar, config.image_start_id, config.num_image_tokens, config.num_tokens, config.pad_id
    )
    prompts = [[5] * anatomy.prompt_tokens] * 3
    sampler.sample(prompts, 4, Sampling(), list(range(12)))
    held = sum(
        tensor.nbytes
        for cache in caches
        for pair in (*cache._prompt.values(), *cache._own.values())
        for tensor in pair
    )
    assert memory.sampler_cache(anatomy, 12, 4, 4) == held


def peak_of(module: torch.nn.Module, run) -> int:
    """Most bytes that torch's tracker sees besides the weights, without gradients."""
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker, torch.no_grad():
        run()
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    assert isinstance(snapshot, dict)
    return snapshot["Total"] - sum(p.nbytes for p in module.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_buffers(anatomy, dtype):
    policy = Policy.from_pretrained(base_path(), getattr(torch, dtype))
    pictures, width = 16, WIDTHS[dtype]
    latents = policy.noise(range(pictures))
    conditions = policy.connector(
        torch.zeros(
            pictures, 1 + anatomy.num_tokens, policy.ar.config.hidden_size, dtype=latents.dtype
        )
    ).detach()
    time = torch.zeros(1)
    head = peak_of(
        policy.diffusion,
        lambda: Denoiser(policy.diffusion, conditions, None).velocity(latents, time),
    )
    decoder = peak_of(policy.vae, lambda: policy.vae.decode(latents))
    assert memory.head_buffers(anatomy, pictures, 1, width) == pytest.approx(head, rel=0.2)
    assert memory.autoencoder_buffers(anatomy, pictures, width, "decoder") == pytest.approx(
        decoder, rel=0.1
    )


@pytest.fixture
def bfloat16_by_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


def test_published_decoding_buffers(published, bfloat16_by_default):
    """Without a byte of real memory: fake tensors have sizes alone."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from torch._subclasses.fake_tensor import FakeTensorMode

    from policy.published import DC_AE, SANA

    with FakeTensorMode():
        head, vae = SanaTransformer2DModel(**SANA), AutoencoderDC(**DC_AE)
        latents, rows, time = torch.zeros(1, 32, 32, 32), torch.zeros(1, 730, 2304), torch.zeros(1)
        in_head = peak_of(head, lambda: Denoiser(head, rows, None).velocity(latents, time))
        in_decoder = peak_of(vae, lambda: vae.decode(latents))
    assert memory.head_buffers(published, 1, 1, 2) == pytest.approx(in_head, rel=0.01)
    assert memory.autoencoder_buffers(published, 1, 2, "decoder") == pytest.approx(
        in_decoder, rel=0.01
    )


class Tiled(torch.nn.Module):
    """Decoding as a module: inside one, the tracker lets the decoder be called for each tile."""

    def __init__(self, vae, tile: int) -> None:
        super().__init__()
        self.vae, self.tile = vae, tile

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self.vae, latents, self.tile)


def test_decoding_buffers_in_tiles(published):
    """384 px, the proportions of the published autoencoder at an eighth of its width."""
    from diffusers import AutoencoderDC

    from policy.published import DC_AE

    widths = [count // 8 for count in DC_AE["decoder_block_out_channels"]]
    layers = dict.fromkeys(("encoder_layers_per_block", "decoder_layers_per_block"), [1] * 6)
    channels = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), widths)
    config = DC_AE | layers | channels
    decoder, latents = Tiled(AutoencoderDC(**config), 256), torch.zeros(1, 32, 12, 12)
    measured = peak_of(decoder, lambda: decoder(latents))
    small = replace(published, latent_size=12, parts=published.parts | {"vae": Part({}, config)})
    expected = memory.autoencoder_buffers(small, 1, memory.SINGLE, "decoder", 256)
    assert expected == pytest.approx(measured, rel=0.1)


def test_decoding_in_tiles_needs_less_where_all_decoding_of_a_run_is_in_tiles(published):
    def needed(*changes: str) -> int:
        recipe = recipe_of("blip3o-next-3b/grpo-geneval", *changes)
        return memory.grpo_memory(recipe, published).phases["decoding"]

    whole, train, both = needed(), "decode.train.tile=512", "decode.eval.tile=512"
    assert needed(train) == whole  # the held-out pictures are decoded whole
    assert needed(train, "evals.every=0", "decode.check.every=5") == whole
    assert needed(train, both) == needed(train, "evals.every=0") < whole / 3


def test_logits_of_an_update():
    from rl.image_head import image_logprobs

    hidden = torch.randn(4, 36, 32, dtype=torch.bfloat16)
    head = torch.nn.Parameter(torch.randn(512, 32, dtype=torch.bfloat16))
    codes = torch.zeros(4, 36, dtype=torch.int64)
    tracker = MemTracker()
    with tracker:
        image_logprobs(hidden, head, codes)[0].sum().backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    gradient = memory.SINGLE * 512 * 32
    assert peak == pytest.approx(4 * 36 * 512 * (2 + memory.BACKWARD_TILE) + gradient, rel=0.1)


def test_vllm_s_cache_is_the_recipe_s(published):
    """Keys and values of 28 layers, 8 heads of 128, two bytes each: 112 KiB for each token."""
    recipe = recipe_of(
        "blip3o-next-3b/grpo-geneval", "rollout.engine=vllm", "rollout.vllm.cache_gib=20"
    )
    assert memory.grpo_memory(recipe, published).resident["vLLM's cache"] == 20 * 2**30
    tokens = 20 * 2**30 // (112 * 2**10)
    expected = tokens // (published.prompt_tokens + published.num_tokens)
    assert memory.vllm_pictures(recipe, published) == expected > 200


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 2), ("float32", 4)])
def test_a_cache_in_8_bits_holds_more_pictures(published, dtype, times):
    asked = ("rollout.engine=vllm", "rollout.vllm.cache_gib=20", f"policy.dtype={dtype}")
    before = memory.vllm_pictures(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    asked = (*asked, "rollout.vllm.cache_dtype=fp8")
    found = memory.vllm_pictures(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    assert times * before <= found < times * (before + 1)


def test_merged_weights_are_kept_where_they_are_sent_from_the_gpu(published):
    asked = ("rollout.engine=vllm", "rollout.workers=2", "rollout.ray.gpus_per_worker=1")
    asked = (*asked, "rollout.ray.address=auto")
    stored = memory.grpo_memory(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    asked = (*asked, "rollout.vllm.weight_transfer=nccl")
    sent = memory.grpo_memory(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    whole = memory.grpo_memory(
        recipe_of("blip3o-next-3b/grpo-geneval", *asked, "policy.lora=null"), published
    )
    kept = 2 * published.parameters["ar"]
    assert sent.resident == stored.resident | {"merged weights, sent": kept}
    assert "merged weights, sent" not in whole.resident


def test_workers_that_share_the_trainers_gpu_take_its_memory(published):
    asked = ("rollout.engine=vllm", "rollout.workers=2", "rollout.ray.gpus_per_worker=0.5")
    asked = (*asked, "rollout.vllm.weight_transfer=ipc", "rollout.vllm.cache_gib=20")
    found = memory.grpo_memory(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published).resident
    assert found["vLLM's weights"] == 2 * 2 * published.parameters["ar"]
    assert found["vLLM's cache"] == 2 * 20 * 2**30
    awake = memory.grpo_memory(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    asked = (*asked, "rollout.vllm.sleep=true")
    asleep = memory.grpo_memory(recipe_of("blip3o-next-3b/grpo-geneval", *asked), published)
    held = found["vLLM's weights"] + found["vLLM's cache"]
    assert asleep.phases["sampling"] - awake.phases["sampling"] == held
    assert awake.phases["sampling"] > 0


def test_vllm_that_sleeps_takes_its_memory_while_it_samples_alone(published):
    asked = ("blip3o-next-3b/grpo-geneval", "rollout.engine=vllm", "rollout.vllm.cache_gib=20")
    awake = memory.grpo_memory(recipe_of(*asked), published)
    asleep = memory.grpo_memory(recipe_of(*asked, "rollout.vllm.sleep=true"), published)
    held = 20 * 2**30 + 2 * published.parameters["ar"]
    assert sum(awake.resident.values()) - sum(asleep.resident.values()) == held
    assert asleep.phases == awake.phases | {"sampling": awake.phases["sampling"] + held}


def test_workers_sample_elsewhere(published):
    name, engine = "blip3o-next-3b/grpo-geneval", "rollout.engine=vllm"
    found = memory.grpo_memory(recipe_of(name, engine, "rollout.workers=4"), published)
    assert not [what for what in found.resident if "vLLM" in what]
    assert found.phases["sampling"] == 0


def test_decode_workers_render_their_share_of_a_wave_and_the_trainer_nothing(published):
    name = "blip3o-next-3b/grpo-geneval"  # 16 prompts x 16
    here = grpo_memory(recipe_of(name), published)
    recipe = recipe_of(name, "decode.workers=4", "train.micro_batch=null", "rollout.waves=2")
    conditions = (1 + published.num_tokens) * 2048 * 2
    assert grpo_memory(recipe, published).phases["decoding"] == 256 * conditions
    share = 8 * 16 // 4
    [(section, found)] = memory.worker_memory(recipe, published).items()
    assert section == "decode"
    assert found.phases["decoding"] == share * conditions + memory.decoding(
        published, recipe.decode.eval, share, 2
    )
    few = recipe_of(name, "decode.workers=4")
    assert few.train.micro_batch == 8
    elsewhere = grpo_memory(few, published)
    assert elsewhere.resident == here.resident
    moved = here.phases["decoding"] - elsewhere.phases["decoding"]
    worker = memory.worker_memory(few, published)["decode"]
    assert worker.phases["decoding"] == 8 * conditions + moved
    assert memory.worker_memory(recipe_of(name), published) == {}


def test_a_decode_worker_s_weights_are_those_that_it_loads(anatomy):
    from rollout.decode_pool import Head

    loaded = Head(str(base_path()), "bfloat16").load()
    recipe = recipe_of("geneval-scenes", "policy.dtype=bfloat16", "decode.workers=1")
    counted = memory.worker_memory(recipe, anatomy)["decode"].resident["weights"]
    one_row = 2 * anatomy.parts["ar"].config["hidden_size"]  # of the head, which says the type
    assert sum(p.nbytes for p in loaded.parameters()) == counted + one_row


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_rollout_worker_samples_whole_groups(published, engine):
    """Of 16 prompts 3 workers have 6 at the most: as one process that has 6 alone."""
    name, changes = "blip3o-next-3b/grpo-geneval", (f"rollout.engine={engine}",)
    found = memory.worker_memory(recipe_of(name, *changes, "rollout.workers=3"), published)
    changes = (*changes, "rollout.prompts_per_step=6")
    alone = grpo_memory(recipe_of(name, *changes), published)
    assert found["rollout"].phases == {"sampling": alone.phases["sampling"]}
    assert found["rollout"].resident["weights"] == 2 * published.parameters["ar"]
    cache = alone.resident.get("vLLM's cache", 0)
    assert found["rollout"].peak == sum(
        (2 * published.parameters["ar"], cache, alone.phases["sampling"])
    )


def test_nccl_has_two_buffers_on_each_side_or_all_weights(anatomy, published, monkeypatch):
    asked = ("rollout.engine=vllm", "rollout.workers=2", "rollout.ray.gpus_per_worker=1")
    asked = (*asked, "rollout.ray.address=auto", "rollout.vllm.weight_transfer=nccl")
    recipe = recipe_of("blip3o-next-3b/grpo-geneval", *asked)
    whole = 2 * published.parameters["ar"]  # fit into two buffers with an embedding of 0.9 GB each
    assert grpo_memory(recipe, published).phases["sending"] == whole
    assert memory.worker_memory(recipe, published)["rollout"].phases["receiving"] == whole
    monkeypatch.setattr(memory, "TRANSFER_BUFFER", 10**8)
    embedding = 2 * 217_210 * 2048
    expected = 2 * (10**8 + embedding)
    assert expected < whole
    assert grpo_memory(recipe, published).phases["sending"] == expected
    assert memory.worker_memory(recipe, published)["rollout"].phases["receiving"] == expected


def test_the_constants_are_those_of_the_engines():
    import inspect

    from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

    from rl.image_head import TILE

    assert (TOKEN_CHUNK_SIZE, TILE) == (memory.LOGIT_ROWS, memory.LOGIT_COLUMNS)
    rows = inspect.signature(ImageTokenSampler.__init__).parameters["micro_batch"].default
    assert rows == memory.SAMPLER_ROWS


def test_sharding_divides_what_each_stage_divides(published):
    """By the table of the ZeRO paper: 2 + 2 + 12 bytes a parameter, and what is divided when."""
    changes = ("policy.lora=null", "algorithm.beta=0", "rollout.engine=transformers")
    recipe = recipe_of("blip3o-next-3b/grpo-geneval", *changes)
    count = published.parameters["ar"]
    for stage, each in ((1, 2 + 2 + 12 / 8), (2, 2 + (2 + 12) / 8)):
        resident = grpo_memory(recipe, published, Sharding(8, stage)).resident
        ours = sum(resident.values()) - resident["weights of the rest"]
        assert ours == pytest.approx(count * each, rel=1e-6)
    alone = grpo_memory(recipe, published).resident
    assert sum(alone.values()) - alone["weights of the rest"] == count * (2 + 2 + 4)


def test_a_smaller_micro_batch_needs_less_and_more_gpus_never_need_more(published):
    def peak(gpus, stage, micro):
        recipe = recipe_of("blip3o-next-3b/grpo-geneval", f"train.micro_batch={micro}")
        return grpo_memory(recipe, published, Sharding(gpus, stage)).peak

    assert peak(1, 0, 16) > peak(1, 0, 8) > peak(1, 0, 1)
    assert peak(8, 1, 16) >= peak(8, 2, 16) >= peak(32, 2, 16)
