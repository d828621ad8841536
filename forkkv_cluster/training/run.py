"""One training from files to files: what ``forkkv train-adapter`` does, without a terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.training.examples import ExampleFile, read_examples
from forkkv_cluster.training.lora_model import TEACHER, LoraModel, LoraShape, load_tokenizer, open_model, save_adapter
from forkkv_cluster.training.teacher import complete
from forkkv_cluster.training.terminal import OnProgress
from forkkv_cluster.training.trainer import Quality, Trainer, TrainingResult, TrainingSettings


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """``shape`` None: the teacher's own, whose copy the student starts as. ``eval_data`` is measured before and after."""

    model_dir: Path
    data: Path
    out: Path
    settings: TrainingSettings = field(default_factory=TrainingSettings)
    shape: LoraShape | None = None
    teacher_dir: Path | None = None
    eval_data: Path | None = None
    completion_tokens: int = 64
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What came of it. ``quality`` by who and under what, of ``eval_data``; losses are means over a tenth of the steps."""

    directory: str
    trained_for: Sharing
    learnt_from: str
    num_steps: int
    num_contexts: int
    num_branches: int
    num_tokens: int
    seconds: float
    first_loss: float
    last_loss: float
    quality: dict[str, Quality]


def train_adapter(job: TrainingJob, on_progress: OnProgress = lambda *_: None) -> TrainingReport:
    """Read, train, measure, write ``job.out``. Raises InvalidArgument, Unsupported or FailedPrecondition."""
    if job.out.exists() and any(job.out.iterdir()):
        raise InvalidArgument("out", str(job.out), "is not empty", "Name a new directory.")
    job.settings.validate()
    on_progress("loading the model", 0, 1, str(job.model_dir))
    sharing = job.settings.sharing
    model = open_model(
        job.model_dir, sharing, shape=job.shape, teacher_dir=job.teacher_dir, device=job.device, dtype=job.dtype,
        seed=job.settings.seed,
    )  # fmt: skip
    on_progress("loading the model", 1, 1, str(job.model_dir))
    data = _examples(job, job.data, model, on_progress)
    held_out = _examples(job, job.eval_data, model, on_progress) if job.eval_data is not None else None
    trainer = Trainer(model, job.settings)
    quality = _quality_before(trainer, held_out, model.has_teacher)
    result = trainer.train(data.contexts, lambda done, total, loss: on_progress("training", done, total, f"loss {loss:.4f}"))
    if held_out is not None:
        quality[f"trained, {sharing}"] = trainer.evaluate(held_out.contexts)
    report = _report(job, data, result, quality)
    save_adapter(model, job.out, sharing, _provenance(job, data, report))
    return report


def _examples(job: TrainingJob, path: Path, model: LoraModel, on_progress: OnProgress) -> ExampleFile:
    """The file, with the teacher's completions where it has none."""
    read = read_examples(
        path,
        load_tokenizer(model.model_dir),
        vocab_size=model.config.vocab_size,
        max_len=model.max_len,
        has_completions=not model.has_teacher,
    )
    if not model.has_teacher:
        return read
    contexts = complete(
        model,
        read.contexts,
        max_tokens=job.completion_tokens,
        on_completed=lambda done, total: on_progress("completing", done, total, path.name),
    )
    return ExampleFile(tuple(contexts), read.digest)


def _quality_before(trainer: Trainer, held_out: ExampleFile | None, has_teacher: bool) -> dict[str, Quality]:
    if held_out is None:
        return {}
    before = {"untrained": trainer.evaluate(held_out.contexts)}
    if has_teacher:
        before["teacher, isolated"] = trainer.evaluate(held_out.contexts, Sharing.ISOLATED, TEACHER)
        before["teacher, as shared"] = trainer.evaluate(held_out.contexts, None, TEACHER)
    return before


def _report(job: TrainingJob, data: ExampleFile, result: TrainingResult, quality: dict[str, Quality]) -> TrainingReport:
    tenth = max(1, len(result.losses) // 10)
    return TrainingReport(
        directory=str(job.out),
        trained_for=job.settings.sharing,
        learnt_from=f"{job.teacher_dir}, isolated" if job.teacher_dir is not None else "completions",
        num_steps=len(result.losses),
        num_contexts=len(data.contexts),
        num_branches=data.num_branches,
        num_tokens=result.num_tokens,
        seconds=result.seconds,
        first_loss=fmean(result.losses[:tenth]),
        last_loss=fmean(result.losses[-tenth:]),
        quality=quality,
    )


def _provenance(job: TrainingJob, data: ExampleFile, report: TrainingReport) -> dict[str, Any]:
    """How the adapter came to be, for its reader: no path of this machine, and no time."""
    return {
        "base_model": job.model_dir.name,
        "learnt_from": "the isolated outputs of " + job.teacher_dir.name if job.teacher_dir is not None else "completions",
        "data": {"name": job.data.name, "sha256": data.digest, "contexts": report.num_contexts, "branches": data.num_branches},
        "steps": report.num_steps,
        "first_loss": report.first_loss,
        "last_loss": report.last_loss,
        "settings": asdict(job.settings),
        "quality": {name: asdict(quality) for name, quality in report.quality.items()},
    }
