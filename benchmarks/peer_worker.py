"""One contestant of `peers.py` in a process of its own: it loads the weights, and takes a step when it is told to.

    PYTHON peer_worker.py CONTESTANT FOLDER THREADS

FOLDER holds the checkpoint (Hugging Face's layout) and `packs.json`. Requests come as one JSON object a line on
standard input, and each is answered by one on standard output: a loss of named packs, or a step, which is timed,
profiled, or looked at for the memory that it takes. The first line says what runs.

Knows one entry for each contestant, and imports what is the contestant's alone: the file runs in the environments of
the peers, where this project's dependencies are not installed.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

LR, BETAS, EPS, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 1.0
"""Of AdamW without decay, the same for all, and the norm to which gradients are clipped."""

IGNORED = -100
"""Label of a token without loss, where the peers put it: at the token itself."""

SLOTS = 128
"""Documents that our packs have room for, as `data.pack_documents` has it."""

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""Of parameters, gradients and moments, the same for all."""

Document = dict[str, Any]
"""`tokens`, and the first of them that bears a loss, `first`."""
Pack = list[Document]
Packs = list[Pack]
"""Those of one step."""


class Desk:
    """Where requests come in and answers go out.

    Args:
        folder: Holds `packs.json`.
    """

    def __init__(self, folder: Path) -> None:
        # What libraries print must not come between the answers.
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        packs = json.loads((folder / "packs.json").read_text())
        self.steps: list[Packs] = packs.pop("steps")
        self._named: dict[str, Packs] = packs
        self._loss: Callable[[Packs], float] | None = None

    def open(self, loss: Callable[[Packs], float], **facts: Any) -> None:
        """Say that the contestant is ready, and how it answers for losses."""
        self._loss = loss
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        there = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else resident()
        self.answer({"versions": versions, "resident": there, **facts})

    def answer(self, answer: dict[str, Any]) -> None:
        """Send one line."""
        print(json.dumps(answer), file=self._answers, flush=True)

    def next(self) -> tuple[str, int]:
        """The next step that is asked for: what is to be seen of it, and which packs; losses are answered meanwhile.

        Raises:
            SystemExit: Nothing more is asked for.
        """
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] != "loss":
                return request["do"], request["step"]
            assert self._loss is not None
            with torch.no_grad():
                packs = self.steps[request["of"]] if isinstance(request["of"], int) else self._named[request["of"]]
                self.answer({"loss": self._loss(packs)})
        raise SystemExit

    def serve(self, step: Callable[[int], None]) -> None:
        """Take steps as they are asked for, to the end."""
        while True:
            kind, number = self.next()
            with seen(kind) as found:
                step(number)
            self.answer(found)


# What is seen of a step


def resident(which: str = "VmRSS") -> int:
    """Memory of this process in RAM, in bytes; `VmHWM`: the most there ever was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: found no {which}, expected it; this needs Linux")


@contextlib.contextmanager
def seen(kind: str) -> Iterator[dict[str, Any]]:
    """Look at what happens inside.

    Args:
        kind: "seconds"; "profile", which adds the operators with their own time; "memory", bytes that are there before
            and the most there were; "allocations", the most bytes of tensors beyond those that were there before, which
            no allocator's habits blur, at the price of a slow step.

    Yields:
        What was found; filled at the end.
    """
    found: dict[str, Any] = {}
    cuda = DEVICE.type == "cuda"
    with contextlib.ExitStack() as stack:
        if kind == "memory":
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                found["before"] = torch.cuda.memory_allocated()
            else:
                found["before"] = resident()
                Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        looking = None
        if kind in ("profile", "allocations"):
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
            looking = stack.enter_context(profile(activities=activities, profile_memory=kind == "allocations"))
        synchronize()
        begin, worked = time.perf_counter(), time.process_time()
        yield found
        synchronize()
        found["seconds"], found["cpu seconds"] = time.perf_counter() - begin, time.process_time() - worked
    if kind == "memory":
        found["peak"] = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    elif kind == "allocations":
        assert looking is not None
        found["peak"] = most_allocated(looking)
    elif kind == "profile":
        assert looking is not None
        own = [(e.key, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3, e.count)
               for e in looking.key_averages()]  # fmt: skip
        found["operators"] = [row for row in sorted(own, key=lambda row: -row[1]) if row[1] > 0.05]


def synchronize() -> None:
    """Wait for the device to finish."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def most_allocated(looking: Any) -> int:
    """The most bytes of tensors that were there at once, less those that were there at the start."""
    events = [event for event in looking.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


# Layouts


def flat(packs: Packs) -> tuple[list[int], list[int], list[int]]:
    """Tokens, labels (each token's own, where it bears a loss) and positions of packs one after another."""
    documents = [document for pack in packs for document in pack]
    tokens = [token for document in documents for token in document["tokens"]]
    positions = [place for document in documents for place in range(len(document["tokens"]))]
    labels = [
        token if place >= document["first"] else IGNORED
        for document in documents
        for place, token in enumerate(document["tokens"])
    ]
    return tokens, labels, positions


def rows(packs: Packs) -> dict[str, Tensor]:
    """A row for each pack, with positions that begin anew in each document."""
    columns = zip(*(flat([pack]) for pack in packs), strict=True)
    tokens, labels, positions = (torch.tensor(column, device=DEVICE) for column in columns)
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


def padded(packs: Packs) -> dict[str, Tensor]:
    """A row for each document, filled up to the longest."""
    documents = [flat([[document]])[:2] for pack in packs for document in pack]
    longest = max(len(tokens) for tokens, _ in documents)

    def square(which: int, filling: int) -> Tensor:
        return torch.tensor([d[which] + [filling] * (longest - len(d[which])) for d in documents], device=DEVICE)

    mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t, _ in documents], device=DEVICE)
    return {"input_ids": square(0, 0), "labels": square(1, IGNORED), "attention_mask": mask}


# Contestants


def ours(desk: Desk, folder: Path, *, compiled: bool = False) -> None:
    """This project's model, loss, optimizer and step on one flat pack, without FSDP."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for a checkout that is not installed

    import numpy as np
    import torch.distributed as dist

    from data import Example, PackedBatch
    from data.batch import assemble
    from magnum_train.config import OptimConfig
    from magnum_train.optim import build_optimizer
    from magnum_train.step import forward, train_step
    from model import Transformer
    from model.hf import HFFolder, load_hf

    model = Transformer(HFFolder(folder).config).to(DEVICE, DTYPE)
    load_hf(model, folder)
    if compiled:
        for block in model.layers:
            block.compile(fullgraph=True)
    precision = "bf16_stochastic" if DEVICE.type == "cuda" else "float32"
    optimizer = build_optimizer(model, OptimConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS), precision)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def batch(packs: Packs) -> PackedBatch:
        documents = []
        for document in (document for pack in packs for document in pack):
            weights = (np.arange(len(document["tokens"])) >= document["first"]).astype(np.float32)
            documents.append(Example(np.array(document["tokens"], np.int32), weights))
        capacity = sum(len(document.tokens) for document in documents)
        return assemble(documents, capacity, SLOTS).to(DEVICE)

    def loss(packs: Packs) -> float:
        pack = batch(packs)
        return float(forward(model, pack).total / pack.weights.double().sum())

    batches = [batch(packs) for packs in desk.steps]
    sums = [float(pack.weights.double().sum()) for pack in batches]

    def step(number: int) -> None:
        which = number % len(batches)
        train_step(
            model, optimizer, [batches[which]], weight_sum=sums[which], n_sources=1, lr=LR, max_grad_norm=MAX_NORM
        )

    desk.open(loss, attention=model._backend(model.tok_embeddings.weight))
    desk.serve(step)


def trl(desk: Desk, folder: Path, *, recompute: bool, accumulate: int = 1) -> None:
    """TRL's SFTTrainer with packing, in its own training loop; its steps wait for those that ask for them."""
    import datasets
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer, __version__

    transformers.logging.set_verbosity_error()
    attention = flash_or_sdpa()

    def row(pack: Pack) -> dict[str, list[int]]:
        """What `pack_dataset` gives, so that the packs are the same as everybody's."""
        tokens, labels, _ = flat([pack])
        return {"input_ids": tokens, "labels": labels, "seq_lengths": [len(d["tokens"]) for d in pack]}

    dataset = datasets.Dataset.from_list([row(pack) for packs in desk.steps for pack in packs])
    per_step = len(desk.steps[0])
    settings = SFTConfig(
        str(folder / f"trl-{os.getpid()}"), packing=True, max_length=len(dataset[0]["input_ids"]),
        dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
        per_device_train_batch_size=per_step // accumulate, gradient_accumulation_steps=accumulate,
        gradient_checkpointing=recompute, model_init_kwargs={"dtype": str(DTYPE)[6:], "attn_implementation": attention},
        bf16=False, use_cpu=DEVICE.type == "cpu", max_steps=1_000_000, learning_rate=LR, lr_scheduler_type="constant",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=MAX_NORM,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    words = Tokenizer(WordLevel({"<unk>": 0, "<pad>": 1, "</s>": 2}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")

    class Steps(TrainerCallback):
        """A step of the trainer's own loop for each that is asked for."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            kind, number = desk.next()
            assert number % len(desk.steps) == state.global_step % len(desk.steps)
            self._seen = seen(kind)
            self._found = self._seen.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._seen.__exit__(None, None, None)
            desk.answer(self._found)

    trainer = SFTTrainer(
        model=str(folder), args=settings, train_dataset=dataset, processing_class=tokenizer, callbacks=[Steps()]
    )

    def loss(packs: Packs) -> float:
        batch = trainer.data_collator([row(pack) for pack in packs])
        return float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)))

    versions = {"trl": __version__, "transformers": transformers.__version__}
    optimizer = str(settings.optim)
    desk.open(loss, packages=versions, attention=attention, optimizer=optimizer)
    trainer.train()


def flash_or_sdpa() -> str:
    """What of transformers' attention keeps documents of a pack apart, the fastest that is here."""
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if DEVICE.type == "cuda" and is_flash_attn_2_available() else "sdpa"


def bare(desk: Desk, folder: Path, *, layout: Callable[[Packs], dict[str, Tensor]], compiled: bool = False) -> None:
    """The Mistral of transformers in a loop of a few lines."""
    import transformers

    attention = flash_or_sdpa()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation=attention)
    model.to(DEVICE).train()
    called = torch.compile(model) if compiled else model
    # Without a cache and without a mask it finds documents by their positions; with a cache, its default, it does not.
    facts = {"attention": attention, "packages": {"transformers": transformers.__version__}}
    loop(desk, model, layout, lambda batch: called(**batch, use_cache=False).loss, **facts)


def litgpt(desk: Desk, folder: Path, *, compiled: bool = False) -> None:
    """The GPT of litgpt with its own cross-entropy, as in its pretraining: one causal row for each pack."""
    from importlib.metadata import version

    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy
    from safetensors.torch import load_file

    shape = json.loads((folder / "config.json").read_text())
    config = Config(
        block_size=max(sum(len(d["tokens"]) for d in pack) for packs in desk.steps for pack in packs),
        n_layer=shape["num_hidden_layers"], n_embd=shape["hidden_size"], vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"], norm_class_name="RMSNorm", norm_eps=shape["rms_norm_eps"],
        parallel_residual=False, n_head=shape["num_attention_heads"], n_query_groups=shape["num_key_value_heads"],
        head_size=shape["head_dim"], rope_base=int(shape["rope_theta"]), rotary_percentage=1.0, bias=False,
        mlp_class_name="LLaMAMLP", intermediate_size=shape["intermediate_size"],
    )  # fmt: skip
    model = GPT(config)
    theirs = load_file(folder / "model.safetensors")
    names = {
        "norm_1": "input_layernorm", "attn.proj": "self_attn.o_proj", "norm_2": "post_attention_layernorm",
        "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj",
    }  # fmt: skip
    state = {
        "transformer.wte.weight": theirs["model.embed_tokens.weight"],
        "transformer.ln_f.weight": theirs["model.norm.weight"],
        "lm_head.weight": theirs["lm_head.weight"],
    }
    for layer in range(config.n_layer):
        here, there = f"transformer.h.{layer}.", f"model.layers.{layer}."
        state |= {f"{here}{name}.weight": theirs[f"{there}{other}.weight"] for name, other in names.items()}
        state[here + "attn.qkv.weight"] = torch.cat([theirs[f"{there}self_attn.{x}_proj.weight"] for x in "qkv"])
    model.load_state_dict(state)
    model.to(DEVICE, DTYPE)
    called = torch.compile(model) if compiled else model

    def layout(packs: Packs) -> dict[str, Tensor]:
        made = rows(packs)
        targets = torch.cat([made["labels"][:, 1:], torch.full_like(made["labels"][:, :1], IGNORED)], dim=1)
        return {"tokens": made["input_ids"], "targets": targets}

    def loss(batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = chunked_cross_entropy(
            called(batch["tokens"]), batch["targets"], chunk_size=0, ignore_index=IGNORED
        )
        return found

    loop(desk, model, layout, loss, packages={"litgpt": version("litgpt")}, attention="causal over the pack")


def loop(
    desk: Desk,
    model: torch.nn.Module,
    layout: Callable[[Packs], dict[str, Tensor]],
    loss: Callable[[dict[str, Tensor]], Tensor],
    **facts: Any,
) -> None:
    """The loop that anyone would write, with torch's fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    batches = [layout(packs) for packs in desk.steps]

    def step(number: int) -> None:
        loss(batches[number % len(batches)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    desk.open(lambda packs: float(loss(layout(packs))), **facts)
    desk.serve(step)


def products(desk: Desk, folder: Path) -> None:
    """The matrix products of a step alone, each written into a place that is there already: the ceiling."""
    shape = json.loads((folder / "config.json").read_text())
    width, layers, hidden = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    queries, keys = (shape[f"num_{kind}_heads"] * shape["head_dim"] for kind in ("attention", "key_value"))
    labels = len([label for label in flat(desk.steps[0])[1] if label != IGNORED])
    tokens = len(flat(desk.steps[0])[0])
    sizes = [(tokens, width, queries)] + 2 * [(tokens, width, keys)] + [(tokens, queries, width)]
    sizes += 2 * [(tokens, width, hidden)] + [(tokens, hidden, width)]
    calls = []
    for count, size in [(layers, size) for size in sizes] + [(1, (labels, width, shape["vocab_size"]))]:
        x, weight, out = (torch.randn(*pair, device=DEVICE, dtype=DTYPE)
                          for pair in (size[:2], size[:0:-1], size[::2]))  # fmt: skip
        both = [(x, weight.t(), out), (out, weight, x.clone()), (out.t(), x, weight.clone())]
        calls += count * [(a, b, torch.empty_like(c)) for a, b, c in both]
    flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in calls)

    def step(number: int) -> None:
        for a, b, out in calls:
            torch.mm(a, b, out=out)

    desk.open(lambda packs: 0.0, flops=flops)
    desk.serve(step)


CONTESTANTS: dict[str, Callable[[Desk, Path], None]] = {
    "ours": ours,
    "ours_compiled": lambda desk, folder: ours(desk, folder, compiled=True),
    "trl": lambda desk, folder: trl(desk, folder, recompute=False),
    "trl_accumulated": lambda desk, folder: trl(desk, folder, recompute=False, accumulate=2),
    "trl_recompute": lambda desk, folder: trl(desk, folder, recompute=True),
    "transformers": lambda desk, folder: bare(desk, folder, layout=rows),
    "transformers_compiled": lambda desk, folder: bare(desk, folder, layout=rows, compiled=True),
    "transformers_padded": lambda desk, folder: bare(desk, folder, layout=padded),
    "litgpt": litgpt,
    "litgpt_compiled": lambda desk, folder: litgpt(desk, folder, compiled=True),
    "products": products,
}


def main() -> None:
    """Run one contestant until nothing more is asked of it."""
    name, folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    CONTESTANTS[name](Desk(Path(folder)), Path(folder))


if __name__ == "__main__":
    main()
