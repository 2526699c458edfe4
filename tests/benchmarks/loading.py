"""Speed of loading and writing shards, against other loaders and against decoding alone.

    python tests/benchmarks/loading.py [--json] [--pictures N] [--workers W] [--only FIGURE,...]

All loaders read the same pictures and captions from the same shards, or the same encoded bytes in their own format,
with a warm page cache, and yield the same batches: 64 pictures of 224 x 224, uint8, each with one caption padded to the
longest. Measurements alternate; each figure is the median of the ratios of the repetitions, since the CPU clock drifts
between them. The data are generated, about 1.1 GB, and cached in `--folder`. Exit code 1: a bound is missed.
"""

import itertools
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# Processes that write shards import this module too, so modules that they do not need are imported in functions.
from table import Figure, build_parser, print_figures

if TYPE_CHECKING:
    from shards.augment.settings import Augment
    from shards.reading.dataset import Batch

SIZE, BATCH = 224, 64
ORIGINALS, TIMES = 256, 12  # pictures written, and repetitions: enough to amortize the start of processes
SEED = 1


class Bench:
    """Data of the benchmark, and methods that measure each figure."""

    def __init__(self, folder: Path, pictures: int, workers: int, repeats: int) -> None:
        import corpus

        from shards import manifest

        self.folder, self.workers, self.repeats = folder, workers, repeats
        folder.mkdir(parents=True, exist_ok=True)
        jobs = len(os.sched_getaffinity(0))
        log_progress(f"shards of {pictures} pictures in {folder}")
        self.shards = corpus.make_shards(folder / "shards", pictures, jobs)
        self.manifest = manifest.load(self.shards)
        self.urls = sorted(map(str, self.shards.glob("*.tar")))
        for url in self.urls:
            Path(url).read_bytes()  # load into the page cache

    # Loaders; each call is one measurement.

    def ours(
        self, folder: Path, begin: float, epochs: float, workers: int, augment: "Augment | None" = None
    ) -> "Iterator[Batch]":
        """Return this project's batches from `begin`, a number of epochs, for `epochs` epochs, with a new reader."""
        from shards.manifest import load
        from shards.reading.loader import load_batches
        from shards.reading.order import order_of
        from shards.reading.reader import Reader

        manifest = load(folder)
        order = order_of(manifest, "train", BATCH, seed=SEED)
        first, last = (int(order.steps_per_epoch * at) for at in (begin, begin + epochs))
        return load_batches(
            Reader(manifest),
            order,
            range(first, last),
            image_size=SIZE,
            max_seconds=30.0,
            accumulation=1,
            rank=0,
            world_size=1,
            workers=workers,
            augment=augment,
        )

    def loaders(self, epochs: int) -> "dict[str, Callable[[], Iterator[Batch]]]":
        """Return all loaders, by the name of their figure."""
        import others

        settings = (SIZE, BATCH, self.workers, epochs)
        return {
            "ours": lambda: self.ours(self.shards, 0.0, epochs, self.workers),
            "webdataset_docs": lambda: others.webdataset_docs(self.urls, *settings),
            "webdataset_best": lambda: others.webdataset_best(self.urls, *settings),
            "mosaicml_streaming": lambda: others.mosaicml_streaming(self.folder / "mds", self.manifest, *settings),
            "lhotse_shar": lambda: others.lhotse_shar(self.folder / "shar", self.manifest, *settings),
            "spdl": lambda: others.spdl(self.manifest, *settings),
        }

    def limit(self, epochs: int) -> float:
        """Measure samples per second of processes that only decode, from memory."""
        from shards.reading.reader import Reader

        reader = Reader(self.manifest)
        pairs = [
            (reader.picture(n), reader.audio(random.choice(self.manifest.captions(n))))
            for n in range(len(self.manifest.key))
        ]
        context = multiprocessing.get_context("fork")  # children inherit the bytes
        barrier = context.Barrier(self.workers + 1)
        processes = [
            context.Process(target=decode_all, args=(pairs[n :: self.workers], epochs, barrier))
            for n in range(self.workers)
        ]
        for process in processes:
            process.start()
        barrier.wait()
        begin = time.perf_counter()
        for process in processes:
            process.join()
        return epochs * len(pairs) / (time.perf_counter() - begin)

    # The figures.

    def rates(self, wanted: set[str], epochs: int = 16) -> list[Figure]:
        """Measure samples per second, over enough epochs that the startup time of half a second is negligible."""
        bounds = {
            "webdataset_docs": (1.5, "samples/s against webdataset as documented"),
            "webdataset_best": (1.1, "samples/s against webdataset that decodes only the selected caption"),
            "mosaicml_streaming": (1.0, "samples/s against mosaicml-streaming"),
            "lhotse_shar": (1.0, "samples/s against lhotse's Shar"),
            "spdl": (1.0, "samples/s against SPDL's thread pipeline with the same codecs"),
            "limit": (0.9, "samples/s against processes that only decode, from memory"),
        }
        loaders = {name: open_ for name, open_ in self.loaders(epochs).items() if name in {"ours", *wanted}}
        for name in list(loaders):
            log_progress(f"{name}: checking batches")
            try:
                self.check_batches(loaders[name]())
            except ImportError as error:
                print(f"{name}: not installed, skipped ({error})", file=sys.stderr)
                del loaders[name]
        measures: dict[str, Callable[[], float]] = {name: partial(rate, open_) for name, open_ in loaders.items()}
        if "limit" in wanted:
            measures["limit"] = lambda: self.limit(epochs)
        taken = self.measure_alternately(measures)
        return [
            figure_of(name, taken["ours"], taken[name], "samples/s", *bounds[name]) for name in bounds if name in taken
        ]

    def check_batches(self, batches: "Iterator[Batch]") -> None:
        """Check shapes, types and values of the first two batches."""
        import numpy as np

        from shards.media.audio import decode_audio
        from shards.media.picture import decode_picture
        from shards.reading.reader import Reader

        reader = Reader(self.manifest)
        for batch in itertools.islice(batches, 2):
            longest = int(batch.lengths.max())
            assert tuple(batch.images.shape) == (BATCH, 3, SIZE, SIZE), batch.images.shape
            assert tuple(batch.waveforms.shape) == (BATCH, longest), batch.waveforms.shape
            kinds = [str(values.dtype) for values in (batch.images, batch.waveforms, batch.lengths, batch.ids)]
            assert kinds == ["torch.uint8", "torch.float32", "torch.int64", "torch.int64"], kinds
            for image, wave, length, n in zip(batch.images, batch.waveforms, batch.lengths, batch.ids, strict=True):
                assert np.array_equal(image.numpy(), decode_picture(reader.picture(int(n)), SIZE)), int(n)
                captions = [decode_audio(reader.audio(row)) for row in self.manifest.captions(int(n))]
                assert any(np.array_equal(wave[: int(length)].numpy(), one) for one in captions), int(n)
                assert not wave[int(length) :].any(), int(n)

    def augment(self, epochs: int = 2) -> Figure:
        """Measure samples per second with every kind of augmentation at a probability of 0.2, against none."""
        from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS, Augment, ImageAugment, SpeechAugment

        settings = Augment(
            SpeechAugment(**dict.fromkeys(SPEECH_KINDS, 0.2)), ImageAugment(**dict.fromkeys(IMAGE_KINDS, 0.2))
        )
        taken = self.measure_alternately(
            {
                "with": partial(rate, lambda: self.ours(self.shards, 0.0, epochs, self.workers, settings)),
                "without": partial(rate, lambda: self.ours(self.shards, 0.0, epochs, self.workers)),
            }
        )
        what = "samples/s with each kind of augmentation on a fifth of the samples, against no augmentation"
        return figure_of("augment", taken["with"], taken["without"], "samples/s", 0.15, what)

    def first_batch(self) -> Figure:
        """Measure seconds to the first batch of an epoch of realistic length, including loading its manifest."""
        taken = self.first_batches(0.0)
        what = f"seconds to the first batch of {self.epoch_pictures:,} pictures, against webdataset_best"
        return figure_of("first_batch", taken["ours"], taken["theirs"], "s", 1.0, what, at_most=True)

    def resume(self) -> Figure:
        """Measure seconds to the first batch at 90 % of that epoch."""
        taken = self.first_batches(0.9)
        what = (
            f"seconds to the first batch at 90 % of {self.epoch_pictures:,} pictures, two workers; webdataset reads "
            "all preceding samples without decoding them"
        )
        return figure_of("resume", taken["ours"], taken["theirs"], "s", 50.0, what, seconds=True)

    def first_batches(self, begin: float) -> dict[str, list[float]]:
        """Measure seconds to the first batch at a fraction of the long epoch, with two workers; the first decides."""
        import corpus
        import others

        epoch = corpus.make_epoch(self.folder / "epoch", self.shards)
        urls = sorted(map(str, epoch.glob("*.tar")))
        self.epoch_pictures = len(urls) // len(self.urls) * len(self.manifest.key)

        def seconds(open_: "Callable[[], Iterator[Batch]]") -> float:
            start = time.perf_counter()
            batches = open_()
            next(batches)  # `batches` stays open until the clock is read
            return time.perf_counter() - start

        def measures(at: float) -> dict[str, Callable[[], float]]:
            skip = int(at * self.epoch_pictures)
            return {
                "ours": partial(seconds, lambda: self.ours(epoch, at, 1.0 - at, workers=2)),
                "theirs": partial(seconds, lambda: others.webdataset_best(urls, SIZE, BATCH, 2, skip=skip)),
            }

        for measure in measures(0.0).values():
            measure()  # warm-up: imports
        return self.measure_alternately(measures(begin))

    def make_shards(self) -> Figure:
        """Measure pictures written per second and core, by the processor time of all processes from start to end.

        By wall-clock time, webdataset would use one process more than ours: the writer of the pool's results. The bound
        is below 1 because ours also starts new workers, computes checksums and flushes every shard to disk.
        """
        import corpus
        import others

        from shards.writing.writer import Format, write_shards

        log_progress("source files")
        items = corpus.make_originals(self.folder / "originals", ORIGINALS, TIMES)
        out = self.folder / "written"

        def seconds(write: Callable[[], Any]) -> float:
            shutil.rmtree(out, ignore_errors=True)
            begin = os.times()
            write()
            return sum(os.times()[:4]) - sum(begin[:4])  # of this process and of its children that have ended

        shard_format = Format(samples_per_shard=corpus.PER_SHARD)
        measures = {
            "ours": lambda: seconds(lambda: write_shards(items, out, "benchmark", shard_format, {}, self.workers)),
            "theirs": lambda: seconds(lambda: others.webdataset_writer(items, out, self.workers)),
        }
        rates = {
            name: [len(items) / value for value in times] for name, times in self.measure_alternately(measures).items()
        }
        shutil.rmtree(out)
        what = "pictures/s per core, against webdataset's ShardWriter fed by a process pool"
        return figure_of("make_shards", rates["ours"], rates["theirs"], "pictures/s", 0.9, what)

    def measure_alternately(self, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """Return the values of each measure, taken alternately."""
        values: dict[str, list[float]] = {name: [] for name in measures}
        for repetition in range(self.repeats):
            for name, measure in measures.items():
                values[name].append(measure())
                log_progress(f"repetition {repetition + 1} of {self.repeats}: {name} {values[name][-1]:.4g}")
        return values


def figure_of(
    name: str,
    ours: list[float],
    theirs: list[float],
    unit: str,
    bound: float,
    what: str,
    at_most: bool = False,
    seconds: bool = False,
) -> Figure:
    """Return a figure whose ratio is the median of ours/theirs over repetitions, or of theirs/ours with `seconds`."""
    ratio = statistics.median(b / a if seconds else a / b for a, b in zip(ours, theirs, strict=True))
    medians = statistics.median(ours), statistics.median(theirs)
    return Figure(name, *medians, unit, ratio, what, **{"at_most" if at_most else "at_least": bound})


def rate(open_: "Callable[[], Iterator[Batch]]") -> float:
    """Measure samples per second from opening to the last batch; a later start would not count prefetched batches."""
    begin = time.perf_counter()
    total = sum(len(batch.ids) for batch in open_())
    return total / (time.perf_counter() - begin)


def decode_all(pairs: list[tuple[bytes, bytes]], epochs: int, barrier: Any) -> None:
    """Decode all pictures and captions `epochs` times, after all processes are ready."""
    from shards.media.audio import decode_audio
    from shards.media.picture import decode_picture

    decode_picture(pairs[0][0], SIZE), decode_audio(pairs[0][1])  # warm-up: imports
    barrier.wait()
    for _ in range(epochs):
        for picture, audio in pairs:
            decode_picture(picture, SIZE)
            decode_audio(audio)


def log_progress(line: str) -> None:
    """Print a line with time and load average to stderr."""
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {line}", file=sys.stderr, flush=True)


RATES = ("webdataset_docs", "webdataset_best", "mosaicml_streaming", "lhotse_shar", "spdl", "limit")
FIGURES = (*RATES, "augment", "first_batch", "resume", "make_shards")


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = build_parser(__doc__, repeats=5)
    parser.add_argument("--pictures", type=int, default=1024, help="pictures in the shards (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="loader processes (default: one per core)"
    )
    parser.add_argument(
        "--only", metavar="FIGURE,...", default=",".join(FIGURES), help=f"figures to measure: {', '.join(FIGURES)}"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="cache of the data (default: a subfolder of the temporary folder for each number of pictures)",
    )
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    if unknown := wanted - set(FIGURES):
        parser.error(f"unknown figures: {', '.join(sorted(unknown))}; valid: {', '.join(FIGURES)}")
    multiple = BATCH * options.workers
    if options.pictures < 2 * multiple or options.pictures % multiple:
        parser.error(
            f"--pictures is {options.pictures}; with {options.workers} workers it must be a multiple of {multiple} "
            f"and at least {2 * multiple}"
        )
    folder = options.folder or Path(tempfile.gettempdir()) / f"loading-benchmark-{options.pictures}"
    bench = Bench(folder, options.pictures, options.workers, options.repeats)
    figures = bench.rates(wanted & set(RATES)) if wanted & set(RATES) else []
    figures += [getattr(bench, name)() for name in FIGURES[len(RATES) :] if name in wanted]
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
