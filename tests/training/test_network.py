"""The training network equals Hugging Face's class, and its features equal Hugging Face's processors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from training.answering import TransformersAnswerer
from training.blueprint import write_settings
from training.dialogue import Item
from training.encoding import MODEL_FOLDER, encode_item
from training.features import log_mel, patchify
from training.loader import collate
from training.network import Thinker
from training.optimizer import Muon, build_optimizers, orthogonalise
from training.worlds import WORLD_WEIGHTS, Source, layout_of, sample_item


@pytest.fixture(scope="module")
def network() -> Thinker:
    """Fresh weights: every parameter of the checkpoint's format has a part in the output, none is near zero."""
    torch.manual_seed(0)
    network = Thinker().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.05)
    return network


@pytest.fixture(scope="module")
def reference(network: Thinker, tmp_path_factory: pytest.TempPathFactory) -> TransformersAnswerer:
    """The same weights in Hugging Face's class, by way of a checkpoint folder."""
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    write_settings(folder)
    (folder / "tokenizer.json").write_bytes((MODEL_FOLDER / "tokenizer.json").read_bytes())
    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return TransformersAnswerer(folder)


def make_item(world: str, source: Source) -> Item:
    rng = random.Random(world)
    return sample_item(rng, layout_of(world, rng), source, num_turns=1)


@pytest.mark.parametrize("world", WORLD_WEIGHTS)
def test_prompt_and_logits_equal_hugging_face(
    world: str, network: Thinker, reference: TransformersAnswerer, source: Source
) -> None:
    item = make_item(world, source)
    encoded = encode_item(item)
    prompt = reference.token_ids(item)
    length = prompt.shape[1]
    assert encoded.input_ids[:length].tolist() == prompt[0].tolist()
    with torch.no_grad():
        ours = network.lm_head(network.hidden_states(collate([item])))[0, :length]
        theirs = reference.logits(item)[0]
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_batch_equals_its_items(network: Thinker, source: Source) -> None:
    rng = random.Random(5)
    layout = layout_of("both", rng)
    items = [sample_item(rng, layout, source, 2) for _ in range(3)]
    with torch.no_grad():
        together = network.hidden_states(collate(items))
        for row, item in enumerate(items):
            count = len(encode_item(item).input_ids)
            alone = network.hidden_states(collate([item]))[0, :count]
            torch.testing.assert_close(together[row, :count], alone, atol=1e-4, rtol=1e-4)


def test_patches_equal_the_image_processor(source: Source) -> None:
    image = make_item("scene", source).media[0].data
    processor = Qwen2VLImageProcessorPil.from_pretrained(MODEL_FOLDER)
    expected = processor(images=[image], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(patchify(torch.from_numpy(image)[None, None])[0], expected)


def test_an_odd_clip_is_filled_with_its_last_frame() -> None:
    frames = torch.arange(3, dtype=torch.uint8)[None, :, None, None, None].expand(1, 3, 16, 16, 3)
    patches = patchify(frames)
    assert patches.shape == (2, 4, 3 * 2 * 64)
    assert sorted(set(patches[1].flatten().tolist())) == pytest.approx([2 / 127.5 - 1])


def test_log_mel_equals_the_feature_extractor() -> None:
    waveform = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 0.1
    extractor = WhisperFeatureExtractor.from_pretrained(MODEL_FOLDER)
    expected = extractor(waveform, sampling_rate=16_000, return_tensors="pt", padding="max_length")["input_features"]
    padded = torch.zeros(1, 32_000)
    padded[0, :20_000] = torch.from_numpy(waveform)
    torch.testing.assert_close(log_mel(padded), expected[..., :200], atol=1e-4, rtol=1e-4)


def test_orthogonalising_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((2, 24, 40), (2, 40, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.3


def test_every_parameter_has_one_optimizer() -> None:
    network = Thinker()
    muon, adam = build_optimizers(network, 1e-3)
    assert isinstance(muon, Muon)
    held = [
        parameter for optimizer in (muon, adam) for group in optimizer.param_groups for parameter in group["params"]
    ]
    assert len(held) == len({id(parameter) for parameter in held}) == len(list(network.parameters()))
