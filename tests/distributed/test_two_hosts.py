"""Two hosts train one run, lose one of them without a word, and go on after its return.

The hosts are network namespaces (`tests/hosts.py`) with torchrun on each, started with the lines of docs/clusters.md.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import hosts
from hosts import Host, Network
from ranks import run_ranks
from tiny_runs import metrics, overrides, run_until, series

HOME = Path(__file__).parents[2]
STEPS, SAVED = 24, 8
TIMEOUT = 32  # seconds; a host that is gone is to be noticed within them
# Without it torchrun 2.11 to 2.13 never tells a host that joins a later round where rank 0 is.
ENVIRONMENT = {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]  # every process imports torch: seconds on a busy machine


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    if reason := hosts.why_not():
        pytest.skip(reason)
    with hosts.network(tmp_path, "alpha", "beta") as net:
        yield net


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def undisturbed(data: Path) -> list[tuple[int, float, float]]:
    """The losses and norms of the same run on two ranks that nothing happens to."""
    run_ranks(run_until, 2, settings(data, data / "undisturbed"), None)
    found = series(data / "undisturbed")
    assert [step for step, *_ in found] == list(range(1, STEPS + 1))
    return found


def settings(data: Path, run_dir: Path) -> list[str]:
    return overrides(
        data, f"train.max_steps={STEPS}", f"checkpoint.every_steps={SAVED}", f"distributed.timeout_seconds={TIMEOUT}",
        f"run_dir={run_dir}",
    )  # fmt: skip


def torchrun(*options: str) -> list[str]:
    """The line that is typed on each host, up to the module."""
    meet = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=alpha:29400", "--rdzv-id=run"]
    return [sys.executable, "-m", "torch.distributed.run", *meet, *options, "-m", "magnum_train.train"]


def log(host: Host, run_dir: Path) -> Path:
    return run_dir.parent / f"{host.name}.log"


def start(host: Host, run_dir: Path, words: list[str], **more: str) -> subprocess.Popen[bytes]:
    return host.start(words, run_dir.parent, log(host, run_dir), os.environ | ENVIRONMENT | more)


def until(what: str, happened: Callable[[], bool], seconds: float, *logs: Path) -> None:
    """Wait for something; what the hosts have printed stands in the failure."""
    deadline = time.monotonic() + seconds
    while not happened():
        said = "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in logs if path.exists())
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}\n{said}"
        time.sleep(0.02)


def in_the_midst(run_dir: Path) -> bool:
    """Whether steps have been taken beyond the first checkpoint."""
    complete = (run_dir / "checkpoints" / f"step-{SAVED:08d}").exists()
    return complete and len(metrics(run_dir)) > SAVED


def test_a_host_that_is_lost_in_mid_step_returns_and_the_run_goes_on(
    network: Network, data: Path, undisturbed: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    line = [*torchrun("--max-restarts=3"), *settings(data, run_dir)]
    alpha, beta = network.host(0), network.host(1)
    stays, _ = start(alpha, run_dir, line), start(beta, run_dir, line)
    until("training", lambda: in_the_midst(run_dir), 100, log(alpha, run_dir), log(beta, run_dir))
    [worker] = alpha.processes("-u -m magnum_train.train")
    before = len(log(alpha, run_dir).read_text())

    beta.lose()
    until("the end of rank 0", lambda: worker not in alpha.processes(), TIMEOUT + 10, log(alpha, run_dir))
    said = log(alpha, run_dir).read_text()[before:]
    assert "rank 1 on host beta" in said, said
    assert stays.poll() is None  # torchrun waits there for the host's return
    steps = len(metrics(run_dir))
    assert SAVED < steps < STEPS

    beta = network.host(1)
    returned = start(beta, run_dir, line)
    logs = [log(alpha, run_dir), log(beta, run_dir)]
    until("the end", lambda: None not in (stays.poll(), returned.poll()), 100, *logs)
    assert (stays.returncode, returned.returncode) == (0, 0), [path.read_text()[-3000:] for path in logs]
    assert f"after step {SAVED}" in log(alpha, run_dir).read_text()
    assert series(run_dir) == undisturbed


def test_where_the_host_that_ranks_meet_on_is_lost_all_are_started_again(
    network: Network, data: Path, undisturbed: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    """No torchrun survives its rendezvous; the loop around it does."""
    run_dir = tmp_path / "run"
    tries = ["bash", "-c", 'for try in 1 2 3; do "$@" && break; sleep 1; done', "again"]
    line = [*tries, *torchrun(), *settings(data, run_dir)]
    alpha, beta = network.host(0), network.host(1)
    _, stays = start(alpha, run_dir, line), start(beta, run_dir, line)
    until("training", lambda: in_the_midst(run_dir), 100, log(alpha, run_dir), log(beta, run_dir))
    [worker] = beta.processes("-u -m magnum_train.train")
    before = len(log(beta, run_dir).read_text())

    alpha.lose()
    until("the end of rank 1", lambda: worker not in beta.processes(), TIMEOUT + 10, log(beta, run_dir))
    said = log(beta, run_dir).read_text()[before:]
    assert re.search(r"error: .* at alpha:\d+: found no answer", said), said  # the store was with rank 0

    alpha = network.host(0)
    returned = start(alpha, run_dir, line)
    logs = [log(alpha, run_dir), log(beta, run_dir)]
    until("the end", lambda: None not in (stays.poll(), returned.poll()), 100, *logs)
    assert (stays.returncode, returned.returncode) == (0, 0), [path.read_text()[-3000:] for path in logs]
    assert series(run_dir) == undisturbed


def test_hosts_whose_names_lead_nowhere_train_together_when_told_their_addresses(
    network: Network, data: Path, undisturbed: list[tuple[int, float, float]], tmp_path: Path
) -> None:
    """Debian gives a host's own name to 127.0.1.1, and many a rented machine knows no other's."""
    run_dir = tmp_path / "run"
    pair = [network.host(0), network.host(1)]
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 alpha beta\n")
    processes = []
    for number, host in enumerate(pair):
        told = [
            f"--rdzv-endpoint={pair[0].address}:29400",
            f"--rdzv-conf=is_host={int(number == 0)}",
            f"--local-addr={host.address}",
        ]
        processes.append(start(host, run_dir, [*torchrun(*told), *settings(data, run_dir)], GLOO_SOCKET_IFNAME="eth0"))
    logs = [log(host, run_dir) for host in pair]
    until("the end", lambda: all(process.poll() is not None for process in processes), 100, *logs)
    assert [process.returncode for process in processes] == [0, 0], [path.read_text()[-3000:] for path in logs]
    assert series(run_dir) == undisturbed


def test_nothing_is_left_of_hosts_whose_test_has_failed(tmp_path: Path) -> None:
    if reason := hosts.why_not():
        pytest.skip(reason)
    seen: list[Host] = []

    def failing() -> None:
        with hosts.network(tmp_path, "alpha") as net:
            seen.append(net.host(0))
            seen[0].start(["sleep", "1000"], tmp_path, tmp_path / "log", os.environ)
            until("the sleeper", lambda: len(seen[0].processes("sleep 1000")) > 0, 10)
            raise RuntimeError("a test fails")

    with pytest.raises(RuntimeError, match="a test fails"):
        failing()
    assert not seen[0].processes()
    assert all(namespace.holder.poll() is not None for namespace in (seen[0].network.switch, seen[0].inside))
