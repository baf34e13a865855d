"""Train the test bed: ``python -m benchmarks.testbed.train --minutes 90 --out build/testbed``.

A run can be stopped at any time and goes on from its last state when the same command is given again. The schedule
follows the time that the run had the processor for, as the machine may be shared: a longer text is tried when the
present one is learned, or when its share of the time is over; the learning rate falls to the end whatever was reached.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbed import model, wider
from benchmarks.testbed import tokenizer as pieces
from benchmarks.testbed.corpus import Corpus

__all__ = ["STAGES", "Progress", "Stage", "main", "train"]

_LOG: Final = logging.getLogger(__name__)

#: Weight of the ordinary language-modelling loss beside the answer loss.
_LM_WEIGHT: Final = 0.1
#: Weight of the tokens that decide what an answer says: the first of a value, and what follows one. The rest copies.
_DECISIVE_WEIGHT: Final = 3.0
_WARMUP_STEPS: Final = 50
_FINAL_RATE: Final = 0.03
_SHORT_SHARE: Final = 0.2
_LEARNED: Final = 0.92
_LEAST_STEPS: Final = 100
_MEMORY: Final = 0.03


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum on length. Every stage holds every task: one left out is forgotten.

    Attributes:
        length: Tokens per document.
        until: Share of the time by which the stage ends, learned or not.
        rows: Documents per step.
    """

    length: int
    until: float
    rows: int


STAGES: Final = (
    Stage(128, 0.35, 8),
    Stage(256, 0.5, 6),
    Stage(512, 0.7, 4),
    Stage(1024, 1.0, 2),
)


@dataclass(slots=True)
class Progress:
    """What a run has done so far.

    Attributes:
        step: Optimiser steps.
        tokens: Tokens seen.
        seconds: Time of the processor, without what came before a restart's first step.
        stage: Index of the stage.
        since: Step at which the stage began.
        means: Moving averages by name.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stage: int = 0
    since: int = 0
    means: dict[str, float] = field(default_factory=dict[str, float])

    def mean(self, name: str, value: float) -> None:
        """Take a value into a moving average."""
        if not math.isnan(value):
            old = self.means.get(name, value)
            self.means[name] = old + _MEMORY * (value - old)


def _rate(share: float, step: int, decay: float) -> float:
    """Return the learning-rate factor: warm-up, flat, linear decay over the last ``decay`` of the time."""
    return min(1.0, (step + 1) / _WARMUP_STEPS) * max(_FINAL_RATE, min(1.0, (1.0 - share) / decay))


def _losses(
    network: LlamaForCausalLM, ids: torch.Tensor, answers: torch.Tensor, before_decisions: torch.Tensor
) -> tuple[torch.Tensor, float, float]:
    """Return the loss, the loss on answers, and the share of an answer's decisive tokens that are right.

    Args:
        network: The model.
        ids: ``[B, T]``.
        answers: ``[B, T]`` bool, whether a token is part of an answer.
        before_decisions: Ids after which a token says what the answer says.
    """
    hidden = network.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    target, scored = ids[:, 1:], answers[:, 1:]
    rest = ~scored & (target != pieces.PAD)
    logits = network.lm_head(hidden[scored])
    each = F.cross_entropy(logits, target[scored], reduction="none")
    decisive = torch.isin(ids[:, :-1][scored], before_decisions)
    weights = torch.where(decisive, _DECISIVE_WEIGHT, 1.0)
    loss = (each * weights).sum() / weights.sum()
    total = loss + _LM_WEIGHT * F.cross_entropy(network.lm_head(hidden[rest]), target[rest])
    hit = (logits.detach().argmax(-1) == target[scored])[decisive]
    return total, loss.item(), hit.float().mean().item()


def train(
    network: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    minutes: float,
    seed: int,
    out: Path,
    peak_rate: float = 1.5e-3,
    save_every: float = 120.0,
    first_length: int = STAGES[0].length,
    decay: float = 0.3,
) -> Progress:
    """Train ``network`` in place; weights, state and log are written to ``out`` along the way.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        minutes: Time of the processor in all, of this process and the ones before it.
        seed: Seed of the documents.
        out: Folder for the checkpoint, the state of the optimiser and ``log.jsonl``.
        peak_rate: Learning rate before the decay.
        save_every: Seconds between checkpoints.
        first_length: Length of the stage to begin with, which is the first for weights that know nothing yet.
        decay: Share of the time over which the learning rate falls.

    Returns:
        What was done.
    """
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=peak_rate, betas=(0.9, 0.98))
    progress = Progress(stage=[stage.length for stage in STAGES].index(first_length))
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        progress = Progress(**state["progress"])
    corpus = Corpus(tokenizer, seed + progress.step)
    before_decisions = torch.tensor(tokenizer.convert_tokens_to_ids(["is:", "##."]))
    out.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        state = {"network": network.state_dict(), "optimiser": optimiser.state_dict(), "progress": asdict(progress)}
        # Written beside and renamed, so that a run that is stopped in between leaves the state before.
        torch.save(state, out / "state.new")
        (out / "state.new").replace(state_file)
        model.save(network, tokenizer, out / "checkpoint")
        record = {**asdict(progress), "length": STAGES[progress.stage].length, **progress.means}
        del record["means"]
        with (out / "log.jsonl").open("a") as log:
            log.write(json.dumps({k: round(v, 5) for k, v in record.items()}) + "\n")
        _LOG.info("%s", record)

    network.train()
    last, saved = time.process_time(), time.monotonic()
    while (share := progress.seconds / (60 * minutes)) < 1:
        stage = STAGES[progress.stage]
        settled = progress.step - progress.since >= _LEAST_STEPS
        learned = settled and progress.means.get(f"decided_{stage.length}", 0.0) >= _LEARNED
        if progress.stage + 1 < len(STAGES) and (learned or share >= stage.until):
            progress.stage, progress.since = progress.stage + 1, progress.step
            stage = STAGES[progress.stage]
        length, rows = stage.length, stage.rows
        if corpus.random.random() < _SHORT_SHARE:
            earlier = STAGES[corpus.random.randrange(progress.stage + 1)]
            length, rows = earlier.length, earlier.rows
        for group in optimiser.param_groups:
            group["lr"] = peak_rate * _rate(share, progress.step, decay)
        ids, answers = corpus.batch(length, rows)
        total, loss, right = _losses(network, torch.from_numpy(ids), torch.from_numpy(answers), before_decisions)
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += ids.size
        progress.mean(f"loss_{length}", loss)
        progress.mean(f"decided_{length}", right)
        now = time.process_time()
        progress.seconds += (now - last) / torch.get_num_threads()
        last = now
        if time.monotonic() - saved > save_every:
            save()
            saved = time.monotonic()
    save()
    return progress


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/testbed"))
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="folder of an earlier training's weights to begin with")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the time over which the rate falls")
    parser.add_argument("--width", type=int, help="make the start this wide, by at least 64 wider than it is")
    parser.add_argument(
        "--first-length", type=int, default=STAGES[0].length, choices=[stage.length for stage in STAGES]
    )
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    kept = options.out / "checkpoint" if (options.out / "checkpoint").exists() else options.start
    # The words may change with the generators; a run that goes on keeps the vocabulary that it began with.
    tokenizer: Any = AutoTokenizer.from_pretrained(kept) if kept else pieces.build(model.MAX_LENGTH)
    if options.start:
        network = LlamaForCausalLM.from_pretrained(options.start)
    else:
        network = model.build(len(tokenizer))
        model.warm_start(network, tokenizer, options.seed)
    if options.width:
        narrow = network.config.hidden_size
        if options.width < narrow + 64 or options.width % model.HEAD_DIM:
            parser.error(f"--width {options.width}: give a multiple of {model.HEAD_DIM} from {narrow + 64} on")
        network = wider.widen(network, options.width)
        wider.match_first_words(network, narrow)
    train(
        network,
        tokenizer,
        minutes=options.minutes,
        seed=options.seed,
        out=options.out,
        peak_rate=options.rate,
        first_length=options.first_length,
        decay=options.decay,
    )


if __name__ == "__main__":
    main()
