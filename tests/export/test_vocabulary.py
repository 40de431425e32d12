"""The tokenizers that are written, those that are refused, and what stands in the file for each."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastpref.errors import UserError
from fastpref.export.pieces import scores
from fastpref.export.vocabulary import read_vocabulary
from fastpref.export.words import word_rule
from tests.support.paths import QUICKSTART_MODEL
from tests.support.toy_tokenizers import trained_chatml, trained_gemma, trained_llama3

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 = _WORDS + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")


def written(tokenizer: Any, size: int | None = None, ends: tuple[int, ...] = ()) -> dict[str, Any]:
    return dict(read_vocabulary(tokenizer, size or len(tokenizer), ends).settings)


def sentencepiece(
    *, normalizer: Any = None, merges: list[tuple[str, str]] | None = None, words: Any = None
) -> PreTrainedTokenizerFast:
    """Make a tokenizer as transformers makes one of a SentencePiece model: every way to make a token is a merge."""
    pieces = ["▁t", "he", "▁the", "in", "▁▁", "▁▁▁▁"]
    letters = sorted({letter for word in pieces for letter in word})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pieces]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    if merges is None:
        merges = [
            (word[:at], word[at:]) for word in pieces for at in range(1, len(word))
            if word[:at] in vocabulary and word[at:] in vocabulary
        ]  # fmt: skip
    inner: Any = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizer or normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if words is not None:
        inner.pre_tokenizer = words
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


RULES: dict[str, Any] = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "smaug-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}
UNKNOWN: dict[str, Any] = {
    "a prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "other words": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3 + "|x"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "removed words": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "removed"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
    "digits together": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]),
    "whitespace": pre_tokenizers.Whitespace(),
}


def with_rule(rule: Any) -> Any:
    inner: Any = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    inner.pre_tokenizer = rule
    return json.loads(inner.to_str())


@pytest.mark.parametrize(("name", "rule"), RULES.items(), ids=RULES)
def test_a_rule_for_words_is_recognised(name: str, rule: Any):
    """The name is llama.cpp's for the same rule. Llama 3's differs by whether words that are tokens need no merges."""
    content = with_rule(rule)
    assert word_rule(content) == name
    content["model"]["ignore_merges"] = True
    if name == "smaug-bpe":
        assert word_rule(content) == "llama-bpe"
    else:
        with pytest.raises(UserError, match="its pre_tokenizer is none of those"):
            word_rule(content)


@pytest.mark.parametrize("rule", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_rule_is_refused(rule: Any):
    """A rule that differs from a known one in anything is not taken for it."""
    with pytest.raises(UserError, match="another rule would give other tokens"):
        word_rule(with_rule(rule))


@pytest.mark.parametrize(("make", "rule"), [(trained_chatml, "gpt-2"), (trained_llama3, "smaug-bpe")])
def test_bpe_is_written_with_types_merges_and_roles(make: Callable[[], Any], rule: str):
    """Special tokens are control tokens, embeddings without a token are unused, and the ends are EOS, EOT and EOM."""
    tokenizer = make()
    size, eos = len(tokenizer) + 3, tokenizer.eos_token_id
    settings = written(tokenizer, size, (eos, 5, 6, 7))
    added = tokenizer.get_added_vocab().values()
    assert (settings["tokenizer_model"], settings["tokenizer_pre"]) == ("gpt2", rule)
    assert all(settings["token_list"][at] == token for token, at in tokenizer.get_vocab().items())
    assert settings["token_list"][-3:] == [f"[PAD{at}]" for at in range(size - 3, size)]
    types = settings["token_types"]
    assert {at for at, kind in enumerate(types) if kind == TokenType.CONTROL} == set(added)
    assert {at for at, kind in enumerate(types) if kind == TokenType.UNUSED} == set(range(size - 3, size))
    assert settings["token_merges"] == [
        " ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    ]
    assert [settings[f"{name}_token_id"] for name in ("eos", "eot", "eom")] == [eos, 5, 6]
    assert settings["add_bos_token"] is (make is trained_llama3)
    assert settings["add_eos_token"] is False
    assert settings["chat_template"] == tokenizer.chat_template


def test_sentencepiece_is_written_with_scores():
    """Tokens that merges make first have the highest scores, single letters and bytes the lowest."""
    tokenizer = sentencepiece()
    settings = written(tokenizer)
    score = dict(zip(settings["token_list"], settings["token_scores"]))
    assert (settings["tokenizer_model"], settings["tokenizer_pre"]) == ("llama", "default")
    assert score["▁t"] > score["he"] > score["▁the"] > score["in"] > score["▁▁"] > score["▁▁▁▁"] > score["e"]
    types = dict(zip(settings["token_list"], settings["token_types"]))
    assert types["<0x0A>"] == TokenType.BYTE
    assert types["<unk>"] == TokenType.UNKNOWN
    assert types["</s>"] == TokenType.CONTROL
    assert settings["add_space_prefix"] is True
    assert settings["add_bos_token"] is True
    assert written(sentencepiece(normalizer=normalizers.Replace(" ", "▁")))["add_space_prefix"] is False


REFUSED: dict[str, Callable[[], Any]] = {
    "which no merge does": trained_gemma,
    "its normalizer has a step Lowercase": lambda: sentencepiece(normalizer=normalizers.Lowercase()),
    "does not write spaces as ▁": lambda: sentencepiece(normalizer=normalizers.Prepend("▁")),
}


@pytest.mark.parametrize(("message", "make"), REFUSED.items(), ids=REFUSED)
def test_a_vocabulary_whose_scores_would_say_something_else(message: str, make: Callable[[], Any]):
    """Where llama.cpp would join other tokens than the merges do, the vocabulary is refused."""
    with pytest.raises(UserError, match=message):
        written(make())


def test_merges_that_make_a_token_must_stand_together():
    """A score per token cannot say that another merge comes between two ways to make it."""
    vocabulary = {token: at for at, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("ab", "c"), ("b", "c"), ("a", "bc")]
    with pytest.raises(UserError, match="the merges that make 'abc' do not stand together"):
        scores(vocabulary, merges, set())
    assert scores(vocabulary, [*merges[:1], merges[2], merges[1], merges[3]], set()) == {"ab": 0, "bc": -1, "abc": -2}


def test_a_tokenizer_with_more_tokens_than_embeddings():
    """It is refused, with both numbers."""
    tokenizer = AutoTokenizer.from_pretrained(QUICKSTART_MODEL)
    with pytest.raises(UserError, match=f"has token {len(tokenizer) - 1} and the model only 900 embeddings"):
        written(tokenizer, 900)


def test_a_token_that_drops_spaces():
    """It is said if the chat template writes no spaces there, and refused if it does."""
    tokenizer: Any = trained_chatml()
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True, special=True)])
    assert "the tokenizer drops spaces beside <x>" in read_vocabulary(tokenizer, len(tokenizer), ()).notes[0]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' <x>' }}{% endfor %}"
    with pytest.raises(UserError, match="drops spaces beside <x> in what the chat template writes"):
        written(tokenizer)


def test_bos_is_added_only_if_the_chat_template_writes_it():
    """llama.cpp adds BOS to conversations too, so it must not if the chat template writes none."""
    tokenizer = trained_llama3()
    assert written(tokenizer)["add_bos_token"] is True
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), ())
    assert dict(vocabulary.settings)["add_bos_token"] is False
    assert any("no BOS is added" in note for note in vocabulary.notes)


def test_a_space_before_the_first_text_only():
    """It is never added if the chat template begins with a special token, and refused if there is no such template."""
    tokenizer = sentencepiece(
        normalizer=normalizers.Replace(" ", "▁"), words=pre_tokenizers.Metaspace("▁", "first", False)
    )
    with pytest.raises(UserError, match="puts a space before a text, but not after special tokens"):
        written(tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}"
    vocabulary = read_vocabulary(tokenizer, len(tokenizer), ())
    assert dict(vocabulary.settings)["add_space_prefix"] is False
    assert any("puts a space before a text" in note for note in vocabulary.notes)
