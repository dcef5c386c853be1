"""Small random models of the real classes that answer questions about images, and images and questions for them."""

import numpy as np
import torch
from PIL import Image

WORDS = (
    "yes", "no", "red", "is", "there", "a", "cat", "the", "picture", "true", "answer", "with", "or",
    *"0123456789", "?", ".", "user", "assistant",
)  # fmt: skip
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LLAMA = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}user {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} assistant"
)
SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
QUESTIONS = ("Is there a red cat?", "Is the picture true?", "cat?", "red cat 1 2 3 4?")


def word_tokenizer(special):
    """A tokenizer of whole words; `special` are padding, unknown, beginning, end and another."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*special, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token=special[1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    is_bert = special == BERT
    ends = [(special[2], 2), (special[3], 3)] if is_bert else [(special[2], 2)]
    single = f"{special[2]} $A {special[3]}" if is_bert else f"{special[2]} $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    names = ["input_ids", "attention_mask"]
    roles = dict(pad_token=special[0]) if is_bert else {}  # like many language models, the other one has no padding
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=special[1], bos_token=special[2], eos_token=special[3],
        additional_special_tokens=[special[4]], model_input_names=names, model_max_length=40, **roles,
    )  # fmt: skip


def save_vilt(folder):
    """A ViltForQuestionAnswering that chooses among yes, no and red."""
    from transformers import ViltConfig, ViltForQuestionAnswering, ViltImageProcessor, ViltProcessor

    torch.manual_seed(0)
    labels = {0: "yes", 1: "no", 2: "red"}
    config = ViltConfig(
        **SMALL, vocab_size=len(BERT) + len(WORDS), num_hidden_layers=2, image_size=32, patch_size=16,
        max_image_length=-1, initializer_range=1.0, id2label=labels, label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    ViltForQuestionAnswering(config).save_pretrained(folder)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16), word_tokenizer(BERT)).save_pretrained(folder)


def save_blip(folder):
    """A BlipForQuestionAnswering, which writes its answers."""
    from transformers import BlipConfig, BlipForQuestionAnswering, BlipImageProcessor, BlipProcessor

    torch.manual_seed(0)
    text = dict(
        **SMALL, vocab_size=len(BERT) + len(WORDS), encoder_hidden_size=32, projection_dim=16, num_hidden_layers=1,
        bos_token_id=2, sep_token_id=3, eos_token_id=3, pad_token_id=0, initializer_range=1.0,
    )  # fmt: skip
    vision = dict(**SMALL, num_hidden_layers=1, image_size=32, patch_size=16)
    config = BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16, projection_dim=16)
    BlipForQuestionAnswering(config).save_pretrained(folder)
    image_processor = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(image_processor, word_tokenizer(BERT)).save_pretrained(folder)


def save_llava(folder, template=TEMPLATE):
    """A LlavaForConditionalGeneration whose tokenizer has no padding token, with or without a chat template."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    torch.manual_seed(0)
    vision = CLIPVisionConfig(**SMALL, num_hidden_layers=2, image_size=28, patch_size=14, initializer_range=0.5)
    text = LlamaConfig(
        **SMALL, vocab_size=len(LLAMA) + len(WORDS), num_hidden_layers=1, num_key_value_heads=2, initializer_range=0.5,
        bos_token_id=2, eos_token_id=3, max_position_embeddings=128,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, image_token_index=4, image_seq_length=4)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight[4] = 0  # it does not write `<image>`
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        image_processor, word_tokenizer(LLAMA), patch_size=14, vision_feature_select_strategy="default",
        chat_template=template, num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


def picture(seed, width=64, height=48):
    """An image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save_benchmark(root, prompts=5):
    """`images/p<k>.png`, grids of noise, and `questions.csv` with four questions a prompt."""
    (root / "images").mkdir(parents=True)
    head = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
    lines = [head, "first,x,,1,0,x,x,entity - whole (x),skipped?"]
    for k in range(prompts):
        picture(k).save(root / "images" / f"p{k}.png")
        for n, text in enumerate(QUESTIONS, start=1):
            category = ("attribute - color", "entity - whole")[n % 2]
            lines.append(f'p{k},prompt {k},,{n},"{n - 1}, {n - 1}",x,x,"{category} (thing, {n})",{text}')
    (root / "questions.csv").write_text("\n".join(lines) + "\n")
    return root
