"""The comparison with the peers, without the peers: the protocol, the environment, agreement and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.peers import worker
from benchmarks.peers.__main__ import main
from benchmarks.peers.client import RefusedError, Worker, WorkerError
from benchmarks.peers.compare import agree, pooled_scores, total
from benchmarks.peers.contestants import Contestant, Sides, full, pruned
from benchmarks.peers.environment import PeersMissingError, prepare
from benchmarks.peers.ours import Ours
from benchmarks.peers.report import markdown
from benchmarks.peers.run import Comparison, Plan
from benchmarks.quality.models import folders
from benchmarks.quality.samples import make
from benchmarks.retriever import model
from benchmarks.theory.dense import attend
from benchmarks.theory.prompts import make_prompts, of_sample
from tests.oracles import paper

FAKE = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    do = request.pop("do")
    if do == "die": sys.stderr.write("out of luck\\n"); sys.exit(3)
    if do == "hang": time.sleep(60)
    if do == "babble": print("Loading 100%"); sys.stdout.flush(); continue
    print(json.dumps({"error": "can't"} if do == "refuse" else {"did": do, **request})); sys.stdout.flush()
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Worker]:
    def started(timeout: float = 60.0) -> Worker:
        return Worker([sys.executable, "-c", FAKE], tmp_path / "log", timeout)

    return started


def test_a_worker_answers_one_request_after_the_other(start: Callable[..., Worker]) -> None:
    fake = start()
    assert fake.ask("add", left=1) == {"did": "add", "left": 1}
    assert fake.ask("add", left=2) == {"did": "add", "left": 2}
    fake.close()
    fake.close()
    assert not fake.alive


def test_a_worker_that_refuses_can_be_asked_again(start: Callable[..., Worker]) -> None:
    fake = start()
    with pytest.raises(RefusedError, match="can't"):
        fake.ask("refuse")
    assert fake.ask("add") == {"did": "add"}
    fake.close()


def test_a_worker_that_dies_leaves_its_last_words(start: Callable[..., Worker]) -> None:
    fake = start()
    with pytest.raises(WorkerError, match="died at 'die', exit status 3: out of luck"):
        fake.ask("die")
    with pytest.raises(WorkerError, match="died at 'add'"):
        fake.ask("add")


def test_a_worker_that_babbles_is_ended(start: Callable[..., Worker]) -> None:
    fake = start()
    with pytest.raises(WorkerError, match="not JSON: 'Loading 100%"):
        fake.ask("babble")
    assert not fake.alive


def test_a_worker_that_hangs_is_ended(start: Callable[..., Worker]) -> None:
    fake = start(timeout=1.0)
    with pytest.raises(WorkerError, match="no answer to 'hang' in 1 s"):
        fake.ask("hang")
    assert not fake.alive


def test_a_worker_that_can_not_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match="could not start"):
        Worker([str(tmp_path / "python")], tmp_path / "log")


def test_a_dead_worker_is_started_again_but_not_for_ever(start: Callable[..., Worker]) -> None:
    started: list[Worker] = []

    def count() -> Worker:
        started.append(start())
        return started[-1]

    sides = Sides(Ours(model.CHECKPOINT, {}), count, model.CHECKPOINT, 1)
    for _ in range(3):
        assert sides.ask_peer("add") == {"did": "add"}
        with pytest.raises(WorkerError, match="died at"):
            sides.ask_peer("die")
    with pytest.raises(WorkerError, match="not started again: it died 3 times"):
        sides.ask_peer("add")
    sides.close()
    assert len(started) == 3


def test_the_real_worker_answers_as_this_process_does(tmp_path: Path) -> None:
    """Where kvpress is missing, its presses are refused, and the full cache is not."""
    command = [sys.executable, "-I", worker.__file__]
    ours = Ours(model.CHECKPOINT, {})
    sides = Sides(ours, lambda: Worker(command, tmp_path / "log"), model.CHECKPOINT, 1)
    here, there, quantised = full()
    (prompt,) = make_prompts(["few"], 96, 1, seed=1)
    answers: list[dict[str, Any]] = []
    try:
        assert sides.ask(there, "hello")["versions"]["torch"] == torch.__version__
        for one in (here, there):
            opened = sides.ask(one, "open", prompt=list(prompt.document), way=dict(one.way), watch=True)
            assert opened["kept"] is None
            sides.ask(one, "feed", tokens=list(prompt.question))
            answers.append({**opened, **sides.ask(one, "decode", count=4)} | {"seconds": None})
        with pytest.raises(RefusedError, match="kvpress"):
            sides.ask(pruned(32, 8, 5)[1], "open", prompt=list(prompt.aware), way=dict(pruned(32, 8, 5)[1].way))
        assert sides.ask(there, "peak", prompt=list(prompt.aware), way=dict(there.way), count=2)["peak_bytes"] > 0
    finally:
        sides.close()
    assert quantised.way["kind"] == "quantized"
    assert answers[0] == answers[1]
    assert tuple(answers[0]["tokens"]) == prompt.answer
    assert answers[0]["cache_bytes"] == 2 * 4 * 4 * (len(prompt.aware) + 4) * 32 * 4


def test_this_side_keeps_a_budget_and_says_where() -> None:
    ours = Ours(model.CHECKPOINT, {"inner": "eager", "pool": "avg", "safeguard": "hard"})
    (prompt,) = make_prompts(["few"], 160, 1, seed=1)
    way = pruned(32, 8, 5)[2].way
    opened = ours.open(prompt.aware, way, watch=True)
    assert [sum(map(len, layer)) for layer in opened["kept"]] == [4 * 32] * 4
    assert all(head[-8:] == list(range(len(prompt.aware) - 8, len(prompt.aware))) for head in opened["kept"][0])
    assert 0 < opened["index_bytes"] < opened["cache_bytes"] < 2 * 4 * 4 * len(prompt.aware) * 32 * 4
    assert len(ours.decode(3)["tokens"]) == 3
    assert ours.open(prompt.aware, way)["kept"] is None
    with pytest.raises(ValueError, match="no kind 'adakv'"):
        ours.open(prompt.aware, {"kind": "adakv"})
    ours.reset()


def test_this_side_answers_the_test_bed_as_it_was_taught() -> None:
    folder = folders()[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [of_sample(one, tokenizer) for one in make(tokenizer, ["niah_single_2", "niah_multiquery"], 512, 2, 5)]
    ours, way = Ours(folder, {}), full()[0].way
    for prompt in prompts:
        ours.open(prompt.aware, way)
        assert tuple(ours.decode(len(prompt.answer))["tokens"]) == prompt.answer
        assert len(prompt.answer) > 3  # what the prompt itself decides is the first alone


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--testbed", "9"], "no training 9 of the test bed; there are 0, 1, 2"),
        (["--testbed", "0", "--tasks", "nosuch"], "unknown RULER task 'nosuch'; choose from niah_single_1, "),
        (["--testbed", "0", "--tasks", "vt"], "'vt' asks for 0 keys and has 5 answers"),
        (["--tasks", "vt"], "no task 'vt' with a single question; there are single, few"),
    ],
)
def test_what_can_not_be_asked_is_refused_before_anything_runs(
    asked: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*asked, "--documents", "1", "--out", str(tmp_path), "--environment", str(tmp_path / "none")])
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def runner(fail: str, calls: list[str]) -> Callable[[Sequence[str]], subprocess.CompletedProcess[str]]:
    """Return what stands for a shell: a command fails if it ends with ``fail``."""

    def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        calls.append(" ".join(command[-2:]) if "pip" in command else "venv")
        Path(command[-1]).mkdir(exist_ok=True) if "venv" in command else None
        return subprocess.CompletedProcess(
            command, int(bool(fail) and command[-1] == fail), "", "Looking\nERROR: no network\n"
        )

    return run


def test_pytorch_is_installed_first_and_stays_pinned(tmp_path: Path) -> None:
    calls: list[str] = []
    folder = tmp_path / "peers"
    made = prepare(folder, "2.13.0+cpu", runner("", calls))
    pin = "torch==2.13.0"
    assert calls == ["venv", f"--quiet {pin}", f"{pin} kvpress", f"{pin} optimum-quanto"]
    assert made.missing == {}
    assert prepare(folder, "2.13.0+cpu", runner("kvpress", [])) == made, "it is not made twice"


def test_without_that_pytorch_the_newest_is_taken(tmp_path: Path) -> None:
    calls: list[str] = []
    prepare(tmp_path / "peers", "9.9", runner("torch==9.9", calls))
    assert calls == ["venv", "--quiet torch==9.9", "--quiet torch", "--quiet kvpress", "--quiet optimum-quanto"]


def test_what_can_be_done_without_may_be_missing(tmp_path: Path) -> None:
    assert prepare(tmp_path / "peers", "1.0", runner("optimum-quanto", [])).missing == {
        "optimum-quanto": "ERROR: no network"
    }


def test_without_a_network_it_says_what_to_install(tmp_path: Path) -> None:
    folder = tmp_path / "peers"
    with pytest.raises(PeersMissingError, match=r"ERROR: no network\n(?s:.)*-m pip install torch==1.0 kvpress"):
        prepare(folder, "1.0", runner("kvpress", []))
    assert prepare(folder, "1.0", runner("", [])).missing == {}, "the next run goes on"


def test_equal_sets_agree_and_others_are_ties_only_if_their_scores_are() -> None:
    scores = [torch.tensor([[0.5, 0.2, 0.2 + 1e-7, 0.1], [0.3, 0.3, 0.1, 0.1]])]
    first = [[[0, 1, 4], [0, 4]]]
    assert agree(first, first, None).row() == {
        "heads": 2, "equal": 2, "tied": 0, "entries": 5, "shared": 5, "lowest": 1.0, "lengths": 0, "gap": 0.0,
    }  # fmt: skip
    tied = agree(first, [[[0, 2, 4], [0, 4]]], scores)
    assert (tied.equal, tied.tied, tied.shared, tied.lengths) == (1, 1, 4, 0)
    assert tied.lowest == pytest.approx(2 / 3)
    worse = agree(first, [[[0, 3, 4], [0, 4]]], scores)
    assert (worse.equal, worse.tied, worse.gap) == (1, 0, pytest.approx(0.5))
    longer = agree(first, [[[0, 4], [0, 1, 4]]], scores)
    assert (longer.tied, longer.lengths) == (0, 1)
    window = agree(first, [[[0, 1, 3], [0, 4]]], scores)
    assert (window.tied, window.row()["gap"]) == (0, None)
    assert agree(first, [[[0, 2, 4], [0, 4]]], None).tied == 0
    both = total([tied, worse])
    assert (both.heads, both.equal, both.tied, both.gap) == (4, 2, 1, worse.gap)


def test_the_scores_of_a_tie_are_those_of_the_paper() -> None:
    network = model.load()
    network.set_attn_implementation("eager")
    (prompt,) = make_prompts(["few"], 96, 1, seed=2)
    layers = attend(network, prompt.aware, 8)
    found = pooled_scores(layers, {"window": 8, "kernel": 5})
    for layer, scores in zip(layers, found, strict=True):
        for head in range(4):
            group = layer.weights[2 * head : 2 * head + 2].mean((0, 1))[:-8].tolist()
            assert scores[head].tolist() == pytest.approx(paper.pool(group, "avg", 5))


class Canned:
    """Both sides at once: every answer is right, the second of a pair differs in one entry, one contestant dies."""

    def __init__(self) -> None:
        self.prompts = make_prompts(["few"], 96, 1, seed=4)
        self.cells = 0

    def next_cell(self) -> None:
        self.cells += 1

    def ask(self, contestant: Contestant, do: str, **arguments: Any) -> dict[str, Any]:
        if contestant.way["kind"] == "quantized":
            raise WorkerError("died")
        if contestant.way["kind"] == "adakv" and do == "peak":
            raise RefusedError("no fake keys")
        sizes = {"cache_bytes": 2048, "index_bytes": 512}
        if do == "open":
            kept = [[[0, 1, 80 + contestant.peer]] * 4] * 4 if "window" in contestant.way else None
            return {"kept": kept, "seconds": 0.25, **sizes}
        if do == "peak":
            return {"peak_bytes": 3 << 20}
        if do == "decode" and arguments["count"] == 4:
            return {"tokens": list(self.prompts[0].answer), "seconds": [0.5] * 4, **sizes}
        return {"seconds": [0.5, 0.75, 1.0], **sizes}


def test_a_comparison_records_what_fails_and_goes_on(tmp_path: Path) -> None:
    sides = Canned()
    network = model.load()
    network.set_attn_implementation("eager")
    plan = Plan(sides.prompts, windows=[8], budgets=[8, 32], kernel=5, rounds=2)
    path = tmp_path / "peers.jsonl"
    Comparison(plan, sides, network, path, lambda text: None).run()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sides.cells == 1
    assert [(row["name"], row["what"]) for row in rows if row["kind"] == "failed"] == [
        ("QuantizedCache (quanto, 4 bits)", "answers"),
        ("kvpress AdaKV+SnapKV", "peak"),
    ]
    assert [row["budget"] for row in rows if row["kind"] == "skipped"] == [8]
    assert sum(row["kind"] == "score" for row in rows) == 2 * 6
    assert sum(row["kind"] == "time" for row in rows) == 6
    kept = [row for row in rows if row["kind"] == "kept"]
    assert [(row["heads"], row["equal"], row["shared"] / row["entries"]) for row in kept] == [
        (16, 0, pytest.approx(2 / 3))
    ] * 4
    text = markdown(rows)
    assert "| kvpress SnapKV | 8 | 32 | 1/1 | 1/1 |" in text
    assert "| DynamicCache | - | - | 1/1 | 1/1 |" in text
    assert "| QuantizedCache (quanto, 4 bits) | - | - | answers | died |" in text
    assert "| all | 8 | 8 | - | the budget does not exceed the window" in text
    assert "| adakv_compile snapkv | 8 | 32 | 750.00 | 500.00-1000.00 | 250.00 | 250.00-250.00 | 6 |" in text
    assert "2.0 | 0.5 | 3.00 |" in text
    assert "0/16" in text


def test_nothing_to_show_is_an_empty_page() -> None:
    assert "##" not in markdown([{"kind": "run", "model": "x", "peers": {"torch": "1"}, "tasks": ["a", "b"]}])
    assert "`x --y 1`; model x." in markdown([{"kind": "run", "command": "x --y 1", "model": "x"}])
    assert "model x; peers torch 1; tasks a, b." in markdown(
        [{"kind": "run", "model": "x", "peers": {"torch": "1"}, "tasks": ["a", "b"]}]
    )
