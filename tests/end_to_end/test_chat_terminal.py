"""Chat as a person and as a script start it, on random weights: a terminal, its keys, pipes, any text on the line."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data.conversation import parse
from data.tokenizer import train_tokenizer
from magnum_train import chat
from magnum_train.config import ChatConfig
from model import Transformer, TransformerConfig
from model.hf import save_hf
from model.transformer import init_weights

HOME = Path(__file__).parents[2]
CHAT = [sys.executable, "-m", "magnum_train.chat", "weights=my model"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with weights in it."""
    tokenizer = train_tokenizer(["a"], 261)
    config = TransformerConfig(
        dim=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=64, vocab_size=tokenizer.vocab_size
    )
    model = Transformer(config)
    init_weights(model, 0)
    with torch.no_grad():
        model.output.weight[tokenizer.stop_ids] = 0  # never the likeliest: a reply lasts until it is interrupted
    save_hf(model, tmp_path / "my model", fields={"max_position_embeddings": 4096})
    tokenizer.save(tmp_path / "my model" / "tokenizer.json")
    return tmp_path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(HOME), "PYTHONUTF8": "1", "TERM": "dumb"}


class Screen:
    """What a terminal shows, read as far as asked; and whether it was told to mark what is pasted."""

    def __init__(self, terminal: int) -> None:
        self.terminal, self.rest, self.marks_pastes = terminal, b"", False

    def until(self, sign: str, seconds: float = 40) -> str:
        """What comes, up to and with the sign; it waits for something also where that is empty."""
        end = time.monotonic() + seconds
        while not self.rest or (place := self.rest.find(sign.encode())) < 0:
            ready, _, _ = select.select([self.terminal], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {sign!r} in {self.rest!r}"
            self.rest += os.read(self.terminal, 4096)
            self.marks_pastes |= b"\x1b[?2004h" in self.rest
            self.rest = self.rest.replace(b"\x1b[?2004l\r", b"").replace(b"\x1b[?2004h", b"")
        place += len(sign.encode())
        seen, self.rest = self.rest[:place], self.rest[place:]
        return seen.decode(errors="replace")


@contextlib.contextmanager
def at_a_terminal(folder: Path, kind: str, *words: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The program at a terminal of a kind; the terminal's other end, and the process."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*CHAT, *words], cwd=folder, env=environment() | {"TERM": kind}, stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    try:
        yield master, process
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_lines_that_are_pasted_together_are_one_message(folder: Path) -> None:
    with at_a_terminal(folder, "xterm", "max_new_tokens=2") as (master, process):
        screen = Screen(master)
        screen.until("> ")
        assert screen.marks_pastes
        os.write(master, b"\x1b[200~Line one.\rLine two.\x1b[201~\r")
        screen.until("cut off at max_new_tokens=2")
        screen.until("> ")
        os.write(master, b"/save talk.jsonl\r")
        screen.until("saved: one line more")
        os.write(master, b"/quit\r")
        assert process.wait(timeout=20) == 0
    messages = parse(json.loads((folder / "talk.jsonl").read_text())).messages
    assert [m.content for m in messages if m.role == "user"] == ["Line one.\nLine two."]


def test_a_conversation_at_a_terminal(folder: Path) -> None:
    with at_a_terminal(folder, "dumb", "max_new_tokens=100000", "temperature=0.05") as (master, process):
        screen = Screen(master)
        assert "my model. A line is a message" in screen.until("> ")
        time.sleep(1)  # between the prompt and its waiting for a key Python's readline is deaf to a signal
        os.write(master, b"\x03")
        screen.until("[/quit or Ctrl-D leaves]\r\n> ")
        for message in ("Hé, 🤖", "/retry"):
            os.write(master, f"{message}\n".encode())
            screen.until(f"{message}\r\n")
            screen.until("")  # the reply has begun
            os.write(master, b"\x03")
            screen.until("[interrupted; what was said so far stands]\r\n> ")
        os.write(master, b"/save talk.jsonl\n")
        screen.until("[saved: one line more in talk.jsonl]\r\n> ")
        os.write(master, b"\x04")
        process.wait(timeout=20)
        assert process.returncode == 0
    messages = parse(json.loads((folder / "talk.jsonl").read_text())).messages
    assert [m.role for m in messages] == ["user", "assistant"]
    assert messages[0].content == "Hé, 🤖"
    assert messages[1].content


def script(folder: Path, *words: str | bytes, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """One call with standard input from a pipe."""
    return subprocess.run(
        [*CHAT, "max_new_tokens=5", *words], cwd=folder, env=environment(), input=stdin, capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["chat", "export"])
def test_ctrl_c_while_the_program_is_being_loaded_ends_it_without_a_traceback(verb: str, tmp_path: Path) -> None:
    """A torch that takes a minute to import stands in for the one that takes seconds."""
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    paths = os.pathsep.join([str(tmp_path), str(HOME)])
    process = subprocess.Popen(
        [sys.executable, "-m", f"magnum_train.{verb}"], env=environment() | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)
        assert (process.returncode, *said) == (-signal.SIGINT, "", "")
    finally:
        process.kill()


def test_a_conversation_keeps_its_checkpoint_from_being_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from within: when the reply is asked for, the weights are still held, and afterwards they are not."""
    held = contextlib.ExitStack()
    open_ = [True]
    held.callback(open_.clear)
    real, seen = chat.find, []
    monkeypatch.setattr(chat, "find", lambda *a: dataclasses.replace(real(*a), lock=held))
    monkeypatch.setattr(chat, "_alone", lambda *_: seen.extend(open_))
    chat.chat(ChatConfig(weights=str(folder / "my model"), prompt="Hello"))
    assert seen == [True]
    assert open_ == []


@pytest.mark.slow  # three starts of the program, since it is its line, its file and its pipe that are tested
def test_the_same_message_gets_the_same_reply_from_the_line_a_file_and_a_pipe(folder: Path) -> None:
    message = "It's 1=1 (really)! ${x}\n\\"
    (folder / "message").write_text(message + "\n")
    answers = [
        script(folder, f"prompt={message}"),
        script(folder, "prompt_file=message"),
        script(folder, stdin=message.encode()),
    ]
    assert [a.returncode for a in answers] == [0] * 3, answers[0].stderr
    assert len({a.stdout for a in answers}) == 1
    assert answers[0].stdout.endswith(b"\n")
    assert {a.stderr for a in answers} <= {b"", b"cut off at max_new_tokens=5\n"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), b"error: prompt: found nothing: standard input is empty"),
        ((b"prompt=\xff",), b"error: prompt: found bytes that are not UTF-8"),
    ],
)
def test_a_mistake_is_answered_in_one_message(folder: Path, words: tuple[bytes, ...], said: bytes) -> None:
    done = script(folder, *words)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(said)
    assert b"Traceback" not in done.stderr
