"""Any text comes back as it was, none becomes a control token, and files of each kind give the same ids."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Tokenizer
from data.tokenizer import train_tokenizer

NAMES = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "[INST]", "<SPECIAL_20>"]
any_text = st.lists(st.text() | st.sampled_from([*NAMES, " ", "\n", "\r\n", "Ġ", "’", "🤖"])).map("".join)


def spec_of(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    tokenizer.save(folder / "spec.json")
    value: dict[str, Any] = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    return value


def written(spec: object, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(spec), encoding="utf-8")
    return path


@given(any_text)
def test_any_text_comes_back_and_holds_no_control_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.control_ids.intersection(ids)
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


@settings(max_examples=50)
@given(any_text)
def test_any_text_comes_back_with_the_real_vocabulary(nemo: Tokenizer, text: str) -> None:
    ids = nemo.encode(text)
    assert nemo.decode(ids) == text
    assert not nemo.control_ids.intersection(ids)


@given(st.lists(any_text, max_size=5))
def test_a_batch_is_encoded_like_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_control_tokens_show_as_their_names(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.im_start_id, *tokenizer.encode("ü"), tokenizer.im_end_id, tokenizer.im_end_id]
    assert tokenizer.decode(ids) == "<|im_start|>ü<|im_end|><|im_end|>"


def test_half_a_character_shows_as_a_replacement(tokenizer: Tokenizer, byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.decode(byte_tokenizer.encode("🤖")[:2]) == "\ufffd"


@pytest.mark.parametrize("id_", [-1, 300, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, id_: int) -> None:
    with pytest.raises(ValueError, match=f"id {id_} is not in this tokenizer's vocabulary of 300"):
        tokenizer.decode([id_])


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_a_saved_tokenizer_is_read_back_equal(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert (again.bos_id, again.vocab_size, again.controls) == (0, 300, tokenizer.controls)
    assert not (tmp_path / "tokenizer_config.json").exists()


@pytest.mark.parametrize(("bos", "id_"), [(None, None), ("</s>", 1), ({"content": "<pad>"}, 2)])
def test_bos_is_what_the_configuration_beside_the_file_says(
    tokenizer: Tokenizer, tmp_path: Path, bos: object, id_: int | None
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
    configured = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert configured.bos_id == id_
    assert configured != tokenizer
    (tmp_path / "again").mkdir()
    configured.save(tmp_path / "again" / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path / "again" / "tokenizer.json") == configured


def test_the_library_reads_a_saved_file_with_control_tokens_and_bos(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Raw

    tokenizer.save(tmp_path / "tokenizer.json")
    raw = Raw.from_file(str(tmp_path / "tokenizer.json"))
    assert raw.encode("hi<|im_end|>").ids == [0, *tokenizer.encode("hi"), tokenizer.im_end_id]
    assert raw.get_vocab_size() == tokenizer.vocab_size


def test_the_layout_of_the_file_does_not_change_the_digest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = spec_of(tokenizer, tmp_path)
    spec["model"]["merges"] = [merge.split(" ") for merge in spec["model"]["merges"]]
    spec["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))
    assert Tokenizer.from_file(written(spec, tmp_path)).digest == tokenizer.digest


def test_a_control_token_is_no_word_even_where_whole_words_are_looked_up(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = spec_of(tokenizer, tmp_path)
    spec["model"]["ignore_merges"] = True
    spec["pre_tokenizer"]["pretokenizers"] = spec["pre_tokenizer"]["pretokenizers"][1:]  # no split: one word
    spec["model"]["vocab"] |= {"<|im_end|": 300, "<|im_end|>a": 301}
    spec["model"]["merges"] += [["<|im_end|", ">"], ["<|im_end|>", "a"]]
    changed = Tokenizer.from_file(written(spec, tmp_path))
    assert changed.decode(changed.encode("<|im_end|>")) == "<|im_end|>"
    assert changed.im_end_id not in changed.encode("<|im_end|>")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFKC"}}, "the tokenizer changes text"),
        ({"normalizer": {"type": "Lowercase"}}, "the tokenizer changes text"),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                }
            },
            "changes text",
        ),
        ({"pre_tokenizer": {"type": "Nonsense"}}, "not a usable tokenizer.json"),
        ({"model": {"type": "Unigram", "vocab": []}}, "no BPE model found"),
        (
            {"model": {"type": "BPE", "vocab": {"a": 5}, "merges": []}},
            "byte 0x00 (and 254 more) cannot be encoded",
        ),
    ],
)
def test_a_file_that_cannot_give_text_back_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = written(spec_of(tokenizer, tmp_path) | change, tmp_path)
    with pytest.raises(DataError) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"no such file"):
        Tokenizer.from_file(path)
    for content, reason in (
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "found a JSON list"),
        (b"{}", "no BPE model"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=reason):
            Tokenizer.from_file(path)


def renamed(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    spec["model"]["vocab"] = {names.get(token, token): id_ for token, id_ in spec["model"]["vocab"].items()}
    return spec


def test_slots_rename_reserved_ids_where_chatml_tokens_are_missing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = renamed(spec_of(tokenizer, tmp_path), {"<|im_start|>": "<r1>", "<|im_end|>": "<r2>"})
    path = written(spec, tmp_path)
    with pytest.raises(DataError, match=r"no control token <|im_start|>, and no slot was named.*<r1>=3, <r2>=4"):
        Tokenizer.from_file(path)
    with pytest.raises(DataError, match=r"slot 77 is no reserved control token"):
        Tokenizer.from_file(path, im_start_slot=77, im_end_slot=4)
    with pytest.raises(DataError, match=r"slot 3 is no reserved control token"):
        Tokenizer.from_file(path, im_start_slot=3, im_end_slot=3)
    assert Tokenizer.from_file(path, im_start_slot=3, im_end_slot=4) == tokenizer


def test_slots_that_contradict_the_file_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"already id 4; leave its slot unset instead of 2"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", im_end_slot=2)


def test_appended_tokens_get_the_next_free_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = renamed(spec_of(tokenizer, tmp_path), {"<|im_start|>": "<r1>", "<|im_end|>": "<r2>"})
    spec["added_tokens"].append({"id": 310, "content": "<far>"})
    path = written(spec, tmp_path)
    appended = Tokenizer.from_file(path, append=True)
    assert (appended.im_start_id, appended.im_end_id, appended.vocab_size) == (311, 312, 313)
    assert (appended.controls["<r1>"], appended.controls["<r2>"]) == (3, 4)
    assert appended.encode("hi<|im_end|>") == tokenizer.encode("hi<|im_end|>")
    assert appended.digest != Tokenizer.from_file(path, im_start_slot=3, im_end_slot=4).digest
    appended.save(tmp_path / "again.json")
    assert Tokenizer.from_file(tmp_path / "again.json") == appended


def test_a_token_that_is_there_is_not_appended(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spec = spec_of(tokenizer, tmp_path)
    assert Tokenizer.from_file(written(spec, tmp_path), append=True) == tokenizer
    one = Tokenizer.from_file(written(renamed(spec, {"<|im_end|>": "<r2>"}), tmp_path), append=True)
    assert (one.im_start_id, one.im_end_id, one.vocab_size) == (3, 300, 301)


@pytest.mark.parametrize("slots", [{"im_start_slot": 3, "im_end_slot": 4}, {"im_end_slot": 0}])
def test_slots_and_appended_tokens_exclude_each_other(
    tokenizer: Tokenizer, tmp_path: Path, slots: dict[str, int]
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"append is set, and so is im_start_slot .*either a new id or a reserved one"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", append=True, **slots)


def test_a_folder_is_read_like_the_file_in_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tekken.json").write_text("not read")
    assert Tokenizer.from_file(tmp_path) == tokenizer
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    assert Tokenizer.from_file(tmp_path).bos_id is None


def test_a_folder_with_a_tekken_file_alone_is_read(nemo: Tokenizer, tekken_file: Path, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").symlink_to(tekken_file)
    (tmp_path / "tokenizer.model").touch()
    assert Tokenizer.from_file(tmp_path) == nemo


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without tokenizer.json and tekken.json; expected one of them") as caught:
        Tokenizer.from_file(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(DataError, match=r"only a SentencePiece tokenizer.model, which is no byte-level BPE"):
        Tokenizer.from_file(tmp_path)


def test_training_gives_exactly_the_size_and_the_control_tokens_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 300
    assert list(tokenizer.controls.items()) == list(zip(NAMES[:5], range(5), strict=True))


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    texts = [f"{word} number {n}" for n in range(9) for word in ("alpha", "beta", "gamma", "delta", "epsilon")]
    assert train_tokenizer(texts, 280) == train_tokenizer(texts[::-1], 280)


def test_training_is_the_same_in_another_process(tokenizer: Tokenizer) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from conftest import TEXTS;"
        "from data.tokenizer import train_tokenizer; print(train_tokenizer(TEXTS, 300).digest)"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(Path(__file__).parent)]
        done = subprocess.run(
            command,
            env=environment,
            cwd=Path(__file__).parents[3],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == tokenizer.digest


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size is 260; expected at least 261"):
        train_tokenizer([], 260)
    with pytest.raises(DataError, match=r"vocab_size is 400, but the texts yield only 26[0-9] tokens; set it to 26"):
        train_tokenizer(["abab"], 400)


def test_tekken_names_and_slots_are_those_of_nemo(nemo: Tokenizer) -> None:
    assert nemo.vocab_size == 131072
    assert (nemo.bos_id, nemo.im_start_id, nemo.im_end_id) == (1, 14, 15)
    assert (nemo.controls["<pad>"], nemo.controls["<SPECIAL_999>"], len(nemo.controls)) == (10, 999, 1000)
    assert nemo.encode("assistant\n") == [1503, 19464, 1010]
    assert nemo.encode("hi") == [8101]


def test_tekken_is_converted_in_seconds(tekken_file: Path) -> None:
    start = time.process_time()
    Tokenizer.from_file(tekken_file)
    assert time.process_time() - start < 8  # about 2 where nothing else runs


def test_a_tekken_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written({"config": {}, "vocab": [], "special_tokens": []}, tmp_path)
    with pytest.raises(DataError, match=r"Tekken file with its own control tokens"):
        Tokenizer.from_file(path)
