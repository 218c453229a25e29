"""Answer prompts with a run's weights: `python -m magnum_train.chat weights=RUN prompt="…"`."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from data import Message, Tokenizer
from data.chatml import encode_prompt
from data.sources import locate
from magnum_train import checkpoint
from magnum_train.config import ChatConfig, from_yaml, verb
from magnum_train.errors import CheckpointError, ConfigError
from model import Transformer
from model.generate import generate


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
    file = locate(key, path).file
    if file is None or not file.is_file():
        raise ConfigError(key, f"no file {path}", 'a JSONL file of {"prompt": …}')
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"{file}: {error}", "a file in UTF-8") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            prompt = Prompt(row["prompt"], row.get("system"))
            prompt.messages()  # refuses what is no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}, line {number}", line[:80], '{"prompt": "…", "system": "…"}') from error
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(key, f"no prompt in {file}", 'lines of {"prompt": …}')
    return prompts[:limit]


def find_checkpoint(weights: str) -> tuple[Path, Path]:
    """The run's folder and the checkpoint that `weights` names, the newest unless `RUN@STEP` asks for another."""
    match = re.fullmatch(r"(.+?)(?:@(\d+))?", weights)
    assert match is not None
    run_dir = Path(match[1])
    if not (run_dir / "config.yaml").is_file():
        raise CheckpointError("weights", f"no run in {run_dir}", "the folder of a run", "Look under runs/.")
    there = checkpoint.steps(run_dir)
    step = int(match[2]) if match[2] else (there[-1] if there else None)
    if step is None or step not in there:
        listed = ", ".join(map(str, there)) or "none"
        raise CheckpointError("weights", f"no checkpoint of {weights}", f"one of the run's steps: {listed}")
    return run_dir, checkpoint.path_of(run_dir, step)


def load(weights: str) -> tuple[Transformer, Tokenizer]:
    """A run's model on one device, and its tokenizer.

    Args:
        weights: RUN or RUN@STEP.

    Raises:
        CheckpointError: If there is no such run or checkpoint.
    """
    run_dir, folder = find_checkpoint(weights)
    config = from_yaml(run_dir / "config.yaml")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = Transformer(config.model.transformer())
    model.to_empty(device="cpu")
    checkpoint.load_weights(folder, model)
    if device.type == "cuda":
        model.to(device, torch.bfloat16)
    return model.eval(), Tokenizer.from_file(str(run_dir / "tokenizer.json"))


def reply(
    model: Transformer,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 1,
) -> Iterator[int]:
    """The reply's token ids, one by one, up to and including <|im_end|> where the model says it."""
    return generate(
        model,
        encode_prompt(messages, tokenizer),
        max_new_tokens=max_new_tokens,
        stop_ids=(tokenizer.im_end_id,),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def reply_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """A reply's text without its end token; says so where the reply was cut short by its limit."""
    if ids and ids[-1] == tokenizer.im_end_id:
        return tokenizer.decode(ids[:-1])
    return tokenizer.decode(ids) + " […]"


def chat(config: ChatConfig) -> None:
    """Answer the prompts on standard output."""
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, config.max_prompts, "prompts")
    else:
        assert config.prompt is not None
        prompts = [Prompt(config.prompt, config.system)]
    model, tokenizer = load(config.weights)
    console = Console(highlight=False, soft_wrap=True)
    for prompt in prompts:
        ids = list(
            reply(
                model,
                tokenizer,
                prompt.messages(),
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                seed=config.seed,
            )
        )
        if prompt.system is not None:
            console.print(f"system     {prompt.system}", style="dim", markup=False)
        console.print(f"user       {prompt.text}", style="cyan", markup=False)
        console.print(f"assistant  {reply_text(tokenizer, ids)}\n", markup=False)


if __name__ == "__main__":
    verb(chat, ChatConfig, "chat")
