"""Text encoders of a pipeline: computed in float32, whatever their files are, or refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import PROMPTS, TOKENS, TOY, WIDTH, Toy, ToyPipeline, save_text_encoder, save_toy

from dq_export.core.condition_file import CONDITIONS
from dq_export.core.recipe import Recipe
from dq_export.families.checkpoint import open_checkpoint
from dq_export.families.reference import ModelError
from dq_export.families.source import load_reference
from dq_export.families.text_encoders import encoder_bytes, require_prompts
from dq_export.families.text_parts import parts_of
from dq_export.pipeline import run

pytestmark = pytest.mark.usefixtures("toy_known")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def model(toy: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(toy, tmp_path / "model"))


def recipe(model: Path, **values: Any) -> Recipe:
    return Recipe.parse({"model": str(model), "steps": 3, "calib_size": 2, **values}, "test")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_encoder_of_half_the_width_computes_in_float32(dtype: torch.dtype, model: Path) -> None:
    from transformers import T5EncoderModel, T5Tokenizer

    save_text_encoder(model, dtype)
    actual = load_reference(str(model)).encode(PROMPTS, "cpu").arrays["context"]
    tokenizer = T5Tokenizer.from_pretrained(model / "tokenizer")
    widened = T5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32).eval()
    exact = ToyPipeline(None, None, tokenizer, widened).encode_prompt(list(PROMPTS)).numpy()
    np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


def test_an_encoder_may_be_stored_in_pickles_in_shards(toy: Path, model: Path) -> None:
    """As the first PixArt is on the hub; the shared embedding stands there under both of its names."""
    from safetensors.torch import load_file

    path = model / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    shards = {f"pytorch_model-0000{number}-of-00002.bin": sorted(state)[number - 1 :: 2] for number in (1, 2)}
    for name, names in shards.items():
        torch.save({key: state[key] for key in names}, path.with_name(name))
    places = {key: name for name, names in shards.items() for key in names}
    path.with_name("pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    path.unlink()
    exact, actual = (load_reference(str(folder)).encode(PROMPTS, "cpu").arrays["context"] for folder in (toy, model))
    np.testing.assert_array_equal(actual, exact)


def test_an_encoder_that_gives_nan_is_refused(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model / "text_encoder" / "model.safetensors"
    save_file({**load_file(path), "encoder.final_layer_norm.weight": torch.full((WIDTH,), float("nan"))}, path)
    with pytest.raises(
        ModelError, match=r"the outputs of its text encoders do not fit its network: context has NaN or Inf in row 0"
    ):
        load_reference(str(model)).encode(PROMPTS, "cpu")


def test_a_tokenizer_may_be_a_sentencepiece_model(model: Path, tmp_path: Path) -> None:
    """As PixArt's are on the hub, with marks above the vocabulary in the configuration."""
    import sentencepiece

    texts = ["A red square, beside a ﬁne green circle!", "blue squares"]
    (tmp_path / "texts").write_text("\n".join(texts * 9))
    options = {"vocab_size": 40, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "spiece"), hard_vocab_limit=False, **options
    )
    for path in (model / "tokenizer").iterdir():
        path.unlink()
    shutil.copyfile(tmp_path / "spiece.model", model / "tokenizer" / "spiece.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    more = [f"<extra_id_{number}>" for number in range(2)]
    marks = {**{i: pieces.id_to_piece(i) for i in range(3)}, **{pieces.get_piece_size() + 1 - i: more[i] for i in range(2)}}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(number): {"content": mark, **plain} for number, mark in marks.items()},
        "additional_special_tokens": more, "clean_up_tokenization_spaces": True, "eos_token": "</s>", "extra_ids": 2,
        "legacy": True, "model_max_length": 300, "pad_token": "<pad>", "sp_model_kwargs": {}, "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }  # fmt: skip
    (model / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = parts_of(TOY, open_checkpoint(model))["tokenizer"].tokenizer()
    for text_ in (*texts, "", "unknown: 雪"):
        assert tokenizer(text_).input_ids == [*pieces.encode(text_), 1]


def test_the_memory_of_an_encoder_is_computed_from_its_headers(model: Path) -> None:
    """Weights in float32 are mapped as they are; of other files, one block at a time is converted."""
    actual = []
    for dtype in (torch.float32, torch.bfloat16):
        save_text_encoder(model, dtype)
        actual.append(encoder_bytes(TOY, open_checkpoint(model)) - (model / "text_encoder/model.safetensors").stat().st_size)
    block = 4 * (4 * WIDTH * 8 + 3 * 16 * WIDTH + 2 * WIDTH + 2 * 32)  # attention, gated MLP, norms, relative positions
    assert actual == [0, block + 4 * (11 * WIDTH + WIDTH)]


def index(model: Path, **entries: Any) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def text(path: Path, content: str) -> None:
    path.write_text(content)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "encoder gone": (lambda model: shutil.rmtree(model / "text_encoder"), r"text_encoder: no such folder, .* pass --conditions"),
    "tokenizer gone": (lambda model: shutil.rmtree(model / "tokenizer"), r"tokenizer: no such folder, .* pass --conditions FILE"),
    "no vocabulary": (
        lambda model: (model / "tokenizer" / "tokenizer.json").unlink(),
        r"tokenizer: no tokenizer\.json and no spiece\.model; download it again, or pass --conditions",
    ),
    "vocabulary cut": (lambda model: text(model / "tokenizer/tokenizer.json", '{"model": '), r"tokenizer\.json: not readable as"),
    "vocabulary empty": (lambda model: text(model / "tokenizer/tokenizer.json", "{}"), r"tokenizer: makes no T5Tokenizer \("),
    "vocabulary wrong": (
        lambda model: edit(model / "tokenizer/tokenizer.json", model={"type": "Unigram", "vocab": 7, "unk_id": 2}),
        r"tokenizer: makes no T5Tokenizer \(",
    ),
    "piece model": (
        lambda model: ((model / "tokenizer/tokenizer.json").unlink(), text(model / "tokenizer/spiece.model", "junk")),
        r"spiece\.model: not a SentencePiece model \(",
    ),
    "settings": (lambda model: text(model / "tokenizer/tokenizer_config.json", "[]"), r"tokenizer_config\.json: expected a JSON"),
    "remote code": (lambda model: index(model, text_encoder=["mine", "T5EncoderModel"]), r"text_encoder is \['mine', 'T5Enc"),
    "other class": (lambda model: index(model, tokenizer=["transformers", "GPT2Tokenizer"]), "expected .'transformers', one of"),
    "null": (lambda model: index(model, text_encoder=[None, None]), r"text_encoder is \[None, None\]; expected"),
    "pipeline": (
        lambda model: index(model, _class_name="FluxPipeline"),
        r"'FluxPipeline' does not draw with the family toy; expected ToyPipeline",
    ),
    "alone": (lambda model: (model / "model_index.json").unlink(), r"model_index\.json: no such file, so nothing says what"),
    "weights gone": (
        lambda model: (model / "text_encoder/model.safetensors").unlink(),
        r"text_encoder: no weights; expected model\.safetensors or pytorch_model\.bin",
    ),
    "config gone": (lambda model: (model / "text_encoder/config.json").unlink(), r"text_encoder/config\.json: no such file"),
    "config wrong": (lambda model: edit(model / "text_encoder/config.json", d_model="8"), r"config\.json: d_model = '8'"),
    "config of another": (
        lambda model: edit(model / "text_encoder/config.json", feed_forward_proj="swish"),
        r"config\.json: feed_forward_proj = 'swish': expected 'relu' or 'gated-gelu'",
    ),
    "config huge": (lambda model: edit(model / "text_encoder/config.json", num_layers=10**9), r"config\.json: num_layers = 10"),
    "quantized": (
        lambda model: edit(model / "text_encoder/config.json", quantization_config={"bits": 4}),
        r"quantized already \(quantization_config\)",
    ),
    "vocabulary small": (
        lambda model: edit(model / "text_encoder/config.json", vocab_size=3),
        r"tokenizer: makes the token \d+ of prompt 1 \('a red square'\), and text_encoder knows 3 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_text_encoder_is_refused_before_the_network_is_loaded(name: str, model: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[name]
    damage(model)
    (model / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"never read")
    with pytest.raises(ModelError, match=message) as error:
        run(recipe(model), tmp_path / "out", until="calibrate")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_other_keys_of_a_configuration_change_nothing(toy: Path, model: Path) -> None:
    """A decoder's masks, for example, of a file that is for the whole T5."""
    edit(model / "text_encoder" / "config.json", is_decoder=True, pad_token_id={"a": 1}, use_cache="no", dropout_rate=None)
    exact, actual = (load_reference(str(folder)).encode(PROMPTS, "cpu").arrays["context"] for folder in (toy, model))
    np.testing.assert_array_equal(actual, exact)


def test_weights_of_another_encoder_are_refused_and_nothing_is_kept(model: Path, tmp_path: Path) -> None:
    edit(model / "text_encoder" / "config.json", d_ff=24)
    with pytest.raises(
        ModelError, match=r"text_encoder: config\.json and weights do not fit each other: .*wi_0\.weight has shape"
    ):
        run(recipe(model), tmp_path / "out", until="calibrate")
    assert not (tmp_path / "out" / CONDITIONS).exists()


def test_an_encoder_of_another_width_does_not_fit_the_network(model: Path, tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=11, **sizes)).save_pretrained(model / "text_encoder")
    with pytest.raises(
        ModelError, match=r"the outputs of its text encoders do not fit its network: context has shape \[4, 5, 12\];"
    ):
        run(recipe(model), tmp_path / "out", until="calibrate")


def test_a_prompt_that_is_too_long_is_named(toy: Path, tmp_path: Path) -> None:
    prompts = ["a red square", "a red square beside a blue circle"]
    with pytest.raises(ModelError, match=rf"^prompt 2 \('a red .*'\): 8 tokens, and ToyPipeline takes {TOKENS}; shorten it$"):
        run(recipe(toy, prompts=prompts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prompt_is_measured_as_the_pipelines_write_it(toy: Path) -> None:
    class Twice(Toy):
        def written(self, prompt: str) -> str:
            return f"{prompt} {prompt}"

    checkpoint = open_checkpoint(toy)
    require_prompts(TOY, checkpoint, ["a red square"])
    with pytest.raises(ModelError, match=r"^prompt 1 \('a red square'\): 7 tokens"):
        require_prompts(Twice(), checkpoint, ["a red square"])
