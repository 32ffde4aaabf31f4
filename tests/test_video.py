"""Decoding gives the frames that were asked for, the same on every call, or one line that names the file."""

from __future__ import annotations

import random
import struct
from fractions import Fraction

import pytest
import torch

from pgdpo_fast.data.video import probe_video, read_video, resample, write_video
from pgdpo_fast.errors import ConfigError, DataError


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
