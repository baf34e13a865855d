"""Where LongBench's rows come from: the hub's archive, a folder with it, or QMSum's own transcripts.

On the hub LongBench is an archive with a loading script, and the library ``datasets`` runs none from version 4 on.
So the archive itself is fetched, and its JSON lines are read as they are.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adakv_compile.evaluation.errors import EvaluationError, need
from adakv_compile.evaluation.longbench import DATASETS

__all__ = ["FETCH", "QMSUM_TASK", "collect", "is_qmsum", "load_rows", "qmsum_rows"]

_REPOSITORY: Final = "THUDM/LongBench"
_ARCHIVE: Final = "data.zip"
FETCH: Final = f"hf download {_REPOSITORY} {_ARCHIVE} --repo-type dataset"
"""The command that fetches the archive."""

QMSUM_TASK: Final = "qmsum_test"
"""What QMSum's own test split is called: LongBench's ``qmsum`` is 200 of its 281 queries, so figures differ."""

_QMSUM_FILE: Final = "test.jsonl"


def load_rows(dataset: str, folder: Path | None) -> Sequence[Mapping[str, Any]]:
    """Return the rows of a data set.

    Args:
        dataset: A name in :data:`adakv_compile.evaluation.longbench.DATASETS`.
        folder: Folder with ``data.zip``, or with the ``.jsonl`` files that are in it; None for the hub.

    Raises:
        EvaluationError: The rows aren't there, or their number is not that of LongBench.
    """
    source, text = _from_archive(dataset, _hub()) if folder is None else _in_folder(dataset, folder)
    try:
        rows: list[Mapping[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise EvaluationError(f"{source} holds no JSON lines: {error}") from error
    expected = DATASETS[dataset].rows
    if len(rows) != expected:
        raise EvaluationError(
            f"{dataset} has {len(rows)} rows in {source}; LongBench has {expected}: figures would not be comparable"
        )
    return rows


def _hub() -> Path:
    need("huggingface_hub")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_REPOSITORY, _ARCHIVE, repo_type="dataset"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"LongBench is not on this machine and the hub did not provide it; fetch it where there is a network with: "
            f"{FETCH}\nand, if it was moved here by hand, name its folder with --data"
        ) from error


def _from_archive(dataset: str, archive: Path) -> tuple[str, bytes]:
    """Return the name and the content of a file in the archive."""
    try:
        with zipfile.ZipFile(archive) as files:
            return f"{str(archive)!r}", files.read(f"data/{dataset}.jsonl")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise EvaluationError(
            f"{str(archive)!r} is not LongBench's archive: {error}; fetch it with: {FETCH}"
        ) from error


def _in_folder(dataset: str, folder: Path) -> tuple[str, bytes]:
    for candidate in (folder / f"{dataset}.jsonl", folder / "data" / f"{dataset}.jsonl"):
        if candidate.is_file():
            return f"{str(candidate)!r}", candidate.read_bytes()
    if (folder / _ARCHIVE).is_file():
        return _from_archive(dataset, folder / _ARCHIVE)
    raise EvaluationError(
        f"{str(folder)!r} holds neither {_ARCHIVE} nor {dataset}.jsonl; fetch them with: {FETCH} --local-dir {folder}"
    )


def is_qmsum(folder: Path | None) -> bool:
    """Tell whether a folder holds QMSum's own test split, as its repository has it."""
    return folder is not None and (folder / _QMSUM_FILE).is_file()


def qmsum_rows(folder: Path) -> list[Mapping[str, Any]]:
    """Return QMSum's test split (Zhong et al. 2021) as LongBench's rows: a row for each query about each meeting.

    Args:
        folder: Folder with QMSum's ``test.jsonl``, one meeting per line.

    Raises:
        EvaluationError: The file is something else.
    """
    path = folder / _QMSUM_FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [row for line in lines if line.strip() for row in _queries(json.loads(line))]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise EvaluationError(f"{str(path)!r} is not QMSum's test split: {type(error).__name__}: {error}") from error


def _queries(meeting: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    said = [f"{turn['speaker']}: {turn['content']}" for turn in meeting["meeting_transcripts"]]
    context = "\n".join(said)
    for asked in (*meeting["general_query_list"], *meeting["specific_query_list"]):
        yield {
            "context": context,
            "input": asked["query"],
            "answers": [asked["answer"]],
            "all_classes": None,
            "length": len(context.split()),
        }


def collect(
    chosen: Sequence[str], folder: Path | None, count: int
) -> dict[str, tuple[str, Sequence[Mapping[str, Any]]]]:
    """Return the rows of several data sets, by the name that their results get.

    From a folder with QMSum's own transcripts ``qmsum`` is taken, under the name :data:`QMSUM_TASK`, and only that.

    Args:
        chosen: Names in :data:`adakv_compile.evaluation.longbench.DATASETS`.
        folder: As for :func:`load_rows`.
        count: First rows of each; 0 for all.

    Returns:
        For each name the data set whose prompt and metric apply, and its rows.

    Raises:
        EvaluationError: A data set isn't there.
    """
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"there is no folder {str(folder)!r}; fetch LongBench with: {FETCH} --local-dir {folder}")
    if folder is not None and is_qmsum(folder) and list(chosen) == ["qmsum"]:
        return {QMSUM_TASK: ("qmsum", _first(qmsum_rows(folder), count))}
    return {dataset: (dataset, _first(load_rows(dataset, folder), count)) for dataset in chosen}


def _first(rows: Sequence[Mapping[str, Any]], count: int) -> Sequence[Mapping[str, Any]]:
    return [rows[index] for index in range(min(count or len(rows), len(rows)))]
