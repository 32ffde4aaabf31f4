"""Decoding gives the frames that were asked for, the same on every call, or one line that names the file."""

from __future__ import annotations

import random
import struct
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pgdpo_fast.data.limits import VideoLimits
from pgdpo_fast.data.video import probe_video, read_video, resample, write_video
from pgdpo_fast.errors import ConfigError, DataError, Preempted


def numbered(frames, height=64, width=96):
    """Frames whose grey level is their number: 20 + 8 k, with a lighter left half."""
    level = (20 + 8 * torch.arange(frames)).view(-1, 1, 1, 1).expand(-1, height, width, 3).clone()
    level[:, :, : width // 2] += 20
    return level.to(torch.uint8)


def numbers(video):
    """The frame numbers of `numbered` that a decoded clip shows."""
    right = video[:, :, 3 * video.shape[2] // 4 :].float().mean((1, 2, 3))
    return [round((float(level) - 20) / 8) for level in right]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """24 numbered frames at 12 fps."""
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", numbered(24), 12)


def test_frames_come_back_as_written(clip):
    video = read_video(clip)
    assert video.dtype == torch.uint8 and tuple(video.shape) == (24, 64, 96, 3)
    assert (video.int() - numbered(24).int()).abs().max() <= 3
    assert numbers(video) == list(range(24))
    info = probe_video(clip)
    assert (info.frames, info.fps, info.height, info.width, info.seconds) == (24, 12, 64, 96, 2.0)


def test_colours_survive_writing_and_reading(tmp_path):
    colours = torch.tensor([[220, 30, 40], [30, 200, 60], [40, 60, 230], [250, 250, 10]], dtype=torch.uint8)
    video = colours.repeat_interleave(16, 0).view(1, 1, 64, 3).expand(5, 32, 64, 3)
    back = read_video(write_video(tmp_path / "c.mp4", video, 8, crf=1))
    assert (back[:, 8:24, 8::16].int() - video[:, 8:24, 8::16].int()).abs().max() <= 4


def test_writing_and_reading_twice_gives_the_same_bytes(tmp_path, clip):
    again = write_video(tmp_path / "again.mp4", numbered(24), 12)
    assert again.read_bytes() == clip.read_bytes()
    options = dict(frames=9, height=48, width=48, fps=5)
    assert torch.equal(read_video(clip, **options), read_video(again, **options))


def test_the_file_is_h264_yuv420p_with_its_index_in_front(clip):
    import av

    with av.open(str(clip)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    data = clip.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_write_video_refuses_what_h264_cannot_hold(tmp_path):
    with pytest.raises(ConfigError, match="even sides.*32x34"):
        write_video(tmp_path / "x.mp4", torch.zeros(3, 32, 33, 3, dtype=torch.uint8), 8)
    with pytest.raises(ConfigError, match=r"expected torch.uint8 \[F, H, W, 3\]"):
        write_video(tmp_path / "x.mp4", torch.zeros(3, 32, 32, 3), 8)
    with pytest.raises(ConfigError, match="fps"):
        write_video(tmp_path / "x.mp4", torch.zeros(3, 32, 32, 3, dtype=torch.uint8), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps, expected", [(12, [0, 1, 2, 3, 4]), (6, [0, 2, 4, 6, 8]), (24, [0, 0, 1, 1, 2]),
                                           (8, [0, 1, 3, 4, 6]), (None, [0, 1, 2, 3, 4])])  # fmt: skip
def test_frames_are_taken_by_time_at_the_wanted_rate(clip, fps, expected):
    assert numbers(read_video(clip, frames=5, fps=fps)) == expected


def test_the_centre_of_a_longer_clip(clip):
    assert numbers(read_video(clip, frames=4, start="center")) == [10, 11, 12, 13]
    assert numbers(read_video(clip, frames=4, fps=6, start="center")) == [8, 10, 12, 14]


def test_a_pair_of_different_size_length_and_rate_comes_out_alike(tmp_path, clip):
    other = write_video(tmp_path / "other.mp4", numbered(28, 96, 80), 24)
    first, second = (read_video(path, frames=7, height=32, width=32, fps=6) for path in (clip, other))
    assert first.shape == second.shape == (7, 32, 32, 3)
    assert numbers(first) == [0, 2, 4, 6, 8, 10, 12] and numbers(second) == [0, 4, 8, 12, 16, 20, 24]


def test_too_short_a_clip_is_an_error_or_padded_when_asked(clip):
    with pytest.raises(DataError, match=r"clip.mp4: 24 frames \(2.00 s\), 25 needed.*short='pad'"):
        read_video(clip, frames=25)
    with pytest.raises(DataError, match="12 frames at 6 fps"):
        read_video(clip, frames=13, fps=6)
    assert numbers(read_video(clip, frames=27, short="pad"))[22:] == [22, 23, 23, 23, 23]
    assert numbers(read_video(clip, frames=13, fps=6, short="pad"))[10:] == [20, 22, 23]


def test_jittered_timestamps_still_give_every_frame_once():
    times = [Fraction(round(1000 * k / 30), 1000) for k in range(50)]  # milliseconds, as Matroska keeps them
    assert resample(times, times[-1] + Fraction(33, 1000), frames=49, fps=30) == list(range(49))


def test_resampling_agrees_with_a_plain_search():
    draw = random.Random(0)
    for _ in range(50):
        times = sorted({Fraction(draw.randrange(3000), 1000) for _ in range(draw.randrange(1, 40))} | {Fraction(0)})
        end, fps = times[-1] + Fraction(draw.randrange(1, 100), 1000), draw.choice([1, 7, 12.5, 24, 29.97])
        step, k, expected = 1 / Fraction(fps).limit_denominator(1_000_000), 0, []
        while k * step < end:
            expected.append(min(range(len(times)), key=lambda i: (abs(times[i] - k * step), times[i])))
            k += 1
        assert resample(times, end, frames=None, fps=fps) == expected


def test_resizing_covers_keeps_the_aspect_and_crops_the_centre(tmp_path):
    circle = torch.zeros(2, 120, 240, 3, dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(120) - 59.5, torch.arange(240) - 119.5, indexing="ij")
    circle[:, torch.hypot(x, y) < 40] = 255
    path = write_video(tmp_path / "circle.mp4", circle, 8)
    video = read_video(path, height=60, width=60)
    bright = video[0, :, :, 0] > 127
    assert abs(int(bright.any(1).sum()) - 40) <= 1 and abs(int(bright.any(0).sum()) - 40) <= 1
    assert torch.equal(bright, bright.flip(0)) and torch.equal(bright, bright.flip(1))


def test_shrinking_is_antialiased(tmp_path):
    stripes = torch.zeros(2, 128, 128, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    small = read_video(write_video(tmp_path / "s.mp4", stripes, 8), height=32, width=32)
    assert small[:, :, 2:-2].float().std() < 12


def test_stored_rotation_is_applied(tmp_path, clip):
    data = bytearray(clip.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8  # version 0 header, times and ids, reserved, layer and volume
    assert struct.unpack(">9i", data[matrix : matrix + 36]) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    turned = tmp_path / "turned.mp4"  # 90 degrees clockwise when shown, as phones write it
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 64 << 16, 0, 1 << 30)
    turned.write_bytes(data)
    info = probe_video(turned)
    assert (info.height, info.width) == (96, 64)
    assert torch.equal(read_video(turned), read_video(clip).rot90(-1, (1, 2)))


def with_display_matrix(clip, path, *entries):
    """The clip with other first two rows [a b; c d] in its display matrix."""
    data = bytearray(clip.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (entry << 16 for entry in entries)
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("entries", "upright"),
    [((1, 0, 0, 1), lambda v: v), ((-1, 0, 0, 1), lambda v: v.flip(2)), ((1, 0, 0, -1), lambda v: v.flip(1)),
     ((-1, 0, 0, -1), lambda v: v.rot90(2, (1, 2))), ((0, 1, -1, 0), lambda v: v.rot90(-1, (1, 2))),
     ((0, -1, 1, 0), lambda v: v.rot90(1, (1, 2))), ((0, 1, 1, 0), lambda v: v.transpose(1, 2)),
     ((0, -1, -1, 0), lambda v: v.transpose(1, 2).flip(1, 2))],
    ids=lambda value: "" if callable(value) else str(value),  # a function's text holds its address
)  # fmt: skip
def test_every_stored_turn_and_mirror_is_undone(tmp_path, entries, upright):
    corner = torch.zeros(3, 64, 96, 3, dtype=torch.uint8)
    corner[:, :20, :50] = 255
    plain = write_video(tmp_path / "plain.mp4", corner, 8)
    turned = with_display_matrix(plain, tmp_path / "turned.mp4", *entries)
    expected = upright(read_video(plain))
    assert torch.equal(read_video(turned), expected)
    info = probe_video(turned)
    assert (info.height, info.width) == tuple(expected.shape[1:3])


def test_a_slanted_display_matrix_is_refused(tmp_path, clip):
    slanted = with_display_matrix(clip, tmp_path / "slanted.mp4", 1, 1, -1, 1)
    assert "no quarter turn or mirror" in one_line(read_video, slanted)


def test_impossible_arguments_are_config_errors(clip):
    for options in ({"height": 32}, {"frames": 0}, {"fps": -1}, {"start": "end"}, {"short": "loop"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            read_video(clip, **options)


def as_container(clip, path):
    """The packets of a clip copied into another container."""
    import av

    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return path


def with_sound(path, frames=48, side=128, first=0, format=None, pixels="yuv420p", silent=False, **options):
    """Noise at 12 fps beside noise at 48 kHz (or, `silent`, alone), from `first` seconds on."""
    import av
    import numpy as np

    draw, rate = np.random.default_rng(0), 48_000
    codecs = {".webm": ("libvpx-vp9", "libopus"), ".avi": ("libx264", "mp3")}.get(path.suffix, ("libx264", "aac"))
    with av.open(str(path), "w", format=format) as container:
        video = container.add_stream(codecs[0], rate=12, options=options)
        sound = None if silent else container.add_stream(codecs[1], rate)
        video.width = video.height = side
        video.pix_fmt = pixels
        resampler = None if silent else av.AudioResampler(format=sound.codec_context.format, layout="stereo", rate=rate)
        for index in range(frames):
            picture = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts, frame.time_base = index + 12 * first, Fraction(1, 12)
            container.mux(video.encode(frame))
            if silent:
                continue
            noise = av.AudioFrame.from_ndarray(draw.normal(0, 0.1, (1, 8000)).astype("float32"), "flt", "stereo")
            noise.rate, noise.pts, noise.time_base = rate, index * 4000 + rate * first, Fraction(1, rate)
            for block in resampler.resample(noise):
                container.mux(sound.encode(block))
        for stream in filter(None, (video, sound)):
            container.mux(stream.encode())
    return path


@pytest.fixture(scope="module", params=["mkv", "webm", "ts", "avi", "flv", "mp4"])
def sounding(request, tmp_path_factory):
    return with_sound(tmp_path_factory.mktemp("sound") / f"whole.{request.param}",
                      format={"ts": "mpegts"}.get(request.param))  # fmt: skip


def test_a_truncated_file_with_sound_is_an_error_in_every_container(tmp_path, sounding):
    assert len(read_video(sounding)) == 48
    data = sounding.read_bytes()
    for share in (0.3, 0.6, 0.9, 0.97):
        cut = tmp_path / f"cut{sounding.suffix}"
        cut.write_bytes(data[: int(share * len(data)) | 1])
        one_line(lambda path: read_video(path, frames=4), cut)
        one_line(probe_video, cut)


@pytest.mark.parametrize("suffix", ["mkv", "webm", "ts", "flv"])
def test_a_whole_file_whose_first_stamp_is_not_zero_is_whole(tmp_path, suffix):
    format = {"ts": "mpegts"}.get(suffix)
    for silent in (False, True):
        late = with_sound(tmp_path / f"late.{suffix}", frames=24, first=3, format=format, silent=silent)
        assert len(read_video(late)) == 24


def test_what_8_bit_frames_lose_is_noted(tmp_path, clip):
    import av
    import numpy as np

    assert probe_video(clip).notes == ()
    interlaced = with_sound(tmp_path / "fields.mkv", frames=4, **{"x264-params": "tff=1"}, flags="+ilme+ildct")
    assert "interlaced" in " ".join(probe_video(interlaced).notes)
    deep = with_sound(tmp_path / "deep.mkv", frames=4, pixels="yuv420p10le",
                      **{"x264-params": "transfer=smpte2084:colorprim=bt2020:colormatrix=bt2020nc"})  # fmt: skip
    notes = " ".join(probe_video(deep).notes)
    assert "10 bits a channel" in notes and "HDR (PQ)" in notes
    with av.open(str(tmp_path / "clear.mov"), "w") as container:
        stream = container.add_stream("png", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "rgba"
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 4), 100, dtype=np.uint8), format="rgba")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "alpha" in " ".join(probe_video(tmp_path / "clear.mov").notes)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ffconcat"])
@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile {}\n",
        "ffconcat version 1.0\nfile '{}'\nduration 1\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{}\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "concat with duration", "hls"],
)
def test_a_script_that_names_other_files_opens_none(tmp_path, clip, suffix, script):
    victim = tmp_path / "victim.mp4"
    victim.write_bytes(clip.read_bytes())
    for named in ("victim.mp4", str(victim)):
        path = tmp_path / f"script.{suffix}"
        path.write_text(script.format(named))
        one_line(read_video, path)
        one_line(probe_video, path)


def test_a_file_name_is_never_an_address_or_a_pattern(tmp_path, clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a|b.mp4", "x[v2].mp4", "%03d.mp4", "pipe:0", "subfile,,start,0,end,9,,:a"):
        Path(name).write_bytes(clip.read_bytes())
        assert len(read_video(name)) == 24


# -- limits


def far_stamp(clip, path, seconds):
    """The clip in Matroska with its last frame moved to `seconds`."""
    import av

    with av.open(str(clip)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        last = max(packets, key=lambda packet: packet.dts)
        last.pts = last.dts = int(seconds / last.time_base)
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    return path


def test_a_far_time_stamp_is_refused_at_once_and_a_gap_within_the_limit_is_read(tmp_path, clip):
    far = far_stamp(clip, tmp_path / "far.mkv", 1_000_000)
    started = time.monotonic()
    for call in (probe_video, lambda path: read_video(path, frames=17, fps=8)):
        assert "span 1000000 s, expected at most 86400 s" in one_line(call, far)
    gap = far_stamp(clip, tmp_path / "gap.mkv", 80_000)
    assert len(read_video(gap, frames=17, fps=900, start="center")) == 17  # 72 million steps of 1/900 s
    assert "more than 250000 frames" in one_line(lambda path: read_video(path, fps=900), gap)
    assert time.monotonic() - started < 5


def test_every_limit_is_a_setting_that_is_kept(clip):
    for limits, said in ((VideoLimits(pixels=64 * 96 - 1), "pictures of 96x64, expected at most 6143 pixels"),
                         (VideoLimits(frames=23), "more than 23 frames"), (VideoLimits(seconds=1.5), "span 2 s"),
                         (VideoLimits(patience=1e-9), "took longer than 1e-09 s")):  # fmt: skip
        assert said in one_line(lambda path, limits=limits: read_video(path, limits=limits), clip)
        assert said in one_line(lambda path, limits=limits: probe_video(path, limits=limits), clip)
    assert len(read_video(clip, limits=VideoLimits(64 * 96, 24, 2.0, 60))) == 24
    for options in ({"fps": 1e9}, {"frames": 10**9}, {"height": 10**5, "width": 10**5}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            read_video(clip, **options)
    with pytest.raises(ConfigError, match="limit frames=0"):
        VideoLimits(frames=0)


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path):
    """A GIF of 16000 x 16000 in 200 bytes: header, one descriptor, and too little data to matter."""
    data = b"GIF89a" + struct.pack("<HHBBB", 16000, 16000, 0x80, 0, 0) + bytes(6)
    data += b"," + struct.pack("<HHHHB", 0, 0, 16000, 16000, 0) + b"\x02\x03\x44\x01\x05\x00;"
    path = tmp_path / "huge.gif"
    path.write_bytes(data)
    started = time.monotonic()
    assert "pixels" in one_line(read_video, path)
    assert time.monotonic() - started < 2


def test_reading_stops_when_asked(clip):
    for call in (read_video, probe_video):
        with pytest.raises(Preempted, match="clip.mp4: reading was stopped"):
            call(clip, stop=lambda: True)


def busy(frames=40, side=128):
    return torch.randint(0, 256, (frames, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("noisy") / "noisy.mp4", busy(), 10)


def one_line(call, path):
    with pytest.raises(DataError) as caught:
        call(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"hello world\n" * 300, bytes(range(256)) * 40])
def test_files_that_are_no_video_are_one_line(tmp_path, content):
    path = tmp_path / "broken.mp4"
    path.write_bytes(content)
    for call in (read_video, probe_video):
        one_line(call, path)


def test_missing_files_folders_and_sound_without_pictures_are_one_line(tmp_path):
    import wave

    assert "no such video" in one_line(read_video, tmp_path / "nowhere.mp4")
    assert "no such video" in one_line(read_video, tmp_path)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000), sound.writeframes(b"\0\0" * 8000)
    assert "no video stream" in one_line(read_video, tmp_path / "sound.wav")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_truncated_file_is_an_error_even_when_its_first_frames_are_whole(tmp_path, noisy, suffix, share):
    whole = as_container(noisy, tmp_path / f"whole.{suffix}") if suffix != "mp4" else noisy
    assert len(read_video(whole)) == 40
    cut = tmp_path / f"cut.{suffix}"
    data = whole.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    one_line(read_video, cut)
    one_line(lambda path: read_video(path, frames=1), cut)


def test_a_file_that_lost_exactly_its_last_frame_is_an_error(tmp_path, noisy):
    import av

    with av.open(str(noisy)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(noisy.read_bytes()[:last])
    assert "39 of 40 frames" in one_line(lambda path: read_video(path, frames=1), cut)


def test_a_picture_the_decoder_had_to_patch_up_is_an_error_only_where_it_is_used(tmp_path, noisy):
    data, path, found = noisy.read_bytes(), tmp_path / "flipped.mp4", 0
    for position in range(6 * len(data) // 10, 8 * len(data) // 10, len(data) // 100):
        path.write_bytes(data[:position] + bytes([data[position] ^ 255]) + data[position + 1 :])
        assert torch.equal(read_video(path, frames=20), read_video(noisy, frames=20))
        try:
            read_video(path)
        except DataError as error:
            found += "cannot be decoded whole" in str(error)
    assert found >= 5


def test_a_zeroed_block_in_the_pictures_is_an_error(tmp_path, noisy):
    data = bytearray(noisy.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20000] = bytes(20000)
    path = tmp_path / "zeroed.mp4"
    path.write_bytes(data)
    one_line(read_video, path)


def test_random_damage_never_escapes_as_another_exception(tmp_path, noisy):
    draw, path = random.Random(0), tmp_path / "flipped.mp4"
    data = noisy.read_bytes()
    outcomes = set()
    for _ in range(30):
        damaged = bytearray(data)
        for _ in range(draw.choice([1, 5, 50])):
            damaged[draw.randrange(len(damaged) if draw.random() < 0.5 else 1500)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_video(path, frames=40, height=32, width=32)
            outcomes.add("frames")
        except DataError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert "error" in outcomes
