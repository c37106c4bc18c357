"""Recipes that build a policy: image tokenizer, autoencoder, then joint training."""

from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from recipes.schema_common import (
    Device,
    Header,
    LogSection,
    LoraSection,
    OptimizerSection,
    SaveSection,
    SceneTask,
    Section,
    StepsSection,
    TextPath,
    cross_error,
)

TrainedPart = Literal[
    "ar", "connector", "reference_connector", "diffusion", "diffusion.caption", "diffusion.patch"
]
"""What pretraining can train. `diffusion.caption` is the projection and norm of the conditions,
`diffusion.patch` the way in and out of the latents."""
FINE_PARTS = {
    "diffusion.caption": ("caption_projection.", "caption_norm."),
    "diffusion.patch": ("patch_embed.", "proj_out."),
}
"""What the names of their weights in the diffusion head begin with."""
ENCODED_AT_ONCE = 4
"""Pictures whose latents are made together: at 1024 px each takes 2.7 GB for that."""
CODEC_LOG_EVERY = 50
"""Steps between two rows of numbers while an image codec is trained."""
Route = Literal["cross_attention", "noise_space"]
BatchSize = Annotated[int, Field(ge=1, description="Pictures per optimizer step.")]


class StartSection(Section):
    """Where the run starts from."""

    path: Annotated[
        TextPath | None,
        Field(
            description="Policy folder to go on from, or `base` for the policy shipped with the "
            "package; null = new weights of the tiny policy."
        ),
    ] = None


class PretrainStartSection(StartSection):
    """Where the run starts from, and what it adds."""

    device: Annotated[Device, Field(description="auto = cuda where there is a GPU, else cpu.")] = (
        "auto"
    )
    lora: Annotated[
        LoraSection | None,
        Field(description="Adapters to train in the AR model; null = train its weights."),
    ] = None
    routes: Annotated[
        tuple[Route, ...] | None,
        Strict(False),
        Field(
            description="Ways in which the diffusion head is to see a reference picture, for a "
            "policy that learns to edit; null = those that the policy has."
        ),
    ] = None


class SceneTasksSection(Section):
    """What pictures of the scene world show."""

    tasks: Annotated[
        dict[SceneTask, Annotated[float, Field(ge=0)]] | None,
        Field(
            min_length=1,
            description="Scene world only: task -> how often it is drawn, relative to the others "
            "(0 = never); null = all tasks alike.",
        ),
    ] = None

    @model_validator(mode="after")
    def _some_task(self) -> Self:
        if self.tasks is not None and not any(self.tasks.values()):
            raise cross_error("tasks", "Every task has weight 0.", "give one a weight above 0.")
        return self


class PicturesSection(SceneTasksSection):
    """Pictures to learn from."""

    source: Annotated[
        Literal["scenes"], Field(description="`scenes`: pictures of the scene world.")
    ] = "scenes"


class CaptionedSection(SceneTasksSection):
    """Pictures with captions, or edits: pictures with a reference and an instruction."""

    source: Annotated[
        TextPath,
        Field(
            description="`scenes` for the scene world, or webdataset shards: a folder, a glob or a "
            "range such as data/{000..063}.tar."
        ),
    ] = "scenes"
    references: Annotated[
        int,
        Field(ge=0, le=1, description="Reference pictures of each sample: 1 = the data are edits."),
    ] = 0
    caption_noise: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Scene world only: share of captions with one wrong word, like web "
            "captions.",
        ),
    ] = 0.0
    context: Annotated[
        int | None,
        Field(
            ge=16,
            description="Longest sequence in tokens, image tokens included; longer captions are "
            "cut at their end. null = what the AR model takes.",
        ),
    ] = None
    workers: Annotated[
        int, Field(ge=0, le=256, description="Processes that read shards, per training process.")
    ] = 0

    @model_validator(mode="after")
    def _scene_world_only(self) -> Self:
        shards, edits = self.source != "scenes", self.references > 0
        for key, given, off in (
            ("tasks", self.tasks is not None, "null"),
            ("caption_noise", self.caption_noise, "0"),
        ):
            if given and (shards or edits):
                what = "Shards have" if shards else "Edits of the scene world have"
                raise cross_error(key, f"{what} no {key}.", f"set data.{key}={off}.")
        if self.context and not (shards or edits):
            raise cross_error(
                "context",
                "Captions of the scene world are short and never cut.",
                "set data.context=null.",
            )
        if self.workers and not shards:
            raise cross_error(
                "workers",
                "Pictures of the scene world are drawn and encoded in the training process.",
                "set data.workers to 0.",
            )
        return self


class PretrainLossSection(Section):
    """Weights of the joint loss and what is hidden from the diffusion head."""

    cross_entropy: Annotated[
        float, Field(ge=0, description="Weight of the next-token loss on image tokens.")
    ] = 1.0
    flow_matching: Annotated[
        float, Field(ge=0, description="Weight of the flow-matching loss of the diffusion head.")
    ] = 1.0
    condition_dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of pictures without conditioning, for guidance."),
    ] = 0.1
    hidden_noise: Annotated[
        float,
        Field(ge=0, le=10, description="Standard deviation of noise on the hidden states."),
    ] = 0.0
    draws: Annotated[
        Literal["per_sample", "per_batch"],
        Field(
            description="Where noise, time and dropout come from: each sample's own seed, so that "
            "they are alike for any number of processes, or torch's generator, a batch at a time."
        ),
    ] = "per_sample"

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not self.cross_entropy and not self.flow_matching:
            raise cross_error(
                "cross_entropy", "Both losses have weight 0.", "give one of them a weight above 0."
            )
        return self


class PretrainTrainSection(OptimizerSection):
    """The optimizer, and how the work is spread."""

    batch_size: BatchSize
    optimizer: Annotated[
        Literal["muon", "adamw"],
        Field(description="muon = Muon for hidden matrices and AdamW for the rest."),
    ] = "adamw"
    decay_steps: Annotated[
        int, Field(ge=0, description="Last steps over which the learning rate falls to 2 %.")
    ] = 0
    compile: Annotated[
        bool, Field(description="torch.compile the language model; needs a C++ compiler.")
    ] = False
    micro_batch: Annotated[
        int | None,
        Field(
            ge=1,
            description="Pictures per forward pass of a process; gradients add up over passes. "
            "null = a process's share of batch_size at once.",
        ),
    ] = None
    bf16: Annotated[
        bool,
        Field(
            description="Compute in bfloat16; weights and optimizer stay float32 (see deepspeed)."
        ),
    ] = False
    gradient_checkpointing: Annotated[
        bool, Field(description="Compute activations again in the backward pass: less memory.")
    ] = False
    deepspeed: Annotated[
        Literal["zero1", "zero2", "zero3"] | None,
        Field(
            description="Divide among processes the optimizer state (zero1), also gradients "
            "(zero2), also weights (zero3); null = every process has all of it."
        ),
    ] = None
    ema: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Decay per step of a moving average of the weights, which then is what the "
            "trained policy has; null = the last weights.",
        ),
    ] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise cross_error(
                "micro_batch",
                f"{self.micro_batch} does not divide train.batch_size, {self.batch_size}.",
                f"use a divisor of {self.batch_size}.",
            )
        if self.deepspeed and self.optimizer == "muon":
            raise cross_error(
                "optimizer",
                "Muon needs whole matrices, and ZeRO cuts them into pieces.",
                "use adamw, or set train.deepspeed to null.",
            )
        if self.deepspeed == "zero3" and self.ema:
            raise cross_error(
                "ema",
                "With zero3 no process has whole weights to average.",
                "use zero2, or set train.ema to null.",
            )
        return self


class CodecTrainSection(StepsSection):
    """What is left to choose: an image codec has a fixed optimizer and schedule."""

    batch_size: BatchSize


class ImageTokenizerTrainSection(CodecTrainSection):
    """Training of the image tokenizer, by Muon."""

    unquantized_steps: Annotated[
        int,
        Field(ge=1, description="First steps without codebook; k-means then places the codes."),
    ] = 500


class AutoencoderTrainSection(CodecTrainSection):
    """Training of the autoencoder, by AdamW."""

    latent_noise: Annotated[
        float,
        Field(ge=0, le=5, description="Largest noise on latents, in their standard deviations."),
    ] = 0.3


class PretrainLogSection(LogSection):
    """Where numbers go, and how often."""

    every: Annotated[
        int, Field(ge=1, description="Steps between two rows; each is their mean.")
    ] = 50


class PretrainRecipe(Header):
    """Joint training of the AR model and the diffusion head: pretraining, fine-tuning, editing."""

    kind: Annotated[Literal["pretrain"], Field(description="What this recipe does.")]
    policy: Annotated[PretrainStartSection, Field(description="Where the run starts from.")] = (
        PretrainStartSection()
    )
    data: Annotated[CaptionedSection, Field(description="Pictures with captions, or edits.")] = (
        CaptionedSection()
    )
    loss: Annotated[PretrainLossSection, Field(description="The joint loss.")] = (
        PretrainLossSection()
    )
    trainable: Annotated[
        tuple[TrainedPart, ...],
        Strict(False),
        Field(
            min_length=1,
            description="Parts that are trained; the others stay as they are. The default is what "
            "the published code trains.",
        ),
    ] = ("ar", "connector", "diffusion.caption")
    train: Annotated[PretrainTrainSection, Field(description="The optimizer.")]
    save: Annotated[SaveSection, Field(description="Checkpoints.")] = SaveSection(every=500)
    log: Annotated[PretrainLogSection, Field(description="Numbers.")] = PretrainLogSection()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.policy.lora and "ar" not in self.trainable:
            raise cross_error(
                "policy.lora", "The AR model is not trained.", "add ar to trainable, or use null."
            )
        heads = [part for part in self.trainable if part != "ar"]
        if heads and not self.loss.flow_matching:
            raise cross_error(
                "trainable",
                f"loss.flow_matching is 0, and {heads[0]} learns from nothing else.",
                "use [ar], or give loss.flow_matching a weight above 0.",
            )
        if self.policy.routes and not self.data.references:
            raise cross_error(
                "policy.routes",
                "Routes are for reference pictures, and the data have none.",
                "set data.references to 1, or remove policy.routes.",
            )
        if self.loss.draws == "per_batch" and (
            self.data.source != "scenes" or self.data.references
        ):
            raise cross_error(
                "loss.draws",
                "Each sample of shards, and each edit, has draws of its own.",
                "use per_sample.",
            )
        return self


class _CodecRecipe(Header):
    """What the two kinds for image codecs have in common."""

    policy: Annotated[StartSection, Field(description="Where the run starts from.")] = (
        StartSection()
    )
    data: Annotated[PicturesSection, Field(description="Pictures.")] = PicturesSection()


class ImageTokenizerRecipe(_CodecRecipe):
    """Training of the image tokenizer (encoder and codebook)."""

    kind: Annotated[Literal["image_tokenizer"], Field(description="What this recipe does.")]
    train: Annotated[ImageTokenizerTrainSection, Field(description="The optimizer.")]

    @model_validator(mode="after")
    def _places_the_codebook(self) -> Self:
        train = self.train
        if train.unquantized_steps >= train.steps:
            raise cross_error(
                "train.unquantized_steps",
                f"All {train.steps} steps are without codebook, so it would never be placed.",
                "lower it, or raise train.steps.",
            )
        return self


class AutoencoderRecipe(_CodecRecipe):
    """Training of the autoencoder whose latents the diffusion head draws."""

    kind: Annotated[Literal["autoencoder"], Field(description="What this recipe does.")]
    train: Annotated[AutoencoderTrainSection, Field(description="The optimizer.")]
