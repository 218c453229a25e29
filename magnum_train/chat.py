"""Talk with trained weights: `python -m magnum_train.chat weights=RUN`, or `… prompt=TEXT` for one reply.

Owns the conversation at the terminal, its commands, and how a reply's ids become text while they come.
"""

import contextlib
import difflib
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports below take seconds; Ctrl-C in them is no error to trace

from rich.console import Console

from data import DataError, Message, Tokenizer
from data.chatml import encode_prompt
from data.sources import locate
from magnum_train.config import ChatConfig, verb
from magnum_train.errors import ConfigError
from magnum_train.weights import find, load_model
from model import Transformer
from model.generate import Past, generate

COMMANDS = {
    "/system": "TEXT  set the system message, what was said stays; without TEXT there is none",
    "/retry": "answer the last message again, with the next seed",
    "/undo": "take back the last message and its reply",
    "/reset": "forget what was said; the system message stays",
    "/save": "FILE  append the conversation to FILE as one line of JSONL, which can be trained on",
    "/help": "show these lines",
    "/quit": "leave, as does Ctrl-D; Ctrl-C stops a reply",
}
"""What a line may begin with, and what it does. Any other line is a message; one that begins with // is sent with /."""

_PICTURES = {n: chr(0x2400 + n) for n in range(0x20) if chr(n) not in "\t\n"}
_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
"""Visible signs for control characters: a model may write any text, and is not to command the terminal."""


@dataclass(frozen=True)
class Prompt:
    """What is asked: a user's message, and a system message or none."""

    text: str
    system: str | None = None

    def messages(self) -> tuple[Message, ...]:
        """As the conversation so far."""
        head = () if self.system is None else (Message("system", self.system),)
        return (*head, Message("user", self.text))


def read_prompts(path: str, limit: int | None, key: str) -> list[Prompt]:
    """Read prompts from JSONL of {"prompt": …, "system": …}.

    Args:
        path: A file, or `shipped:NAME`.
        limit: Most prompts to read; None reads all.
        key: The setting that named the file, for messages.

    Raises:
        ConfigError: If the file is missing or a line is not of this form; names file and line.
    """
    try:
        file = locate(key, path).file
    except DataError:
        file = None
    if file is None or not file.is_file():
        raise ConfigError(key, f"no file {path}", 'a JSONL file of {"prompt": …}')
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # splitlines would cut a text at U+2028 too
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"{file}: {error}", "a file in UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            for name in row.keys() - {"prompt", "system"}:  # others are their writer's own, a typo is a lost message
                if meant := difflib.get_close_matches(name, ("prompt", "system")):
                    raise ConfigError(f"{file}, line {number}", f"a field {name!r}", f"{meant[0]!r}")
            prompt = Prompt(row["prompt"], row.get("system"))
            prompt.messages()  # refuses what is no text
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}, line {number}", line[:80], '{"prompt": "…", "system": "…"}') from error
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(key, f"no prompt in {file}", 'lines of {"prompt": …}')
    return prompts[:limit]


def read_text(path: str) -> str:
    """A user message from a file, or from standard input where the path is -; without a newline at its end.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or is empty.
    """
    place = "standard input" if path == "-" else path
    try:
        if path != "-":
            content = Path(path).expanduser().read_bytes()
        else:
            content = sys.stdin.buffer.read() if sys.stdin is not None else b""
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError("prompt_file", f"{place}: {error}", "text in UTF-8") from error
    except OSError as error:
        raise ConfigError("prompt_file", f"{place}: {error.strerror}", "a file with a message, or -") from error
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise ConfigError("prompt", f"nothing: {place} is empty", "a message", "Give prompt=TEXT or prompt_file=FILE.")
    return text


def reply(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 1,
    past: Past | None = None,
) -> Iterator[int]:
    """The reply's token ids, one by one, up to and including a stop token where the model says one."""
    return generate(
        model,
        encode_prompt(messages, tokenizer),
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        vocab_size=tokenizer.vocab_size,
        seed=seed,
        past=past,
    )


def _reply(
    model: Transformer, tokenizer: Tokenizer, config: ChatConfig, messages: Sequence[Message], past: Past | None = None
) -> Iterator[int]:
    """`reply` as the settings ask for it."""
    return reply(
        model, tokenizer, messages,
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
        repetition_penalty=config.repetition_penalty, seed=config.seed, past=past,
    )  # fmt: skip


def reply_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A reply's text without its stop token; says so where the reply was cut short by its limit."""
    if ids and ids[-1] in tokenizer.stop_ids:
        return tokenizer.decode(ids[:-1])
    return tokenizer.decode(ids) + " […]"


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """A reply's text while its ids come; a character goes out when it is whole.

    Together the pieces are `tokenizer.decode` of all ids before the stop token, control tokens by name.
    """
    waiting: list[int] = []
    for token in ids:
        if token in tokenizer.stop_ids:
            break
        waiting.append(token)
        text = tokenizer.decode(waiting)
        # Bytes that are no whole character show as U+FFFD. At the end they may be the beginning of one.
        if text and not text.endswith("\ufffd"):
            yield text
            waiting = []
    if waiting:
        yield tokenizer.decode(waiting)


class Dialogue:
    """A conversation with a model: what was said, and what the network has read of it.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        settings: How replies are drawn; `system` and `seed` are where it begins.
        write: Takes text for the terminal as it comes; remarks, which are not part of a reply, in brackets.
        context: Tokens that the model is known for; a longer conversation is remarked on.

    Attributes:
        system: The system message, or None.
        history: User and assistant in turn, ending in the assistant.
        seed: Of the next reply.
        past: What the network has read. Each turn is encoded anew, and what agrees is not read again. A reply may
            be spelt by other tokens than its text is encoded to, and then is read again from there: as it will
            stand in training data.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        settings: ChatConfig,
        write: Callable[[str], None],
        context: int | None = None,
    ) -> None:
        self._model, self._tokenizer, self._settings, self._write = model, tokenizer, settings, write
        self._context = context
        self.system = settings.system
        self.history: list[Message] = []
        self.seed = settings.seed
        self.past = Past(model)

    def messages(self, turns: Sequence[Message]) -> list[Message]:
        """Turns as the model sees them, after the system message."""
        return [*([] if self.system is None else [Message("system", self.system)]), *turns]

    def line(self, line: str) -> bool:
        """Do what a line says; false where it ends the conversation."""
        word, _, rest = line.partition(" ")
        if line.startswith("//"):
            self.say(line[1:])
        elif not line.startswith("/"):
            if line.strip():
                self.say(line)
        elif word == "/quit":
            return False
        elif word in COMMANDS:
            getattr(self, f"_{word[1:]}")(rest)
        else:
            self._remark(f"no command {word}; there are {', '.join(COMMANDS)}. To send a text with /, begin with //")
        return True

    def say(self, text: str) -> None:
        """Send a user message and show the reply."""
        self._answer([*self.history, Message("user", text)])

    def _answer(self, asked: list[Message]) -> None:
        """Show the reply to turns that end in the user's; they and what was shown become the history.

        Where there is no reply at all, the history stays as it was.
        """
        ids: list[int] = []
        shown: list[str] = []
        interrupted = False
        settings = replace(self._settings, seed=self.seed)
        stream = _reply(self._model, self._tokenizer, settings, self.messages(asked), self.past)
        try:
            for piece in pieces(self._tokenizer, _noted(stream, ids)):
                shown.append(piece)
                self._write(piece)
        except KeyboardInterrupt:
            interrupted = True
        self._write("\n")
        if interrupted and not shown:
            self._remark("interrupted before the first word; your message is taken back")
            return
        self.history = [*asked, Message("assistant", "".join(shown))]
        if interrupted:
            self._remark("interrupted; what was said so far stands")
        elif ids[-1] not in self._tokenizer.stop_ids:
            self._remark(f"cut off at max_new_tokens={settings.max_new_tokens}")
        elif not shown:
            self._remark("an empty reply")
        if self._context is not None and len(self.past.tokens) > self._context:
            self._remark(_beyond(len(self.past.tokens), self._context))

    def _remark(self, text: str) -> None:
        self._write(f"[{text}]\n")

    def _asked(self) -> list[Message]:
        """The turns up to the last user message; empty where there is none."""
        last = max((i for i, message in enumerate(self.history) if message.role == "user"), default=-1)
        return self.history[: last + 1]

    def _system(self, text: str) -> None:
        text = text.strip()
        if text:
            Message("system", text)  # refuses what is no text
        self.system = text or None
        self._remark("system message set" if text else "no system message")

    def _retry(self, _: str) -> None:
        asked = self._asked()
        if not asked:
            self._remark("nothing to answer yet")
            return
        if self._settings.temperature == 0:
            self._remark("temperature is 0, so the reply will be the same")
        self.seed += 1
        self._answer(asked)

    def _undo(self, _: str) -> None:
        asked = self._asked()
        self._remark(f"taken back: {asked[-1].content[:60]}" if asked else "nothing to take back")
        self.history = asked[:-1]

    def _reset(self, _: str) -> None:
        self.history, self.past = [], Past(self._model)  # a new past, since the old one holds its memory
        self._remark("all forgotten" + ("" if self.system is None else "; the system message stays"))

    def _save(self, name: str) -> None:
        """Append, since a file of conversations is what training reads, and nothing there is lost."""
        name = name.strip()
        if not name or not self.history:
            self._remark("nothing to save yet" if name else "found no file; expected /save FILE")
            return
        row = {"messages": [{"role": m.role, "content": m.content} for m in self.messages(self.history)]}
        try:
            with Path(name).expanduser().open("a+b") as file:
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.write(b"\n")
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except (OSError, ValueError) as error:
            self._remark(f"not saved: {error}")
            return
        self._remark(f"saved: one line more in {name}")

    def _help(self, _: str) -> None:
        for name, meaning in COMMANDS.items():
            self._write(f"{name:8} {meaning}\n")


def _noted(stream: Iterable[int], ids: list[int]) -> Iterator[int]:
    """The same ids, each noted before it is handed on."""
    for token in stream:
        ids.append(token)
        yield token


def converse(
    model: Transformer,
    tokenizer: Tokenizer,
    settings: ChatConfig,
    read: Callable[[], str],
    write: Callable[[str], None],
    context: int | None = None,
) -> None:
    """Hold a conversation until it is left.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        settings: How replies are drawn.
        read: Gives the next line without its newline; EOFError ends the conversation, KeyboardInterrupt does not.
        write: Takes text as it comes.
        context: Tokens that the model is known for; a longer conversation is remarked on.
    """
    dialogue = Dialogue(model, tokenizer, settings, write, context)
    while True:
        try:
            if not dialogue.line(read()):
                return
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n[/quit or Ctrl-D leaves]\n")
        except (ValueError, RuntimeError, MemoryError) as error:  # no text, no memory: the next line may do
            write(f"\n[no reply, and nothing changed: {error}]\n")


def chat(config: ChatConfig) -> None:
    """Answer one message, several, or a person at the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not in UTF-8 shows ? for what it lacks
    prompts: list[Prompt] = []
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, config.max_prompts, "prompts")
    elif config.prompt is not None:
        if not config.prompt:
            raise ConfigError("prompt", "nothing", "a message", "Leave it out for a conversation.")
        prompts = [Prompt(config.prompt, config.system)]
    elif config.prompt_file is not None or sys.stdin is None or not sys.stdin.isatty():
        prompts = [Prompt(read_text(config.prompt_file or "-"), config.system)]
    with find(config.weights, "weights") as found:  # to the end: what one talks with can still be exported then
        model, tokenizer = load_model(found, config.tokenizer, dtype=config.dtype)
        try:
            if config.prompts is not None:
                _labelled(model, tokenizer, config, prompts)
            elif prompts:
                _alone(model, tokenizer, config, prompts[0], found.max_positions)
            else:
                _at_the_terminal(model, tokenizer, config, found.max_positions)
        except BrokenPipeError:  # `… | head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None  # as a shell counts SIGPIPE
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left over is not tried again
            raise ConfigError("standard output", str(error.strerror), "room for the reply") from error


def _labelled(model: Transformer, tokenizer: Tokenizer, config: ChatConfig, prompts: Sequence[Prompt]) -> None:
    """Each prompt with its reply, for people."""
    console = Console(highlight=False, soft_wrap=True)
    for prompt in prompts:
        text = reply_text(tokenizer, list(_reply(model, tokenizer, config, prompt.messages())))
        if prompt.system is not None:
            console.print(f"system     {prompt.system.translate(_PICTURES)}", style="dim", markup=False)
        console.print(f"user       {prompt.text.translate(_PICTURES)}", style="cyan", markup=False)
        console.print(f"assistant  {text.translate(_PICTURES)}\n", markup=False)


def _alone(model: Transformer, tokenizer: Tokenizer, config: ChatConfig, prompt: Prompt, context: int) -> None:
    """The reply's text on standard output and nothing else, for scripts; as it is, unless a terminal shows it."""
    ids: list[int] = []
    past, pictures = Past(model), _PICTURES if sys.stdout.isatty() else {}
    for piece in pieces(tokenizer, _noted(_reply(model, tokenizer, config, prompt.messages(), past), ids)):
        _show(piece.translate(pictures))
    _show("\n")
    if ids[-1] not in tokenizer.stop_ids:
        print(f"cut off at max_new_tokens={config.max_new_tokens}", file=sys.stderr)
    if len(past.tokens) > context:
        print(_beyond(len(past.tokens), context), file=sys.stderr)


def _beyond(tokens: int, context: int) -> str:
    """What to say of a conversation that is longer than its model is good for."""
    return f"{tokens:,} tokens with the reply; these weights are known for {context:,}, and may ramble beyond"


def _at_the_terminal(model: Transformer, tokenizer: Tokenizer, config: ChatConfig, context: int) -> None:
    """A conversation with whoever sits there."""
    with contextlib.suppress(ImportError):  # some platforms lack it
        readline = importlib.import_module("readline")  # gives input() its editing and its history
        readline.parse_and_bind("set enable-bracketed-paste on")  # so that pasted lines are one message
    _show(f"{config.weights}. A line is a message; /help lists the commands, Ctrl-D leaves.\n")
    write = lambda text: _show(text.translate(_PICTURES))  # noqa: E731
    converse(model, tokenizer, config, lambda: input("> "), write, context)


def _show(text: str) -> None:
    print(text, end="", flush=True)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    verb(chat, ChatConfig, "chat")
