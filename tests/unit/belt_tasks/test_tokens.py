"""Tokens: whole documents, whatever they hold; long ones in pieces with the same result."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from belt_tasks import tokens as tokens_module
from belt_tasks.errors import ConfigError
from belt_tasks.tokens import DocumentTokenizer, Tokens, load_tokenizer
from tests.conftest import ROBERTA_NAMES, SENTENCES, byte_level_tokenizer, save_tokenizer, unigram_tokenizer, words

EXPECTED_SPECIAL = {
    "bert": ((2,), (3,), 0),
    "distilbert": ((2,), (3,), 0),
    "roberta": ((0,), (2,), 1),
    "mpnet": ((0,), (2,), 1),
    "modernbert": ((2,), (3,), 0),
}
SMUGGLED = "a [SEP] b [CLS] <s> c </s> <mask>[MASK]<pad>[PAD] d"


@pytest.mark.parametrize("family", EXPECTED_SPECIAL)
def test_special_tokens_are_those_of_the_tokenizer_and_the_model(tiny_encoders, family):
    special = load_tokenizer(tiny_encoders(family)).special

    assert (special.prefix_ids, special.suffix_ids, special.pad_id) == EXPECTED_SPECIAL[family]


@pytest.mark.parametrize("family", EXPECTED_SPECIAL)
def test_tokens_and_characters_equal_those_of_transformers(tiny_encoders, family):
    texts = [*SENTENCES, "", "   ", "\x00 nul", "e\u0301 \u202ebidi\u202c 👩‍👩‍👧‍👦", words(300)]

    found = load_tokenizer(tiny_encoders(family)).tokenize(texts)

    expected = AutoTokenizer.from_pretrained(tiny_encoders(family))(
        texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    assert found.num_tokens_D.tolist() == [len(ids) for ids in expected["input_ids"]]
    assert found.input_ids_T.tolist() == [token for ids in expected["input_ids"] for token in ids]
    spans = list(zip(found.start_char_T.tolist(), found.stop_char_T.tolist(), strict=True))
    assert spans == [tuple(span) for offsets in expected["offset_mapping"] for span in offsets]
    assert found.input_ids_T.dtype == np.int32


@pytest.mark.parametrize("family", EXPECTED_SPECIAL)
def test_a_text_cannot_smuggle_in_special_tokens(tiny_encoders, family):
    tokenizer = load_tokenizer(tiny_encoders(family))

    found = tokenizer.tokenize([SMUGGLED])

    special = {*tokenizer.special.prefix_ids, *tokenizer.special.suffix_ids, tokenizer.special.pad_id}
    assert not special & set(found.input_ids_T.tolist())
    assert found.stop_char_T.max() == len(SMUGGLED)  # nothing of it was left out


def test_a_text_cannot_reach_special_pieces_of_a_unigram_vocabulary(tmp_path):
    save_tokenizer(tmp_path, unigram_tokenizer(), ROBERTA_NAMES)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    found = DocumentTokenizer.from_transformers(tokenizer, pad_id=1, source="unigram").tokenize([SMUGGLED])

    assert not {0, 1, 2, 4} & set(found.input_ids_T.tolist())


STRANGE = ["the fox \N{SNOWMAN}\N{SNOWMAN} x", "\u6f22\u5b57 fox", "", "fox"]


@pytest.mark.parametrize("family", EXPECTED_SPECIAL)
def test_unknown_tokens_are_those_that_transformers_has(tiny_encoders, family):
    reference = AutoTokenizer.from_pretrained(tiny_encoders(family))

    found = load_tokenizer(tiny_encoders(family)).tokenize(STRANGE)

    ids = [token for ids in reference(STRANGE, add_special_tokens=False)["input_ids"] for token in ids]
    assert found.num_unknown == ids.count(reference.unk_token_id)
    assert (found.num_unknown > 0) == (family in ("bert", "distilbert"))  # others spell every text in bytes
    assert Tokens.concatenate([found, found]).num_unknown == 2 * found.num_unknown


def test_a_tokenizer_without_an_unknown_token_counts_none():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(["<s>", "</s>"], ("<s>", "</s>")))

    found = DocumentTokenizer.from_transformers(tokenizer, pad_id=1, source="without").tokenize(STRANGE)

    assert found.num_unknown is None
    assert Tokens.concatenate([found, found]).num_unknown is None


def long_texts():
    """Runs of words, spaces, punctuation and letters without any space, joined in any order."""
    run = st.one_of(
        st.sampled_from(SENTENCES),
        st.sampled_from([" ", "  ", "\n\n\t ", "!", "!?...", "é", "e\u0301", "漢字", "😀", "x"]).flatmap(
            lambda part: st.integers(1, 60).map(lambda times: part * times)
        ),
        st.text(max_size=20),
    )
    return st.lists(run, max_size=25).map("".join).map(lambda text: text.encode("utf-8", "ignore").decode())


@pytest.fixture(scope="module")
def tokenizers(tiny_encoders, tmp_path_factory):
    """Tokenizers of each kind, among them those that put a space before a text."""
    made = {family: load_tokenizer(tiny_encoders(family)) for family in ("bert", "roberta", "modernbert")}
    folder = tmp_path_factory.mktemp("unigram")
    save_tokenizer(folder, unigram_tokenizer(), ROBERTA_NAMES)
    made["unigram"] = DocumentTokenizer.from_transformers(
        PreTrainedTokenizerFast.from_pretrained(folder), pad_id=1, source="unigram"
    )
    prefixed = byte_level_tokenizer(["<s>", "</s>"], ("<s>", "</s>"))
    prefixed.pre_tokenizer.add_prefix_space = True
    made["byte level with a prefix space"] = DocumentTokenizer.from_transformers(
        PreTrainedTokenizerFast(tokenizer_object=prefixed), pad_id=1, source="prefixed"
    )
    return made


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "unigram", "byte level with a prefix space"])
@settings(max_examples=150, deadline=None)
@given(text=long_texts())
def test_a_long_text_in_pieces_equals_the_whole(tokenizers, kind, text):
    whole = tokenizers[kind].tokenize([text])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "PIECE_CHARACTERS", 100)
        patch.setattr(tokens_module, "OVERLAP_CHARACTERS", 40)
        pieces = tokenizers[kind].tokenize([text])

    assert pieces.input_ids_T.tolist() == whole.input_ids_T.tolist()
    assert pieces.start_char_T.tolist() == whole.start_char_T.tolist()
    assert pieces.stop_char_T.tolist() == whole.stop_char_T.tolist()


def test_a_long_text_really_is_cut(tiny_encoder, monkeypatch):
    tokenizer = load_tokenizer(tiny_encoder)
    sizes = []
    encode = tokenizer._encode_piece
    monkeypatch.setattr(tokens_module, "PIECE_CHARACTERS", 500)
    monkeypatch.setattr(tokens_module, "OVERLAP_CHARACTERS", 100)
    monkeypatch.setattr(
        tokenizer, "_encode_piece", lambda text, start, stop: sizes.append(stop - start) or encode(text, start, stop)
    )

    tokenizer.tokenize([words(2000)])

    assert len(sizes) > 20
    assert max(sizes) == 500


@given(lengths=st.lists(st.integers(0, 40), max_size=30))
def test_calls_are_bounded_and_keep_the_order(lengths):
    texts = ["x" * length for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens_module, "CALL_CHARACTERS", 50)
        patch.setattr(tokens_module, "PIECE_CHARACTERS", 20)
        calls = [list(call) for call in tokens_module._calls(texts)]

    assert [text for call in calls for text in call] == texts
    assert all(call for call in calls)
    assert all(sum(map(len, call)) <= 50 for call in calls)
    assert all(len(call) == 1 for call in calls if max(map(len, call)) > 20)


def test_concatenated_buffers_equal_one_call(tiny_encoder):
    tokenizer = load_tokenizer(tiny_encoder)

    joined = Tokens.concatenate(
        [tokenizer.tokenize(SENTENCES[:2]), tokenizer.tokenize([]), tokenizer.tokenize(SENTENCES[2:])]
    )

    whole = tokenizer.tokenize(SENTENCES)
    assert joined.input_ids_T.tolist() == whole.input_ids_T.tolist()
    assert joined.offsets.tolist() == whole.offsets.tolist()


def test_no_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=f"cannot load a model from {tmp_path}"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_a_first_special_token_is_refused():
    bare = byte_level_tokenizer(["<s>"], ("<s>", "<s>"))
    bare.post_processor = None

    with pytest.raises(ConfigError, match="puts no special token before a text"):
        DocumentTokenizer.from_transformers(PreTrainedTokenizerFast(tokenizer_object=bare), pad_id=0, source="gpt")
