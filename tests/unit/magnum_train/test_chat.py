"""Conversations: what each command does to what was said, what a reply looks like while it comes, what scripts get."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Message, Tokenizer
from data.chatml import encode_prompt
from data.conversation import parse
from data.tokenizer import train_tokenizer
from magnum_train import chat
from magnum_train.chat import Dialogue, converse, pieces, read_text, reply_text
from magnum_train.config import ChatConfig
from magnum_train.errors import ConfigError
from model import Transformer
from model.transformer import init_weights
from models import TINY

BYTES = train_tokenizer(["a"], 261)  # no merges: a token for each byte
LETTERS = BYTES.encode("abcdefghijklmnopqrstuvwxyz .")


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A network that says letters and may stop: a reply is then encoded to the tokens that it was said in."""
    network = Transformer(replace(TINY, vocab_size=BYTES.vocab_size))
    init_weights(network, 0)
    never = torch.ones(BYTES.vocab_size, dtype=torch.bool)
    never[[*LETTERS, BYTES.im_end_id]] = False
    network.output.register_forward_hook(lambda _, inputs, logits: logits.masked_fill(never, -torch.inf))
    return network.eval()


class Terminal:
    """Lines to be read, an exception among them to be raised, and what was written."""

    def __init__(self, *lines: object) -> None:
        self.lines = list(lines)
        self.written = ""

    def read(self) -> str:
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)

    def write(self, text: str) -> None:
        self.written += text


CONFIG = ChatConfig(weights="w", max_new_tokens=8, temperature=1.0)


def dialogue(model: Transformer, *lines: str, config: ChatConfig = CONFIG) -> tuple[Dialogue, Terminal]:
    """A conversation after some lines."""
    terminal = Terminal()
    talk = Dialogue(model, BYTES, config, terminal.write)
    for line in lines:
        assert talk.line(line)
    return talk, terminal


def scripted(monkeypatch: pytest.MonkeyPatch, *events: object) -> None:
    """Let every reply be these: texts, ids, and exceptions to be raised."""

    def generate(*_: object, **__: object):
        for event in events:
            if isinstance(event, BaseException):
                raise event
            yield from BYTES.encode(event) if isinstance(event, str) else [event]

    monkeypatch.setattr(chat, "generate", generate)


def test_a_conversation_is_kept_and_shown(model: Transformer) -> None:
    talk, terminal = dialogue(model, "Hello", "And then?")
    assert [m.role for m in talk.history] == ["user", "assistant"] * 2
    assert [m.content for m in talk.history[::2]] == ["Hello", "And then?"]
    assert "".join(c for c in terminal.written if c != "\n").startswith(talk.history[1].content)
    assert "[cut off at max_new_tokens=8]" in terminal.written


def test_each_token_passes_through_the_network_once(model: Transformer) -> None:
    given: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: given.append(len(inputs[0])))
    talk, _ = dialogue(model, "Hello", "And then?", "/system Be short.", "/system", "Why?")
    assert sum(given) == len(talk.past.tokens)
    prompt = encode_prompt(talk.history[:-1], BYTES)
    assert talk.past.tokens[: len(prompt)] == prompt
    talk.line("/undo")
    read = list(talk.past.tokens)
    given.clear()
    talk.line("Where?")
    asked = encode_prompt(talk.history[:-1], BYTES)
    shared = next(i for i, (a, b) in enumerate(zip(asked, read, strict=False)) if a != b)
    assert given[0] == len(asked) - shared
    given.clear()
    talk.line("/retry")
    assert given[0] == 1
    handle.remove()


def test_a_reply_with_a_past_is_the_reply_without_one(model: Transformer) -> None:
    talk, _ = dialogue(model, "Hello", "And then?", "/retry", "/undo", "Why?", "/system S", "Where?")
    ids = list(chat.reply(model, BYTES, talk.messages(talk.history[:-1]), max_new_tokens=8, temperature=1.0, seed=2))
    assert "".join(pieces(BYTES, ids)) == talk.history[-1].content


def test_system_sets_replaces_and_clears(model: Transformer) -> None:
    talk, terminal = dialogue(model, "/system Be brief.", "Hello", "/system Be long.")
    assert talk.messages(talk.history)[0] == Message("system", "Be long.")
    assert len(talk.history) == 2
    talk.line("/system")
    assert talk.messages(talk.history) == talk.history
    assert terminal.written.count("[system message set]") == 2
    assert terminal.written.endswith("[no system message]\n")


def test_retry_answers_again_with_another_seed(model: Transformer) -> None:
    talk, _ = dialogue(model, "Hello")
    first = talk.history
    talk.line("/retry")
    assert talk.seed == CONFIG.seed + 1
    assert talk.history[0] == first[0]
    assert len(talk.history) == 2
    assert talk.history[1] != first[1]


def test_retry_without_temperature_says_that_nothing_changes(model: Transformer) -> None:
    talk, terminal = dialogue(model, "Hello", config=replace(CONFIG, temperature=0.0))
    first = talk.history
    talk.line("/retry")
    assert talk.history == first
    assert "temperature is 0, so the reply will be the same" in terminal.written


def test_undo_takes_back_an_exchange_at_a_time(model: Transformer) -> None:
    talk, terminal = dialogue(model, "Hello", "And then?")
    talk.line("/undo")
    assert [m.content for m in talk.history[::2]] == ["Hello"]
    talk.line("/undo")
    assert talk.history == []
    for empty in ("/undo", "/retry"):
        talk.line(empty)
    assert terminal.written.endswith("[nothing to take back]\n[nothing to answer yet]\n")


def test_reset_forgets_all_but_the_system_message(model: Transformer) -> None:
    talk, _ = dialogue(model, "/system S", "Hello", "/reset")
    assert (talk.history, talk.system, talk.past.tokens) == ([], "S", [])


def test_saved_lines_are_rows_that_training_reads(model: Transformer, tmp_path: Path) -> None:
    file = tmp_path / "my talks.jsonl"
    talk, _ = dialogue(model, "/system S ✓", "Hello\u2028you", f"/save {file}", "More", f"/save {file}")
    rows = [parse(json.loads(line)) for line in file.read_text().split("\n") if line]
    assert list(rows[1].messages) == talk.messages(talk.history)
    assert rows[0].messages == rows[1].messages[:3]


def test_saving_mends_a_last_line_without_its_end(model: Transformer, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": []}')
    dialogue(model, "Hello", f"/save {file}")
    assert [list(json.loads(line)) for line in file.read_text().splitlines()] == [["messages"]] * 2


def test_what_cannot_be_saved_is_said(model: Transformer, tmp_path: Path) -> None:
    _, terminal = dialogue(model, f"/save {tmp_path}/x", "Hello", "/save", f"/save {tmp_path}")
    assert "[nothing to save yet]" in terminal.written
    assert "[found no file; expected /save FILE]" in terminal.written
    assert f"[not saved: [Errno 21] Is a directory: '{tmp_path}']" in terminal.written
    assert list(tmp_path.iterdir()) == []


def test_other_words_after_a_slash_are_answered_with_the_commands(model: Transformer) -> None:
    talk, terminal = dialogue(model, "/sytem x", "/", "")
    assert talk.history == []
    assert terminal.written.count("no command") == 2
    assert all(name in terminal.written for name in chat.COMMANDS)
    talk.line("//etc/hosts, what is it?")
    assert talk.history[0].content == "/etc/hosts, what is it?"


def test_help_names_every_command_and_every_command_is_there(model: Transformer) -> None:
    talk, terminal = dialogue(model, "/help")
    assert len(terminal.written.splitlines()) == len(chat.COMMANDS)
    for name in chat.COMMANDS:
        assert talk.line(name) == (name != "/quit")


def test_a_conversation_ends_with_quit_or_the_end_of_input(model: Transformer) -> None:
    for lines in (["Hello", "/quit", "never read"], ["Hello"]):
        terminal = Terminal(*lines)
        converse(model, BYTES, CONFIG, terminal.read, terminal.write)
        assert terminal.lines == (["never read"] if len(lines) > 1 else [])


def test_an_interrupt_at_the_prompt_says_how_to_leave(model: Transformer) -> None:
    terminal = Terminal(KeyboardInterrupt(), "/help")
    converse(model, BYTES, CONFIG, terminal.read, terminal.write)
    assert terminal.written.startswith("\n[/quit or Ctrl-D leaves]\n/system")


def test_an_interrupted_reply_keeps_what_was_shown(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    half = BYTES.encode("é")[0]
    scripted(monkeypatch, "Once upon", half, KeyboardInterrupt())
    talk, terminal = dialogue(model, "A story")
    assert talk.history == [Message("user", "A story"), Message("assistant", "Once upon")]
    assert terminal.written == "Once upon\n[interrupted; what was said so far stands]\n"


def test_an_interrupt_before_the_first_word_changes_nothing(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, terminal = dialogue(model, "Hello")
    before = talk.history
    scripted(monkeypatch, KeyboardInterrupt())
    talk.line("More")
    talk.line("/retry")
    assert talk.history == before
    assert terminal.written.count("your message is taken back") == 2


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, "Some words", RuntimeError("out of memory"))
    terminal = Terminal("Hello", "\udcff", "/save x")
    converse(model, BYTES, CONFIG, terminal.read, terminal.write)
    assert "[no reply, and nothing changed: out of memory]" in terminal.written
    assert "half of a surrogate pair" in terminal.written
    assert "[nothing to save yet]" in terminal.written


def test_an_empty_reply_is_remarked(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, BYTES.im_end_id)
    talk, terminal = dialogue(model, "Hello")
    assert talk.history[-1] == Message("assistant", "")
    assert terminal.written == "\n[an empty reply]\n"


def test_a_character_goes_out_when_it_is_whole() -> None:
    ids = [*BYTES.encode("a🤖é漢"), BYTES.im_end_id, 99]
    assert list(pieces(BYTES, ids)) == ["a", "🤖", "é", "漢"]
    assert list(pieces(BYTES, ids[:3])) == ["a", "\ufffd"]


def test_control_tokens_show_by_name() -> None:
    ids = [*BYTES.encode("a🤖")[:-1], BYTES.im_start_id, *BYTES.encode("b")]
    assert "".join(pieces(BYTES, ids)) == "a\ufffd<|im_start|>b"


WORDS = train_tokenizer(["the 🤖 then 🤗 é the théâtre"] * 9, 279)


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
@settings(max_examples=200, deadline=None)
@given(places=st.lists(st.integers(0, 10_000), max_size=12), text=st.text(max_size=6))
def test_the_pieces_together_are_the_text(tokenizer: Tokenizer, places: list[int], text: str) -> None:
    known = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.stop_ids]
    for ids in ([known[place % len(known)] for place in places], tokenizer.encode(text)):
        assert "".join(pieces(tokenizer, [*ids, tokenizer.im_end_id])) == tokenizer.decode(ids)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
        assert reply_text(tokenizer, [*ids, tokenizer.im_end_id]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"Hello\n", "Hello"), (b"\xef\xbb\xbfHi", "Hi"), (b" a\r\nb \r\n", " a\r\nb "), ("ü\n\n".encode(), "ü\n")],
)
def test_a_message_is_read_without_its_last_newline(
    content: bytes, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").write_bytes(content)
    assert read_text(str(tmp_path / "m")) == text
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_text("-") == text


@pytest.mark.parametrize(("content", "said"), [(b"\xff", "UTF-8"), (b"\n", "is empty"), (None, "No such file")])
def test_a_message_that_cannot_be_read_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigError, match=f"m.* {said}" if said != "UTF-8" else said):
        read_text(str(tmp_path / "m"))


@pytest.fixture
def loaded(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in memory instead of in a folder."""
    monkeypatch.setattr(chat, "find", lambda *_: contextlib.nullcontext(SimpleNamespace(max_positions=100)))
    monkeypatch.setattr(chat, "load_model", lambda *_, **__: (model, BYTES))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("way", ["prompt", "file", "standard input"])
def test_a_script_gets_the_reply_and_nothing_else(
    way: str,
    model: Transformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "m").write_text("Hello\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n" if way == "standard input" else b"")))
    given = {"prompt": {"prompt": "Hello"}, "file": {"prompt_file": str(tmp_path / "m")}}.get(way, {})
    chat.chat(replace(CONFIG, system="S", **given))
    messages = [Message("system", "S"), Message("user", "Hello")]
    ids = list(chat.reply(model, BYTES, messages, max_new_tokens=8, temperature=1.0))
    out, err = capsys.readouterr()
    assert out == "".join(pieces(BYTES, ids)) + "\n"
    assert err == ("" if ids[-1] in BYTES.stop_ids else "cut off at max_new_tokens=8\n")


@pytest.mark.usefixtures("loaded")
def test_prompts_of_a_file_are_answered_with_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "Who?", "system": "S"}\n\n{"prompt": "Where?\u2028Here?"}\n')
    chat.chat(replace(CONFIG, prompts=str(tmp_path / "p.jsonl")))
    labels = [line.split()[0] for line in capsys.readouterr().out.split("\n") if line]
    assert labels == ["system", "user", "assistant", "user", "assistant"]


@pytest.mark.usefixtures("loaded")
def test_a_conversation_longer_than_the_model_is_good_for_is_remarked_on(capsys: pytest.CaptureFixture[str]) -> None:
    chat.chat(replace(CONFIG, prompt="x" * 120))
    assert "these weights are known for 100" in capsys.readouterr().err


@pytest.mark.parametrize("row", ['{"prompt": "x", "sytem": "y"}', '{"prompt": 1}', '["x"]', "{"])
def test_a_row_of_prompts_that_is_not_of_the_form_is_refused_with_its_line(row: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n' + row + "\n")
    with pytest.raises(ConfigError, match=r"p\.jsonl, line 2"):
        chat.read_prompts(str(tmp_path / "p.jsonl"), None, "prompts")


def test_a_model_cannot_command_the_terminal() -> None:
    assert "a\x1b[2J\x07\x9b\x7f\tb\n".translate(chat._PICTURES) == "a␛[2J␇\ufffd␡\tb\n"
