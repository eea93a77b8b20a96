"""What a checkpoint is served for, and how it pools: read from its files, as sentence-transformers and Hugging Face
write them.

    config.json                      the architecture's head; labels; how a cross-encoder's score is brought to 0 to 1
    config_sentence_transformers.json    texts to put in front of queries and documents
    modules.json                     the modules behind the model, in order: Pooling, Dense, Normalize
    1_Pooling/config.json            which rows become a vector
    sentence_bert_config.json        how many tokens the model was trained for

Nothing here opens weights or runs anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sensorium.checkpoint import TOKENIZER_CONFIG, member, read_json, read_json_list
from sensorium.config import Activation, PoolerConfig, PoolingType
from sensorium.engine.args import EngineArgs
from sensorium.engine.hf_config import CheckpointConfig
from sensorium.errors import ConfigError, ModelError
from sensorium.pooling_params import PoolingTask

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
_POOLING_MODES: Mapping[str, PoolingType] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
}
"""Names in the files of sentence-transformers."""
_POOLING_FLAGS: Mapping[str, PoolingType] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
}
"""The same as older versions write them."""
_NO_EFFECT = ("Transformer", "Dropout", "Router", "Asym")
_CLASSIFIERS = ("ForSequenceClassification", "ForRewardModel")
_TOKEN_CLASSIFIERS = ("ForTokenClassification",)
_LATE_INTERACTION = ("ForRetrieval",)
_EMBEDDERS = ("Model", "ForMaskedLM", "ForTextEncoding", "EncoderModel")
_MAX_TOKENIZER_LEN = 1 << 24
"""A tokenizer without a limit writes a number that is larger."""


@dataclass(frozen=True, slots=True)
class PoolingChoice:
    """A checkpoint that is served for pooling."""

    pooler: PoolerConfig
    is_generator: bool
    """Its class generates; what it does before its head is used."""


def pooling_choice(
    args: EngineArgs, path: Path, config: CheckpointConfig, generates: Sequence[str]
) -> PoolingChoice | None:
    """How a checkpoint is served for pooling; None: it generates.

    Args:
        args: Their `runner`, `convert` and `pooling_type` decide where they are given.
        path: The checkpoint's folder.
        config: Its config.
        generates: Those of its architectures that generate.

    Raises:
        ConfigError: The settings don't fit one another or the checkpoint.
        ModelError: The checkpoint's files name something that isn't served.
    """
    modules = _modules(path)
    head = _head(config.architectures)
    pools = bool(modules) or (not generates and head is not None)
    runner = args.runner if args.runner != "auto" else "pooling" if pools or args.convert != "auto" else "generate"
    if runner == "generate":
        if args.convert != "auto":
            raise ConfigError(
                f"convert: got {args.convert!r} beside runner 'generate', expected 'auto'. Set runner (--runner) to "
                "'pooling', or leave convert out."
            )
        if not generates and head is not None:
            raise ConfigError(
                f"runner: got 'generate' for {config.architectures}, which don't generate, expected 'pooling'. Leave "
                "runner (--runner) out."
            )
        return None
    task = _task(args, config, head, has_pooling=any(kind == "Pooling" for kind, _ in modules), modules=bool(modules))
    is_generator = bool(generates)
    if task in ("classify", "token_classify"):
        return PoolingChoice(_classifier(path, config, task, is_generator=is_generator), is_generator)
    kind = args.pooling_type or _pooling_type(path, config, modules, is_generator=is_generator)
    return PoolingChoice(_embedder(path, config, modules, task, kind), is_generator)


def _head(architectures: Sequence[str]) -> PoolingTask | None:
    """What the first architecture's head is for; None for a name that says nothing."""
    name = architectures[0]
    for suffixes, task in (
        (_CLASSIFIERS, "classify"),
        (_TOKEN_CLASSIFIERS, "token_classify"),
        (_LATE_INTERACTION, "token_embed"),
        (_EMBEDDERS, "embed"),
    ):
        if name.endswith(suffixes):
            return task  # type: ignore[return-value]
    return None


def _task(
    args: EngineArgs, config: CheckpointConfig, head: PoolingTask | None, *, has_pooling: bool, modules: bool
) -> PoolingTask:
    if args.convert == "classify" and head not in ("classify", "token_classify"):
        if not _classifier_tokens(config):
            raise ConfigError(
                f"convert: got 'classify' for {config.architectures}, which have no classification head, expected "
                "tokens whose logits are the scores. Name them in hf_overrides (--hf-overrides), for example "
                '{"classifier_from_token": ["no", "yes"]}.'
            )
        return "classify"
    if args.convert == "embed":
        return "embed"
    if modules and not has_pooling:
        return "token_embed"  # a vector for each token: late interaction
    return "embed" if modules or head is None else head


def _classifier_tokens(config: CheckpointConfig) -> Sequence[str | int]:
    found = config.written.get("classifier_from_token") or ()
    if not isinstance(found, list | tuple) or not all(isinstance(each, str | int) for each in found):
        raise ModelError(
            f"classifier_from_token in config.json: got {found!r:.80}, expected a list of tokens or of their ids. "
            "Correct it."
        )
    return found


def _classifier(path: Path, config: CheckpointConfig, task: PoolingTask, *, is_generator: bool) -> PoolerConfig:
    tokens = _classifier_tokens(config) if is_generator else ()
    labels = _labels(config, len(tokens))
    return PoolerConfig(
        tasks=(task,),
        labels=labels,
        activation=_activation(config, labels, task),
        token_ids=_token_ids(path, tokens),
    )


def _embedder(
    path: Path, config: CheckpointConfig, modules: Sequence[tuple[str, str]], task: PoolingTask, kind: PoolingType
) -> PoolerConfig:
    dense = [member(path, folder, MODULES) for kind, folder in modules if kind == "Dense"]
    towers = _two_towers(config)
    if towers is not None:
        return PoolerConfig(tasks=("embed",), size=towers)
    tasks: tuple[PoolingTask, ...] = ("token_embed",) if task == "token_embed" else ("embed", "token_embed")
    sizes = [size for size in (_dense_size(folder) for folder in dense) if size is not None]
    dimensions = _int_tuple(config, "matryoshka_dimensions")
    prompts, default_prompt = _prompts(path, modules)
    return PoolerConfig(
        prompts=prompts,
        default_prompt=default_prompt,
        pooling_type=kind,
        normalize=not modules or task == "token_embed" or any(kind == "Normalize" for kind, _ in modules),
        tasks=tasks,
        size=sizes[-1] if sizes else _embedding_dim(config, task),
        projections=tuple(folder.name for folder in dense),
        is_matryoshka=bool(dimensions) or config.written.get("is_matryoshka") is True,
        matryoshka_dimensions=dimensions,
    )


def _embedding_dim(config: CheckpointConfig, task: PoolingTask) -> int | None:
    """Numbers of a token's vector, where the model itself projects to them (ColQwen2)."""
    return getattr(config.hf_config, "embedding_dim", None) if task == "token_embed" else None


def _two_towers(config: CheckpointConfig) -> int | None:
    """Of a model with a tower for texts and one for pictures, the numbers of a vector; None for any other."""
    whole = config.hf_config
    text = getattr(whole, "text_config", None)
    if config.architectures[0] not in ("CLIPModel", "SiglipModel") or text is None:
        return None
    return int(getattr(whole, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size)


# sentence-transformers


def _modules(path: Path) -> list[tuple[str, str]]:
    """The modules of a sentence-transformers checkpoint, `(kind, folder)` in order; none of another checkpoint.

    Raises `ModelError` for a module that isn't served.
    """
    found = []
    for entry in read_json_list(path / MODULES):
        if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
            raise ModelError(f"{MODULES}: got {entry!r:.80}, expected objects with a type. Download the file again.")
        kind = entry["type"].rpartition(".")[2]
        if kind not in ("Pooling", "Dense", "Normalize", *_NO_EFFECT):
            raise ModelError(
                f"{MODULES}: got the module {entry['type']!r:.120}, expected Transformer, Pooling, Dense or Normalize. "
                "Serve the checkpoint without it, by removing it from the file, if that is right."
            )
        if kind in ("Router", "Asym"):
            raise ModelError(
                f"{MODULES}: got a {kind}, which takes queries and documents through different modules, expected one "
                "way for all texts. Serve each of its parts as a checkpoint of its own."
            )
        found.append((kind, str(entry.get("path") or "")))
    return found


def _pooling_type(
    path: Path, config: CheckpointConfig, modules: Sequence[tuple[str, str]], *, is_generator: bool
) -> PoolingType:
    folder = next((folder for kind, folder in modules if kind == "Pooling"), None)
    if folder is None:
        return "last" if is_generator or _is_decoder(config) else "mean"
    written = read_json(member(path, folder, MODULES) / "config.json")
    named = written.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or ())
    found = {_POOLING_MODES[mode] for mode in modes if mode in _POOLING_MODES}
    found |= {mode for flag, mode in _POOLING_FLAGS.items() if written.get(flag) is True}
    if len(found) != 1:
        raise ModelError(
            f"{folder}/config.json: got {sorted(found) or modes or 'no'} ways of pooling, expected one of "
            f"{sorted(_POOLING_MODES)}. Correct the file, or set pooling_type (--pooling-type)."
        )
    return found.pop()


def _prompts(path: Path, modules: Sequence[tuple[str, str]]) -> tuple[Mapping[str, str], str | None]:
    """Texts that go in front of what is embedded, and the name of the one that always does.

    Raises `ModelError` for a file that isn't so, and for texts whose rows are left out of the vector.
    """
    written = read_json(path / PROMPTS)
    found, default = written.get("prompts") or {}, written.get("default_prompt_name")
    is_texts = isinstance(found, Mapping) and all(isinstance(text, str) for text in found.values())
    if not is_texts or (default is not None and default not in found):
        raise ModelError(
            f"prompts in {PROMPTS}: got {found!r:.120} with the default {default!r:.60}, expected texts by name, and "
            "one of the names or null. Correct the file."
        )
    folder = next((folder for kind, folder in modules if kind == "Pooling"), None)
    pooling = read_json(member(path, folder, MODULES) / "config.json") if folder is not None else {}
    if pooling.get("include_prompt") is False and any(found.values()):
        raise ModelError(
            f"include_prompt in {folder}/config.json: got false, expected true: rows of a text in front can't be left "
            f"out of the vector. Remove the texts from {PROMPTS} to serve the model without them."
        )
    return found, default


def _is_decoder(config: CheckpointConfig) -> bool:
    """Whether a bare model is one that reads from left to right."""
    from transformers.models.auto import modeling_auto

    model_type = config.hf_config.model_type
    is_two_way = getattr(config.hf_config, "is_causal", True) is False or getattr(
        config.hf_config, "use_bidirectional_attention", False
    )
    is_masked = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_masked and not is_two_way


def _dense_size(folder: Path) -> int | None:
    size = read_json(folder / "config.json").get("out_features")
    return size if isinstance(size, int) else None


def trained_length(path: Path) -> int | None:
    """Most tokens that a checkpoint's files say its model is for, beside its config: the least of them."""
    lengths = [
        read_json(path / "sentence_bert_config.json").get("max_seq_length"),
        read_json(path / TOKENIZER_CONFIG).get("model_max_length"),
    ]
    return min((each for each in lengths if isinstance(each, int) and 0 < each < _MAX_TOKENIZER_LEN), default=None)


# Labels


def _labels(config: CheckpointConfig, num_tokens: int) -> tuple[str, ...]:
    if num_tokens:
        return ("LABEL_0",) if num_tokens == 2 else tuple(f"LABEL_{i}" for i in range(num_tokens))
    names = getattr(config.hf_config, "id2label", None) or {}
    return tuple(str(names[key]) for key in sorted(names))


def _activation(config: CheckpointConfig, labels: Sequence[str], task: PoolingTask) -> Activation:
    """As sentence-transformers' cross-encoders say it, else as Hugging Face's pipelines go by `problem_type`."""
    stated = config.written.get("sentence_transformers")
    named = (stated or {}).get("activation_fn") if isinstance(stated, Mapping) else None
    named = named or config.written.get("sbert_ce_default_activation_function")
    if isinstance(named, str):
        kind = named.rpartition(".")[2]
        known: Mapping[str, Activation] = {"Identity": "none", "Sigmoid": "sigmoid", "Softmax": "softmax"}
        if kind not in known:
            raise ModelError(
                f"activation_fn in config.json: got {named!r:.120}, expected one of {sorted(known)}. Correct it."
            )
        return known[kind]
    problem = getattr(config.hf_config, "problem_type", None)
    if problem == "regression":
        return "none"
    if task == "token_classify":
        return "softmax"
    return "sigmoid" if problem == "multi_label_classification" or len(labels) == 1 else "softmax"


def _token_ids(path: Path, tokens: Sequence[str | int]) -> tuple[int, ...]:
    """Ids of single tokens. Raises `ModelError` for a text that is more or less than one."""
    if all(isinstance(each, int) for each in tokens):
        return tuple(int(each) for each in tokens)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    ids: list[int] = []
    for each in tokens:
        found = [each] if isinstance(each, int) else tokenizer.encode(each, add_special_tokens=False)
        if len(found) != 1:
            raise ModelError(
                f"classifier_from_token: got {each!r:.60}, which is {len(found)} tokens, expected one. Name a token "
                "of the tokenizer's vocabulary, or its id."
            )
        ids += found
    return tuple(ids)


def _int_tuple(config: CheckpointConfig, name: str) -> tuple[int, ...]:
    found = config.written.get(name) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(each, int) and each > 0 for each in found):
        raise ModelError(f"{name} in config.json: got {found!r:.80}, expected a list of sizes. Correct it.")
    return tuple(found)
