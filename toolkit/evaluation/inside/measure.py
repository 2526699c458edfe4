"""Look inside a model on one split: gap and ranks, hardest queries, attention over patches, denoising."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from shards.manifest import Manifest
from shards.media.audio import SAMPLE_RATE
from shards.media.picture import decode_picture
from shards.reading.caption_attributes import read_caption_attributes
from toolkit.config.schema import Config
from toolkit.evaluation.attention import cross_attention
from toolkit.evaluation.encode import Encodings, ModelInputs, ProcessInfo, encode
from toolkit.evaluation.example_sheet import equally_spaced
from toolkit.evaluation.inside.denoising import denoising_curves
from toolkit.evaluation.inside.overlays import draw_attention, spans_of
from toolkit.evaluation.inside.similarity import FOUND, hardest, rank_histogram, similarities
from toolkit.evaluation.inside.words import align_proportionally
from toolkit.evaluation.ranking import rank_both
from toolkit.evaluation.recall import Ranking
from toolkit.model.outputs import Encoded

if TYPE_CHECKING:
    from toolkit.model.retrieval import SpeechImageModel

HARDEST, DRAWN = 8, 8  # queries of each direction, and drawn pairs
_DENOISED, _BATCH = 256, 32  # pairs that the denoiser is measured on
_SHOWN = 288  # pixels of a picture that attention is drawn over


class InsideLook:
    """Measures one model on some pictures of a split, in one process.

    Args:
        model: In evaluation mode, on the device.
        manifest: The shards.
        split: Name of the split.
        samples: Int64 [P], numbers of the pictures.
        config: Sections `data` and `evaluation` are used.
        process: This process, the only one.
    """

    def __init__(
        self,
        model: "SpeechImageModel",
        manifest: Manifest,
        split: str,
        samples: np.ndarray,
        config: Config,
        process: ProcessInfo,
    ) -> None:
        self.model, self.manifest, self.config, self.process = model, manifest, config, process
        self.inputs = ModelInputs(manifest, samples, config)
        texts = read_caption_attributes(manifest, split).text
        rows = [row for sample in manifest.rows(split).tolist() for row in manifest.captions(sample)]
        self.texts = dict(zip(rows, texts, strict=True))
        self.samples = samples

    @torch.no_grad()
    def distributions(self) -> dict[str, Any]:
        """Measure modality gap, similarities, ranks and hardest queries: these fields of `Inside`."""
        encodings = encode(self.model, self.manifest, self.samples, self.config, self.process)
        speech, images, caption_picture = encodings.speech, encodings.images, encodings.caption_picture
        speech_to_image, image_to_speech = rank_both(speech, images, caption_picture, FOUND)
        gap, similarity = similarities(speech, images, caption_picture)
        directions = {"speech_to_image": speech_to_image, "image_to_speech": image_to_speech}
        ranks = {name: rank_histogram(ranking) for name, ranking in directions.items()}
        return {
            "gap": gap,
            "similarity": similarity,
            "ranks": ranks,
            "hardest": self._hardest(encodings, speech_to_image, image_to_speech),
        }

    def _hardest(
        self, encodings: Encodings, speech_to_image: Ranking, image_to_speech: Ranking
    ) -> dict[str, list[dict[str, Any]]]:
        speech, images, caption_picture = encodings.speech, encodings.images, encodings.caption_picture
        queries, pictures = caption_picture.unique(), torch.arange(len(images))
        by_speech = hardest(speech_to_image, speech, caption_picture, images, pictures, HARDEST)
        by_image = hardest(
            image_to_speech, images[queries.to(images.device)], queries, speech, caption_picture, HARDEST
        )
        for each in by_speech:
            each |= {"query": self.caption_reference(each["query"]), "answer": self.picture_reference(each["answer"])}
            each["found"] = [self.picture_reference(index) for index in each["found"]]
        for each in by_image:
            each |= {
                "query": self.picture_reference(int(queries[each["query"]])),
                "answer": self.caption_reference(each["answer"]),
            }
            each["found"] = [self.caption_reference(index) for index in each["found"]]
        return {"speech_to_image": by_speech, "image_to_speech": by_image}

    def picture_reference(self, index: int) -> dict[str, Any]:
        """Reference of a picture by its position."""
        sample = int(self.samples[index])
        image_id = self.manifest.image_id[sample].decode(errors="replace")
        return {"sample": sample, "caption": None, "id": image_id, "text": None}

    def caption_reference(self, index: int) -> dict[str, Any]:
        """Reference of a caption by its position."""
        row = int(self.inputs.captions[index])
        return {
            **self.picture_reference(int(self.inputs.caption_picture[index])),
            "caption": row,
            "text": self.texts[row],
        }

    @torch.no_grad()
    def attention(self) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
        """Draw the attention of captions at equal distances over their pictures: `Inside.attention`, and the PNGs."""
        pairs, drawings = [], {}
        for index in equally_spaced(len(self.inputs.captions), DRAWN):
            query, name = self.caption_reference(index), f"attention-{index:06d}.png"
            wave = self.inputs.speech(index)
            seconds = len(wave) / SAMPLE_RATE
            speech, image = self._encode_pairs([index])
            attention = cross_attention(self.model, speech, image)
            words = align_proportionally(wave.numpy(), query["text"] or "")
            stored = self.inputs.reader.picture(query["sample"])
            shown = decode_picture(stored, _SHOWN, resize=self.config.data.resize)
            match = float(attention.logits.softmax(dim=-1)[1])
            title = query["text"] or f"caption {query['caption']} of {query['id']}"
            drawings[name] = draw_attention(shown, attention, seconds, words or spans_of(seconds), title)
            listed = [asdict(word) for word in words] or None
            pairs.append({"image": name, "query": query, "match": match, "words": listed})
        return pairs, drawings

    @torch.no_grad()
    def denoising(self, denoisers: Mapping[str, Any]) -> dict[str, Any]:
        """Measure the denoisers on the first captions of pictures at equal distances: `Inside.denoising`."""
        return denoising_curves(denoisers, self._pairs(), self.config.objectives.denoising)

    def _pairs(self) -> Iterator[tuple[Encoded, Encoded, Tensor]]:
        """Yield encoded pairs of different pictures, in batches of at least two."""
        # The first caption of each picture that has one.
        _, first = np.unique(self.inputs.caption_picture, return_index=True)
        chosen = first[equally_spaced(len(first), _DENOISED)]
        for start in range(0, len(chosen), _BATCH):
            batch = chosen[start : start + _BATCH].tolist()
            if len(batch) > 1:
                ids = torch.from_numpy(self.samples[self.inputs.caption_picture[batch]]).to(self.process.device)
                yield (*self._encode_pairs(batch), ids)

    def _encode_pairs(self, captions: list[int]) -> tuple[Encoded, Encoded]:
        device = self.process.device
        waves = [self.inputs.speech(index) for index in captions]
        images = torch.stack([self.inputs.image(int(self.inputs.caption_picture[index])) for index in captions])
        lengths = torch.tensor([len(wave) for wave in waves], device=device)
        return self.model(images.to(device), pad_sequence(waves, batch_first=True).to(device), lengths)
