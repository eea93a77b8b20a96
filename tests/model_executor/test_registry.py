"""Which class serves which architecture, and packages that add their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar

import pytest
import transformers
from torch import nn

from sensorium.errors import ConfigError
from sensorium.model_executor.models import interfaces, registry
from sensorium.model_executor.models.interfaces import (
    EMBED_INPUT_METHODS,
    EMBED_MULTIMODAL_METHODS,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
    find_override,
    overrides,
    supports_multimodal,
)
from sensorium.model_executor.models.registry import IN_TREE, ModelRegistry
from tests.helpers.waiting import HANG_S


@pytest.fixture
def models() -> registry._ModelRegistry:
    return registry._ModelRegistry({"Known": "collections:OrderedDict"})


class Model(nn.Module):
    pass


def test_a_class_and_a_string_serve_an_architecture(models: registry._ModelRegistry) -> None:
    models.register_model("ByClass", Model)
    models.register_model("ByString", "torch.nn:Linear")
    assert models.resolve(["ByClass"]) == (Model, "ByClass")
    assert models.resolve("ByString") == (nn.Linear, "ByString")
    assert models.resolve(["Unknown", "ByClass"]) == (Model, "ByClass")
    assert models.get_supported_archs() == ["ByClass", "ByString", "Known"]


def test_a_string_is_imported_only_when_needed(models: registry._ModelRegistry) -> None:
    models.register_model("Lazy", "package_that_is_not_there:Model")
    with pytest.raises(TypeError, match="can't import 'package_that_is_not_there:Model'"):
        models.resolve(["Lazy"])
    models.register_model("NoSuchClass", "collections:NoSuchClass")
    with pytest.raises(TypeError, match="NoSuchClass"):
        models.resolve(["NoSuchClass"])


@pytest.mark.parametrize(
    ("architecture", "config", "is_native"),
    [
        ("LlavaForConditionalGeneration", {"text_config": {"model_type": "llama"}}, True),
        ("LlavaForConditionalGeneration", {"text_config": {"model_type": "phi"}}, False),
        ("LlavaForConditionalGeneration", {"vision_config": {"model_type": "dinov2"}}, False),
        ("LlavaNextForConditionalGeneration", {"text_config": {"model_type": "phi"}}, False),
        ("InternVLForConditionalGeneration", {"text_config": {"model_type": "qwen3"}}, True),
        ("InternVLForConditionalGeneration", {"text_config": {"model_type": "phi"}}, False),
        ("Mistral3ForConditionalGeneration", {"text_config": {"model_type": "mistral"}}, True),
        ("Mistral3ForConditionalGeneration", {"text_config": {"model_type": "ministral3"}}, False),
        ("Idefics3ForConditionalGeneration", {"text_config": {"model_type": "phi"}}, False),
    ],
    ids=str,
)
def test_a_checkpoint_of_other_parts_runs_by_modules_of_transformers(
    architecture: str, config: dict[str, Any], is_native: bool
) -> None:
    """A class for an architecture took every checkpoint of it, and refused those with a decoder that has none here."""
    config_class = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))
    resolved, _ = ModelRegistry.resolve(architecture, hf_config=config_class(**config))
    assert (resolved.__name__ == architecture) is is_native
    forced, _ = ModelRegistry.resolve(architecture, "native", hf_config=config_class(**config))
    assert forced.__name__ == architecture


def test_a_registered_class_wins_over_modules_of_transformers(models: registry._ModelRegistry) -> None:
    models.register_model("Olmo2ForCausalLM", Model)
    generic, name = models.resolve(["Qwen2MoeForCausalLM"])
    assert (generic.__name__, name) == ("TransformersForCausalLM", "Qwen2MoeForCausalLM")
    assert models.resolve(["Olmo2ForCausalLM"]) == (Model, "Olmo2ForCausalLM")
    assert models.resolve(["Qwen2MoeForCausalLM", "Olmo2ForCausalLM"]) == (Model, "Olmo2ForCausalLM")
    assert models.resolve(["Olmo2ForCausalLM"], "transformers") == (generic, "Olmo2ForCausalLM")
    assert models.resolve(["MyRemoteModel"], is_remote=True) == (generic, "MyRemoteModel")


def test_who_asks_for_one_kind_of_class_is_told_that_there_is_another(models: registry._ModelRegistry) -> None:
    with pytest.raises(ConfigError, match="to run the modules of transformers"):
        models.resolve(["Qwen2MoeForCausalLM"], "native")
    with pytest.raises(ConfigError, match="model_impl: got 'transformers'"):
        models.resolve(["Known"], "transformers")


@pytest.mark.parametrize("string", ["module", "module.Model", "module:", ":Model", "a:b:c", ""])
def test_another_string_is_a_value_error(models: registry._ModelRegistry, string: str) -> None:
    with pytest.raises(ValueError, match="<module>:<class>"):
        models.register_model("Arch", string)


@pytest.mark.parametrize("thing", [None, 3, Model()])
def test_another_type_is_a_type_error(models: registry._ModelRegistry, thing: Any) -> None:
    with pytest.raises(TypeError, match="expected a class or a string"):
        models.register_model("Arch", thing)


@pytest.mark.parametrize("architectures", [["Unknown"], [], "Unknown"])
def test_an_unknown_architecture_lists_the_known_ones(models: registry._ModelRegistry, architectures: Any) -> None:
    with pytest.raises(ValueError, match=r"not supported for now. Supported architectures: \['Known'\]"):
        models.resolve(architectures)


def test_the_message_for_an_unknown_architecture_stays_readable(models: registry._ModelRegistry) -> None:
    for i in range(100):
        models.register_model(f"A{i:02}", Model)
    with pytest.raises(ValueError, match=r"'A15'\] and 85 more\. Add one with"):
        models.resolve("Unknown")


def test_registering_again_warns_and_wins(models: registry._ModelRegistry, caplog: pytest.LogCaptureFixture) -> None:
    models.register_model("New", Model)
    assert not caplog.records
    models.register_model("Known", Model)
    assert "Known is already registered, and will be overwritten by the new model class Model" in caplog.text
    assert models.resolve("Known") == (Model, "Known")


def test_architectures_in_the_tree_are_known_without_being_imported() -> None:
    assert set(IN_TREE) <= set(ModelRegistry.get_supported_archs())
    assert all(target.startswith("sensorium.model_executor.models.") for target in IN_TREE.values())


# Plug-in packages


def make_package(path: Path, name: str, body: str) -> None:
    (path / f"{name}.py").write_text(textwrap.dedent(body))
    metadata = path / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[sensorium.general_plugins]\n{name} = {name}:register\n")


def test_packages_add_models_in_every_process_and_a_broken_one_does_no_harm(tmp_path: Path) -> None:
    """Out-of-tree media work in a spawned worker: it has imported nothing but what the plug-in brings."""
    make_package(tmp_path, "a_broken_package", "def register():\n    raise RuntimeError('broken')\n")
    make_package(
        tmp_path,
        "my_package",
        """
        from sensorium.model_executor.models.registry import ModelRegistry
        calls = []
        def register():
            calls.append(1)
            ModelRegistry.register_model("MyModel", "my_model:MyModel")
        """,
    )
    (tmp_path / "my_model.py").write_text(
        textwrap.dedent(
            """
            from torch import nn, ones
            from sensorium.model_executor.models.interfaces import SupportsMultiModal
            from sensorium.multimodal import MULTIMODAL_REGISTRY

            @MULTIMODAL_REGISTRY.register_image_input_mapper(lambda ctx, data: {"pixel_values": ones(2)})
            class MyModel(nn.Module, SupportsMultiModal):
                pass
            """
        )
    )
    (tmp_path / "worker.py").write_text(
        textwrap.dedent(
            """
            import logging, multiprocessing
            logging.basicConfig()

            def work(queue):
                from sensorium.plugins import load_general_plugins
                load_general_plugins()
                load_general_plugins()
                import my_package
                from sensorium.model_executor.models.registry import ModelRegistry
                from sensorium.multimodal import MULTIMODAL_REGISTRY
                from tests.helpers.configs import make_model_config
                model_class, _ = ModelRegistry.resolve(["MyModel"])
                config = make_model_config(model_class)
                MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
                mapped = MULTIMODAL_REGISTRY.map_input(config, {"image": "x"})
                queue.put((len(my_package.calls), model_class.__name__, mapped["pixel_values"].tolist()))

            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                queue = context.SimpleQueue()
                process = context.Process(target=work, args=(queue,))
                process.start()
                print(queue.get())
                process.join()
            """
        )
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "worker.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert result.stdout.strip() == "(1, 'MyModel', [1.0, 1.0])", result.stderr
    assert "Plug-in a_broken_package (a_broken_package:register) failed to load" in result.stderr


# Interfaces


class Declared(nn.Module, SupportsMultiModal):
    pass


class DuckTyped(nn.Module):
    supports_multimodal: ClassVar[bool] = True


class Inherited(Declared):
    pass


class Encodes(Declared):
    def get_multimodal_embeddings(self, **kwargs: Any) -> Any:
        return kwargs


class EncodesUnderTodaysNames(Declared):
    def embed_multimodal(self, **kwargs: Any) -> Any:
        return kwargs

    @staticmethod
    def embed_input_ids(input_ids: Any, multimodal_embeddings: Any = None) -> Any:
        return input_ids


class EncodesUnderYesterdaysName(Declared):
    def process_mm_inputs(self, **kwargs: Any) -> Any:
        return kwargs


def test_only_the_flag_says_that_a_class_takes_media() -> None:
    assert all(map(supports_multimodal, (Declared, DuckTyped, Inherited)))
    assert not supports_multimodal(Model)
    assert not supports_multimodal(None)
    assert not supports_multimodal(type("Off", (Declared,), {"supports_multimodal": False}))
    assert isinstance(Declared(), SupportsMultiModal)
    assert not isinstance(Model(), SupportsMultiModal)


def test_inherited_stubs_are_no_methods() -> None:
    """`hasattr` is true for every class with the interface; tiers are found by what is overridden."""
    for name in ("get_multimodal_embeddings", "get_input_embeddings"):
        assert hasattr(Declared(), name)
        assert not overrides(Declared, name)
        assert not overrides(Inherited, name)
    assert Declared().get_multimodal_embeddings() is None
    assert overrides(Encodes, "get_multimodal_embeddings")
    assert overrides(type("Below", (Encodes,), {}), "get_multimodal_embeddings")
    assert not overrides(Encodes, "get_input_embeddings")
    assert not overrides(Model, "get_multimodal_embeddings")


@pytest.mark.parametrize(
    ("model_class", "encode", "embed"),
    [
        (Declared, None, None),
        (Encodes, "get_multimodal_embeddings", None),
        (EncodesUnderTodaysNames, "embed_multimodal", "embed_input_ids"),
        (EncodesUnderYesterdaysName, "process_mm_inputs", None),
    ],
)
def test_methods_are_found_under_all_their_names(model_class: type, encode: Any, embed: Any) -> None:
    assert find_override(model_class, EMBED_MULTIMODAL_METHODS) == encode
    assert find_override(model_class, EMBED_INPUT_METHODS) == embed


def test_a_stub_in_front_does_not_hide_a_method_behind_it() -> None:
    """With the interface named first, its stub comes first in the resolution order: the class as written runs it."""

    class Text(nn.Module):
        def get_input_embeddings(self, input_ids: Any) -> Any:
            return input_ids

    class InterfaceLast(Text, SupportsMultiModal):  # type: ignore[misc]
        pass

    class InterfaceFirst(SupportsMultiModal, Text):
        pass

    assert overrides(InterfaceLast, "get_input_embeddings")
    assert not overrides(InterfaceFirst, "get_input_embeddings")


@pytest.mark.parametrize(
    ("protocol", "flag"),
    [
        (SupportsLoRA, "supports_lora"),
        (SupportsPP, "supports_pp"),
        (interfaces.HasInnerState, "has_inner_state"),
        (interfaces.IsAttentionFree, "is_attention_free"),
        (interfaces.IsHybrid, "is_hybrid"),
        (interfaces.SupportsCrossEncoding, "supports_cross_encoding"),
    ],
)
def test_other_capabilities_are_flags_too(protocol: type, flag: str) -> None:
    has = getattr(interfaces, flag)
    capable = type("Capable", (nn.Module, protocol), {})
    assert has(capable)
    assert has(capable())
    assert not has(Model)
    assert not has(Model())


def test_a_typo_in_an_architecture_is_met_with_the_name_that_was_meant() -> None:
    with pytest.raises(ConfigError, match="'LlamaForCausalLM' is meant"):
        ModelRegistry.resolve(["LlamaForCausalML"])
