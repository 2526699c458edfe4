"""An index of given embeddings, written without a model."""

from toolkit.indexing.items import Item
from toolkit.indexing.store import Head, Index, write_head
from toolkit.indexing.writer import Journal, commit


def write_index(out, embeddings, dtype="float16"):
    """An index of given embeddings [N, D]."""
    out.mkdir()
    head = Head("image", "0" * 64, "", {"kind": "files"}, embeddings.shape[1], dtype)
    write_head(out, head)
    journal = Journal(out, head)
    items = [Item(f"{number:07d}.jpg", 1, "1") for number in range(len(embeddings))]
    journal.append(items, embeddings)
    commit(Index.open(out), journal, items)
    return Index.open(out)
