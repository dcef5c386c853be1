"""A training run as a pipeline in memory."""

from pathlib import Path

import torch
from diffusers.models import AutoencoderDC, AutoencoderKL

from tim.config import load_config
from tim.models.autoencoders import Autoencoder
from tim.models.network import traits_of
from tim.models.text_encoders import TextEncoder
from tim.pipelines.class_to_image import TiMClassPipeline
from tim.pipelines.networks import TiMClassTransformer2DModel, TiMTransformer2DModel
from tim.pipelines.scheduler import TransitionScheduler
from tim.pipelines.text_to_image import TiMPipeline


def pipeline_of_run(
    folder: str | Path, torch_dtype: torch.dtype = torch.float32, weights: str | None = None
) -> TiMPipeline | TiMClassPipeline:
    """The newest checkpoint of a run, with the autoencoder and the text encoder that its config.yaml names.

    Args:
        folder: of the run, which holds config.yaml and checkpoints/.
        torch_dtype: of the weights, but the time embedders', which stay float32.
        weights: 'ema' or 'raw'; None takes the moving average when there is one.

    Raises:
        FileNotFoundError: when the config, a checkpoint or what the config names is missing.
        ValueError: for weights of another network than the config's.
    """
    yaml = Path(folder) / "config.yaml"
    model = load_config(yaml).model
    scheduler = TransitionScheduler(model.transport.target, model.transport.params)
    vae: AutoencoderDC | AutoencoderKL | None = None
    if model.vae_dir:
        vae = Autoencoder.from_pretrained(model.vae_dir, torch_dtype).model
    if traits_of(model.network).cap_feat_dim is None:
        network = TiMClassTransformer2DModel.from_single_file(folder, yaml, torch_dtype, weights)
        return TiMClassPipeline(network, scheduler, vae)
    if not model.text_encoder_dir:
        raise ValueError(f"{yaml} names no text encoder (model.text_encoder_dir)")
    encoder = TextEncoder(
        model.text_encoder_dir, max_length=model.max_seq_length, use_last_hidden_state=model.use_last_hidden_state,
        padding=model.text_padding, dtype=torch_dtype,
    )  # fmt: skip
    return TiMPipeline(
        TiMTransformer2DModel.from_single_file(folder, yaml, torch_dtype, weights),
        scheduler,
        vae,
        encoder.model,
        encoder.tokenizer,
        max_sequence_length=model.max_seq_length,
        use_last_hidden_state=model.use_last_hidden_state,
        text_padding=model.text_padding,
    )
