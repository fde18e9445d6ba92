"""One run over an archive: the only module that knows the order of all stages.

What is to be done with each recording is decided from the manifests first; only when something is
left are models loaded. Each result is written, synced and entered in its manifest before the next
one is taken up, so a run can be killed at any time and loses no more than it had in hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from funasr_batch import __version__
from funasr_batch.errors import FileError
from funasr_batch.recognizer import ModelFiles, find_model, load_recognizer
from funasr_batch.records import Source, Transcript
from funasr_batch.rendering import render
from funasr_batch.run.engine import Advanced, Failed, Finished, Started, Unchanged, transcribe_jobs
from funasr_batch.run.manifest import (
    Decision,
    Manifest,
    Output,
    Wanted,
    decide,
    describe_output,
    open_manifest,
    outputs_intact,
)
from funasr_batch.run.progress import FileResult, Reporter, RunSummary
from funasr_batch.run.reading import Job
from funasr_batch.run.stats import FileStats, RunTally, Stage
from funasr_batch.run.stopping import StopRequest
from funasr_batch.run.storage import check_writable, lock_output, publish, sweep_temporaries
from funasr_batch.settings import Settings, recognition_digest, rendering_digest


@dataclass(frozen=True, slots=True)
class Task:
    """A recording with the settings that hold for it."""

    source: Source
    settings: Settings

    @property
    def output_folder(self) -> Path:
        """The folder whose manifest knows it."""
        return self.settings.output_dir or self.source.root

    @property
    def outputs(self) -> dict[str, Path]:
        """The file of each format."""
        stem = self.source.output
        return {name: stem.with_name(f"{stem.name}.{name}") for name in self.settings.format}


def run(
    tasks: Sequence[Task],
    missing: Sequence[tuple[Path, str]],
    *,
    reporter: Reporter,
    stop: StopRequest,
    cache_dir: Path,
) -> RunSummary:
    """Transcribes what is not done yet and writes every output that is wanted.

    `missing` are recordings that were named but cannot be read at all, each with the reason.
    Raises ModelError, StorageError and BusyError; what is wrong with one recording is reported.
    """
    with ExitStack() as stack:
        manifests = {
            folder: _open_output(folder, stack, reporter)
            for folder in dict.fromkeys(task.output_folder for task in tasks)
        }
        return _Run(manifests, reporter, stop, cache_dir).all(tasks, missing)


def _open_output(folder: Path, stack: ExitStack, reporter: Reporter) -> Manifest:
    check_writable(folder)
    stack.enter_context(lock_output(folder))
    sweep_temporaries(folder)
    manifest = stack.enter_context(open_manifest(folder))
    for warning in manifest.warnings:
        reporter.warning(warning)
    return manifest


@dataclass(slots=True)
class _Run:
    """The state of a run, used by one thread."""

    manifests: Mapping[Path, Manifest]
    reporter: Reporter
    stop: StopRequest
    cache_dir: Path
    tally: RunTally = field(default_factory=RunTally)
    failures: list[FileResult] = field(default_factory=list)
    model_load_seconds: float = 0.0
    begun: int = 0
    """Recordings that were given to a model."""

    def all(self, tasks: Sequence[Task], missing: Sequence[tuple[Path, str]]) -> RunSummary:
        started = time.perf_counter()
        runs = {
            manifest: manifest.begin_run(__version__, {"recordings": len(tasks)})
            for manifest in self.manifests.values()
        }
        self.reporter.run_started(len(tasks) + len(missing), None)
        for path, reason in missing:
            self._report(FileResult(path, "failed", reason=reason))
        for group in _by_recognition(tasks):
            if self.stop.is_set():
                break
            self._group(group)
        summary = RunSummary(
            self.tally.result(
                wall_seconds=time.perf_counter() - started - self.model_load_seconds,
                model_load_seconds=self.model_load_seconds,
            ),
            tuple(self.failures),
            exit_code=self._exit_code(),
        )
        for manifest, number in runs.items():
            manifest.end_run(number, summary.stats.as_dict(), summary.exit_code)
        return summary

    def _exit_code(self) -> int:
        if self.stop.signal:
            return 128 + self.stop.signal
        return 1 if self.failures else 0

    def _group(self, tasks: Sequence[Task]) -> None:
        """Recordings that the same model recognises with the same settings."""
        settings = tasks[0].settings
        files = find_model(settings, self.cache_dir)
        want = {task: _wanted(task.settings, files) for task in tasks}
        jobs: dict[Job, Task] = {}
        for task in tasks:
            if self.stop.is_set():
                return
            job = self._start(task, want[task])
            if job is not None:
                jobs[job] = task
        if not jobs:
            return
        loading = time.perf_counter()
        recognizer = load_recognizer(files, settings)
        self.model_load_seconds += time.perf_counter() - loading
        events = transcribe_jobs(
            self._within_limit(jobs, settings.max_files),
            recognizer,
            workers=settings.workers,
            batch_seconds=settings.batch_seconds,
            stop=self.stop,
        )
        for event in events:
            task = jobs[event.job]
            match event:
                case Started():
                    self.reporter.file_started(task.source.relative)
                case Advanced(_, seconds):
                    self.reporter.file_advanced(task.source.relative, seconds)
                case Finished(_, transcript, stats):
                    self._keep(task, want[task], transcript, stats)
                case Unchanged():
                    self._same_content(task, want[task])
                case Failed(_, error, stage):
                    self._fail(task, want[task], error, stage)

    def _within_limit(self, jobs: Iterable[Job], most: int | None) -> list[Job]:
        """As many jobs as `max_files` leaves for this group."""
        chosen = list(islice(jobs, None if most is None else max(0, most - self.begun)))
        self.begun += len(chosen)
        return chosen

    def _start(self, task: Task, want: Wanted) -> Job | None:
        """What is to be read; None when the recording is finished without that."""
        manifest = self.manifests[task.output_folder]
        decision = self._decide(task, want)
        audio, settings = task.source.path, task.settings
        match decision.action:
            case "skip":
                self._skip(task, decision.reason)
                return None
            case "render" if self._render(task, want):
                return None
            case "hash" if self._can_be_finished(task, want):
                entry = manifest.lookup(task.source)
                sha256 = entry.content_sha256 if entry else None
                return Job(audio, sha256, settings.channel, settings.track)
        return Job(audio, None, settings.channel, settings.track)

    def _can_be_finished(self, task: Task, want: Wanted) -> bool:
        """Whether nothing needs recognition if the content is still the same."""
        manifest = self.manifests[task.output_folder]
        entry = manifest.lookup(task.source)
        decision = self._decide(task, want, entry.content_sha256 if entry else None)
        return decision.action == "skip" or manifest.transcript(task.source) is not None

    def _decide(self, task: Task, want: Wanted, content_sha256: str | None = None) -> Decision:
        if task.settings.overwrite:
            return Decision("transcribe", "to be redone")
        entry = self.manifests[task.output_folder].lookup(task.source)
        intact = entry is not None and outputs_intact(entry, task.outputs)
        return decide(task.source, entry, want, intact, content_sha256)

    def _keep(self, task: Task, want: Wanted, transcript: Transcript, stats: FileStats) -> None:
        """Writes the outputs of a new transcript and then enters it in the manifest."""
        manifest = self.manifests[task.output_folder]
        writing = time.perf_counter()
        try:
            outputs = _publish(task, transcript)
        except FileError as error:
            self._fail(task, want, error, "write")
            return
        manifest.record_done(task.source, want, transcript, outputs)
        stages: dict[Stage, float] = {
            **stats.stages,
            "write": time.perf_counter() - writing,
        }
        reason = "; ".join(transcript.warnings) or None
        self._report(
            FileResult(
                task.source.relative, transcript.status, replace(stats, stages=stages), reason
            )
        )

    def _render(self, task: Task, want: Wanted) -> bool:
        """Writes outputs from the kept transcript; False when there is none after all."""
        manifest = self.manifests[task.output_folder]
        transcript = manifest.transcript(task.source)
        if transcript is None:
            return False
        try:
            outputs = _publish(task, transcript)
        except FileError as error:
            self._fail(task, want, error, "write")
            return True
        manifest.record_rendered(task.source, want, outputs)
        self._report(FileResult(task.source.relative, "rendered"))
        return True

    def _same_content(self, task: Task, want: Wanted) -> None:
        """Its time stamps had changed, its content had not."""
        manifest = self.manifests[task.output_folder]
        entry = manifest.lookup(task.source)
        manifest.record_same_content(task.source)
        sha256 = entry.content_sha256 if entry else None
        decision = self._decide(task, want, sha256)
        if decision.action == "render" and self._render(task, want):
            return
        self._skip(task, "same content as before")

    def _skip(self, task: Task, reason: str) -> None:
        self._report(FileResult(task.source.relative, "skipped", reason=reason))

    def _fail(self, task: Task, want: Wanted, error: FileError, stage: Stage) -> None:
        manifest = self.manifests[task.output_folder]
        manifest.record_failed(task.source, want, task.settings.model, error, stage)
        reason = str(error) if error.hint is None else f"{error} ({error.hint})"
        self._report(FileResult(task.source.relative, "failed", reason=reason))
        if task.settings.fail_fast:
            self.stop.set()

    def _report(self, result: FileResult) -> None:
        self.tally.add(result.outcome, result.stats)
        if result.outcome in ("failed", "partial"):
            self.failures.append(result)
        self.reporter.file_finished(result)


def _by_recognition(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks grouped by what recognises them, so that one model is in memory at a time."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(recognition_digest(task.settings), []).append(task)
    return list(groups.values())


def _wanted(settings: Settings, files: ModelFiles) -> Wanted:
    return Wanted(
        recognition=recognition_digest(settings),
        rendering=rendering_digest(settings),
        weights_sha256=files.digest,
        formats=settings.format,
    )


def _publish(task: Task, transcript: Transcript) -> list[Output]:
    """Writes all outputs of a recording together. Raises StorageError."""
    contents = render(transcript, task.settings)
    outputs = task.outputs
    # JSON first: who sees a subtitle finds the JSON beside it.
    order = sorted(contents, key=lambda name: name != "json")
    publish({outputs[name]: contents[name] for name in order})
    return [describe_output(name, outputs[name], data) for name, data in contents.items()]
