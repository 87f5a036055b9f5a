"""HTTP/1.1 on a connection: uvicorn's protocol on httptools, with what it leaves open closed.

- A request that offers an upgrade, as Java's HttpClient does with `Upgrade: h2c`, keeps its body.
  The parser stops at the end of such a head (httptools#124) and uvicorn drops what follows
  (uvicorn#2722); a server may ignore the offer (RFC 9110, 7.8), and this one does.
- A head is bounded in bytes. The parser joins what it has of a header with each piece that comes,
  which takes the event loop a time that grows with the square of the header's length.
- A head is bounded in seconds, and so is a client's silence while answers wait for it to read
  them. uvicorn's only clock runs between two requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serve import protocol

log = logging.getLogger(__name__)

HEAD = 64 * 1024  # bytes of a head, and of what comes between two parts of a body
_PIECE = 4096  # bytes parsed at a time: by so many at most a head passes HEAD
_FRAMING = (b"content-length", b"transfer-encoding", b"connection")


class Wire(HttpToolsProtocol):
    """One connection.

    Invariant: while no request is answered, either uvicorn's clock for idle connections runs or
    the one here; the latter from the first byte on until the head is complete.
    """

    def __init__(self, *, deadline: float, **rest: Any) -> None:
        """Args:
        deadline: seconds in which the head of a request has to arrive, and after which a client
            that does not read its answers is given up.
        rest: of uvicorn's.
        """
        super().__init__(**rest)
        self._deadline = deadline
        self._clock: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None  # runs while more is written than is read
        self._spare = 0  # bytes since the last that got a request further
        self._begun = False  # a head has, and is not complete
        self._in_body = False
        self._offered = False  # the parser stops: the head offers an upgrade
        self._replaying = False
        self._deaf = False  # the connection ends, what still comes does not count

    # ---- the clock ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wind()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        self._has_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        self._has_read()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # closes, once the client has read the rest
        self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        if self._unread is None:
            self._unread = self.loop.call_later(self._deadline, self.transport.abort)

    def _has_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _wind(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(self._deadline, self._late)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        self._clock = None
        if self._begun:
            self._refuse(408, "the head of the request did not arrive in time")
        elif self._pending():
            self.cycle.keep_alive = False
        else:  # nothing was asked: an answer would be taken for that of the next request
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._clock is not None:  # the next head is under way
            self._unset_keepalive_if_required()

    # ---- bytes -------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.timeout_keep_alive_task is not None:  # idle until now
            self._unset_keepalive_if_required()
            self._wind()
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            if self._deaf or self.transport.is_closing():
                return
            self._feed(view[start : start + _PIECE])

    def _feed(self, piece: memoryview) -> None:
        self._spare += len(piece)
        try:
            while piece:
                try:
                    self.parser.feed_data(piece)
                    break
                except httptools.HttpParserUpgrade as stopped:
                    piece = piece[stopped.args[0] :]
                    self._replay()
        except httptools.HttpParserError:
            self._refuse(400, "this is not HTTP/1.1")
            return
        if self._spare > HEAD:
            self._refuse(431, f"the head of the request is longer than {HEAD} bytes")

    def _replay(self) -> None:
        """Go on behind a head that offers an upgrade, with a parser that has not seen the offer.

        It gets the headers that say where the body ends, and so reads, or refuses, the same body
        as it would without the offer.
        """
        self._offered = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        head = [b"%s / HTTP/%s\r\n" % (method, version.encode())]
        head += [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self._replaying = True
        try:
            self.parser.feed_data(b"".join([*head, b"\r\n"]))
        finally:
            self._replaying = False

    def _pending(self) -> bool:
        """Whether a request whose head is complete is still to be answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str) -> None:
        """Answer the request that is being read with an error, and end the connection.

        Those before it are answered first, and then the connection ends without a word: an answer
        that stands in for another is worse than none.
        """
        self._deaf = True
        self._stop()
        log.debug("%s: %s", self.client, message)
        if self._pending() and not self._in_body:
            self.cycle.keep_alive = False
            return
        if not self._in_body or not (self.pipeline or self.cycle.response_started):
            body = protocol.dump({"error": message})
            self.transport.write(
                STATUS_LINE[status] + b"content-type: application/json\r\nconnection: close\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
        self.transport.close()

    # ---- called by the parser ----------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._replaying:
            return
        self._spare, self._begun = 0, True
        self._wind()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._replaying and not self._in_body:  # a trailer is no header of the request
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._offered = self.parser.should_upgrade()
        if self._offered:
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("this is no proxy")
            return  # once more from `_replay`
        self._stop()
        self._spare, self._begun, self._in_body = 0, False, True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._spare = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._offered:
            self._in_body = False
            super().on_message_complete()
