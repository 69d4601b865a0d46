"""Event files -> points, and the cache between them. Nothing here knows what a run is beyond its folder."""

import json
import re
import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from lan_utils.files import replace

Points = np.ndarray  # of dtype POINT, (points,)
POINT = np.dtype([("step", "i8"), ("value", "f4")])  # agent step; value of the tag there
RETURN, REPRESENTATION, LAYERS = "charts/episodic_return", "representation/", "layers/"
EVALUATION = "eval/"

CACHE_FORMAT = 4
CACHE_NAME = re.compile(r"plot_results-[0-9a-f]{40}\.npz")  # of every file that this program puts into its cache


# ------------------------------------------------------------------------------------------- event files


def masked_crc32c(data: bytes) -> int:
    """The check sum of TFRecord files, uint32."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(content: bytes) -> tuple[list[bytes], int, int]:
    """The records of a TFRecord file; TensorBoard's own reader takes some four times as long.

    Returns:
        The whole records, the number of damaged ones between them, and the bytes at the end that hold no record.
    """
    records, damaged, position = [], 0, 0
    while position + 16 <= len(content):
        header = content[position : position + 8]
        length, checksum = struct.unpack_from("<QI", content, position)
        end = position + 16 + length
        # A wrong length leaves no way to find the next record.
        if end > len(content) or checksum != masked_crc32c(header):
            break
        record = content[position + 12 : end - 4]
        if masked_crc32c(record) == struct.unpack_from("<I", content, end - 4)[0]:
            records.append(record)
        else:
            damaged += 1
        position = end
    return records, damaged, len(content) - position


@dataclass
class Session:
    """The points of an event file from its beginning, or from a restart, to the next restart or its end."""

    restart: int | None  # points of earlier sessions from this agent step on are void
    points: dict[str, tuple[list[int], list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: ([], []))
    )  # by tag: steps, values; "" holds the tags that only count for the run's length


@dataclass
class EventFile:
    """What an event file holds."""

    name: str
    sessions: list[Session]
    started: float = 0.0  # wall time of the first event that has one, seconds since 1970
    problems: list[str] = field(default_factory=list)

    @property
    def order(self) -> tuple[int, float, str]:
        """Sort key: a later file restarted later in the training. Clocks go back, and machines' clocks differ; so
        wall times only order files of the same restart step, and names those of the same time."""
        restarts = [session.restart for session in self.sessions if session.restart is not None]
        return min(restarts, default=-1), self.started, self.name


def read_event_file(file: Path) -> EventFile:
    """The scalar points of one event file, evaluation's aside (its steps are games)."""
    found = EventFile(file.name, [Session(None)])
    try:
        records, damaged, lost = read_records(file.read_bytes())
    except OSError as error:
        found.problems.append(f"{file.name} cannot be read ({error.strerror})")
        return found
    for record in records:
        try:
            event = Event.FromString(record)
        except DecodeError:
            damaged += 1
            continue
        found.started = found.started or event.wall_time
        if event.session_log.status == SessionLog.START:
            found.sessions.append(Session(event.step))
        for value in event.summary.value:
            if value.HasField("simple_value") and not value.tag.startswith(EVALUATION):
                is_wanted = value.tag == RETURN or value.tag.startswith((REPRESENTATION, LAYERS))
                steps, values = found.sessions[-1].points[value.tag if is_wanted else ""]
                steps.append(event.step)
                values.append(value.simple_value)
    if damaged:
        found.problems.append(f"{file.name}: {damaged} damaged records were skipped")
    if lost:
        found.problems.append(f"{file.name}: the last {lost:,} bytes are truncated or damaged")
    return found


def read_events(files: Sequence[Path]) -> tuple[dict[str, Points], int, list[str]]:
    """Every point of a run that the figures need.

    Args:
        files: the run's event files, in any order: what they hold orders them (`EventFile.order`).

    Returns:
        Points by tag (`charts/episodic_return`, `representation/...`, `layers/...`), steps ascending and distinct,
        values finite; the last agent step of any training point, 0 without one; what was wrong or dropped, a phrase
        each.
    """
    contents = sorted(map(read_event_file, files), key=lambda content: content.order)
    problems = [problem for content in contents for problem in content.problems]
    found: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for content in contents:
        for session in content.sessions:
            void = 0
            if session.restart is not None:
                for tag, (steps, values) in found.items():
                    kept = [i for i, step in enumerate(steps) if step < session.restart]
                    void += (len(steps) - len(kept)) * (tag != "")
                    found[tag] = [steps[i] for i in kept], [values[i] for i in kept]
            if void:
                problems.append(
                    f"{content.name}: its restart at step {session.restart:,} voids {void:,} earlier points"
                )
            for tag, (steps, values) in session.points.items():
                found[tag][0].extend(steps)
                found[tag][1].extend(values)

    last_step = max(0, *(max(steps, default=0) for steps, _ in found.values())) if found else 0
    found.pop("", None)
    points = {}
    layers = [tag.split("/")[1] for tag in found if tag.startswith(LAYERS)]  # in the order in which a run measures them

    def place(tag: str) -> tuple[str, int, str]:
        kind, name = tag.split("/")[:2]
        return kind, layers.index(name) if tag.startswith(LAYERS) else 0, tag

    for tag in sorted(found, key=place):
        steps, values = found[tag]
        tagged = np.empty(len(steps), POINT)
        tagged["step"], tagged["value"] = steps, values
        tagged = tagged[np.argsort(tagged["step"], kind="stable")]
        is_latest = np.append(tagged["step"][1:] != tagged["step"][:-1], True)[: len(tagged)]
        is_finite = np.isfinite(tagged["value"])
        for count, what in (
            (np.sum(~is_latest), "steps logged twice, the later value counts"),
            (np.sum(~is_finite), "NaN or infinite values left out"),
        ):
            if count:
                problems.append(f"{tag}: {count} {what}")
        points[tag] = tagged[is_latest & is_finite]
    return {tag: tagged for tag, tagged in points.items() if len(tagged)}, last_step, problems


# ------------------------------------------------------------------------------------------------- cache


def read_run(folder: Path, cache: Path) -> tuple[dict[str, Points], int, list[str]]:
    """`read_events` of a run's folder, from the file `cache` where the event files are still those it was made of.

    Whatever is wrong with a run's files is among the problems, never an error.

    Raises:
        OSError: the cache cannot be written.
    """
    try:
        files = sorted(file for file in folder.glob("events.out.tfevents.*") if file.is_file())
        about: dict[str, Any] = {"format": CACHE_FORMAT, "folder": str(folder.absolute())}
        about["files"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        return {}, 0, [f"cannot be read ({error.strerror})"]
    try:
        with np.load(cache, allow_pickle=False) as content:
            known = json.loads(str(content["about"]))
            if about.items() <= known.items():
                points = {tag: content[f"points {i}"] for i, tag in enumerate(known["tags"])}
                return points, known["last_step"], known["problems"]
    except Exception:  # whatever is wrong with a cache, it is made again
        pass
    try:
        points, last_step, problems = read_events(files)
    except Exception as error:  # one run that nobody thought of must not stop the others
        return {}, 0, [f"cannot be read ({type(error).__name__}: {error})"]
    about |= {"tags": list(points), "last_step": last_step, "problems": problems}
    arrays = {f"points {i}": tagged for i, tagged in enumerate(points.values())}
    if not any("cannot be read" in problem for problem in problems):  # for want of permission, or a disk that is away
        replace(cache, lambda file: np.savez(file, about=json.dumps(about), **arrays))
    return points, last_step, problems
