"""How fast conversations are prepared, beside `tokenizers.encode_batch` alone on the same text and cores.

    python benchmarks/prepare.py ROWS_FOLDER TOKENIZER OUT.json [--conversations 100000] [--rounds 5]

ROWS_FOLDER holds sharegpt_tools.json and alpaca.json; TOKENIZER is a tokenizer.json or a Tekken file. Conversations are
made of their rows by sampling and joining turns. Each measurement is a process of its own, so that peak memory is its
own, and the kinds take turns, so that a busy machine hits all alike. The time of imports and of reading the tokenizer
counts for none.
"""

import argparse
import json
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MAX_TOKENS = 8192
CHUNK_CHARACTERS = 4_000_000


def conversations(folder: Path, count: int, seed: int = 7) -> Any:
    """Rows in the ShareGPT form, of 1 to 12 exchanges, drawn from the published ones."""
    draw = random.Random(seed)
    exchanges: list[list[dict[str, str]]] = []
    for row in json.loads((folder / "sharegpt_tools.json").read_text()):
        turns = row["conversations"]
        exchanges += [turns[n : n + 2] for n in range(0, len(turns) - 1, 2)]
    for row in json.loads((folder / "alpaca.json").read_text()):
        user = f"{row['instruction']}\n{row['input']}".strip()
        exchanges.append([{"from": "human", "value": user}, {"from": "gpt", "value": row["output"]}])
    for number in range(count):
        drawn = [draw.choice(exchanges) for _ in range(min(12, 1 + int(draw.expovariate(0.25))))]
        head = [{"from": "system", "value": f"Conversation {number}."}] if number % 2 else []
        yield {"conversations": [*head, *(turn for exchange in drawn for turn in exchange)]}


def child(kind: str, rows: Path, tokenizer: Path, prepared_dir: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    from data import Tokenizer
    from data.gates import Rules
    from data.prepared import prepare
    from data.sources import SourceConfig

    ours = Tokenizer.from_file(tokenizer)
    if kind in ("prepare", "again"):
        source = {"made": SourceConfig(str(rows), form="sharegpt")}
        begin = time.perf_counter()
        prepared = prepare(source, Rules(MAX_TOKENS), prepared_dir=prepared_dir, tokenizer=ours, max_loss_share=0.5)
        seconds = time.perf_counter() - begin
        assert prepared.reused == (kind == "again")
        account = prepared.ledger.accounts["made"]
        found: dict[str, Any] = {"tokens": account.tokens["read"], "rows": account.rows["read"]}
    else:
        # The same vocabulary, merges and split of words, without the control tokens, for which all text is searched.
        from tokenizers import Tokenizer as Raw

        raw = Raw.from_str(json.dumps(ours._spec))
        encode = raw.encode_batch if kind == "encode_batch" else raw.encode_batch_fast
        seconds, tokens = 0.0, 0
        with rows.open(encoding="utf-8") as stream:
            contents = (turn["value"] for line in stream for turn in json.loads(line)["conversations"])
            while chunk := list(islice(contents, 8192)):
                begin = time.perf_counter()
                batch = encode(chunk, add_special_tokens=False)
                seconds += time.perf_counter() - begin
                tokens += sum(len(one) for one in batch)
        found = {"tokens": tokens}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return found | {"kind": kind, "seconds": seconds, "peak_gib": peak}


def main() -> None:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--conversations", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    line = parser.parse_args()
    if line.child:
        print(json.dumps(child(line.child[0], line.rows, line.tokenizer, Path(line.child[1]))))
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made.jsonl"
        with made.open("w", encoding="utf-8") as stream:
            for row in conversations(line.rows, line.conversations):
                stream.write(json.dumps(row) + "\n")
        size = made.stat().st_size
        for _ in range(line.rounds):
            folder = Path(scratch) / "prepared"
            shutil.rmtree(folder, ignore_errors=True)
            for kind in ("encode_batch", "prepare", "again", "encode_batch_fast"):
                command = [sys.executable, __file__, str(made), str(line.tokenizer), "-", "--child", kind, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{kind} failed:\n{done.stderr}")
                results.append(json.loads(done.stdout.splitlines()[-1]))
                print(f"  {results[-1]}", file=sys.stderr)
    by_kind = {kind: [r for r in results if r["kind"] == kind] for kind in dict.fromkeys(r["kind"] for r in results)}
    median = {kind: statistics.median(r["seconds"] for r in found) for kind, found in by_kind.items()}
    peak = {kind: max(r["peak_gib"] for r in found) for kind, found in by_kind.items()}
    ratios = {
        kind: statistics.median(
            raw["seconds"] / ours["seconds"] for raw, ours in zip(by_kind[kind], by_kind["prepare"], strict=True)
        )
        for kind in ("encode_batch", "encode_batch_fast")
    }
    record = {
        "conversations": line.conversations,
        "bytes": size,
        "tokens": by_kind["prepare"][0]["tokens"],
        "rounds": line.rounds,
        "median_seconds": median,
        "peak_gib": peak,
        "speed_of": ratios,
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("tokenizers", "numpy", "torch")},
        "raw": results,
    }
    line.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{line.conversations:,} conversations, {size / 1e6:,.0f} MB, {record['tokens']:,} tokens")
    for kind, seconds in median.items():
        print(f"  {kind:18} {seconds:8.2f} s   peak {peak[kind]:.2f} GiB")
    for kind, ratio in record["speed_of"].items():
        print(f"  prepare reaches {ratio:.2f} of the speed of {kind} (median of {line.rounds} rounds' ratios)")


if __name__ == "__main__":
    main()
