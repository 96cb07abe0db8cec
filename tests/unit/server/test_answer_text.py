from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from server.answer_text import AnswerText, Detokenizer, StopStrings
from server.backbone import Backbone


@pytest.fixture(scope="module")
def tokenizer(backbone: Backbone) -> PreTrainedTokenizerBase:
    return backbone.tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("text", ["plain", "zwölf Boxkämpfer", "日本語 and 👩‍👩‍👧 family", " leading", "a\n\nb\t"])
def test_pieces_join_to_the_text_and_hold_no_broken_character(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids_of(tokenizer, text)] + [detokenizer.flush()]
    assert "".join(pieces) == text
    assert not any("�" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_do_not_wait_for_ever(tokenizer: PreTrainedTokenizerBase) -> None:
    broken = ids_of(tokenizer, "é")[:1]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in broken * 40]
    assert any(pieces)
    assert max(len(piece) for piece in pieces) <= 8


def test_special_tokens_have_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer)
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    assert detokenizer.push(end) == ""
    assert detokenizer.push(ids_of(tokenizer, "x")[0]) == "x"


@given(
    st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3), st.data()
)
def test_stop_strings_cut_as_they_would_in_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    matcher = StopStrings(stops)
    shown, stopped, rest = "", False, text
    while rest and not stopped:
        size = data.draw(st.integers(1, len(rest)))
        piece, rest = rest[:size], rest[size:]
        safe, stopped = matcher.push(piece)
        shown += safe
        assert not any(stop in shown for stop in stops)
    if not stopped:
        shown += matcher.flush()
    # Whichever stop string is complete first decides; the one that begins first among those ends the text.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    assert text.startswith(shown)
    if stopped:
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown == text


def push_all(answer: AnswerText, tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    pieces = []
    for token in ids_of(tokenizer, text):
        pieces.append(answer.push(token))
        if answer.stopped:
            break
    return [*pieces, answer.finish()]


def test_the_space_after_a_rendered_prompt_is_dropped_once(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = AnswerText(tokenizer, (), min_tokens=0, answers_prompt=True)
    assert "".join(push_all(answer, tokenizer, "  two spaces")) == answer.text == " two spaces"
    raw = AnswerText(tokenizer, (), min_tokens=0, answers_prompt=False)
    push_all(raw, tokenizer, " kept")
    assert raw.text == " kept"


def test_nothing_after_a_stop_string_is_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = AnswerText(tokenizer, ("END",), min_tokens=0, answers_prompt=False)
    pieces = push_all(answer, tokenizer, "fine ENDless")
    assert (answer.text, answer.stopped) == ("fine ", True)
    assert "".join(pieces) == "fine "


def test_a_stop_string_waits_for_the_least_number_of_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = AnswerText(tokenizer, ("b",), min_tokens=4, answers_prompt=False)
    push_all(answer, tokenizer, "abababab")
    assert (answer.text, answer.stopped) == ("abab" + "a", True)


def test_what_looked_like_a_stop_string_comes_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = AnswerText(tokenizer, ("STOP",), min_tokens=0, answers_prompt=False)
    pieces = push_all(answer, tokenizer, "xSTO")
    assert pieces[-1] == "STO"
    assert (answer.text, answer.stopped) == ("xSTO", False)


def test_works_with_a_tokenizer_that_is_loaded_anew(tokenizer: PreTrainedTokenizerBase, tmp_path: object) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    answer = AnswerText(again, (), min_tokens=0, answers_prompt=False)
    push_all(answer, again, "ünï")
    assert answer.text == "ünï"
