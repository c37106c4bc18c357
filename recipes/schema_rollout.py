"""The sections `rollout` and `decode` of a `grpo` recipe: how pictures come about in a step."""

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from recipes.schema_common import Section, TextPath, cross_error


class WorkerSection(Section):
    """What each worker of a stage takes on its machine; read only if there are any."""

    cpus_per_worker: Annotated[float, Field(gt=0, description="CPUs and threads of a worker.")] = 1
    gpus_per_worker: Annotated[
        float, Field(ge=0, description="GPUs of a worker; 0.5 = two workers share one.")
    ] = 0
    resource: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Ray resource of which a worker takes one, to choose its machines (`ray "
            "start --resources`); null = any machine.",
        ),
    ] = None
    timeout_s: Annotated[
        float,
        Field(gt=0, description="Seconds after which a worker that does not answer is replaced."),
    ] = 600


class RaySection(WorkerSection):
    """The same for rollout workers, and the cluster of all workers."""

    address: Annotated[
        TextPath | None,
        Field(
            description="A running cluster to join (`auto`: the one of this machine); null = start "
            "one here for the time of the run."
        ),
    ] = None


class VllmSection(Section):
    """How vLLM starts, in each worker; read only by that engine."""

    cache_gib: Annotated[
        float,
        Field(
            gt=0,
            description="Memory for keys and values in GiB, which decides how many pictures are "
            "sampled at a time (`atelier plan` counts them).",
        ),
    ] = 1.0
    compile: Annotated[
        bool,
        Field(
            description="Compile the model at the start, on a GPU into CUDA graphs; takes half a "
            "minute or more."
        ),
    ] = False
    cache_dtype: Annotated[
        Literal["auto", "fp8"],
        Field(
            description="Number format of keys and values: that of the policy, or 8 bits, for two "
            "or four times the pictures; fp8 needs algorithm.importance_cap."
        ),
    ] = "auto"
    sleep: Annotated[
        bool,
        Field(
            description="Leave the GPU between rollouts to those who share it: weights wait in "
            "host memory, the cache is dropped."
        ),
    ] = False
    weight_transfer: Annotated[
        Literal["ray", "nccl", "ipc"],
        Field(
            description="How weights reach workers: through Ray's object store, or vLLM's own ways "
            "from GPU to GPU (nccl), or on the trainer's GPU (ipc)."
        ),
    ] = "ray"


class RolloutSection(Section):
    """How image tokens are sampled."""

    engine: Annotated[
        Literal["transformers", "vllm"], Field(description="Engine that samples image tokens.")
    ] = "transformers"
    workers: Annotated[
        int,
        Field(
            ge=0,
            le=4096,
            description="Engines in processes of their own, placed by Ray; 0 = one in the "
            "trainer's process.",
        ),
    ] = 0
    vllm: VllmSection = VllmSection()
    ray: RaySection = RaySection()
    lora_sync: Annotated[
        Literal["merged", "adapter"],
        Field(
            description="What of adapters (policy.lora) is brought to the engine: all weights with "
            "them merged, or they alone, beside the start policy (vllm)."
        ),
    ] = "merged"
    group_size: Annotated[
        int, Field(ge=2, le=4096, description="Images per prompt, compared with one another.")
    ] = 12
    prompts_per_step: Annotated[
        int, Field(ge=1, le=65536, description="Prompts per optimizer step.")
    ] = 12
    waves: Annotated[
        int,
        Field(
            ge=1,
            description="Parts of a step that are sampled, rendered and judged at the same time, "
            "one behind the other; 1 = one stage after the other.",
        ),
    ] = 1
    max_policy_lag: Annotated[
        int,
        Field(
            ge=0,
            le=1,
            description="1 = workers sample the next step during the update, from the weights "
            "before it; 0 = on-policy.",
        ),
    ] = 0
    save_to: Annotated[
        TextPath | None,
        Field(description="Folder for each step's samples (`--save-rollouts`); null = none."),
    ] = None
    replay: Annotated[
        TextPath | None,
        Field(
            description="Folder of saved samples to learn from instead of sampling (`--replay`)."
        ),
    ] = None
    temperature: Annotated[
        float, Field(gt=0, le=10, description="Sampling temperature; 1 = the model as it is.")
    ] = 1.0
    top_k: Annotated[
        int, Field(ge=0, description="Sample from the k likeliest tokens; 0 = from all.")
    ] = 0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Sample from this much probability; 1 = from all.")
    ] = 1.0

    @model_validator(mode="after")
    def _transfers_to_workers(self) -> Self:
        key, gpus = "vllm.weight_transfer", self.ray.gpus_per_worker
        if self.transfer == "nccl" and (not self.workers or gpus < 1 or not self.ray.address):
            raise cross_error(
                key,
                "NCCL wants a GPU for each worker, none of them the trainer's, which a cluster "
                "that the run starts by itself does not keep.",
                "set rollout.workers, gpus_per_worker to 1 and address to a cluster without the "
                "trainer's GPU (both in rollout.ray), or this to ray.",
            )
        if self.transfer == "ipc" and not 0 < self.workers * gpus <= 1:
            raise cross_error(
                key,
                "By IPC workers read the memory of the GPU that they share with the trainer.",
                "let all of them take one GPU (rollout.workers x rollout.ray.gpus_per_worker), or "
                "set this to ray.",
            )
        if self.transfer and (self.max_policy_lag or self.lora_sync == "adapter"):
            raise cross_error(
                key,
                f"{self.transfer} sends the trainer's whole weights, as they are after the update.",
                "set rollout.max_policy_lag to 0 and rollout.lora_sync to merged, or this to ray.",
            )
        return self

    @property
    def transfer(self) -> Literal["nccl", "ipc"] | None:
        """By which of vLLM's own ways weights reach workers; None: by another one."""
        way = self.vllm.weight_transfer
        return None if self.engine != "vllm" or way == "ray" else way

    @property
    def rounds_cache(self) -> bool:
        """Whether the engine keeps keys and values in 8 bits, beside the trainer's law."""
        return self.engine == "vllm" and self.vllm.cache_dtype == "fp8"


NoiseLevel = Annotated[float, Field(ge=0, le=1)]


class DecodeEvalSection(Section):
    """How tokens become pixels."""

    steps: Annotated[int, Field(ge=1, le=1000, description="Euler steps of the flow.")] = 6
    guidance: Annotated[
        float, Field(ge=0, le=50, description="Classifier-free guidance; 1 = none, half the cost.")
    ] = 1.5
    guidance_interval: Annotated[
        tuple[NoiseLevel, NoiseLevel],
        Strict(False),
        Field(
            description="Noise levels [low, high] of the steps that are guided, 1 = pure noise; "
            "the others cost half."
        ),
    ] = (0.0, 1.0)
    tile: Annotated[
        int | None,
        Field(
            ge=1,
            description="Side in pixels of the tiles in which the autoencoder decodes, for less "
            "memory and, where it attends to the whole picture, another one; null = no tiles.",
        ),
    ] = None

    @model_validator(mode="after")
    def _interval_rises(self) -> Self:
        low, high = self.guidance_interval
        if low > high:
            raise cross_error("guidance_interval", "It ends before it begins.", "swap the ends.")
        return self


class DecodeTrainSection(DecodeEvalSection):
    """How tokens become pixels during training."""

    noise: Annotated[
        Literal["shared_in_group", "per_sample"],
        Field(
            description="Whether the images of one prompt start from the same noise, so that "
            "a difference in reward comes from the tokens."
        ),
    ] = "shared_in_group"


class DecodeCheckSection(Section):
    """Whether training's decoding ranks the images of a prompt as evaluation's does."""

    every: Annotated[int, Field(ge=0, description="Steps between two checks; 0 = none.")] = 0
    limit: Annotated[
        float,
        Field(
            ge=-1,
            le=1,
            description="Rank correlation of the reward within groups below which training decodes "
            "better: twice the steps, in the end as well as evaluation does.",
        ),
    ] = 0.8
    prompts: Annotated[int, Field(ge=1, description="Groups of the step that are compared.")] = 4


class DecodeSection(Section):
    """Training may decode more cheaply than evaluation."""

    train: Annotated[DecodeTrainSection, Field(description="Decoding for the reward.")] = (
        DecodeTrainSection()
    )
    eval: Annotated[DecodeEvalSection, Field(description="Decoding for evaluation.")] = (
        DecodeEvalSection()
    )
    check: Annotated[DecodeCheckSection, Field(description="Comparison of the two.")] = (
        DecodeCheckSection()
    )
    compile: Annotated[
        bool,
        Field(
            description="Compile the diffusion head's step at the first rendering (torch.compile; "
            "needs a C++ compiler); takes up to a minute."
        ),
    ] = False
    workers: Annotated[
        int,
        Field(
            ge=0,
            le=4096,
            description="Diffusion heads in processes of their own, placed by Ray; 0 = that of the "
            "trainer's process.",
        ),
    ] = 0
    ray: WorkerSection = WorkerSection()
