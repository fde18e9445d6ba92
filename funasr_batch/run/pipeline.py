"""One run over an archive: the only module that knows the order of all stages.

What is to be done with each recording is decided from the manifests first; only when something is
left are models loaded. Each result is written, synced and entered in its manifest before the next
one is taken up, so a run can be killed at any time and loses no more than it had in hand.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath

from funasr_batch import __version__
from funasr_batch.cpu import SLOW_BLAS_ADVICE, prepare_cpu
from funasr_batch.errors import FileError, FunasrBatchError, StorageError
from funasr_batch.loading import Networks, load_recognizer
from funasr_batch.model_files import ModelFiles, find_model
from funasr_batch.recognizer import Recognizer
from funasr_batch.records import Source, Transcript
from funasr_batch.rendering import render
from funasr_batch.run.engine import Advanced, Failed, Finished, Heard, Started, transcribe_jobs
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
from funasr_batch.run.storage import (
    check_writable,
    file_digest,
    lock_output,
    publish,
    sweep_temporaries,
)
from funasr_batch.settings import Settings, recognition_digest, rendering_digest


@dataclass(frozen=True, slots=True, eq=False)
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
    Raises ModelError, StorageError, BusyError, and UsageError for an output folder that cannot be
    one; what is wrong with one recording is reported.
    """
    with ExitStack() as stack:
        manifests = {
            folder: _open_output(folder, stack, reporter)
            for folder in dict.fromkeys(task.output_folder for task in tasks)
        }
        groups = _by_model(
            [_prepare(group, manifests, cache_dir) for group in _by_recognition(tasks)]
        )
        base = Path(os.path.commonpath({task.source.root for task in tasks}))
        return _Run(tuple(manifests.values()), base, reporter, stop).all(groups, missing)


def _open_output(folder: Path, stack: ExitStack, reporter: Reporter) -> Manifest:
    check_writable(folder)
    stack.enter_context(lock_output(folder))
    sweep_temporaries(folder)
    manifest = stack.enter_context(open_manifest(folder))
    for warning in manifest.warnings:
        reporter.warning(warning)
    return manifest


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A task and what the run needs beside it."""

    task: Task
    want: Wanted
    manifest: Manifest

    @property
    def source(self) -> Source:
        return self.task.source


@dataclass(frozen=True, slots=True)
class _Group:
    """Recordings that one model recognises with the same settings."""

    files: ModelFiles
    settings: Settings
    items: Sequence[_Item]


def _by_recognition(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks grouped by what recognises them, so that one model is in memory at a time."""
    digests = {settings: recognition_digest(settings) for settings in _settings_of(tasks)}
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(digests[task.settings], []).append(task)
    return list(groups.values())


def _by_model(groups: Sequence[_Group]) -> list[_Group]:
    """The groups in an order in which every model is loaded once: those that share one in a row."""
    first: dict[str, int] = {}
    for group in groups:
        first.setdefault(group.files.asr.weights_sha256, len(first))
    return sorted(groups, key=lambda group: first[group.files.asr.weights_sha256])


def _prepare(tasks: Sequence[Task], manifests: Mapping[Path, Manifest], cache_dir: Path) -> _Group:
    settings = tasks[0].settings
    files = find_model(settings, cache_dir)
    wants = {settings: _wanted(settings, files) for settings in _settings_of(tasks)}
    items = [_Item(task, wants[task.settings], manifests[task.output_folder]) for task in tasks]
    return _Group(files, settings, items)


def _settings_of(tasks: Iterable[Task]) -> set[Settings]:
    """Few different ones stand for very many recordings, so digests are made once for each."""
    return {task.settings for task in tasks}


def _wanted(settings: Settings, files: ModelFiles) -> Wanted:
    return Wanted(
        recognition=recognition_digest(settings),
        rendering=rendering_digest(settings),
        weights_sha256=files.digest,
        formats=settings.format,
    )


@dataclass(slots=True)
class _Run:
    """The state of a run, used by one thread."""

    manifests: Sequence[Manifest]
    base: Path
    """The folder that all inputs have in common; recordings are named from there."""
    reporter: Reporter
    stop: StopRequest
    tally: RunTally = field(default_factory=RunTally)
    failures: list[FileResult] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    networks: Networks = field(default_factory=Networks)
    warned: set[str] = field(default_factory=set)
    model_load_seconds: float = 0.0
    begun: int = 0
    """Recordings that were given to a model."""

    def all(self, groups: Sequence[_Group], missing: Sequence[tuple[Path, str]]) -> RunSummary:
        files = sum(len(group.items) for group in groups) + len(missing)
        about = {"recordings": files}
        runs = [manifest.begin_run(__version__, about) for manifest in self.manifests]
        self.reporter.run_started(files, None)
        try:
            self._missing(missing, groups[0].settings)
            for group in groups:
                self._group(group)
        except BaseException as error:
            self.stop.set()  # for the readers
            code = (error if isinstance(error, FunasrBatchError) else FunasrBatchError).exit_code
            with suppress(StorageError):  # what ended the run says more
                self._end(runs, files, code)
            raise
        return self._end(runs, files, self._exit_code())

    def _end(self, runs: Sequence[int], files: int, exit_code: int) -> RunSummary:
        loading = self.model_load_seconds
        stats = self.tally.result(
            wall_seconds=time.perf_counter() - self.started - loading, model_load_seconds=loading
        )
        summary = RunSummary(stats, tuple(self.failures), exit_code, left=files - stats.files)
        self.reporter.run_finished(summary)
        for manifest, number in zip(self.manifests, runs, strict=True):
            manifest.end_run(number, stats.as_dict(), exit_code)
        return summary

    def _exit_code(self) -> int:
        if self.stop.signal:
            return 128 + self.stop.signal
        return 1 if self.failures else 0

    def _missing(self, missing: Sequence[tuple[Path, str]], settings: Settings) -> None:
        for path, reason in missing:
            self._report(FileResult(path, "failed", reason=reason))
            if settings.fail_fast:
                self.stop.set()
                break

    def _group(self, group: _Group) -> None:
        jobs = self._plan(group)
        if not jobs or self.stop.is_set():
            return
        recognizer = self._load(group)
        settings = group.settings
        events = transcribe_jobs(
            jobs,
            recognizer,
            workers=settings.workers,
            batch_seconds=settings.batch_seconds,
            stop=self.stop,
        )
        for event in events:
            item = jobs[event.job]
            match event:
                case Started():
                    self.reporter.file_started(self._shown(item))
                case Advanced(_, seconds):
                    self.reporter.file_advanced(self._shown(item), seconds)
                case Heard(_, segment):
                    self.reporter.file_heard(self._shown(item), segment)
                case Finished(_, transcript, stats):
                    self._keep(item, transcript, stats)
                case Failed(_, error, stage):
                    self._fail(item, error, stage)

    def _plan(self, group: _Group) -> dict[Job, _Item]:
        """What is left to recognise; all else is finished here."""
        settings = group.settings
        jobs: dict[Job, _Item] = {}
        for item in group.items:
            if self.stop.is_set():
                break
            if not self._needs_recognition(item) or self.begun == settings.max_files:
                continue
            jobs[Job(item.source.path, channel=settings.channel, track=settings.track)] = item
            self.begun += 1
        return jobs

    def _load(self, group: _Group) -> Recognizer:
        started = time.perf_counter()
        blas = prepare_cpu()
        recognizer = load_recognizer(group.files, group.settings, self.networks)
        for warning in recognizer.warnings:
            if warning not in self.warned:
                self.warned.add(warning)
                self.reporter.warning(warning)
        if recognizer.device == "cpu" and not blas.is_fast and not self.model_load_seconds:
            self.reporter.warning(SLOW_BLAS_ADVICE)
        self.model_load_seconds += time.perf_counter() - started
        return recognizer

    def _needs_recognition(self, item: _Item) -> bool:
        """Whether a recording must be recognised; if not, it is finished on the way."""
        decision = self._decide(item)
        if decision.action == "hash":
            try:
                decision = self._compare_content(item)
            except FileError as error:
                self._fail(item, error, "decode")
                return False
        match decision.action:
            case "skip":
                self._report(FileResult(self._shown(item), "skipped", reason=decision.reason))
                return False
            case "render":
                return not self._render(item)
        return True

    def _compare_content(self, item: _Item) -> Decision:
        """Its time or place changed: the decision once its content is known."""
        decision = self._decide(item, file_digest(item.source.path))
        if decision.action != "transcribe":
            item.manifest.record_same_content(item.source)
        return decision

    def _decide(self, item: _Item, content_sha256: str | None = None) -> Decision:
        if item.task.settings.overwrite:
            return Decision("transcribe", "to be redone")
        entry = item.manifest.lookup(item.source)
        intact = entry is not None and outputs_intact(entry, item.task.outputs)
        return decide(item.source, entry, item.want, intact, content_sha256)

    def _keep(self, item: _Item, transcript: Transcript, stats: FileStats) -> None:
        """Writes the outputs of a new transcript and then enters it in the manifest."""
        writing = time.perf_counter()
        try:
            outputs = _publish(item.task, transcript)
        except FileError as error:
            self._fail(item, error, "write")
            return
        item.manifest.record_done(item.source, item.want, transcript, outputs)
        stages: dict[Stage, float] = {**stats.stages, "write": time.perf_counter() - writing}
        stats = replace(stats, stages=stages)
        reason = "; ".join(transcript.warnings) or None
        self._report(FileResult(self._shown(item), transcript.status, stats, reason))

    def _render(self, item: _Item) -> bool:
        """Writes outputs from the kept transcript; False when there is none after all."""
        transcript = item.manifest.transcript(item.source)
        if transcript is None:
            return False
        try:
            outputs = _publish(item.task, transcript)
        except FileError as error:
            self._fail(item, error, "write")
            return True
        item.manifest.record_rendered(item.source, item.want, outputs)
        self._report(FileResult(self._shown(item), "rendered"))
        return True

    def _fail(self, item: _Item, error: FileError, stage: Stage) -> None:
        settings = item.task.settings
        item.manifest.record_failed(item.source, item.want, settings.model, error, stage)
        # The report names the recording already.
        message = str(error).removeprefix(f"{item.source.path}: ")
        reason = f"{message}. {error.hint}" if error.hint else message
        self._report(FileResult(self._shown(item), "failed", reason=reason))
        if settings.fail_fast:
            self.stop.set()

    def _report(self, result: FileResult) -> None:
        self.tally.add(result.outcome, result.stats)
        if result.outcome in ("failed", "partial"):
            self.failures.append(result)
        self.reporter.file_finished(result)

    def _shown(self, item: _Item) -> PurePath:
        return item.source.path.relative_to(self.base)


def _publish(task: Task, transcript: Transcript) -> list[Output]:
    """Writes all outputs of a recording together. Raises StorageError, and FileError when only
    this recording's cannot be written."""
    try:
        contents = render(transcript, task.settings, task.source.output.parent)
    except Exception as error:  # a fault of ours costs one recording, like one of its own
        kind = type(error).__name__
        raise FileError(
            f"its transcript cannot be laid out ({kind}: {error})", hint="Please report this."
        ) from error
    # JSON first: who sees a subtitle finds the JSON beside it.
    order = sorted(contents, key=lambda name: name != "json")
    publish({task.outputs[name]: contents[name] for name in order})
    return [describe_output(name, task.outputs[name], data) for name, data in contents.items()]
