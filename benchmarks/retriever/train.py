"""Train the retriever: ``python -m benchmarks.retriever.train``."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from benchmarks.retriever import corpus, model
from benchmarks.retriever import vocabulary as vocab

__all__ = ["STAGES", "Stage", "main", "train"]

_LOG: Final = logging.getLogger(__name__)

#: Weight of the ordinary language-modelling loss beside the answer loss.
_LM_WEIGHT: Final = 0.1
_WARMUP_STEPS: Final = 50
_DECAY_SHARE: Final = 0.35
_FINAL_RATE: Final = 0.03

#: Share of the steps on shorter documents, so that short prompts keep working.
_SHORT_SHARE: Final = 0.2
_SHORTEST: Final = 128


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum on length.

    Attributes:
        length: Tokens per document.
        share: Share of the whole training time.
        tokens_per_step: Tokens per optimiser step.
    """

    length: int
    share: float
    tokens_per_step: int


#: Every stage holds every task: a task left out of a stage is forgotten in it.
STAGES: Final[dict[str, tuple[Stage, ...]]] = {
    "1024": (Stage(512, 0.25, 2048), Stage(1024, 0.75, 2048)),
    "2048": (Stage(1024, 0.1, 2048), Stage(2048, 0.9, 4096)),
}


def _rate(progress: float, step: int) -> float:
    """Return the learning-rate factor: warm-up, flat, linear decay."""
    decay = min(1.0, (1.0 - progress) / _DECAY_SHARE)
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return warmup * max(_FINAL_RATE, decay)


def _stage_at(stages: Sequence[Stage], progress: float) -> Stage:
    """Return the stage that holds at ``progress`` in [0, 1]."""
    done = 0.0
    for stage in stages:
        done += stage.share
        if progress < done:
            return stage
    return stages[-1]


def _draw_length(rng: np.random.Generator, longest: int) -> int:
    """Return the length of the next documents: mostly ``longest``."""
    if rng.random() >= _SHORT_SHARE:
        return longest
    return int(math.exp(rng.uniform(math.log(_SHORTEST), math.log(longest))))


def _losses(
    network: LlamaForCausalLM, ids: torch.Tensor, answers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Return answer loss, loss on the rest, and answer-token accuracy."""
    hidden = network.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    target, scored = ids[:, 1:], answers[:, 1:]
    logits = network.lm_head(hidden[scored])
    answer_loss = F.cross_entropy(logits, target[scored])
    rest_loss = F.cross_entropy(network.lm_head(hidden[~scored]), target[~scored])
    hit = logits.detach().argmax(-1) == target[scored]
    # The closing word is easy; counting it would hide errors in the values.
    accuracy = hit[target[scored] != vocab.END].float().mean().item()
    return answer_loss, rest_loss, accuracy


@torch.no_grad()
def _validate(network: LlamaForCausalLM, length: int) -> dict[str, float]:
    """Return teacher-forced exact match per question for a few facts and many."""
    network.eval()
    rng = np.random.default_rng(7)
    result = {}
    for name, facts in (("few", 4), ("many", 48)):
        task = corpus.RecallTask(name, facts, (3, 3), 8)
        right = total = 0
        for _ in range(4):
            document = corpus.recall_document(rng, length, task)
            ids = torch.from_numpy(document.ids)[None]
            guess = network(ids, use_cache=False).logits[0].argmax(-1)
            for question in document.questions:
                at = question.start + 1
                words = guess[at : at + len(question.answer)].tolist()
                right += tuple(words) == question.answer
                total += 1
        result[name] = right / total
    network.train()
    return result


def train(
    network: LlamaForCausalLM,
    stages: Sequence[Stage],
    *,
    minutes: float,
    seed: int,
    out: Path,
    peak_rate: float = 1e-3,
    copy_share: float = 0.15,
    report_every: int = 100,
) -> list[dict[str, float]]:
    """Train ``network`` in place and write it to ``out`` along the way.

    Time, not steps, drives the schedule: the run ends decayed whatever the
    machine gave it. Only the data and the order are fixed by the seed.

    Args:
        network: The model.
        stages: Curriculum; the shares sum to one.
        minutes: Wall-clock time.
        seed: Seed of the documents.
        out: Folder for the checkpoint and ``log.json``.
        peak_rate: Learning rate before the decay.
        copy_share: Share of copy documents.
        report_every: Steps between validations and checkpoints.

    Returns:
        One record per validation.
    """
    rng = np.random.default_rng(seed)
    matrices = [p for p in network.parameters() if p.ndim == 2]
    vectors = [p for p in network.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    network.train()
    begin = time.monotonic()
    step = tokens = 0
    mean_loss = mean_accuracy = math.nan
    records: list[dict[str, float]] = []
    while (progress := (time.monotonic() - begin) / (60 * minutes)) < 1:
        stage = _stage_at(stages, progress)
        length = _draw_length(rng, stage.length)
        rows = max(1, stage.tokens_per_step // length)
        rate = peak_rate * _rate(progress, step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        ids, answers = corpus.training_batch(rng, length, rows, copy_share=copy_share)
        answer_loss, rest_loss, accuracy = _losses(network, torch.from_numpy(ids), torch.from_numpy(answers))
        (answer_loss + _LM_WEIGHT * rest_loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step += 1
        tokens += ids.size
        if math.isnan(mean_loss):
            mean_loss, mean_accuracy = answer_loss.item(), accuracy
        mean_loss += 0.03 * (answer_loss.item() - mean_loss)
        mean_accuracy += 0.03 * (accuracy - mean_accuracy)
        if step % report_every == 0:
            record = {
                "step": step,
                "minutes": round(progress * minutes, 2),
                "length": stage.length,
                "tokens": tokens,
                "rate": rate,
                "answer_loss": round(mean_loss, 4),
                "answer_accuracy": round(mean_accuracy, 4),
                **_validate(network, stage.length),
            }
            records.append(record)
            _LOG.info("%s", json.dumps(record))
            _save(network, records, out)
    _save(network, records, out)
    return records


def _save(network: LlamaForCausalLM, records: list[dict[str, float]], out: Path) -> None:
    """Write the checkpoint folder and the log so far."""
    model.save(network, out)
    (out / "log.json").write_text(json.dumps(records, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line.

    Args:
        arguments: Command line; the process's own when None.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", type=Path, help="checkpoint to start from")
    parser.add_argument("--out", type=Path, default=Path("build/retriever"))
    parser.add_argument("--stages", choices=STAGES, default="2048")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    network = model.load(options.init) if options.init else model.build()
    stages = STAGES[options.stages]
    _LOG.info("stages %s", json.dumps([asdict(stage) for stage in stages]))
    train(
        network,
        stages,
        minutes=options.minutes,
        seed=options.seed,
        out=options.out,
        peak_rate=options.rate,
    )


if __name__ == "__main__":
    main()
