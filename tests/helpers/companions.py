"""Random autoencoders and a text encoder of the real classes, saved in the published formats."""

import torch


def save_tiny_kl(folder, **kwargs):
    """A random AutoencoderKL of SD-VAE's kind (4 channels, /8) in the diffusers format; returns it."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        **kwargs,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_tiny_dc(folder, **kwargs):
    """A random AutoencoderDC of DC-AE's kind (/4, 8 channels) in the diffusers format; returns it."""
    from diffusers import AutoencoderDC

    model = AutoencoderDC(
        latent_channels=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        attention_head_dim=8,
        **kwargs,
    )
    model.save_pretrained(folder)
    return model.eval()


def save_grey_dc(folder):
    """An AutoencoderDC that divides by 32 as the published one does, and decodes everything to grey at once."""
    from diffusers import AutoencoderDC

    sides = ("encoder", "decoder")
    model = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        **{f"{side}_block_types": ("ResBlock",) * 6 for side in sides},
        **{f"{side}_block_out_channels": (4,) * 6 for side in sides},
        **{f"{side}_layers_per_block": (1,) * 6 for side in sides},
        **{f"{side}_qkv_multiscales": ((),) * 6 for side in sides},
    )
    torch.nn.init.zeros_(model.decoder.conv_out.weight)
    torch.nn.init.zeros_(model.decoder.conv_out.bias)
    model.save_pretrained(folder)


def save_tiny_text_encoder(folder, width=20):
    """A random BertModel with a tokenizer trained on a few captions, in the transformers format."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a photo of a red circle", "two dogs under a blue sky", "a small green square"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast), hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=300,
    )  # fmt: skip
    BertModel(config).eval().save_pretrained(folder)
