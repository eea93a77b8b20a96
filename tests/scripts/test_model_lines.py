"""Lines of model files are counted as the page says."""

from __future__ import annotations

from scripts import model_lines

SOURCE = '''"""A docstring
of two lines."""

from sensorium.model_executor.models.clip import Tower  # a comment

# a comment alone
names = {
    "a": """a text
of two lines""",
}
'''


def test_comments_docstrings_and_blanks_are_no_code() -> None:
    assert model_lines.lines_of_code(SOURCE) == 5


def test_imports_are_followed_within_the_folder() -> None:
    folder = model_lines.OURS
    files = {
        f"{folder}/a.py": SOURCE,
        f"{folder}/clip.py": "from .layers import x\nfrom . import tiles\nimport torch\n",
        f"{folder}/tiles.py": f"from {folder.replace('/', '.')} import a\n",
        f"{folder}/other.py": "",
    }
    assert model_lines.with_imports(f"{folder}/a.py", files) == {
        f"{folder}/{name}.py" for name in ("a", "clip", "tiles")
    }


def test_the_registry_of_vllm_is_read() -> None:
    registry = (
        'X = {"LlavaNext": ("llava_next", "LlavaNext"), "No": "other:Class", **Y}\nZ = {"LlavaNext": ("later", "L")}'
    )
    assert model_lines.classes_of_vllm(registry) == {"LlavaNext": f"{model_lines.THEIRS}/llava_next.py"}


def test_the_section_is_replaced_and_nothing_else() -> None:
    heading = model_lines.HEADING
    page = f"# Page\n\ntext\n\n{heading}\n\nold\n\n## Next\n\nmore\n"
    new = f"{heading}\n\nnew\n"
    assert model_lines.with_section(page, new) == page.replace("old\n", "new\n")
    assert model_lines.with_section("# Page\n", new) == f"# Page\n\n{new}"
