"""PaliGemma: prompts become what its own processor makes of them. `tests/contract` has its logits."""

from __future__ import annotations

import pytest
from transformers import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from sensorium.inputs import InputContext
from sensorium.model_executor.models.media_common import expand_items
from sensorium.model_executor.models.paligemma import PaliGemmaPictures
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.direct import engine_config
from tests.helpers.processors import make_image
from tests.model_executor.models.test_gemma3 import tokenizer_that_joins_lines


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [("ab", 1), ("<image>ab", 1), ("a\n", 2), ("<image><image>\n\n", 2), ("a<image>b", 1), ("", 1)],
)
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_laid_out_as_by_its_processor(prompt: str, num_images: int) -> None:
    tokenizer = tokenizer_that_joins_lines({"image_token": "<image>"})
    pictures = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    pictures.image_seq_length = 16
    reference = PaliGemmaProcessor(pictures, tokenizer)
    images = [make_image(seed=i) for i in range(num_images)]
    expected = reference(text=[prompt], images=[images])["input_ids"][0]

    ctx = InputContext(engine_config(make_checkpoint("paligemma2")).model_config)
    inputs = PaliGemmaPictures(ctx)
    inputs.tokenizer = tokenizer
    ctx.model_config.hf_config.image_token_id = row_id = tokenizer.convert_tokens_to_ids("<image>")
    for first in ([], [tokenizer.bos_token_id]):
        laid_out = inputs.prompt([*first, *tokenizer(prompt)["input_ids"]], num_images)
        pieces = {row_id: [inputs.pieces_of_size(())] * num_images}
        ids, _ = expand_items(laid_out, pieces, {row_id: "image"}, 100)
        assert ids == list(expected)
    assert list(inputs.prompt(ids, num_images)) == ids, "what is laid out stays as it is"
