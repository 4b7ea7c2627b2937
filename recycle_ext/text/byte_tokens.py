"""Byte tokens, <0x00> to <0xFF>, in which SentencePiece's vocabularies write characters that they lack."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer as Backend

_REPLACEMENT = "\ufffd".encode()


class ByteTokens:
    """The byte tokens of a vocabulary."""

    def __init__(self, backend: Backend) -> None:
        decoder = backend.decoder
        falls_back = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()
        ids = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)} if falls_back else {}
        self._id_of = {byte: token_id for byte, token_id in ids.items() if token_id is not None}
        # Without those of U+FFFD nothing can be replaced.
        has_replacement = all(byte in self._id_of for byte in _REPLACEMENT)
        self._byte_of = {token_id: byte for byte, token_id in self._id_of.items() if has_replacement}

    def in_utf8(self, ids: Sequence[int]) -> list[int]:
        """The same ids, but in each run of byte tokens the bytes of U+FFFD where the run is not UTF-8.

        tokenizers.decoders.ByteFallback replaces every byte of a run that is not UTF-8, so that a half character at
        the end takes the characters before it away.
        """
        result: list[int] = []
        run = bytearray()
        for token_id in [*ids, None]:
            byte = self._byte_of.get(token_id)
            if byte is not None:
                run.append(byte)
                continue
            result += [self._id_of[byte] for byte in run.decode("utf-8", "replace").encode()]
            run.clear()
            if token_id is not None:
                result.append(token_id)
        return result
