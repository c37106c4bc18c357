"""Recipes that build a policy: image tokenizer, then autoencoder, then joint pretraining."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from recipes.schema_common import (
    Device,
    Dtype,
    Header,
    LogSection,
    OptimizerSection,
    SaveSection,
    SceneTask,
    Section,
    TextPath,
)

Part = Literal["ar", "image_tokenizer", "connector", "diffusion", "vae"]


class StartSection(Section):
    """Where the run starts from."""

    path: Annotated[
        TextPath | None,
        Field(description="Policy folder to go on from; null = new weights."),
    ] = None
    dtype: Annotated[Dtype, Field(description="Number format of weights and activations.")] = (
        "float32"
    )
    device: Annotated[Device, Field(description="auto = cuda where there is a GPU, else cpu.")] = (
        "auto"
    )


class PicturesSection(Section):
    """Pictures to learn from."""

    source: Annotated[
        TextPath,
        Field(description="`scenes` for the scene world, or the pattern of webdataset tars."),
    ] = "scenes"
    split: Annotated[
        Literal["train", "tune"],
        Field(description="Part of the scene world; held_out is kept for evaluation."),
    ] = "train"
    tasks: Annotated[
        dict[SceneTask, Annotated[float, Field(ge=0)]] | None,
        Field(
            min_length=1,
            description="Task -> how often it is drawn, relative to the others (0 = never); "
            "null = all tasks of the scene world alike.",
        ),
    ] = None


class CaptionedSection(PicturesSection):
    """Pictures with captions."""

    caption_noise: Annotated[
        float,
        Field(ge=0, le=1, description="Share of captions with one wrong word, like web captions."),
    ] = 0.0


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


class PretrainTrainSection(OptimizerSection):
    """The optimizer."""

    batch_size: Annotated[int, Field(ge=1, description="Pictures per optimizer step.")]
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


class ImageTokenizerTrainSection(PretrainTrainSection):
    """The optimizer of the image tokenizer."""

    unquantized_steps: Annotated[
        int,
        Field(ge=1, description="First steps without codebook; k-means then places the codes."),
    ] = 500


class AutoencoderTrainSection(PretrainTrainSection):
    """The optimizer of the autoencoder."""

    latent_noise: Annotated[
        float,
        Field(ge=0, le=5, description="Largest noise on latents, in their standard deviations."),
    ] = 0.3


class _BuildRecipe(Header):
    """What the three kinds have in common."""

    policy: Annotated[StartSection, Field(description="Where the run starts from.")] = (
        StartSection()
    )
    train: Annotated[PretrainTrainSection, Field(description="The optimizer.")]
    save: Annotated[SaveSection, Field(description="Checkpoints.")] = SaveSection(every=500)
    log: Annotated[LogSection, Field(description="Trackers.")] = LogSection()


class PretrainRecipe(_BuildRecipe):
    """Joint training of the AR model and the diffusion head."""

    kind: Annotated[Literal["pretrain"], Field(description="What this recipe does.")]
    data: Annotated[CaptionedSection, Field(description="Pictures with captions.")] = (
        CaptionedSection()
    )
    loss: Annotated[PretrainLossSection, Field(description="The joint loss.")] = (
        PretrainLossSection()
    )
    trainable: Annotated[
        tuple[Part, ...],
        Strict(False),
        Field(min_length=1, description="Parts that are trained; the others stay as they are."),
    ] = ("ar", "connector", "diffusion")


class ImageTokenizerRecipe(_BuildRecipe):
    """Training of the image tokenizer (encoder and codebook)."""

    kind: Annotated[Literal["image_tokenizer"], Field(description="What this recipe does.")]
    data: Annotated[PicturesSection, Field(description="Pictures.")] = PicturesSection()
    train: Annotated[ImageTokenizerTrainSection, Field(description="The optimizer.")]


class AutoencoderRecipe(_BuildRecipe):
    """Training of the autoencoder whose latents the diffusion head draws."""

    kind: Annotated[Literal["autoencoder"], Field(description="What this recipe does.")]
    data: Annotated[PicturesSection, Field(description="Pictures.")] = PicturesSection()
    train: Annotated[AutoencoderTrainSection, Field(description="The optimizer.")]
