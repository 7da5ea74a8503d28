"""Views of a rendering job that do not fit into memory, as a stream of Ray Data for each worker."""

from collections import Counter
from collections.abc import Generator

import ray
import torch
from ray.data import DataContext, DataIterator, Dataset

from raydream.config.agp import AgpDataConfig
from raydream.config.render import ViewConfig
from raydream.store.faults import PASSING_MESSAGES
from raydream.store.storage import LocalFiles
from raydream.train.agp.samples import COLUMNS, Samples, kept, noun_of, samples_of
from raydream.views.dataset import open_job, values_of
from raydream.views.folder import VIEWS, shard_name

_ROWS_AT_ONCE = 256
_SHUFFLED_ROWS = 4096


def open_stream(uri: str) -> Dataset:
    """The rows of all shards, files in random order."""
    files, plan, _ = open_job(uri)
    paths = [files.path(shard_name(VIEWS, shard)) for shard in range(plan.num_shards)]
    context = DataContext.get_current()
    # its newer reader starts a pool of actors for the files' footers: 12 s and more even for a few
    context.use_datasource_v2 = False
    context.retried_io_errors = list(dict.fromkeys([*context.retried_io_errors, *PASSING_MESSAGES]))
    filesystem = None if isinstance(files, LocalFiles) else files.filesystem
    return ray.data.read_parquet(
        [str(path) for path in paths], columns=list(COLUMNS), shuffle="files", filesystem=filesystem
    )


class StreamSamples:
    """An ``agp_samples.SampleSource`` over one worker's part of a stream, shuffled within a buffer, again and again.

    What comes next depends on the stream, not on a generator: a resumed training sees the same views in another order.
    """

    def __init__(self, part: DataIterator, views: ViewConfig, latent_px: int, config: AgpDataConfig) -> None:
        self._part, self._views, self._latent_px, self._config = part, views, latent_px, config
        self._rows = self._forever()
        self._left: Samples | None = None
        self._seen: Counter[str] = Counter()

    def samples(self, size: int, generator: torch.Generator) -> Samples:
        """The next views of the stream."""
        parts = [self._left] if self._left is not None else []
        while sum(len(part.cards) for part in parts) < size:
            parts.append(next(self._rows))
        whole = Samples.concatenate(parts)
        self._left = whole.select(range(size, len(whole.cards)))
        return whole.select(range(size))

    def close(self) -> None:
        """Ends the stream while Ray is there: left to the garbage collector, its end may come after Ray's."""
        self._rows.close()

    def nouns(self) -> tuple[str, ...]:
        """Nouns of the objects that came by so far, the most frequent first."""
        return tuple(noun for noun, _ in self._seen.most_common() if noun)

    def _forever(self) -> Generator[Samples, None, None]:
        while True:
            found = False
            for table in self._part.iter_batches(
                batch_size=_ROWS_AT_ONCE, batch_format="pyarrow", local_shuffle_buffer_size=_SHUFFLED_ROWS
            ):
                rows = {name: values_of(table[name].combine_chunks()) for name in COLUMNS}  # type: ignore[union-attr]
                samples = samples_of(rows, self._views, self._latent_px)
                wanted = [place for place, card in enumerate(samples.cards) if kept(card, self._config)]
                if wanted:
                    found = True
                    self._seen.update(noun_of(samples.cards[place], set(self._config.nouns)) for place in wanted)
                    yield samples.select(wanted)
            if not found:
                raise ValueError("data.nouns, data.known_fronts_only: no object in the views is left; ask for others")
