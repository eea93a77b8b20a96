"""Text from token ids: whole characters only, equal to the tokenizer's own decoding, stop strings anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.engine.detokenizer import ByteLevelStream, Detokenizer, IncrementalDetokenizer, WindowStream
from sensorium.engine.stop_strings import StopMatch, StopStringMatcher
from sensorium.sampling_params import SamplingParams
from tests.helpers import tiny_tokenizers

TOKENIZERS: dict[str, Any] = {
    "byte_level": tiny_tokenizers.wrapped(tiny_tokenizers.byte_level_bpe()),
    "byte_fallback_bpe": tiny_tokenizers.wrapped(tiny_tokenizers.byte_fallback_bpe()),
    "byte_fallback_unigram": tiny_tokenizers.wrapped(tiny_tokenizers.byte_fallback_unigram()),
    "wordpiece": tiny_tokenizers.wrapped(tiny_tokenizers.wordpiece()),
    "python": tiny_tokenizers.python_bytes(),
}
DETOKENIZERS = {name: Detokenizer(tokenizer) for name, tokenizer in TOKENIZERS.items()}
LOSSLESS = [name for name in TOKENIZERS if name != "wordpiece"]

_CHARS = st.sampled_from("ab the quick  fox, .é ü߀你好世界日本😀👩‍👧\n\t▁<>") | st.characters(
    exclude_categories=["Cs"], exclude_characters="\ufffd"
)
_TEXT = st.text(_CHARS, max_size=30)


def _pieces(name: str, prompt: Sequence[int], output: Sequence[int], **params: Any) -> list[str]:
    """The text after each id, and after the end."""
    text = IncrementalDetokenizer(DETOKENIZERS[name], prompt, SamplingParams(**params))
    shown = []
    for token_id in output:
        assert text.update([token_id]) == 1
        shown.append(text.text)
    text.finish()
    return [*shown, text.text]


def test_special_tokens_that_are_asked_for_stay() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("a<s>b</s>c", add_special_tokens=False)
    visible = [tokenizer.convert_tokens_to_ids("</s>")]
    assert _pieces("byte_level", [], ids, visible_special_token_ids=visible)[-1] == "ab</s>c"


def _decode(name: str, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    decoded: str = TOKENIZERS[name].decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return decoded


def _expected(name: str, prompt: Sequence[int], output: Sequence[int], *, skip_special_tokens: bool) -> str:
    before = _decode(name, prompt, skip_special_tokens=skip_special_tokens)
    return _decode(name, [*prompt, *output], skip_special_tokens=skip_special_tokens)[len(before) :]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150)
@given(parts=st.lists(_TEXT | st.sampled_from(tiny_tokenizers.SPECIAL), min_size=1, max_size=4), data=st.data())
def test_text_equals_the_tokenizers_decoding(name: str, parts: list[str], data: Any) -> None:
    """Of any text, cut anywhere into prompt and output, with special tokens in between, shown or not."""
    ids = TOKENIZERS[name].encode("".join(parts), add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    while "\ufffd" in _decode(name, ids[:cut], skip_special_tokens=False):
        cut -= 1  # what a prompt shows that ends within a character is a matter of taste
    skip = data.draw(st.booleans())
    shown = _pieces(name, ids[:cut], ids[cut:], skip_special_tokens=skip)
    assert shown[-1] == _expected(name, ids[:cut], ids[cut:], skip_special_tokens=skip)
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(shown))
    assert not any("\ufffd" in text for text in shown[:-1])


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, len(TOKENIZERS["byte_level"]) + 5), max_size=40), skip=st.booleans())
def test_byte_level_text_is_exact_for_any_ids(ids: list[int], skip: bool) -> None:
    """Also for bytes that are no text, and for ids beyond the tokenizer, which wide output heads can sample."""
    shown = _pieces("byte_level", [], ids, skip_special_tokens=skip)
    assert shown[-1] == _decode("byte_level", ids, skip_special_tokens=skip)
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(shown))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60)
@given(ids=st.lists(st.integers(0, 600), max_size=60), prompt=st.lists(st.integers(-5, 600), max_size=8))
def test_any_ids_give_text(name: str, ids: list[int], prompt: list[int]) -> None:
    shown = _pieces(name, prompt, ids)
    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(shown))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_bpe", "byte_fallback_unigram", "python"])
def test_no_character_is_shown_in_parts(name: str) -> None:
    ids = TOKENIZERS[name].encode("a🦊", add_special_tokens=False)
    shown = _pieces(name, [], ids)
    assert set(shown) <= {"", "a", "a🦊"}
    assert len(shown) > 3


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_bpe", "byte_fallback_unigram", "python"])
def test_an_output_that_ends_within_a_character_ends_as_decoded(name: str) -> None:
    """That is with U+FFFD, which was not shown before; or with nothing, if the tokenizer ignores what is no text."""
    ids = TOKENIZERS[name].encode("a🦊", add_special_tokens=False)[:-1]
    shown = _pieces(name, [], ids)
    assert shown[-2] == "a"
    assert shown[-1] == _decode(name, ids, skip_special_tokens=True)
    assert shown[-1].endswith("\ufffd") == (name != "python")


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_bpe", "byte_fallback_unigram", "python"])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_prompt_that_ends_within_a_character_is_completed(name: str, num_tokens: int) -> None:
    ids = TOKENIZERS[name].encode("x🦊é", add_special_tokens=False)
    cut = (
        next(n for n in range(len(ids)) if _decode(name, ids[: n + 1], skip_special_tokens=True) == "x")
        + 1
        + num_tokens
    )
    assert "\ufffd" in _decode(name, ids[:cut], skip_special_tokens=True) or name == "python"
    assert _pieces(name, ids[:cut], ids[cut:])[-1] == "🦊é"


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback_bpe", "byte_fallback_unigram"])
def test_a_prompt_that_ends_with_bytes_of_no_character_keeps_them(name: str) -> None:
    """Both a U+FFFD in the user's own text and a lone byte are the prompt's; the output does not repeat them."""
    tokenizer = TOKENIZERS[name]
    literal, word = (tokenizer.encode(text, add_special_tokens=False) for text in ("x\ufffd", "the"))
    lone = tokenizer.encode("x🦊", add_special_tokens=False)[:-1]
    for prompt in (literal, lone):
        assert _pieces(name, prompt, word)[-1].strip() == "the"


def test_the_first_word_behind_a_prompt_keeps_its_space() -> None:
    """A metaspace tokenizer drops the space of a first token; but an output is not the first thing in its text."""
    tokenizer = TOKENIZERS["byte_fallback_bpe"]
    prompt, word = (tokenizer.encode(text, add_special_tokens=False) for text in ("the", "f"))
    assert tokenizer.convert_ids_to_tokens(word)[0].startswith("▁")
    assert _pieces("byte_fallback_bpe", prompt, word)[-1] == " f"
    assert _pieces("byte_fallback_bpe", [], word)[-1] == "f"


def test_placeholders_of_media_in_the_prompt_are_no_text() -> None:
    ids = TOKENIZERS["byte_fallback_bpe"].encode("the", add_special_tokens=False)
    for prompt in ([*ids, *[-1] * 30], [*ids, *[10**6] * 10]):
        assert _pieces("byte_fallback_bpe", prompt, ids)[-1].strip() == "the"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_work_per_token_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that never make a character, ids without tokens, or special tokens only: no window may grow."""
    detokenizer = Detokenizer(TOKENIZERS[name])
    decode, lengths = detokenizer._decode, [0]

    def watched(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(detokenizer, "_decode", watched)
    special = TOKENIZERS[name].convert_tokens_to_ids("</s>")
    for token_id in (0xC3, 0xE2, special, 10**6, 300):
        for skip in (True, False):
            text = IncrementalDetokenizer(detokenizer, [], SamplingParams(skip_special_tokens=skip))
            text.update([token_id] * 300)
            text.finish()
    assert max(lengths) <= 16


def test_bytes_that_never_make_a_character_do_not_hold_back_what_follows() -> None:
    tokenizer = TOKENIZERS["byte_fallback_bpe"]
    broken = tokenizer.convert_tokens_to_ids(["<0xE2>"]) * 50
    word = tokenizer.encode("the", add_special_tokens=False)
    shown = _pieces("byte_fallback_bpe", word, [*broken, *word])
    assert shown[-2].endswith("the")
    assert shown[20] != ""


def test_special_tokens_stand_apart_only_if_asked() -> None:
    ids = TOKENIZERS["wordpiece"].encode("the</s></s>fox", add_special_tokens=False)
    options = {"skip_special_tokens": False}
    assert _pieces("wordpiece", [], ids, **options)[-1].startswith("the </s> </s> f")
    joined = _pieces("wordpiece", [], ids, spaces_between_special_tokens=False, **options)[-1]
    assert joined.startswith("the </s></s> f")


@pytest.mark.parametrize("name", LOSSLESS)
def test_texts_of_tokens_make_up_the_text(name: str) -> None:
    """What log probabilities show for the tokens behind the first."""
    ids = TOKENIZERS[name].encode("the quick fox</s> the", add_special_tokens=False)
    texts = [DETOKENIZERS[name].token_text(token_id) for token_id in ids]
    assert "".join(texts).strip() == _decode(name, ids, skip_special_tokens=False).strip()
    assert DETOKENIZERS[name].token_text(10**6) == ""


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=50, deadline=None)
@given(text=_TEXT)
def test_bytes_of_tokens_make_up_the_text(name: str, text: str) -> None:
    """Log probabilities gave the bytes of U+FFFD for a token that is part of a character, and no client could put the
    text together.
    """
    ids = TOKENIZERS[name].encode("a" + text, add_special_tokens=False)
    spelled = b"".join(DETOKENIZERS[name].token_bytes(token_id) for token_id in ids)
    assert spelled.decode().strip(" ") == _decode(name, ids, skip_special_tokens=False).strip(" ")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_token_has_bytes_of_its_own(name: str) -> None:
    detokenizer, parts = DETOKENIZERS[name], []
    for token_id in range(len(TOKENIZERS[name])):
        text, own = detokenizer.token_text(token_id), detokenizer.token_bytes(token_id)
        assert text in (own.decode(errors="replace"), own.decode(errors="ignore"))
        assert "\ufffd".encode() not in own
        parts += [own] if "\ufffd" in own.decode(errors="replace") else []
    assert len(parts) == len(set(parts))
    assert bool(parts) == (name in LOSSLESS)
    assert detokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=30, deadline=None)
@given(text=_TEXT)
def test_each_token_begins_where_its_characters_do(name: str, text: str) -> None:
    """Offsets were sums of the lengths of U+FFFD and of hidden tokens, so that they ran ahead of the text."""
    ids = TOKENIZERS[name].encode(f"a{text}</s>b", add_special_tokens=False)
    for skips in (False, True):
        spelled, offsets = DETOKENIZERS[name].spell(ids, skip_special_tokens=skips)
        assert spelled == _decode(name, ids, skip_special_tokens=skips)
        assert offsets == sorted(offsets)
        assert spelled[offsets[-1] :].lstrip(" ") == "b"
        end = ids.index(TOKENIZERS[name].convert_tokens_to_ids("</s>"))
        assert (spelled[offsets[end] : offsets[end + 1]] == "") == skips


def test_each_kind_of_tokenizer_has_its_stream() -> None:
    assert isinstance(DETOKENIZERS["byte_level"].stream([], frozenset()), ByteLevelStream)
    for name in ("byte_fallback_bpe", "byte_fallback_unigram", "wordpiece", "python"):
        assert isinstance(DETOKENIZERS[name].stream([], frozenset()), WindowStream)


# --- Stop strings ---


def _naive_match(text: str, stops: Sequence[str], first_end: int = 1) -> tuple[int, str] | None:
    """End and string of the first match, character by character, the longest of those that end together."""
    for end in range(first_end, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def _naive_open(text: str, stops: Sequence[str]) -> int:
    return max((n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)


_STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=300)
@given(stops=_STOPS, pieces=st.lists(st.text("abc", max_size=4), max_size=8))
def test_matcher_finds_what_a_naive_search_finds(stops: list[str], pieces: list[str]) -> None:
    matcher, before = StopStringMatcher(stops), ""
    expected = _naive_match("".join(pieces), stops)
    for piece in pieces:
        match = matcher.feed(piece)
        if match is not None:
            assert expected == (len(before) + match.end, match.stop)
            return
        before += piece
        assert matcher.num_open_chars == _naive_open(before, stops)
    assert expected is None


def test_matcher_takes_up_after_a_match() -> None:
    matcher = StopStringMatcher(["aba"])
    assert matcher.feed("ababa") == StopMatch("aba", 3)
    assert matcher.feed("ba") == StopMatch("aba", 2)


@settings(max_examples=300)
@given(
    stops=_STOPS,
    words=st.lists(st.text("abc 你", min_size=1, max_size=4), max_size=8),
    keeps=st.booleans(),
    min_tokens=st.integers(0, 6),
    step=st.integers(1, 3),
)
def test_output_ends_at_the_first_stop_string(
    stops: list[str], words: list[str], keeps: bool, min_tokens: int, step: int
) -> None:
    """However many ids come at once; and no part of a stop string is ever shown unless the output keeps it."""
    tokenizer = TOKENIZERS["byte_level"]
    ids = [i for word in words for i in tokenizer.encode(word, add_special_tokens=False)]
    ends = [
        len(_decode("byte_level", ids[: n + 1], skip_special_tokens=True).rstrip("\ufffd")) for n in range(len(ids))
    ]
    whole = "".join(words)
    first_end = 1 if min_tokens < 2 else ([0, *ends, len(whole)][min(min_tokens - 1, len(ids))] + 1)
    expected = _naive_match(whole, stops, first_end)

    params = SamplingParams(stop=stops, include_stop_str_in_output=keeps, min_tokens=min_tokens, max_tokens=None)
    text = IncrementalDetokenizer(DETOKENIZERS["byte_level"], [], params)
    shown, consumed = [""], 0
    for start in range(0, len(ids), step):
        consumed += text.update(ids[start : start + step])
        shown.append(text.text)
        if text.stop_string is not None:
            break
    else:
        text.finish()
        shown.append(text.text)

    assert all(later.startswith(sooner) for sooner, later in itertools.pairwise(shown))
    if expected is None:
        assert text.stop_string is None
        assert (shown[-1], consumed) == (whole, len(ids))
    else:
        end, stop = expected
        assert text.stop_string == stop
        assert shown[-1] == whole[: end if keeps else end - len(stop)]
        assert consumed == next(n for n, known in enumerate(ends, 1) if known >= end)


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [i for char in "x###User" for i in tokenizer.encode(char, add_special_tokens=False)]
    assert _pieces("byte_level", [], ids[:4], stop=["###End"]) == ["x", "x", "x", "x", "x###"]
    assert _pieces("byte_level", [], ids, stop=["###End"])[4] == "x###U"


@pytest.mark.parametrize("make", [list, tuple])
def test_stop_strings_cost_no_more_with_their_length(make: Callable[[list[str]], Sequence[str]]) -> None:
    """Sixty-four long stop strings that the text nearly repeats: the classical bad case of naive searches."""
    matcher = StopStringMatcher(make(["a" * 1000 + str(i) for i in range(64)]))
    assert matcher.feed("a" * 2000) is None
    assert matcher.num_open_chars == 1000
