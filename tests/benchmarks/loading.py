"""How quick loading and writing are, against other loaders and against the limit: each figure a ratio from one run.

    python tests/benchmarks/loading.py [--json] [--pictures N] [--workers W] [--only FIGURE,...]

All read the same pictures and captions from the same shards or from the same encoded bytes in their own format, with
the page cache warm, and give the same: batches of 64 pictures of 224 x 224 bytes, each with one caption padded to the
longest. They take turns; each figure is the median of the turns' ratios, since a machine's clock drifts from turn to
turn. Everything is made here, about 1.1 GB, and kept in `--folder` for the next time. Exit code 1: a bound is missed.
"""

import argparse
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

# The processes that write shards import this module too, so what they do not need is imported late.
from table import Figure, print_figures

if TYPE_CHECKING:
    from shards.augment.settings import Augment
    from shards.reading.dataset import Batch

SIZE, BATCH = 224, 64
ORIGINALS, TIMES = 256, 12  # pictures that are written, and how often: enough to outweigh the start of the processes
SEED = 1


class Bench:
    """The data, and the measured seconds or rates of every contender, by name."""

    def __init__(self, folder: Path, pictures: int, workers: int, repeats: int) -> None:
        import corpus

        from shards import manifest

        self.folder, self.workers, self.repeats = folder, workers, repeats
        folder.mkdir(parents=True, exist_ok=True)
        jobs = len(os.sched_getaffinity(0))
        say(f"shards of {pictures} pictures in {folder}")
        self.shards = corpus.make_shards(folder / "shards", pictures, jobs)
        self.manifest = manifest.load(self.shards)
        self.urls = sorted(map(str, self.shards.glob("*.tar")))
        for url in self.urls:
            Path(url).read_bytes()  # into the page cache

    # The contenders; each is one measurement.

    def ours(
        self, folder: Path, begin: float, passes: float, workers: int, augment: "Augment | None" = None
    ) -> "Iterator[Batch]":
        """This project's stream from the beginning of a run or part of a pass later, opened from nothing."""
        from shards.manifest import load
        from shards.reading.loader import load_batches
        from shards.reading.order import order_of
        from shards.reading.reader import Reader

        manifest = load(folder)
        order = order_of(manifest, "train", BATCH, seed=SEED)
        first, last = (int(order.steps_per_epoch * at) for at in (begin, begin + passes))
        return load_batches(
            Reader(manifest),
            order,
            range(first, last),
            image_size=SIZE,
            max_seconds=30.0,
            micros=1,
            rank=0,
            world_size=1,
            workers=workers,
            augment=augment,
        )

    def loaders(self, passes: int) -> "dict[str, Callable[[], Iterator[Batch]]]":
        """All loaders, by the name of their figure."""
        import others

        same = (SIZE, BATCH, self.workers, passes)
        return {
            "ours": lambda: self.ours(self.shards, 0.0, passes, self.workers),
            "webdataset_docs": lambda: others.webdataset_docs(self.urls, *same),
            "webdataset_best": lambda: others.webdataset_best(self.urls, *same),
            "mosaicml_streaming": lambda: others.mosaicml_streaming(self.folder / "mds", self.manifest, *same),
            "lhotse_shar": lambda: others.lhotse_shar(self.folder / "shar", self.manifest, *same),
            "spdl": lambda: others.spdl(self.manifest, *same),
        }

    def limit(self, passes: int) -> float:
        """Samples a second of processes that only decode, from memory."""
        from shards.reading.reader import Reader

        reader = Reader(self.manifest)
        pairs = [
            (reader.picture(n), reader.audio(random.choice(self.manifest.captions(n))))
            for n in range(len(self.manifest.key))
        ]
        context = multiprocessing.get_context("fork")  # so that the bytes are there from the beginning
        gate = context.Barrier(self.workers + 1)
        processes = [
            context.Process(target=decode_all, args=(pairs[n :: self.workers], passes, gate))
            for n in range(self.workers)
        ]
        for process in processes:
            process.start()
        gate.wait()
        begin = time.perf_counter()
        for process in processes:
            process.join()
        return passes * len(pairs) / (time.perf_counter() - begin)

    # The figures.

    def rates(self, wanted: set[str], passes: int = 16) -> list[Figure]:
        """Samples a second, over so many passes that beginning, half a second, weighs little."""
        bounds = {
            "webdataset_docs": (1.5, "samples/s against webdataset as its documentation writes it"),
            "webdataset_best": (1.1, "samples/s against webdataset that decodes only what is chosen"),
            "mosaicml_streaming": (1.0, "samples/s against mosaicml-streaming"),
            "lhotse_shar": (1.0, "samples/s against lhotse's Shar"),
            "spdl": (1.0, "samples/s against SPDL's pipeline of threads around the same codecs"),
            "limit": (0.9, "samples/s against processes that only decode, from memory"),
        }
        contenders = {name: open_ for name, open_ in self.loaders(passes).items() if name in {"ours", *wanted}}
        for name in list(contenders):
            say(f"{name}: its batches are looked at")
            try:
                self.look_at(contenders[name]())
            except ImportError as error:
                print(f"{name}: not installed, left out ({error})", file=sys.stderr)
                del contenders[name]
        measures: dict[str, Callable[[], float]] = {name: partial(rate, open_) for name, open_ in contenders.items()}
        if "limit" in wanted:
            measures["limit"] = lambda: self.limit(passes)
        taken = self.in_turns(measures)
        return [
            figure_of(name, taken["ours"], taken[name], "samples/s", *bounds[name]) for name in bounds if name in taken
        ]

    def look_at(self, batches: "Iterator[Batch]") -> None:
        """See that the first batches hold what they ought to, value by value."""
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
                spoken = [decode_audio(reader.audio(row)) for row in self.manifest.captions(int(n))]
                assert any(np.array_equal(wave[: int(length)].numpy(), one) for one in spoken), int(n)
                assert not wave[int(length) :].any(), int(n)

    def augment(self, passes: int = 2) -> Figure:
        """Samples a second with every kind of augmentation at a probability of 0.2, against none."""
        from shards.augment.settings import IMAGE_KINDS, SPEECH_KINDS, Augment, ImageAugment, SpeechAugment

        some = Augment(
            SpeechAugment(**dict.fromkeys(SPEECH_KINDS, 0.2)), ImageAugment(**dict.fromkeys(IMAGE_KINDS, 0.2))
        )
        taken = self.in_turns(
            {
                "with": partial(rate, lambda: self.ours(self.shards, 0.0, passes, self.workers, some)),
                "without": partial(rate, lambda: self.ours(self.shards, 0.0, passes, self.workers)),
            }
        )
        what = "samples/s with each kind of augmentation on a fifth of the samples, against none"
        return figure_of("augment", taken["with"], taken["without"], "samples/s", 0.15, what)

    def first_batch(self) -> Figure:
        """Seconds to the first batch of an epoch as long as a real corpus's, whose whole manifest is read first."""
        taken = self.first_batches(0.0)
        what = f"seconds to the first batch of {self.epoch_pictures:,} pictures, against webdataset_best"
        return figure_of("first_batch", taken["ours"], taken["theirs"], "s", 1.0, what, at_most=True)

    def resume(self) -> Figure:
        """Seconds to the first batch at 90 % of that epoch."""
        taken = self.first_batches(0.9)
        what = (
            f"seconds to the first batch at 90 % of {self.epoch_pictures:,} pictures, two workers; webdataset reads "
            "what is before it, but decodes nothing of that"
        )
        return figure_of("resume", taken["ours"], taken["theirs"], "s", 50.0, what, seconds=True)

    def first_batches(self, begin: float) -> dict[str, list[float]]:
        """Seconds to the first batch at a part of the long epoch, by two workers, as the first of them decides."""
        import corpus
        import others

        epoch = corpus.make_epoch(self.folder / "epoch", self.shards)
        urls = sorted(map(str, epoch.glob("*.tar")))
        self.epoch_pictures = len(urls) // len(self.urls) * len(self.manifest.key)

        def seconds(open_: "Callable[[], Iterator[Batch]]") -> float:
            start = time.perf_counter()
            batches = open_()
            next(batches)  # and they stay open until the clock is read
            return time.perf_counter() - start

        def measures(at: float) -> dict[str, Callable[[], float]]:
            skip = int(at * self.epoch_pictures)
            return {
                "ours": partial(seconds, lambda: self.ours(epoch, at, 1.0 - at, workers=2)),
                "theirs": partial(seconds, lambda: others.webdataset_best(urls, SIZE, BATCH, 2, skip=skip)),
            }

        for measure in measures(0.0).values():
            measure()  # what is imported late is imported now
        return self.in_turns(measures(begin))

    def make_shards(self) -> Figure:
        """Pictures that a core writes in a second: processor time of all processes, from their start to their end.

        By the clock, webdataset's would have a process more than ours at work: the one that writes what the pool makes.
        The bound is below 1: ours also starts its workers afresh, takes checksums and brings every shard to the disk.
        """
        import corpus
        import others

        from shards.writing.writer import Format, write_shards

        say("originals")
        items = corpus.make_originals(self.folder / "originals", ORIGINALS, TIMES)
        out = self.folder / "written"

        def seconds(write: Callable[[], Any]) -> float:
            shutil.rmtree(out, ignore_errors=True)
            begin = os.times()
            write()
            return sum(os.times()[:4]) - sum(begin[:4])  # of this process and of those that it waited for

        form = Format(samples_per_shard=corpus.PER_SHARD)
        measures = {
            "ours": lambda: seconds(lambda: write_shards(items, out, "benchmark", form, {}, self.workers)),
            "theirs": lambda: seconds(lambda: others.webdataset_writer(items, out, self.workers)),
        }
        rates = {name: [len(items) / value for value in some] for name, some in self.in_turns(measures).items()}
        shutil.rmtree(out)
        what = "pictures/s of a core, against webdataset's ShardWriter fed by a pool of processes"
        return figure_of("make_shards", rates["ours"], rates["theirs"], "pictures/s", 0.9, what)

    def in_turns(self, measures: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
        """The values of each measure, taken in turns."""
        values: dict[str, list[float]] = {name: [] for name in measures}
        for turn in range(self.repeats):
            for name, measure in measures.items():
                values[name].append(measure())
                say(f"turn {turn + 1} of {self.repeats}: {name} {values[name][-1]:.4g}")
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
    """A figure whose ratio is ours/theirs, or theirs/ours for seconds that should be few: the median of the turns'."""
    ratio = statistics.median(b / a if seconds else a / b for a, b in zip(ours, theirs, strict=True))
    middle = statistics.median(ours), statistics.median(theirs)
    return Figure(name, *middle, unit, ratio, what, **{"at_most" if at_most else "at_least": bound})


def rate(open_: "Callable[[], Iterator[Batch]]") -> float:
    """Samples a second from opening to the last batch: any later beginning would give away what is made in advance."""
    begin = time.perf_counter()
    total = sum(len(batch.ids) for batch in open_())
    return total / (time.perf_counter() - begin)


def decode_all(pairs: list[tuple[bytes, bytes]], passes: int, gate: Any) -> None:
    """Decode pictures and captions over and over."""
    from shards.media.audio import decode_audio
    from shards.media.picture import decode_picture

    decode_picture(pairs[0][0], SIZE), decode_audio(pairs[0][1])  # what is imported late is imported now
    gate.wait()
    for _ in range(passes):
        for picture, audio in pairs:
            decode_picture(picture, SIZE)
            decode_audio(audio)


def say(line: str) -> None:
    """Tell how far it is."""
    print(f"[{time.strftime('%H:%M:%S')}, load {os.getloadavg()[0]:.1f}] {line}", file=sys.stderr, flush=True)


RATES = ("webdataset_docs", "webdataset_best", "mosaicml_streaming", "lhotse_shar", "spdl", "limit")
FIGURES = (*RATES, "augment", "first_batch", "resume", "make_shards")


def main() -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line rather than a table")
    parser.add_argument("--pictures", type=int, default=1024, help="in the shards (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: one a core")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: %(default)s)")
    parser.add_argument("--only", metavar="FIGURE,...", default=",".join(FIGURES), help=", ".join(FIGURES))
    parser.add_argument("--folder", type=Path, help="default: one for each number of pictures in the temporary folder")
    options = parser.parse_args()
    wanted = set(options.only.split(","))
    if unknown := wanted - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}: there are {', '.join(FIGURES)}")
    whole = BATCH * options.workers
    if options.pictures < 2 * whole or options.pictures % whole:
        parser.error(
            f"--pictures {options.pictures} for {options.workers} workers: give a multiple of {whole}, not {whole}"
        )
    folder = options.folder or Path(tempfile.gettempdir()) / f"loading-benchmark-{options.pictures}"
    bench = Bench(folder, options.pictures, options.workers, options.repeats)
    figures = bench.rates(wanted & set(RATES)) if wanted & set(RATES) else []
    figures += [getattr(bench, name)() for name in FIGURES[len(RATES) :] if name in wanted]
    return print_figures(figures, options.json)


if __name__ == "__main__":
    sys.exit(main())
