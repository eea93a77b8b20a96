"""The text of a new model file and of its test, from a model's anatomy."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Sequence

from sensorium.entrypoints.new_model.anatomy import Anatomy
from sensorium.entrypoints.new_model.items import ItemOfProcessor
from sensorium.entrypoints.new_model.names import LANGUAGE_MODEL
from sensorium.entrypoints.new_model.parts import Part

MARK = "FILL IN"
"""Stands wherever the author has to say something."""
WIDTH, MANY = 120, 4
_KINDS = {"image": "Pictures", "video": "Clips", "audio": "Sounds"}
_MODELS = "sensorium.model_executor.models"
_IMPORTS = (
    ("collections.abc", ("Mapping", "Sequence")),
    ("typing", ("Any", "ClassVar")),
    ("numpy", ""),
    ("torch", ""),
    ("torch", ("nn",)),
    ("sensorium", ("ModelRegistry",)),
    ("sensorium.config", ("EngineConfig",)),
    (f"{_MODELS}.media_common", ("language_config",)),
    (f"{_MODELS}.media_inputs", ("Size", "takes_media")),
    (f"{_MODELS}.media_language_model", ("MediaLanguageModel",)),
    (f"{_MODELS}.processor_inputs", ("ProcessorClips", "ProcessorPictures", "ProcessorSounds")),
    (f"{_MODELS}.utils", ("WeightsMapper", "flatten_bn", "init_registered_model", "maybe_prefix")),
    ("sensorium.multimodal.mrope", ("positions_from_kwargs",)),
)
"""What the file may need, in order; only what it names is imported."""


def stem(anatomy: Anatomy) -> str:
    """What the model is called in names of classes: "Llava" of `LlavaForConditionalGeneration`."""
    return re.sub(r"(For|LMHead)[A-Z]\w*$|Model$", "", anatomy.architecture) or anatomy.architecture


def model_file(anatomy: Anatomy) -> str:
    """The model file."""
    body = "\n\n\n".join(
        (*(_inputs(anatomy, each) for each in anatomy.items), _model_class(anatomy), _registered(anatomy))
    )
    imports = _imports(anatomy, body)
    return f"{_header(anatomy)}\n\nfrom __future__ import annotations\n\n{imports}\n\n\n{body}\n"


def _header(anatomy: Anatomy) -> str:
    towers = [each.hf_class for each in anatomy.parts if each.is_tower]
    others = [each.hf_class or each.name for each in anatomy.parts if not each.is_tower]
    text = " ".join(
        f"Reference: `transformers` `{anatomy.architecture}`, in {anatomy.module}. "
        f"Towers: {_listed(towers)}; beside them: {_listed(others)}; decoder: {anatomy.decoder.hf_class}.".split()
    )
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    about = textwrap.wrap(
        f"Begun by `sensorium new-model`. Places marked {MARK} are the author's; what stands there before is a guess, "
        "or refuses to run.",
        WIDTH,
    )
    return "\n".join((f'"""{stem(anatomy)}: {MARK} what it is, in a line.', "", *lines, *about, '"""'))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"


def _imports(anatomy: Anatomy, body: str) -> str:
    """Import statements of what the body names, by group."""
    wanted = [*_IMPORTS, *((each.module, (each.hf_class,)) for each in anatomy.parts if each.module and each.made)]
    by_module: dict[str, set[str]] = {}
    whole: set[str] = set()
    for module, names in wanted:
        if names == "":
            if re.search(rf"\b{module}\.", body):
                whole.add(module)
            continue
        used = {name for name in names if re.search(rf"\b{name}\b", body)}
        if used:
            by_module.setdefault(module, set()).update(used)
    groups: list[list[str]] = [[], [], []]
    for module in sorted(whole):
        groups[1].append(f"import {module}")
    for module in sorted(by_module):
        group = 0 if module in ("collections.abc", "typing") else 2 if module.startswith("sensorium") else 1
        groups[group].append(_from(module, sorted(by_module[module], key=_import_order)))
    return "\n\n".join("\n".join(group) for group in groups if group)


def _import_order(name: str) -> tuple[bool, str]:
    return not name[0].isupper(), name


def _from(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= WIDTH:
        return line
    return "\n".join((f"from {module} import (", *(f"    {name}," for name in names), ")"))


def _inputs(anatomy: Anatomy, item: ItemOfProcessor) -> str:
    """The class that says how many tokens an item takes."""
    kind = _KINDS[item.modality]
    placeholder = (
        f"    placeholder = {_quoted(item.placeholder)}"
        if item.placeholder is not None
        else f"    # {MARK}: what stands for an item in a chat prompt, as the processor has it.\n    placeholder = None"
    )
    return "\n".join(
        (
            f"class {stem(anatomy)}{kind}(Processor{kind}):",
            f'    """{kind} as the checkpoint\'s processor takes them, which is asked for the tokens of each size.',
            "",
            f"    {MARK}, for speed: `pieces_of_size`, which says by arithmetic what the processor would answer.",
            '    """',
            "",
            placeholder,
            *(() if item.modality == "audio" else _sizes(item.modality)),
        )
    )


def _sizes(modality: str) -> Iterator[str]:
    of = "(height, width)" if modality == "image" else "(frames, height, width)"
    yield ""
    yield "    def sizes(self) -> Sequence[Size]:"
    yield f'        """Sizes {of} among which is the one with the most tokens."""'
    yield f"        # {MARK}: those of the model. Memory is planned for the largest, and larger items are still taken."
    yield "        return list(super().sizes())"


def _quoted(text: str | None) -> str:
    return json.dumps(text, ensure_ascii=False)


def _model_class(anatomy: Anatomy) -> str:
    inputs = ", ".join(f"{stem(anatomy)}{_KINDS[each.modality]}" for each in anatomy.items)
    lines = [
        f"@takes_media({inputs})",
        f"class {anatomy.architecture}(MediaLanguageModel):",
        '    """Towers, what is beside them, and the decoder."""',
        "",
        *_names(anatomy),
        *_host_kwargs(anatomy),
        "",
        *_constructor(anatomy),
        "",
        *_placeholder_ids(anatomy),
        *(_mrope() if anatomy.is_mrope else ()),
        "",
        *_encode_media(anatomy),
    ]
    return "\n".join(lines)


def _names(anatomy: Anatomy) -> Iterator[str]:
    yield "    # Prefixes in checkpoints, the longest first; those of other layouts that are in use belong here, too."
    yield "    names = WeightsMapper("
    yield "        orig_to_new_prefix={"
    for old, new in anatomy.renamings:
        yield f"            {_quoted(old)}: {'None' if new is None else _quoted(new)},"
    yield "        },"
    yield "    )"


def _host_kwargs(anatomy: Anatomy) -> Iterator[str]:
    names = dict.fromkeys(name for each in anatomy.items for name in each.host_kwargs)
    if names:
        listed = ", ".join(map(_quoted, names))
        yield f"    mm_host_kwargs: ClassVar[Sequence[str]] = ({listed}{',' if len(names) == 1 else ''})"


def _constructor(anatomy: Anatomy) -> Iterator[str]:
    yield '    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:'
    yield "        super().__init__()"
    yield "        self.config = hf_config = config.model_config.hf_config"
    for part in anatomy.parts:
        yield from _made(part, anatomy.module)
    yield from _decoder(anatomy)


def _made(part: Part, module: str) -> Iterator[str]:
    """The line that makes a part, or several of one with many arguments."""
    if part.made is None:
        yield f"        # {MARK}: {part.hf_class} of {module}, {part.num_parameters:,} parameters."
        yield f"        self.{part.name}: Any = None"
    elif not part.hf_class:
        sizes = ", ".join(part.made)
        yield f"        self.{part.name}: Any = nn.Parameter(torch.empty({sizes}), requires_grad=False)"
    elif len(part.made) < MANY:
        yield f"        self.{part.name}: Any = {part.hf_class}({', '.join(part.made)})"
    else:
        yield f"        self.{part.name}: Any = {part.hf_class}("
        yield from (f"            {argument}," for argument in part.made)
        yield "        )"


def _decoder(anatomy: Anatomy) -> Iterator[str]:
    decoder = anatomy.decoder
    if decoder.architecture is None:
        yield f"        # {MARK}: the decoder. {decoder.hf_class} has no class in this engine. llama.py is one to look"
        yield "        # at, and docs/adding_a_multimodal_model.md writes one from an empty file."
        yield f'        raise NotImplementedError("the decoder {decoder.hf_class}")'
        return
    if not decoder.is_by_type:
        yield f"        # {MARK}: {decoder.hf_class} has the parameters of {decoder.architecture}. Is it the same?"
    yield f"        self.{LANGUAGE_MODEL} = init_registered_model("
    yield "            language_config(config),"
    yield f'            prefix=maybe_prefix(prefix, "{LANGUAGE_MODEL}"),'
    yield f'            architectures=["{decoder.architecture}"],'
    yield "        )"


def _placeholder_ids(anatomy: Anatomy) -> Iterator[str]:
    ids = ", ".join(f"self.config.{each.token_id_field}" for each in anatomy.items if each.token_id_field)
    yield "    def placeholder_token_ids(self) -> list[int]:"
    yield '        """The tokens at whose positions rows stand."""'
    if any(each.token_id_field is None for each in anatomy.items):
        yield f"        # {MARK}: of each modality."
    yield f"        return [{ids}]"


def _mrope() -> Iterator[str]:
    yield ""
    yield "    @classmethod"
    yield "    def get_mrope_input_positions("
    yield "        cls, input_tokens: Sequence[int], hf_config: Any, mm_kwargs: Mapping[str, Any]"
    yield "    ) -> Any:"
    yield '        """Positions `(3, num_tokens)`, and what to add to the index of later tokens."""'
    yield f"        # {MARK}: this is Qwen2-VL's rule, for items of one run of tokens each; see get_rope_index."
    yield "        return positions_from_kwargs(input_tokens, hf_config, mm_kwargs)"


def _encode_media(anatomy: Anatomy) -> Iterator[str]:
    arguments = dict.fromkeys(name for each in anatomy.items for name in each.tensors)
    yield "    def encode_media("
    yield "        self,"
    yield from (f"        {name}: Any = None," for name in arguments)
    yield "        **kwargs: Any,"
    yield "    ) -> Mapping[int, Sequence[torch.Tensor]]:"
    yield '        """Rows `(num_rows, hidden_size)` of each item, by the token that they stand at."""'
    for item in anatomy.items:
        yield from _about(item)
    yield f"        # {MARK}: return {{token id: [rows of each item]}}, and {{}} without media."
    yield f'        raise NotImplementedError("{anatomy.architecture}.encode_media")'


def _about(item: ItemOfProcessor) -> Iterator[str]:
    """What is known of an item, as comments."""
    for name, shape in item.tensors.items():
        yield f"        # {name}, of one {item.modality}: {shape}; the engine puts an axis of items in front."
    if item.num_rows:
        yield f"        # That item has {item.num_rows} rows."
    if item.encoded_by:
        yield f"        # Hugging Face makes them in {item.encoded_by}."


def _registered(anatomy: Anatomy) -> str:
    return f'ModelRegistry.register_model("{anatomy.architecture}", {anatomy.architecture})'


def file_of_test(anatomy: Anatomy, file_name: str) -> str:
    """The test of the model file."""
    found = (
        f"CHECKPOINT = {_quoted(str(anatomy.folder))}"
        if anatomy.folder is not None
        else f'# {MARK}: the folder of a checkpoint, or of a config with its processor.\nCHECKPOINT = "."'
    )
    options = "" if anatomy.has_weights else f"        random_weights=True,\n{_fewer_layers(anatomy)}"
    return f'''"""{stem(anatomy)} computes what Hugging Face computes: whole, in chunks, in batches, from caches."""

from __future__ import annotations

from pathlib import Path

import sensorium

MODEL_FILE = Path(__file__).with_name({_quoted(file_name)})
{found}


def test_equals_hugging_face() -> None:
    """Tokens and log probabilities, of texts and of media."""
    report = sensorium.verify(
        CHECKPOINT,
        plugins=[str(MODEL_FILE)],
        dtypes=["float32"],
{options}    )
    assert report.is_equal, "\\n".join(report.lines())
    assert report.tier in ("1", "2"), report.tier
'''


def _fewer_layers(anatomy: Anatomy) -> str:
    """A setting that makes random weights of a large config quickly."""
    if not anatomy.sub_configs:
        return ""
    parts = "".join(f'            "{name}": {{"num_hidden_layers": 2}},\n' for name in anatomy.sub_configs)
    return f"        hf_overrides={{\n{parts}        }},\n"
