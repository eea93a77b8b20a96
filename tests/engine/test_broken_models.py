"""A class that can't serve what it declares is refused when it is loaded, in words that its author can use.

Such classes once loaded as "tier 0 atomic", or without a word where their tier is not tried out at all, and every
request failed. Each class here is a right one with one mistake; the message names the class, what it was given, and
what was wrong.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensorium import LLM, ModelRegistry, SamplingParams
from sensorium.errors import InvalidRequestError, ModelError, SensoriumError, WeightsError
from sensorium.inputs import INPUT_REGISTRY, DummyData
from sensorium.model_executor.models.utils import merge_multimodal_embeddings
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import SequenceData
from tests.helpers import toy_models as toys
from tests.helpers.device import TEST_DEVICE
from tests.helpers.toy_models import IMAGE_TOKEN, SeedPageModel, TwoMethodModel

BROKEN: dict[type, str] = {}
"""Class with one mistake: a pattern of what its author must be told."""


def broken(expected: str) -> Any:
    def add(cls: type) -> type:
        ModelRegistry.register_model(cls.__name__, cls)
        BROKEN[cls] = expected
        return cls

    return add


def load(cls: type, path: Path, **settings: Any) -> LLM:
    toys.save_checkpoint(cls, path)
    return LLM(str(path), skip_tokenizer_init=True, device=TEST_DEVICE, num_blocks=64, num_threads=1, **settings)


def merged(model: Any, input_ids: torch.Tensor, pixel_values: Any, change: Any = lambda rows: rows) -> torch.Tensor:
    embeds: torch.Tensor = model.language_model.get_input_embeddings(input_ids).clone()
    if pixel_values is not None:
        embeds[input_ids == IMAGE_TOKEN] = change(model.vision(torch.cat(toys.leaves(pixel_values))))
    return embeds


class Tier0(SeedPageModel):
    """Lets a mistake be made in the rows of media, or in what `forward` returns."""

    def rows(self, rows: torch.Tensor) -> Any:
        return rows

    def returned(self, hidden: torch.Tensor) -> Any:
        return hidden

    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        embeds = merged(self, input_ids, pixel_values, self.rows)
        hidden = self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)
        return self.returned(hidden)


# --- tier 0 ---


@broken(r"forward failed .* dummy data \(1 image item in a prompt of 72 tokens, mapped to pixel_values \(1, 1, 8, 4\)")
class ARowTooFew(Tier0):
    def rows(self, rows: torch.Tensor) -> Any:
        return rows[:-1]


@broken(r"forward failed .*\[8, 16\].* \(test_broken_models.py, line \d+\)")
class RowsTooNarrow(Tier0):
    def rows(self, rows: torch.Tensor) -> Any:
        return rows[:, :16]


@broken(r"forward computed NaN for its dummy data")
class RowsOfNaN(Tier0):
    def rows(self, rows: torch.Tensor) -> Any:
        return rows / 0 * 0


@broken(r"forward failed .* its dummy data .*AttributeError: .*'visoin'")
class EncoderMisspelt(Tier0):
    def rows(self, rows: torch.Tensor) -> Any:
        return self.visoin(rows)


@broken(r"forward returned a tuple .* expected a tensor of hidden states")
class ReturnsTuple(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return (hidden,)


@broken(r"returned a NoneType")
class ReturnsNothing(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return None


@broken(r"compute_logits.* failed .* \(7, 64\) \(logits\? forward returns hidden states\)")
class ReturnsLogits(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return self.lm_head(hidden)


@broken(r"forward returned \(7,\) of torch.int64")
class ReturnsTokens(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return self.lm_head(hidden).argmax(-1)


@broken(r"forward returned \(1, 7, 32\) .* expected hidden states \(7, hidden_size\)")
class ReturnsABatchAxis(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return hidden[None]


@broken(r"forward returned \(1, 32\) .* expected hidden states \(7, hidden_size\)")
class ReturnsTheLastRow(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return hidden[-1:]


@broken(r"differ from those of the prompt alone .* let rows meet in Attention only")
class MixesRows(Tier0):
    def returned(self, hidden: torch.Tensor) -> Any:
        return hidden - hidden.mean(0)


@broken(r"forward failed .* on 7 tokens of text, without pixel_values as in every step that has no media")
class ForgetsThatMediaMayBeAbsent(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        embeds = self.language_model.get_input_embeddings(input_ids).clone()
        embeds[input_ids == IMAGE_TOKEN] = self.vision(torch.cat(toys.leaves(pixel_values)))
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


@broken(r"the same hidden states with and without its dummy data .*pixel_values \(1, 1, 8, 4\)")
class PassesOverMedia(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        return self.language_model(input_ids, positions, kv_caches, attn_metadata)


@broken(r"the same hidden states with and without .* Read these arguments by their names")
class AsksForAnotherName(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, **kwargs):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, positions, kv_caches, attn_metadata, kwargs.get("pixels"))


@broken(r"forward failed .* on 7 tokens of text.*not enough values to unpack")
class ExpectsABatchAxis(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        _batch, _length = input_ids.shape
        return super().forward(input_ids, positions, kv_caches, attn_metadata, pixel_values)


@broken(r"take places from `positions`")
class CountsPositionsItself(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        places = torch.arange(len(input_ids), device=input_ids.device)
        return super().forward(input_ids, places, kv_caches, attn_metadata, pixel_values)


@broken(r"its own entry of kv_caches")
class UsesOneCacheForAllLayers(SeedPageModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, positions, [kv_caches[0]] * 2, attn_metadata, pixel_values)


@broken(r"\[8, 32\].*\[1, 32\]")
class DummyPromptNotExpanded(SeedPageModel):
    pass


def unexpanded_dummy(ctx: Any, seq_len: int, mm_counts: Any) -> DummyData:
    tokens = SequenceData.from_prompt_token_counts((IMAGE_TOKEN, 1), (1, seq_len))
    return DummyData(tokens, {"image": [np.ones((8, toys.IMAGE_WIDTH), np.float32)]})


INPUT_REGISTRY.register_dummy_data(unexpanded_dummy)(DummyPromptNotExpanded)


@broken(r"Attempted to assign 8 multimodal tokens to 1 placeholders")
class DropsRowsInSilence(SeedPageModel):
    """As Hugging Face's classes merge, without their count."""

    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        embeds = self.language_model.get_input_embeddings(input_ids)
        if pixel_values is not None:
            rows = self.vision(torch.cat(toys.leaves(pixel_values)))
            embeds = embeds.masked_scatter((input_ids == IMAGE_TOKEN)[:, None], rows)
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


INPUT_REGISTRY.register_dummy_data(unexpanded_dummy)(DropsRowsInSilence)


@broken(r"its dummy data factory failed for seq_len=72 .*ZeroDivisionError")
class DummyFactoryFails(SeedPageModel):
    pass


INPUT_REGISTRY.register_dummy_data(lambda ctx, seq_len, mm_counts: seq_len // 0)(DummyFactoryFails)


@broken(r"its image mapper failed on its dummy data \(ndarray of \(8, 4\)\): AttributeError")
class MapperFails(SeedPageModel):
    pass


MULTIMODAL_REGISTRY.register_image_input_mapper(lambda ctx, data: {"pixel_values": data.pixels})(MapperFails)


# --- any tier: the head, the constructor, the weights ---


@broken(r"compute_logits.* failed .*\(1x3 and 32x64\)")
class HeadOfAnotherWidth(SeedPageModel):
    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        return self.lm_head(hidden_states[:, :3])


@broken(r"compute_logits\(hidden_states, sampling_metadata\) failed .* takes 2 positional arguments but 3 were given")
class HeadOfOneArgument(SeedPageModel):
    def compute_logits(self, hidden_states: torch.Tensor) -> Any:  # type: ignore[override]
        return self.lm_head(hidden_states)


@broken(r"compute_logits returned a NoneType")
class HeadReturnsNothing(TwoMethodModel):
    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        self.lm_head(hidden_states)


@broken(r"compute_logits returned \(1, 62\) for one row, expected \(1, 64\)")
class HeadTooSmall(SeedPageModel):
    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        return self.lm_head(hidden_states)[:, :-2]


# --- tier 1 and 2 ---


@broken(r"get_input_embeddings failed .* \(7, 32\)")
class EncodesARowTooFew(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        return [rows[:-1] for rows in super().get_multimodal_embeddings(pixel_values)]


@broken(r"get_multimodal_embeddings returned rows of width 16 .* expected 32")
class EncodesTooNarrow(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        return [rows[:, :16] for rows in super().get_multimodal_embeddings(pixel_values)]


@broken(r"get_multimodal_embeddings returned a dict")
class EncodesToADict(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        return {"image": super().get_multimodal_embeddings(pixel_values)}


@broken(r"get_multimodal_embeddings returned a NoneType")
class EncodesNothing(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        super().get_multimodal_embeddings(pixel_values)


@broken(r"get_multimodal_embeddings failed .* missing 1 required positional argument: 'images'")
class EncoderOfAnotherName(TwoMethodModel):
    def get_multimodal_embeddings(self, images: Any) -> Any:
        return super().get_multimodal_embeddings(images)


@broken(r"get_multimodal_embeddings computed NaN")
class EncodesToNaN(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        return [rows * float("nan") for rows in super().get_multimodal_embeddings(pixel_values)]


@broken(r"get_input_embeddings returned the same with and without the rows")
class MergesNothing(TwoMethodModel):
    def get_input_embeddings(self, input_ids: Any, multimodal_embeddings: Any = None) -> Any:
        return self.language_model.get_input_embeddings(input_ids)


@broken(r"get_input_embeddings failed .* Attempted to assign 16 multimodal tokens to 8 placeholders")
class EncodesTwice(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        return [torch.cat([rows, rows]) for rows in super().get_multimodal_embeddings(pixel_values)]

    def get_input_embeddings(self, input_ids: Any, multimodal_embeddings: Any = None) -> Any:
        embeds = self.language_model.get_input_embeddings(input_ids)
        if multimodal_embeddings is None:
            return embeds
        return embeds.masked_scatter((input_ids == IMAGE_TOKEN)[:, None], torch.cat(list(multimodal_embeddings)))


@broken(r"forward failed .* on 7 tokens of text")
class PassesOverEmbeds(TwoMethodModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata, inputs_embeds=None):  # type: ignore[no-untyped-def]
        return self.language_model(input_ids, positions, kv_caches, attn_metadata)


@broken(r"the encoder returned 8 rows .* expected 0, the number of placeholder tokens \[9\]")
class DeclaresAnotherToken(TwoMethodModel):
    pass


MULTIMODAL_REGISTRY.register_placeholder_tokens("image", 9)(DeclaresAnotherToken)


@broken(r"the encoder returned 7 rows .* expected 8, the number of placeholder tokens \[7\]")
class DeclaredAndARowTooFew(EncodesARowTooFew):
    pass


@broken(r"get_multimodal_embeddings failed .* KeyError: 'grid'")
class DeclaredAndEncoderFails(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        raise KeyError("grid")


@broken(r"compute_logits returned a tuple")
class DeclaredAndHeadReturnsTuple(TwoMethodModel):
    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        return (self.lm_head(hidden_states),)


for _declared in (DeclaredAndARowTooFew, DeclaredAndEncoderFails, DeclaredAndHeadReturnsTuple):
    MULTIMODAL_REGISTRY.register_placeholder_tokens("image", IMAGE_TOKEN)(_declared)


# --- text alone ---


class TextModel(toys.ToyHead):
    def __init__(self, *, config: Any, prefix: str = "") -> None:
        super().__init__()
        hf = config.model_config.hf_config
        self.language_model = toys.ToyTrunk(hf)
        self.lm_head = nn.Linear(hf.hidden_size, hf.vocab_size)

    def forward(self, input_ids, positions, kv_caches, attn_metadata):  # type: ignore[no-untyped-def]
        return self.language_model(input_ids, positions, kv_caches, attn_metadata)


@broken(r"forward failed .* on 7 tokens of text: TypeError: .*'attn_metadata'")
class TextWithoutMetadata(TextModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata):  # type: ignore[no-untyped-def]
        return self.language_model(input_ids, positions, kv_caches)


@broken(r"forward returned \(7,\) of torch.int64")
class TextToTokens(TextModel):
    def forward(self, input_ids, positions, kv_caches, attn_metadata):  # type: ignore[no-untyped-def]
        return self.lm_head(super().forward(input_ids, positions, kv_caches, attn_metadata)).argmax(-1)


@broken(r"compute_logits computed NaN")
class TextToNaN(TextModel):
    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        return self.lm_head(hidden_states) * float("nan")


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("mm_split", ["auto", "off"])
def test_a_mistake_is_told_at_load(cls: type, mm_split: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load(cls, tmp_path, mm_split=mm_split)
    assert cls.__name__ in str(caught.value)
    assert re.search(BROKEN[cls], str(caught.value)), str(caught.value)


class SaysTooFewRows(SeedPageModel):
    pass


class SaysTooFewRowsInHalves(TwoMethodModel):
    pass


@pytest.mark.parametrize("cls", [SaysTooFewRows, SaysTooFewRowsInHalves])
@pytest.mark.parametrize("limit", [1, 3])
def test_a_maximum_below_the_dummy_items_rows_is_reported_and_raised(cls: type, limit: int, tmp_path: Path) -> None:
    """It loaded without a word, and every large picture was refused; published files state too little, too."""
    MULTIMODAL_REGISTRY.register_max_image_tokens(toys.MAX_ROWS - 1)(cls)
    ModelRegistry.register_model(cls.__name__, cls)
    llm = load(cls, tmp_path, limit_mm_per_prompt={"image": limit})
    assert any("says 7 rows, but an item of the dummy data has 8" in note for note in llm.report.features.notes)
    prompt = {"prompt_token_ids": [1, IMAGE_TOKEN, 20], "multi_modal_data": {"image": [toys.image(0, toys.MAX_ROWS)]}}
    [output] = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 2


def test_what_a_constructor_raises_names_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ModelRegistry.register_model("TextModel", TextModel)
    toys.save_checkpoint(TextModel, tmp_path)
    monkeypatch.setattr(toys.ToyTrunk, "__init__", lambda self, config: config.vision_config)
    with pytest.raises(ModelError, match=r"TextModel: its constructor failed: AttributeError: .*vision_config"):
        LLM(str(tmp_path), skip_tokenizer_init=True, device=TEST_DEVICE, num_blocks=64)


def test_what_load_weights_raises_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_weights(self: Any, weights: Any) -> set[str]:
        for _name, tensor in weights:
            tensor.copy_from()
        return set()

    ModelRegistry.register_model("TextModel", TextModel)
    toys.save_checkpoint(TextModel, tmp_path)
    monkeypatch.setattr(TextModel, "load_weights", load_weights)
    with pytest.raises(WeightsError, match=r"'[\w.]+' into TextModel: got AttributeError"):
        LLM(str(tmp_path), skip_tokenizer_init=True, device=TEST_DEVICE, num_blocks=64)


def test_rounding_in_few_bits_is_reported_and_no_mistake(tmp_path: Path) -> None:
    """Two sums in another order are no fault of a class, so that only a report tells that rows depend on a batch."""

    class Rounds(MixesRows):
        pass

    ModelRegistry.register_model("Rounds", Rounds)
    report = load(Rounds, tmp_path, dtype="bfloat16", mm_split="off").report
    assert any("cut in two" in note for note in report.features.notes), report.features.notes


# --- at a request ---


def own_merge(input_ids: Any, embeds: Any, rows: Any) -> Any:
    embeds[input_ids == IMAGE_TOKEN] = rows
    return embeds


def our_merge(input_ids: Any, embeds: Any, rows: Any) -> Any:
    return merge_multimodal_embeddings(input_ids, embeds, rows, IMAGE_TOKEN)


def scattered(input_ids: Any, embeds: Any, rows: Any) -> Any:
    return embeds.masked_scatter((input_ids == IMAGE_TOKEN)[:, None], rows)


class ForgetsToExpand(SeedPageModel):
    merge: Any = staticmethod(own_merge)

    def forward(self, input_ids, positions, kv_caches, attn_metadata, pixel_values):  # type: ignore[no-untyped-def]
        embeds = self.language_model.get_input_embeddings(input_ids).clone()
        if pixel_values is not None:
            embeds = self.merge(input_ids, embeds, self.vision(torch.cat(toys.leaves(pixel_values))))
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


class ForgetsToExpandInHalves(TwoMethodModel):
    pass


class ForgetsToExpandDeclared(TwoMethodModel):
    pass


MULTIMODAL_REGISTRY.register_placeholder_tokens("image", IMAGE_TOKEN)(ForgetsToExpandDeclared)
for _forgets in (ForgetsToExpand, ForgetsToExpandInHalves, ForgetsToExpandDeclared):
    INPUT_REGISTRY.register_input_processor(lambda ctx, inputs: inputs)(_forgets)
    ModelRegistry.register_model(_forgets.__name__, _forgets)


TIER_0 = [(ForgetsToExpand, merge, split) for merge in (own_merge, our_merge, scattered) for split in ("auto", "off")]


@pytest.mark.parametrize(
    ("cls", "merge", "mm_split"),
    [*TIER_0, (ForgetsToExpandInHalves, own_merge, "auto"), (ForgetsToExpandDeclared, own_merge, "auto")],
)
def test_placeholders_that_were_not_expanded_are_told_with_both_numbers(
    cls: type, merge: Any, mm_split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows, one placeholder: the caller was told "could not be encoded (InvalidRequestError)"."""
    monkeypatch.setattr(ForgetsToExpand, "merge", staticmethod(merge))
    llm = load(cls, tmp_path, mm_split=mm_split)
    said_at_load = [note for note in llm.report.features.notes if "leaves 1 placeholder tokens for 1 image" in note]
    assert said_at_load or mm_split == "off", "which looks for no placeholders"
    prompt = {"prompt_token_ids": [1, IMAGE_TOKEN, 20], "multi_modal_data": {"image": [toys.image(0, 6)]}}
    with pytest.raises(SensoriumError) as caught:
        llm.generate([prompt], SamplingParams(temperature=0, max_tokens=2))
    message = str(caught.value)
    assert re.search(r"\b6\b", message), message
    assert re.search(r"\b1\b", message), message
    if merge is not own_merge:
        assert isinstance(caught.value, InvalidRequestError)


class MixesItems(TwoMethodModel):
    """Its encoder was written for one image: it takes out the mean of all that it is given."""

    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        images = toys.leaves(pixel_values)
        mean = torch.cat(images).mean() * len(images)
        return [self.vision(image - mean) for image in images]


class TakesOneItem(TwoMethodModel):
    def get_multimodal_embeddings(self, pixel_values: Any) -> Any:
        [image] = toys.leaves(pixel_values)
        return [self.vision(image)]


@pytest.mark.parametrize(("cls", "limit"), [(MixesItems, 1), (MixesItems, 2), (TakesOneItem, 1)])
def test_an_encoder_that_is_not_made_for_several_items_gets_one_at_a_time(
    cls: type, limit: int, tmp_path: Path
) -> None:
    """Two requests in one step must not change each other's images."""
    ModelRegistry.register_model(cls.__name__, cls)
    llm = load(cls, tmp_path, limit_mm_per_prompt={"image": limit})
    assert any("encoded alone" in note for note in llm.report.features.notes), llm.report.features.notes
    prompts = [
        {"prompt_token_ids": [1, IMAGE_TOKEN, 20 + i], "multi_modal_data": {"image": [toys.image(i, 6)]}}
        for i in range(3)
    ]
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias=toys.NO_MEDIA_TOKENS)
    together = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, params)]
    (tmp_path / "again").mkdir()
    fresh = load(cls, tmp_path / "again", limit_mm_per_prompt={"image": limit})
    assert together == [list(fresh.generate([each], params)[0].outputs[0].token_ids) for each in prompts]
