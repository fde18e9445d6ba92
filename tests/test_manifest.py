"""The manifest: what it keeps, what it decides, and how it survives damage."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from funasr_batch.errors import AudioError, BusyError, StorageError, UsageError, VanishedError
from funasr_batch.records import (
    ModelInfo,
    Source,
    SourceInfo,
    TextSegment,
    Token,
    Transcript,
    Word,
)
from funasr_batch.run.manifest import (
    MANIFEST_NAME,
    Decision,
    Entry,
    Failure,
    Manifest,
    Output,
    Wanted,
    decide,
    describe_output,
    open_manifest,
    outputs_intact,
    read_manifest,
)
from funasr_batch.run.storage import STATE_FOLDER, file_digest, write_atomically
from funasr_batch.run.transcript_json import from_dict, pack, to_dict, unpack

WANT = Wanted("recognition", "rendering", "weights", ("json", "srt"))


def an_hour_ago() -> int:
    return time.time_ns() - 3600 * 10**9


def make_source(folder: Path, name: str = "talk.wav", content: bytes = b"audio") -> Source:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, ns=(an_hour_ago(), an_hour_ago()))
    return stat_source(folder, name)


def stat_source(folder: Path, name: str = "talk.wav") -> Source:
    path = folder / name
    status = path.stat()
    relative = PurePath(name)
    return Source(path, folder, relative, path, status.st_size, status.st_mtime_ns, status.st_ino)


def make_transcript(source: Source, text: str = "你好 world") -> Transcript:
    return Transcript(
        source=SourceInfo(str(source.path), file_digest(source.path), 12.5, 44100, 2),
        model=ModelInfo("paraformer", None, WANT.weights_sha256),
        settings_digest=WANT.recognition,
        language="zh",
        segments=(
            TextSegment(0, 120, 900, text, "cif", (Token("你", 120, 300, 0.987654321),), ("x",)),
            TextSegment(1, 900, 1300, "吗？", "vad", words=(Word("吗？", 0.25),)),
        ),
        status="done",
        warnings=("a warning",),
        stats={"audio_seconds": 12.5, "wall_seconds": 0.25, "stages": {"encode": 0.125}},
    )


def paths_of(source: Source) -> dict[str, Path]:
    return {format: Path(f"{source.output}.{format}") for format in WANT.formats}


def finish(manifest: Manifest, source: Source) -> tuple[Output, ...]:
    """What a run does with a recording, without the recognition."""
    outputs = []
    for format, path in paths_of(source).items():
        data = f"{format} of {source.relative}".encode("utf-8", "surrogateescape")
        write_atomically(path, data)
        outputs.append(describe_output(format, path, data))
    manifest.record_done(source, WANT, make_transcript(source), outputs)
    return tuple(outputs)


def plan(manifest: Manifest, source: Source, want: Wanted = WANT) -> Decision:
    """What a run does before the recognition."""
    entry = manifest.lookup(source)
    intact = entry is not None and outputs_intact(entry, paths_of(source))
    decision = decide(source, entry, want, intact)
    if decision.action == "hash":
        return decide(source, entry, want, intact, file_digest(source.path))
    return decision


@pytest.fixture
def manifest(tmp_path: Path) -> Iterator[Manifest]:
    with open_manifest(tmp_path) as opened:
        yield opened


class TestKeeping:
    def test_all_is_there_again_after_reopening(self, tmp_path: Path, manifest: Manifest) -> None:
        source = make_source(tmp_path)
        outputs = finish(manifest, source)
        kept = manifest.lookup(source)
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            entry = reopened.lookup(source)
            assert entry == kept
            assert reopened.all_entries() == (entry,)
            assert reopened.transcript(source) == make_transcript(source)
            assert reopened.warnings == ()
        assert entry is not None
        assert entry.outputs == outputs
        assert entry.path == b"talk.wav"
        assert (entry.status, entry.failure, entry.attempts) == ("done", None, 0)
        assert (entry.model, entry.audio_seconds, entry.wall_seconds) == ("paraformer", 12.5, 0.25)
        assert entry.content_sha256 == file_digest(source.path)

    def test_nothing_is_known_of_another_recording(
        self, tmp_path: Path, manifest: Manifest
    ) -> None:
        finish(manifest, make_source(tmp_path))
        other = make_source(tmp_path, "other.wav")
        assert manifest.lookup(other) is None
        assert manifest.transcript(other) is None

    def test_a_failure_is_kept_with_class_message_stage_and_count(
        self, tmp_path: Path, manifest: Manifest
    ) -> None:
        source = make_source(tmp_path)
        finish(manifest, source)
        for attempt in (1, 2):
            manifest.record_failed(source, WANT, "nano", AudioError("no audio track"), "decode")
            entry = manifest.lookup(source)
            assert entry is not None
            assert entry.status == "failed"
            assert entry.failure == Failure("AudioError", "no audio track", "decode")
            assert (entry.attempts, entry.model, entry.outputs) == (attempt, "nano", ())
        assert manifest.transcript(source) is None, "of the old content, perhaps"
        finish(manifest, source)
        entry = manifest.lookup(source)
        assert entry is not None
        assert (entry.attempts, entry.failure) == (0, None)

    @pytest.mark.parametrize("name", [b"\xff\xfe.wav", b"a\nb.wav", "录音/é.wav".encode(), b"-'\""])
    def test_any_name(self, tmp_path: Path, manifest: Manifest, name: bytes) -> None:
        source = make_source(tmp_path, os.fsdecode(name))
        outputs = finish(manifest, source)
        manifest.record_failed(
            make_source(tmp_path, "gone.wav"), WANT, os.fsdecode(name), VanishedError(str(source)),
            "decode",
        )  # fmt: skip
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            entry = reopened.lookup(source)
            assert reopened.transcript(source) == make_transcript(source)
            assert len(reopened.all_entries()) == 2
        assert entry is not None
        assert entry.path == name
        assert entry.outputs == outputs

    def test_equal_names_under_two_roots_are_two_recordings(self, tmp_path: Path) -> None:
        one = make_source(tmp_path / "one")
        two = make_source(tmp_path / "two")
        with open_manifest(tmp_path / "out") as manifest:
            finish(manifest, one)
            assert manifest.lookup(two) is None
            finish(manifest, two)
            assert {entry.path for entry in manifest.all_entries()} == {
                b"../one/talk.wav",
                b"../two/talk.wav",
            }

    def test_an_archive_that_moved_as_a_whole_is_still_known(self, tmp_path: Path) -> None:
        source = make_source(tmp_path / "before", "deep/talk.wav")
        with open_manifest(tmp_path / "before") as manifest:
            finish(manifest, source)
        (tmp_path / "before").rename(tmp_path / "after")
        moved = stat_source(tmp_path / "after", "deep/talk.wav")
        with open_manifest(tmp_path / "after") as manifest:
            assert plan(manifest, moved).action == "skip"

    def test_numbers_beyond_64_bits(self, tmp_path: Path, manifest: Manifest) -> None:
        source = replace(make_source(tmp_path), inode=2**64 - 1, mtime_ns=2**63 + 5)
        finish(manifest, source)
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            assert reopened.lookup(source) is not None

    def test_runs(self, tmp_path: Path, manifest: Manifest) -> None:
        first = manifest.begin_run("0.1", {"model": "nano"})
        manifest.end_run(first, {"files": 3}, 1)
        second = manifest.begin_run("0.2", {})
        manifest.close()
        rows = sqlite3.connect(tmp_path / STATE_FOLDER / MANIFEST_NAME).execute(
            "SELECT id, tool_version, settings, totals, exit_code, ended_ns >= started_ns FROM runs"
        )
        assert rows.fetchall() == [
            (first, "0.1", '{"model": "nano"}', '{"files": 3}', 1, 1),
            (second, "0.2", "{}", None, None, None),
        ]

    def test_it_is_as_durable_as_sqlite_offers(self, tmp_path: Path, manifest: Manifest) -> None:
        connection = manifest._connection
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,), "FULL"
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        expected = int(sys.platform == "darwin")
        assert connection.execute("PRAGMA fullfsync").fetchone() == (expected,)

    @pytest.mark.parametrize("count", [3, 1000])
    def test_a_second_run_costs_one_query_however_many_are_done(
        self, tmp_path: Path, count: int
    ) -> None:
        source = make_source(tmp_path)
        with open_manifest(tmp_path) as manifest:
            outputs = finish(manifest, source)
            entry = manifest.lookup(source)
            assert entry is not None
            with manifest._transaction():
                for number in range(count):
                    manifest._store(replace(entry, path=b"%d.wav" % number), "{}")
        with open_manifest(tmp_path) as manifest:
            statements: list[str] = []
            manifest._connection.set_trace_callback(statements.append)
            for number in range(count):
                again = replace(source, relative=PurePath(f"{number}.wav"))
                found = manifest.lookup(again)
                assert found is not None
                assert found.outputs == outputs
                intact = outputs_intact(found, paths_of(source))
                assert decide(again, found, WANT, intact).action == "skip"
            assert statements == []


class TestDeciding:
    """Each case over real files, through `plan`."""

    @pytest.fixture
    def source(self, tmp_path: Path, manifest: Manifest) -> Source:
        source = make_source(tmp_path)
        finish(manifest, source)
        return source

    def test_new(self, tmp_path: Path, manifest: Manifest) -> None:
        assert plan(manifest, make_source(tmp_path)) == Decision("transcribe", "not done yet")

    def test_done(self, manifest: Manifest, source: Source) -> None:
        assert plan(manifest, source) == Decision("skip", "done, nothing changed")

    def test_done_is_decided_without_reading_the_recording(
        self, manifest: Manifest, source: Source
    ) -> None:
        entry = manifest.lookup(source)
        assert decide(source, entry, WANT, True).action == "skip"

    def test_failed_before(self, manifest: Manifest, source: Source) -> None:
        manifest.record_failed(source, WANT, "nano", AudioError("no audio track"), "decode")
        assert plan(manifest, source) == Decision("transcribe", "failed before: no audio track")

    @pytest.mark.parametrize(
        ("field", "value", "action", "word"),
        [
            ("recognition", "other", "transcribe", "recognition"),
            ("weights_sha256", "other", "transcribe", "weights"),
            ("rendering", "other", "render", "outputs"),
            ("formats", ("json", "srt", "vtt"), "render", "vtt"),
            ("formats", ("json",), "skip", "nothing"),
        ],
    )
    def test_changed_settings(
        self, manifest: Manifest, source: Source, field: str, value: object, action: str, word: str
    ) -> None:
        decision = plan(manifest, source, replace(WANT, **{field: value}))
        assert decision.action == action
        assert word in decision.reason

    def test_touched_is_found_the_same_and_remembered(
        self, tmp_path: Path, manifest: Manifest, source: Source
    ) -> None:
        os.utime(source.path, ns=(0, an_hour_ago() - 10**12))
        touched = stat_source(tmp_path)
        entry = manifest.lookup(touched)
        assert decide(touched, entry, WANT, True).action == "hash"
        assert plan(manifest, touched).action == "skip"
        manifest.record_same_content(touched)
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            assert decide(touched, reopened.lookup(touched), WANT, True).action == "skip"
            assert reopened.transcript(touched) == make_transcript(touched), "is kept"

    def test_replaced_by_a_copy_with_the_same_time(
        self, tmp_path: Path, manifest: Manifest, source: Source
    ) -> None:
        shutil.copy2(source.path, tmp_path / "copy")
        (tmp_path / "copy").replace(source.path)
        copied = stat_source(tmp_path)
        assert decide(copied, manifest.lookup(copied), WANT, True).action == "hash"
        assert plan(manifest, copied).action == "skip"

    def test_other_content_of_the_same_size(
        self, tmp_path: Path, manifest: Manifest, source: Source
    ) -> None:
        source.path.write_bytes(b"AUDIO")
        assert plan(manifest, stat_source(tmp_path)).action == "transcribe"

    def test_another_size_is_known_without_reading(
        self, tmp_path: Path, manifest: Manifest, source: Source
    ) -> None:
        source.path.write_bytes(b"longer audio")
        changed = stat_source(tmp_path)
        decision = decide(changed, manifest.lookup(changed), WANT, True)
        assert decision == Decision("transcribe", "the recording changed")

    @pytest.mark.parametrize("age_ns", [-(10**12), 0, 10**9])
    def test_a_file_that_was_new_or_of_the_future_when_it_was_read_is_not_trusted_by_its_time(
        self, tmp_path: Path, manifest: Manifest, age_ns: int
    ) -> None:
        make_source(tmp_path)
        now = time.time_ns()
        os.utime(tmp_path / "talk.wav", ns=(now, now - age_ns))
        source = stat_source(tmp_path)
        finish(manifest, source)
        assert decide(source, manifest.lookup(source), WANT, True).action == "hash"
        assert plan(manifest, source).action == "skip"

    @pytest.mark.parametrize("how", ["deleted", "cut", "edited", "a link", "a folder"])
    def test_an_output_that_is_not_what_was_written(
        self, tmp_path: Path, manifest: Manifest, source: Source, how: str
    ) -> None:
        path = paths_of(source)["srt"]
        data = path.read_bytes()
        path.unlink()
        if how == "cut":
            path.write_bytes(data[:-1])
        elif how == "edited":
            path.write_bytes(data.swapcase())
        elif how == "a link":
            (tmp_path / "elsewhere").write_bytes(data)
            path.symlink_to(tmp_path / "elsewhere")
        elif how == "a folder":
            path.mkdir()
        decision = plan(manifest, source)
        assert decision.action == "render"
        assert "output" in decision.reason

    def test_an_output_that_was_only_touched_or_restored(
        self, manifest: Manifest, source: Source
    ) -> None:
        os.utime(paths_of(source)["srt"], ns=(0, 0))
        assert plan(manifest, source).action == "skip"

    def test_outputs_wanted_in_another_place(self, manifest: Manifest, source: Source) -> None:
        entry = manifest.lookup(source)
        assert entry is not None
        elsewhere = {"json": paths_of(source)["json"], "srt": Path("/elsewhere/talk.wav.srt")}
        assert not outputs_intact(entry, elsewhere)

    def test_rendering_again(self, tmp_path: Path, manifest: Manifest, source: Source) -> None:
        path = tmp_path / "talk.wav.vtt"
        write_atomically(path, b"WEBVTT")
        want = replace(WANT, rendering="other", formats=("vtt",))
        manifest.record_rendered(source, want, [describe_output("vtt", path, b"WEBVTT")])
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            entry = reopened.lookup(source)
            assert entry is not None
            assert [output.format for output in entry.outputs] == ["vtt"]
            assert decide(source, entry, want, outputs_intact(entry, {"vtt": path})).action == (
                "skip"
            )
            assert reopened.transcript(source) == make_transcript(source)
            stats = reopened._connection.execute("SELECT stats FROM recordings").fetchone()
            assert json.loads(stats[0]) == make_transcript(source).stats, "are kept"

    @given(
        st.sampled_from(["size", "mtime_ns", "inode"]),
        st.integers(-(2**63), 2**63 - 1),
        st.booleans(),
    )
    def test_any_difference_in_the_stat_is_never_skipped_unread(
        self, field: str, value: int, intact: bool
    ) -> None:
        source = Source(Path("/a"), Path("/"), PurePath("a"), Path("/a"), 5, 10, 15)
        entry = Entry(
            b"a", 5, 10, 15, 10**18, "00", WANT.recognition, WANT.rendering, WANT.weights_sha256,
            "m", "done", None, 0, 1.0, 1.0, 0,
            tuple(Output(f, "/o", 1, 1, "") for f in WANT.formats),
        )  # fmt: skip
        changed = replace(source, **{field: value})
        action = decide(changed, entry, WANT, intact).action
        if changed == source:
            assert action == ("skip" if intact else "render")
        else:
            assert action == ("transcribe" if field == "size" else "hash")


class TestDamage:
    COUNT = 6

    @pytest.fixture
    def archive(self, tmp_path: Path) -> tuple[Path, list[Source], bytes]:
        """A folder with some recordings done, and the bytes of its manifest."""
        sources = [make_source(tmp_path, f"{n}.wav", b"audio %d" % n) for n in range(self.COUNT)]
        with open_manifest(tmp_path) as manifest:
            run = manifest.begin_run("0.1", {})
            for source in sources:
                finish(manifest, source)
            manifest.end_run(run, {}, 0)
        path = tmp_path / STATE_FOLDER / MANIFEST_NAME
        return path, sources, path.read_bytes()

    def survive(self, path: Path, sources: list[Source]) -> tuple[int, tuple[str, ...]]:
        """A run over a damaged manifest: what is skipped is right, the rest can be done again."""
        folder = path.parent.parent
        skipped = 0
        with open_manifest(folder) as manifest:
            for source in sources:
                entry = manifest.lookup(source)
                if plan(manifest, source).action == "skip":
                    assert entry is not None
                    assert entry.content_sha256 == file_digest(source.path)
                    skipped += 1
                transcript = manifest.transcript(source)
                assert transcript in (None, make_transcript(source))
            warnings = manifest.warnings
            finish(manifest, sources[-1])
        with open_manifest(folder) as manifest:
            assert plan(manifest, sources[-1]).action == "skip"
            assert manifest.warnings == ()
        return skipped, warnings

    def test_cut_at_every_page_and_inside_pages(
        self, archive: tuple[Path, list[Source], bytes]
    ) -> None:
        path, sources, data = archive
        lengths = [2, 15, 99, 100, 511, *range(4096, len(data), 4096)]
        for length in lengths:
            path.write_bytes(data[:length])
            skipped, warnings = self.survive(path, sources)
            assert skipped == 0, length
            assert len(warnings) == 1, length
            assert "damaged-" in warnings[0]
        path.write_bytes(data[:-1])  # SQLite reads the missing end of a page as zeros
        self.survive(path, sources)
        kept = {file.name for file in path.parent.glob(f"{MANIFEST_NAME}.damaged-*")}
        assert kept == {f"{MANIFEST_NAME}.damaged-{n + 1}" for n in range(len(lengths))}
        assert (path.parent / f"{MANIFEST_NAME}.damaged-1").read_bytes() == data[:2]

    def test_empty_or_deleted(self, archive: tuple[Path, list[Source], bytes]) -> None:
        path, sources, _ = archive
        for content in (b"", b"S"):  # SQLite takes a file of one byte for an empty one
            path.write_bytes(content)
            assert self.survive(path, sources)[0] == 0
        path.unlink()
        assert self.survive(path, sources)[0] == 0

    @pytest.mark.parametrize("count", [512, 4096, 10**6])
    def test_zeroed_at_the_end(self, archive: tuple[Path, list[Source], bytes], count: int) -> None:
        path, sources, data = archive
        count = min(count, len(data))
        path.write_bytes(data[:-count] + bytes(count))
        self.survive(path, sources)

    def test_each_page_zeroed(self, archive: tuple[Path, list[Source], bytes]) -> None:
        path, sources, data = archive
        for start in range(0, len(data), 4096):
            path.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
            self.survive(path, sources)

    def test_flipped_bits(self, archive: tuple[Path, list[Source], bytes]) -> None:
        path, sources, data = archive
        draw = random.Random(4)
        for _ in range(40):
            damaged = bytearray(data)
            damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            self.survive(path, sources)

    def test_a_flipped_bit_in_an_entry_costs_that_entry_alone(
        self, archive: tuple[Path, list[Source], bytes]
    ) -> None:
        path, sources, data = archive
        digest = file_digest(sources[3].path).encode()
        assert data.count(digest) == 1, "the transcript holds it only compressed"
        path.write_bytes(data.replace(digest, b"f" * 64))
        skipped, warnings = self.survive(path, sources)
        assert skipped == self.COUNT - 1
        assert warnings == ("damaged entries in the manifest: 1; those are done again",)

    @pytest.mark.parametrize("exit_code", [None, 5])
    def test_after_a_run_that_ended_badly_a_large_manifest_is_examined_too(
        self,
        archive: tuple[Path, list[Source], bytes],
        monkeypatch: pytest.MonkeyPatch,
        exit_code: int | None,
    ) -> None:
        path, sources, _ = archive
        monkeypatch.setattr("funasr_batch.run.manifest._ALWAYS_EXAMINED_BYTES", 0)
        with open_manifest(path.parent.parent) as manifest:
            (root,) = manifest._connection.execute(
                "SELECT rootpage FROM sqlite_master WHERE name = 'transcripts'"
            ).fetchone()
        data = path.read_bytes()
        start = (root - 1) * 4096
        path.write_bytes(data[:start] + bytes(4096) + data[start + 4096 :])
        with open_manifest(path.parent.parent) as manifest:
            assert manifest.warnings == ()
            run = manifest.begin_run("0.1", {})
            with pytest.raises(StorageError, match="damaged"):
                manifest.transcript(sources[0])
            if exit_code is not None:
                manifest.end_run(run, {}, exit_code)
        skipped, warnings = self.survive(path, sources)
        assert skipped == 0
        assert "damaged-1" in warnings[0]

    def test_a_stale_journal_goes_with_the_damaged_file(
        self, archive: tuple[Path, list[Source], bytes]
    ) -> None:
        path, sources, data = archive
        path.write_bytes(bytes(len(data)))
        journal = path.with_name(f"{MANIFEST_NAME}-journal")
        journal.write_bytes(b"not for the new one")
        assert self.survive(path, sources)[0] == 0
        assert not journal.exists()

    def test_a_newer_schema_is_refused_with_both_versions(
        self, archive: tuple[Path, list[Source], bytes]
    ) -> None:
        path, _, _ = archive
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA user_version = 7")
        connection.close()
        data = path.read_bytes()
        for open_it in (open_manifest, read_manifest):
            with pytest.raises(UsageError, match=r"schema is 7.*up to 1"):
                open_it(path.parent.parent)
        assert path.read_bytes() == data


class TestOpening:
    def test_reading_makes_nothing(self, tmp_path: Path) -> None:
        assert read_manifest(tmp_path) is None
        assert list(tmp_path.iterdir()) == []
        (tmp_path / STATE_FOLDER).mkdir()
        (tmp_path / STATE_FOLDER / MANIFEST_NAME).write_bytes(b"")
        assert read_manifest(tmp_path) is None

    def test_reading_sees_what_a_run_writes_and_cannot_write(
        self, tmp_path: Path, manifest: Manifest
    ) -> None:
        source = make_source(tmp_path)
        finish(manifest, source)
        reader = read_manifest(tmp_path)
        assert reader is not None
        with reader:
            assert reader.all_entries() == manifest.all_entries()
            with pytest.raises(StorageError):
                reader.record_same_content(source)

    def test_reading_a_damaged_one_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / STATE_FOLDER / MANIFEST_NAME
        path.parent.mkdir()
        path.write_bytes(b"no database at all" * 100)
        with pytest.raises(StorageError, match="damaged") as caught:
            read_manifest(tmp_path)
        assert caught.value.hint
        assert os.listdir(path.parent) == [MANIFEST_NAME]

    def test_a_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / STATE_FOLDER).mkdir()
        (tmp_path / STATE_FOLDER / MANIFEST_NAME).symlink_to(tmp_path / "elsewhere")
        for open_it in (open_manifest, read_manifest):
            with pytest.raises(UsageError, match="symbolic link"):
                open_it(tmp_path)
        assert not (tmp_path / "elsewhere").exists()

    def test_a_full_disk_leaves_the_manifest_as_it_was(
        self, tmp_path: Path, manifest: Manifest
    ) -> None:
        one, two = make_source(tmp_path, "1.wav"), make_source(tmp_path, "2.wav")
        finish(manifest, one)
        (pages,) = manifest._connection.execute("PRAGMA page_count").fetchone()
        manifest._connection.execute(f"PRAGMA max_page_count = {pages}")
        noise = random.Random(0).randbytes(30_000).hex()
        with pytest.raises(StorageError, match="full") as caught:
            manifest.record_done(two, WANT, make_transcript(two, noise), ())
        assert caught.value.hint
        assert manifest.lookup(two) is None
        manifest.close()
        with open_manifest(tmp_path) as reopened:
            assert reopened.warnings == ()
            assert reopened.transcript(one) == make_transcript(one)
            assert reopened.lookup(two) is None
            reopened.record_done(two, WANT, make_transcript(two, noise), ())

    def test_another_process_in_the_way(self, tmp_path: Path, manifest: Manifest) -> None:
        other = sqlite3.connect(tmp_path / STATE_FOLDER / MANIFEST_NAME, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        manifest._connection.execute("PRAGMA busy_timeout = 1")
        with pytest.raises(BusyError, match="locked"):
            manifest.begin_run("0.1", {})
        other.close()
        manifest.begin_run("0.1", {})


TEXT = st.text(st.characters(), max_size=12)  # with lone surrogates and control characters
TOKENS = st.builds(Token, TEXT, st.integers(), st.integers(), st.floats(allow_nan=False))
SEGMENTS = st.builds(
    TextSegment,
    st.integers(0),
    st.integers(),
    st.integers(),
    TEXT,
    st.sampled_from(["cif", "ctc", "vad"]),
    st.lists(TOKENS, max_size=3).map(tuple),
    st.lists(TEXT, max_size=2).map(tuple),
)
TRANSCRIPTS = st.builds(
    Transcript,
    st.builds(SourceInfo, TEXT, TEXT, st.floats(0, 1e6), st.integers(1), st.integers(1)),
    st.builds(ModelInfo, TEXT, st.none() | TEXT, TEXT, st.none() | TEXT),
    TEXT,
    TEXT,
    st.lists(SEGMENTS, max_size=3).map(tuple),
    st.sampled_from(["done", "done_with_warnings", "no_speech", "partial"]),
    st.lists(TEXT, max_size=2).map(tuple),
    st.dictionaries(TEXT, st.integers() | st.dictionaries(TEXT, st.floats(0, 10)), max_size=3),
)


@given(TRANSCRIPTS)
def test_a_transcript_comes_back_without_loss(transcript: Transcript) -> None:
    assert unpack(pack(transcript)) == transcript


@pytest.mark.parametrize("damage", [b"", b"x", b"x\x9c", pack.__doc__.encode()])
def test_a_damaged_transcript_is_a_value_error(damage: bytes) -> None:
    with pytest.raises(ValueError, match="not a stored transcript"):
        unpack(damage)


def test_a_transcript_of_another_version_is_refused(tmp_path: Path) -> None:
    data = to_dict(make_transcript(make_source(tmp_path)))
    with pytest.raises(ValueError, match="version 2"):
        from_dict(data | {"version": 2})
