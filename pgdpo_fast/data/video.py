"""Video files to uint8 frames and back, by PyAV: the same file and arguments give the same bytes, run after run.

Both clips of a pair pass through the same rule, so they may differ in size, length and frame rate: frames are picked
by timestamp at the wanted rate, resized to cover the wanted size with antialiasing, and cropped at the centre.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F

from pgdpo_fast.errors import ConfigError, DataError
from pgdpo_fast.storage import atomic_file

__all__ = ["RULES_VERSION", "VideoInfo", "decoder_fingerprint", "probe_video", "read_video", "resample", "write_video"]

RULES_VERSION = 1  # raise it when the frames that read_video returns for a file change


@dataclass(frozen=True)
class VideoInfo:
    """What a clip holds: frames, mean rate, size as displayed (pixels, rotation applied) and seconds."""

    frames: int
    fps: Fraction
    height: int
    width: int
    seconds: float


@dataclass(frozen=True)
class _Timeline:
    """Presentation stamps in stream units, their times in seconds from the first frame, and the end of the last."""

    stamps: list[int]
    times: list[Fraction]
    end: Fraction


def read_video(
    path: str | os.PathLike,
    *,
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | Fraction | None = None,
    start: str = "begin",
    short: str = "error",
) -> torch.Tensor:
    """Decode a clip to uint8 RGB `[F, H, W, 3]`.

    fps: frame k is the source frame nearest in time to k / fps seconds (of two equally near, the earlier); None takes
        the source's own frames one by one. Nothing is interpolated in time.
    frames: how many; None takes all there are. `start` puts them at the "begin" or the "center" of the clip.
    height, width: both or neither; the frame is scaled to cover them (bicubic with antialias, aspect kept, non-square
        pixels made square), then cropped at the centre. Rotation stored in the file is applied.
    short: what a clip with fewer frames than asked for is: an "error", or "pad" by repeating its last frame.

    Raises DataError naming the file when it is missing, empty, no video, truncated (fewer packets than its header
    promises), damaged where the frames are taken, or too short; ConfigError on impossible arguments.
    """
    _check_arguments(frames, height, width, fps, start, short)
    path = Path(path)
    with _opened(path) as (container, stream):
        timeline = _scan(path, container, stream)
    picks = resample(timeline.times, timeline.end, frames=frames, fps=fps, start=start)
    if frames is not None and len(picks) < frames:
        rate = f" at {float(fps):g} fps" if fps is not None else ""
        if short == "error":
            raise DataError(
                f"{path}: {len(picks)} frames{rate} ({float(timeline.end):.2f} s), {frames} needed; ask for "
                "fewer frames or another fps, or allow padding with the last frame (short='pad')"
            )
        picks += [len(timeline.times) - 1] * (frames - len(picks))
    wanted = {timeline.stamps[index] for index in picks}
    decoded = {}
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for number, frame in enumerate(_decoded(path, container, stream)):
            stamp = frame.pts if frame.pts is not None else number
            if stamp in wanted:
                if frame.is_corrupt:
                    raise DataError(f"{path}: damaged, frame {number} cannot be decoded whole; replace the file")
                decoded[stamp] = _fit(_to_rgb(frame), height, width, stream.sample_aspect_ratio, frame.rotation)
                if len(decoded) == len(wanted):
                    break
    if len(decoded) < len(wanted):
        raise DataError(
            f"{path}: damaged, only {len(decoded)} of {len(wanted)} frames could be decoded; replace the file"
        )
    return torch.stack([decoded[timeline.stamps[index]] for index in picks])


def probe_video(path: str | os.PathLike) -> VideoInfo:
    """Read the container and its packets without decoding pictures. Raises DataError as `read_video` does."""
    path = Path(path)
    with _opened(path) as (container, stream):
        timeline = _scan(path, container, stream)
        with_frame = next(_decoded(path, container, stream, rewind=True), None)
        if with_frame is None:
            raise DataError(f"{path}: no frame can be decoded; replace the file")
        height, width = stream.codec_context.height, stream.codec_context.width
        if with_frame.rotation % 180:
            height, width = width, height
    count = len(timeline.times)
    return VideoInfo(count, Fraction(count) / timeline.end, height, width, float(timeline.end))


def resample(
    times: Sequence[Fraction], end: Fraction, *, frames: int | None, fps: float | Fraction | None, start: str = "begin"
) -> list[int]:
    """Indices of the source frames to show, given their times in seconds (ascending from 0) and the end of the last.

    At most `frames` of them, fewer when the clip is too short. With `fps`, output k asks for time k / fps < end and
    gets the nearest source frame; without, the source's own frames follow one another.
    """
    if fps is None:
        available = list(range(len(times)))
    else:
        step = 1 / Fraction(fps).limit_denominator(1_000_000)
        count = -(-end // step)  # the number of k >= 0 with k * step < end
        available = [_nearest(times, k * step) for k in range(count)]
    if frames is None or frames >= len(available):
        return available
    first = (len(available) - frames) // 2 if start == "center" else 0
    return available[first : first + frames]


def _nearest(times: Sequence[Fraction], time: Fraction) -> int:
    after = bisect_left(times, time)
    if after == len(times):
        return after - 1
    if after and time - times[after - 1] <= times[after] - time:
        return after - 1
    return after


def write_video(path: str | os.PathLike, video: torch.Tensor, fps: float | Fraction, *, crf: int = 12) -> Path:
    """Write uint8 RGB `[F, H, W, 3]` as H.264 (yuv420p, BT.709, index in front), which every browser plays.

    Same frames, same bytes: one encoder thread, no time stamps in the file. `crf` 0-51, lower is better; 12 is visually
    lossless. The file appears whole or not at all. Raises ConfigError on odd sides (yuv420p has none), a wrong shape,
    dtype or rate.
    """
    import av
    from av.video.reformatter import Colorspace

    if video.dtype != torch.uint8 or video.dim() != 4 or video.shape[-1] != 3 or not video.shape[0]:
        raise ConfigError(f"video is {video.dtype} {list(video.shape)}; expected torch.uint8 [F, H, W, 3] with F >= 1")
    _, height, width, _ = video.shape
    if height % 2 or width % 2:
        raise ConfigError(
            f"video is {height}x{width}; H.264 in yuv420p needs even sides, crop or pad to "
            f"{height + height % 2}x{width + width % 2}"
        )
    if not 0 <= crf <= 51 or not fps > 0:
        raise ConfigError(f"crf={crf}, fps={fps}; expected crf from 0 to 51 and fps above 0")
    rate = Fraction(fps).limit_denominator(1001)
    with atomic_file(path, durable=False) as temporary:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "medium"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.thread_count = 1
            context.colorspace = context.color_primaries = context.color_trc = context.color_range = (
                1  # BT.709, TV range
            )
            for index, picture in enumerate(video.cpu().contiguous().numpy()):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=_exact())
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return Path(path)


def decoder_fingerprint() -> dict:
    """What decides the frames of a given file: this module's rules and the library versions underneath."""
    import av

    version = av.library_versions
    return {
        "rules": RULES_VERSION,
        "pyav": av.__version__,
        **{name: ".".join(map(str, version[name])) for name in ("libavcodec", "libavformat", "libswscale")},
    }


def _check_arguments(frames, height, width, fps, start, short) -> None:
    if (height is None) != (width is None):
        raise ConfigError(f"height={height}, width={width}; give both, or neither to keep the source's size")
    for name, value in (("frames", frames), ("height", height), ("width", width), ("fps", fps)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name}={value}; expected a positive number")
    for name, value, known in (("start", start, ("begin", "center")), ("short", short, ("error", "pad"))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}; expected one of {', '.join(known)}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """The container and its first video stream; every failure of the libraries becomes one line naming the file."""
    import av

    if not path.is_file():
        raise DataError(f"{path}: no such video file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: empty file (0 bytes), expected a video; render or download it again")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError(f"{path}: holds no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0].split("last error log:")[-1].strip()
        raise DataError(f"{path}: not a readable video, truncated or damaged ({reason}); replace the file") from error


def _scan(path: Path, container, stream) -> _Timeline:
    """Walk the packets (no decoding), compare them with what the header promises, and return the frame times.

    A truncated file shows here: MP4 records its number of frames, other containers at least their duration.
    """
    base = stream.time_base
    packets = [packet for packet in container.demux(stream) if packet.size]
    if not packets:
        raise DataError(f"{path}: a video stream without frames; render or download it again")
    if len(packets) < stream.frames:
        raise DataError(f"{path}: truncated, {len(packets)} of {stream.frames} frames are there; replace the file")
    if any(packet.is_corrupt for packet in packets):
        raise DataError(f"{path}: truncated or damaged, a packet is incomplete; replace the file")
    shown = [packet for packet in packets if not packet.is_discard]
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    if not shown or any(packet.pts is None for packet in shown):
        count = len(shown) or len(packets)
        return _Timeline(list(range(count)), [k / rate for k in range(count)], count / rate)
    stamps = sorted({packet.pts for packet in shown})
    last = max(shown, key=lambda packet: packet.pts)
    end = (stamps[-1] - stamps[0]) * base + ((last.duration or 0) * base or 1 / rate)
    promised = (
        stream.duration * base
        if stream.duration
        else (Fraction(container.duration, 1_000_000) if container.duration and len(container.streams) == 1 else end)
    )
    if promised - end > max(promised / 20, 2 / rate):
        raise DataError(f"{path}: truncated, {float(end):.2f} of {float(promised):.2f} s are there; replace the file")
    return _Timeline(stamps, [(stamp - stamps[0]) * base for stamp in stamps], end)


def _decoded(path: Path, container, stream, rewind: bool = False) -> Iterator:
    if rewind:
        container.seek(0)
    yield from container.decode(stream)


def _exact():
    """swscale without its per-processor shortcuts: 3 ms for a 1360x752 frame, against 0.5 ms with them."""
    from av.video.reformatter import Interpolation

    return Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.BITEXACT


def _to_rgb(frame) -> torch.Tensor:
    return torch.from_numpy(frame.to_ndarray(format="rgb24", interpolation=_exact(), threads=1))


def _fit(picture: torch.Tensor, height: int | None, width: int | None, pixel_aspect, rotation: int) -> torch.Tensor:
    """uint8 [h, w, 3] -> uint8 [height, width, 3]: upright, square pixels, covering, centre-cropped."""
    source_height, source_width = picture.shape[:2]
    aspect = float(pixel_aspect) if pixel_aspect else 1.0
    size = [source_height, round(source_width * aspect)]
    quarter_turns = rotation // 90 % 4  # the frame's rotation is counter-clockwise, as rot90 turns
    if quarter_turns % 2:
        size.reverse()
    picture = picture.rot90(quarter_turns, (0, 1))
    if height is not None:
        scale = max(height / size[0], width / size[1])
        size = [max(height, round(size[0] * scale)), max(width, round(size[1] * scale))]
    if list(picture.shape[:2]) != size:
        # integer arithmetic on uint8: within one level of the float result, 8 times as fast
        planes = F.interpolate(picture.permute(2, 0, 1)[None], size=size, mode="bicubic", antialias=True)
        picture = planes[0].permute(1, 2, 0)
    if height is not None:
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        picture = picture[top : top + height, left : left + width]
    return picture.contiguous()
