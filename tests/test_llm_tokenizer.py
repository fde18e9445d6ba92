"""Text to ids and back; no text becomes a token that is not text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import CheckpointError
from funasr_batch.text.byte_level import BYTE_OF, from_bytes, to_bytes
from funasr_batch.text.llm_tokenizer import LlmTokenizer, load_llm_tokenizer

SPECIALS = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302}
NOT_SPECIAL = {"<think>": 303, "</think>": 304}
MERGES = [["<", "|"], ["|", ">"], ["h", "i"], *[[from_bytes(c[:2]), from_bytes(c[2:])] for c in
          ("你".encode(), "好".encode())]]  # fmt: skip
MERGES += [[from_bytes(c[:1]), from_bytes(c[1:2])] for c in ("你".encode(), "好".encode())]


def tokenizer_spec() -> dict[str, Any]:
    """A small tokenizer.json of the kind that Qwen has."""
    vocab = dict(BYTE_OF)
    merges = sorted(MERGES, key=lambda pair: len("".join(pair)))
    for pair in merges:
        vocab.setdefault("".join(pair), len(vocab))
    added = [
        {"id": id_, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": name in SPECIALS}
        for name, id_ in (SPECIALS | NOT_SPECIAL).items()
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def write(folder: Path, spec: Any) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LlmTokenizer:
    return load_llm_tokenizer(write(tmp_path_factory.mktemp("small"), tokenizer_spec()))


@pytest.fixture(scope="module")
def qwen(shared_data: Path) -> LlmTokenizer:
    return load_llm_tokenizer(shared_data / "tokenizers" / "qwen3_0.6b" / "tokenizer.json")


def test_bytes_have_one_character_each() -> None:
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert from_bytes(b"a \n\xe4") == "aĠĊä"
    assert to_bytes(from_bytes(bytes(range(256)))) == bytes(range(256))
    assert to_bytes("中") == "中".encode()


class TestSmallTokenizer:
    def test_encodes_by_merges(self, small: LlmTokenizer) -> None:
        assert [small.token_bytes(token) for token in small.encode("hi你")] == [
            b"hi",
            "你".encode(),
        ]

    def test_names_of_tokens_in_text_are_text(self, small: LlmTokenizer) -> None:
        ids = small.encode("<|im_end|><think>")
        assert not {302, 303}.intersection(ids)
        assert small.decode(ids) == "<|im_end|><think>"

    def test_special_tokens_by_name(self, small: LlmTokenizer) -> None:
        assert [small.special(name) for name in SPECIALS | NOT_SPECIAL] == [300, 301, 302, 303, 304]

    def test_missing_token_is_named(self, small: LlmTokenizer) -> None:
        with pytest.raises(CheckpointError, match=r"<\|startofspeech\|>"):
            small.special("<|startofspeech|>")
        with pytest.raises(CheckpointError, match="hi"):
            small.special("hi")  # a piece of text is no special token

    def test_decode_leaves_out_special_tokens(self, small: LlmTokenizer) -> None:
        hi = small.encode("hi")
        assert small.decode([301, *hi, 302, 999, -1, *hi]) == "hihi"
        assert small.decode([303, *hi, 304]) == "<think>hi</think>"

    def test_half_a_character(self, small: LlmTokenizer) -> None:
        assert small.token_bytes(0xE4) == b"\xe4"
        assert small.decode([0xE4, 0xBD]) == "\ufffd"
        assert small.decode([0xE4, 0xBD, 0xA0]) == "你"

    def test_half_a_surrogate_pair(self, small: LlmTokenizer) -> None:
        assert small.decode(small.encode("a\ud83dz")) == "a?z"

    def test_vocab_size(self, small: LlmTokenizer) -> None:
        assert small.vocab_size == 305

    @given(st.text() | st.lists(st.sampled_from([*SPECIALS, *NOT_SPECIAL, "<|", "|>", " ", "hi"]))
           .map("".join))  # fmt: skip
    def test_every_text_comes_back_and_holds_no_special_token(
        self, small: LlmTokenizer, text: str
    ) -> None:
        ids = small.encode(text)
        assert max(ids, default=0) < 300
        assert small.decode(ids) == unicodedata.normalize("NFC", text)


class TestSpecialTokensInsideTheVocabulary:
    @pytest.fixture(params=["merges", "ignore_merges"])
    def tokenizer(self, request: pytest.FixtureRequest, tmp_path: Path) -> LlmTokenizer:
        """A vocabulary where the BPE itself could produce `<|im_end|>`."""
        spec = tokenizer_spec()
        spec["model"]["vocab"] |= SPECIALS
        if request.param == "ignore_merges":
            spec["model"]["ignore_merges"] = True
        else:
            spec["model"]["vocab"] |= {"<|im_end": 310}
            chain = ["<|", "i", "m", "_", "e", "n", "d"]
            for end in range(2, len(chain) + 1):
                spec["model"]["vocab"].setdefault("".join(chain[:end]), 310 + end)
                spec["model"]["merges"].append(["".join(chain[: end - 1]), chain[end - 1]])
            spec["model"]["merges"].append(["<|im_end", "|>"])
        spec["pre_tokenizer"]["use_regex"] = False
        return load_llm_tokenizer(write(tmp_path, spec))

    def test_text_does_not_reach_them(self, tokenizer: LlmTokenizer) -> None:
        assert tokenizer.special("<|im_end|>") == 302
        ids = tokenizer.encode("<|im_end|>")
        assert 302 not in ids
        assert tokenizer.decode(ids) == "<|im_end|>"


class TestDamagedFiles:
    def refused(self, folder: Path, spec: Any, match: str) -> None:
        path = write(folder, spec)
        with pytest.raises(CheckpointError, match=match) as caught:
            load_llm_tokenizer(path)
        assert str(path) in str(caught.value)
        assert caught.value.hint

    def test_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_llm_tokenizer(tmp_path / "tokenizer.json")

    def test_not_json(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        for content in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match="not JSON"):
                load_llm_tokenizer(path)

    def test_too_large(self, tmp_path: Path) -> None:
        path = tmp_path / "tokenizer.json"
        with path.open("wb") as file:
            file.truncate((64 << 20) + 1)
        with pytest.raises(CheckpointError, match="larger than"):
            load_llm_tokenizer(path)

    @pytest.mark.parametrize(
        "spec", [[], {}, {"model": []}, {"model": {"type": "Unigram", "vocab": {}}}]
    )
    def test_not_a_bpe(self, tmp_path: Path, spec: Any) -> None:
        self.refused(tmp_path, spec, "does not describe")

    @pytest.mark.parametrize("bad", ["x", -1, True, 1.5, 1 << 40, None, 0x41])
    def test_bad_ids_of_pieces(self, tmp_path: Path, bad: Any) -> None:
        spec = tokenizer_spec()
        spec["model"]["vocab"]["hi"] = bad  # 0x41 is taken
        self.refused(tmp_path, spec, "damaged")

    @pytest.mark.parametrize("bad", [{"id": -1}, {"id": "x"}, {"content": ""}, {"content": 3}])
    def test_bad_added_tokens(self, tmp_path: Path, bad: dict[str, Any]) -> None:
        spec = tokenizer_spec()
        spec["added_tokens"][0] |= bad
        self.refused(tmp_path, spec, "damaged")

    def test_special_token_with_the_id_of_text(self, tmp_path: Path) -> None:
        spec = tokenizer_spec()
        spec["added_tokens"][0]["id"] = 0x41
        self.refused(tmp_path, spec, "share the id 65")

    def test_special_token_with_two_ids(self, tmp_path: Path) -> None:
        spec = tokenizer_spec()
        spec["model"]["vocab"]["<|im_end|>"] = 290
        tokenizer = load_llm_tokenizer(write(tmp_path, spec))
        with pytest.raises(CheckpointError, match="no id of its own"):
            tokenizer.special("<|im_end|>")

    def test_byte_without_a_token(self, tmp_path: Path) -> None:
        spec = tokenizer_spec()
        del spec["model"]["vocab"]["Ġ"]
        self.refused(tmp_path, spec, "1 of 256 bytes")

    @pytest.mark.parametrize("merges", [[1], [["a"]], [["zz", "y"]], ["a  b c"]])
    def test_bad_merges(self, tmp_path: Path, merges: list[Any]) -> None:
        spec = tokenizer_spec()
        spec["model"]["merges"] = merges
        self.refused(tmp_path, spec, "is refused")
        spec["model"]["vocab"] |= SPECIALS
        self.refused(tmp_path, spec, "is refused")

    def test_tokenizer_that_changes_text(self, tmp_path: Path) -> None:
        spec = tokenizer_spec()
        spec["normalizer"] = {"type": "Lowercase"}
        self.refused(tmp_path, spec, "changes the text")


@pytest.fixture(scope="module")
def library(shared_data: Path) -> Any:
    from tokenizers import Tokenizer

    path = shared_data / "tokenizers" / "qwen3_0.6b" / "tokenizer.json"
    return Tokenizer.from_file(str(path))


class TestQwen:
    def test_tokens_of_the_prompt(self, qwen: LlmTokenizer) -> None:
        """The ids that the published config of Qwen3 names."""
        assert qwen.special("<|im_start|>") == 151644
        assert qwen.special("<|im_end|>") == 151645
        assert qwen.special("<|endoftext|>") == 151643
        assert qwen.vocab_size == 151669

    @pytest.mark.parametrize("name", ["<|startofspeech|>", "<|endofspeech|>"])
    def test_markers_of_the_template_are_no_tokens(self, qwen: LlmTokenizer, name: str) -> None:
        with pytest.raises(CheckpointError):
            qwen.special(name)
        assert len(qwen.encode(name)) > 1

    @given(st.text() | st.from_regex(r"(<\|im_(start|end)\|>|</?think>|[a-z你好 ]){0,6}"))
    def test_every_text_comes_back_and_holds_no_special_token(
        self, qwen: LlmTokenizer, text: str
    ) -> None:
        ids = qwen.encode(text)
        assert max(ids, default=0) < 151643
        assert qwen.decode(ids) == unicodedata.normalize("NFC", text)

    @given(st.lists(st.integers(0, 151_700), max_size=12))
    def test_decodes_like_the_library(
        self, qwen: LlmTokenizer, library: Any, ids: list[int]
    ) -> None:
        assert qwen.decode(ids) == library.decode(ids, skip_special_tokens=True)
