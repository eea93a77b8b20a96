"""Identity of full KV blocks: a hash chain over token ids and media.

The KV of a position depends on everything up to it, so a block's hash covers its parent's hash. What a position's input
is, follows from its token id, or, where a media row stands, from the item's key and the row's index in the item. Both
are part of the hash: two adjacent items with one placeholder id have equal tokens for any split of their lengths, and
only the row index tells the splits apart.

Worked example, block size 4, an image of 6 rows at offset 3: block 0 holds its row 0, block 1 its rows 1 to 4, block 2
its row 5. Their hashes cover (key, 0), (key, 1) and (key, 5).

Of a span whose positions see one another both ways, the KV of each depends on all of it, behind the block too. So the
hash of a block that it touches covers the whole span.

The digest has 256 bits and is never shortened.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from sensorium.scheduler.request import RequestState

DIGEST_BYTES = 32


def _lengthened(data: bytes) -> bytes:
    """Data behind its length, so that what follows can't be mistaken for a part of it."""
    return len(data).to_bytes(8, "little") + data


def root_hash(cache_salt: str | None, adapter_id: int = 0) -> bytes:
    """The parent of a sequence's first block: equal only for requests with the same salt and the same adapter."""
    salt = b"none" if cache_salt is None else b"salt" + _lengthened(cache_salt.encode("utf-8", "surrogatepass"))
    adapter = b"adapter" + adapter_id.to_bytes(8, "little") if adapter_id else b""
    return blake2b(salt + adapter, digest_size=DIGEST_BYTES).digest()


def media_identity(request: RequestState, begin: int, end: int) -> bytes:
    """What positions `[begin, end)` hold of the request's media items; empty where they hold none."""
    parts = []
    for item in request.media_from(begin):
        span = item.span
        if span.offset >= end:
            break
        rows = span.rows_in(begin, end)
        parts.append(_lengthened(item.key.encode("utf-8", "surrogatepass")))
        parts.append(rows.start.to_bytes(8, "little"))
        parts.append(max(span.offset - begin, 0).to_bytes(8, "little"))
        parts.append((min(span.end, end) - begin).to_bytes(8, "little"))
        if span.is_dense:
            parts.append(b"all")
        else:
            parts.append(b"some" + _lengthened((span.positions(rows) - begin).astype("<i8").tobytes()))
    return b"".join(parts)


def two_way_identity(request: RequestState, begin: int, end: int) -> bytes:
    """What positions `[begin, end)` see behind them: the two-way spans that they touch, whole."""
    spans = request.message.two_way_spans
    if len(request.span_digests) < len(spans):
        request.span_digests = [_span_digest(request, *span) for span in spans]
    parts = []
    for (first, last), digest in zip(spans, request.span_digests, strict=True):
        if first < end and begin < last:
            parts += [(first - begin).to_bytes(8, "little", signed=True), (last - begin).to_bytes(8, "little"), digest]
    return b"two ways" + b"".join(parts) if parts else b""


def _span_digest(request: RequestState, begin: int, end: int) -> bytes:
    digest = blake2b(array("q", request.token_ids[begin:end]).tobytes(), digest_size=DIGEST_BYTES)
    digest.update(media_identity(request, begin, end))
    return digest.digest()


def extend_block_hashes(request: RequestState, num_blocks: int, block_size: int) -> None:
    """Append to `request.block_hashes` until it covers the first `num_blocks` blocks, which must be full."""
    hashes = request.block_hashes
    first = len(hashes)
    if first >= num_blocks:
        return
    parent = hashes[-1] if hashes else root_hash(request.message.cache_salt, request.message.adapter_id)
    # Signed 64 bits: ids at media rows may be negative or beyond the vocabulary.
    tokens = array("q", request.token_ids[first * block_size : num_blocks * block_size]).tobytes()
    block_bytes = 8 * block_size
    media = request.message.media
    last_media = media[-1].span.end if media else 0
    two_way = request.message.two_way_spans
    last_two_way = two_way[-1][1] if two_way else 0
    for i in range(num_blocks - first):
        digest = blake2b(parent, digest_size=DIGEST_BYTES)
        digest.update(tokens[i * block_bytes : (i + 1) * block_bytes])
        begin = (first + i) * block_size
        if begin < last_media:
            digest.update(media_identity(request, begin, begin + block_size))
        if begin < last_two_way:
            digest.update(two_way_identity(request, begin, begin + block_size))
        parent = digest.digest()
        hashes.append(parent)


def cross_block_hashes(request: RequestState, num_blocks: int) -> list[bytes]:
    """Hashes of the blocks that hold the rows of a request's items for cross-attention, one item behind the other.

    These rows depend on nothing but the items and the adapter that they go through.
    """
    root = blake2b(request.message.adapter_id.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    for item in request.message.media:
        root.update(_lengthened(item.key.encode("utf-8", "surrogatepass")))
        root.update(item.cross_rows.to_bytes(8, "little"))
    digest = root.digest()
    return [blake2b(digest + i.to_bytes(8, "little"), digest_size=DIGEST_BYTES).digest() for i in range(num_blocks)]
