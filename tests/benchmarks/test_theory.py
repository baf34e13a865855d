"""The measured theory: the loss against a case worked out by hand, the bound, and what no allocation can beat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.retriever import model
from benchmarks.theory.__main__ import main
from benchmarks.theory.allocation import ALLOCATIONS, Observed, kept_scores, oracle, window_scores
from benchmarks.theory.dense import DenseLayer, attend
from benchmarks.theory.loss import measure, project
from benchmarks.theory.prompts import make_prompts
from benchmarks.theory.samples import CASES, Sample, Settings, of_layer, of_prompt
from benchmarks.theory.summary import summarise

SETTINGS = Settings(budgets=(8, 12, 24), window=8, kernel_size=7)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_layer(seed: int) -> DenseLayer:
    """Return attention that is sharper in some heads than in others: 4 query heads on 2 KV heads, 60 entries."""
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(4, 12, 60, generator=generator, dtype=torch.float64) * tensor([0.5, 6.0, 2.0, 1.0])[:, None, None]
    )
    hidden = torch.ones(12, 60, dtype=torch.bool).triu(60 - 12 + 1)
    values = torch.randn(2, 60, 8, generator=generator, dtype=torch.float64)
    output = torch.randn(4, 8, 16, generator=generator, dtype=torch.float64)
    return DenseLayer(logits.masked_fill(hidden, -torch.inf).softmax(-1), values, output)


def test_the_loss_of_one_head_is_what_is_worked_out_by_hand() -> None:
    # Two entries with values 1 and 3, projected by (2, -1): rows (2, -1) and (6, -3), of which the larger norm is 9.
    # Without eviction 0.75 * (2, -1) + 0.25 * (6, -3) = (3, -1.5); with the second entry gone (2, -1).
    projected = project(tensor([[[1], [3]]]), tensor([[[2, -1]]]))
    found = measure(tensor([[0.75, 0.25]]), projected, torch.tensor([[True, False]]))
    assert (found.loss, found.norm, found.mass) == (pytest.approx(1.5), pytest.approx(4.5), pytest.approx(0.75))
    assert found.bound == pytest.approx(2 * 1 * 9 - 2 * 9 * 0.75)


def test_query_heads_of_a_group_lose_the_same_entries() -> None:
    # The second head projects by (1, 1): (2, 2) without eviction and (1, 1) with it, so in all (5, 0.5) and (3, 0).
    projected = project(tensor([[[1], [3]]]), tensor([[[2, -1]], [[1, 1]]]))
    found = measure(tensor([[0.75, 0.25], [0.5, 0.5]]), projected, torch.tensor([[True, False]]))
    assert (found.loss, found.norm, found.mass) == (pytest.approx(2.5), pytest.approx(5.5), pytest.approx(0.625))
    assert found.bound == pytest.approx(2 * 2 * 9 - 2 * 9 * 1.25)


def test_nothing_is_lost_where_everything_is_kept() -> None:
    layer = random_layer(0)
    found = measure(layer.weights[:, -1], project(layer.values, layer.output), torch.ones(2, 60, dtype=torch.bool))
    assert found.loss == pytest.approx(0, abs=1e-12)
    assert found.bound == pytest.approx(0, abs=1e-9)
    assert found.mass == pytest.approx(1)


def test_a_head_that_keeps_nothing_has_no_loss() -> None:
    projected = project(tensor([[[1], [3]]]), tensor([[[2, -1]]]))
    with pytest.raises(ValueError, match=r"heads \[0\] keep nothing"):
        measure(tensor([[0.75, 0.25]]), projected, torch.tensor([[False, False]]))


@pytest.mark.parametrize("seed", range(20))
def test_on_random_attention_no_loss_is_above_the_bound_and_alpha_0_keeps_the_highest_scores(seed: int) -> None:
    check(list(of_layer(random_layer(seed), 0, 3, SETTINGS)))


def test_on_the_model_no_loss_is_above_the_bound_and_alpha_0_keeps_the_highest_scores() -> None:
    network = model.load()
    network.set_attn_implementation("eager")
    for prompt in make_prompts(["few", "many"], 192, 2, seed=3):
        samples = list(of_prompt(network, prompt, SETTINGS))
        assert {sample.layer for sample in samples} == {0, 1, 2, 3}
        check(samples)


def check(samples: list[Sample]) -> None:
    """Assert what the theory says of any sample."""
    uniform = {(s.case, s.layer, s.budget): s for s in samples if s.allocation == "uniform"}
    # A budget of the window alone is left out where a window observes.
    assert len(samples) == sum(3 if case.startswith("oracle") else 2 for case in CASES) * len(ALLOCATIONS) * len(
        {sample.layer for sample in samples}
    )
    for sample in samples:
        assert 0 <= sample.loss <= sample.bound + 1e-12  # rounding in float64, where nothing at all is lost
        assert 0 < sample.mass <= 1 + 1e-12
        if sample.allocation == "adaptive 0":
            other = uniform[sample.case, sample.layer, sample.budget]
            assert sample.scores >= other.scores - 1e-12
            if sample.case.startswith("oracle"):
                assert sample.mass >= other.mass - 1e-7  # ranked in float32
                assert sample.bound <= other.bound * (1 + 1e-6)


def test_the_parts_of_the_layers_add_up_to_what_the_model_computes() -> None:
    network = model.load()
    network.set_attn_implementation("eager")
    outputs: list[torch.Tensor] = []
    for layer in network.model.layers:
        layer.self_attn.register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    (prompt,) = make_prompts(["few"], 96, 1, seed=0)
    for layer, output in zip(attend(network, prompt.aware, 5), outputs, strict=True):
        found = torch.einsum("hqn,hnd->qd", layer.weights, project(layer.values, layer.output))
        torch.testing.assert_close(found.float(), output[0, -5:], rtol=1e-4, atol=1e-5)


def test_attention_that_hands_out_no_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="set_attn_implementation"):
        attend(model.load(), [1, 2, 3], 1)


def test_scores_are_means_over_the_window_and_the_group() -> None:
    weights = tensor([[[0.2, 0.8], [0.4, 0.6]], [[0.0, 1.0], [0.2, 0.8]]])
    torch.testing.assert_close(oracle(weights[:, -1], 1).scores, tensor([[0.3, 0.7]]))
    torch.testing.assert_close(window_scores(weights, 1, 7).scores, tensor([[0.2, 0.8]]))


def test_kept_scores_are_pooled_and_without_the_window() -> None:
    observed = Observed(tensor([[0.1, 0.5, 0.2, 0.9]]), window=1, kernel_size=3)
    assert kept_scores(observed, torch.tensor([[True, False, True, True]])) == pytest.approx(0.5 + 0.5)


def test_a_document_depends_on_its_number_and_not_on_how_many_there_are() -> None:
    many = make_prompts(["few", "many"], 128, 3, seed=5)
    assert make_prompts(["few"], 128, 1, seed=5) == many[:1]
    assert len({prompt.document for prompt in many}) == 6
    assert all(len(prompt.aware) + len(prompt.answer) == 128 for prompt in many)


@pytest.mark.parametrize("task", ["mq", "nothing"])
def test_a_task_without_a_single_question_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=f"no task '{task}' with a single question; there are single, few"):
        make_prompts([task], 128, 1, seed=0)


def sample(allocation: str, loss: float, bound: float) -> Sample:
    return Sample("window, answer", 1, 32, allocation, loss, bound, 0.5, 0.5)


def test_a_summary_pairs_every_allocation_with_the_uniform_one() -> None:
    found = [("uniform", 0.4, 3.0), ("adaptive 0", 0.2, 3.0), ("uniform", 0.4, 3.0), ("adaptive 0", 0.5, 2.0)]
    cells = {(cell.layer, cell.allocation): cell for cell in summarise(sample(*values) for values in found)}
    assert set(cells) == {(layer, name) for layer in (None, 1) for name in ("uniform", "adaptive 0")}
    cell = cells[1, "adaptive 0"]
    assert (cell.lower_loss, cell.same_loss, cell.lower_bound, cell.same_bound) == (0.5, 0.0, 0.5, 0.5)
    assert cell.loss_change == pytest.approx(-0.05)
    assert cell.loss_error == pytest.approx(0.15)


def test_samples_that_can_not_be_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="can't be paired"):
        summarise([sample("uniform", 0.1, 1.0), sample("adaptive 0", 0.1, 1.0), sample("adaptive 0", 0.2, 1.0)])


def test_a_run_writes_lines_a_page_and_a_plot(tmp_path: Path) -> None:
    main(["--documents", "1", "--length", "96", "--budgets", "16", "32", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "theory.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "run"
    assert {line["case"] for line in lines[1:]} == set(CASES)
    assert {line["samples"] for line in lines[1:] if line["layer"] is None} == {2 * 4}
    text = (tmp_path / "theory.md").read_text()
    assert "| 16 | adaptive 0 | 8 |" in text
    assert (tmp_path / "theory.png").stat().st_size > 0
