"""Messages between front and engine: round trips, cut frames, broken frames, both ends of a socket."""

from __future__ import annotations

import asyncio
import socket
import typing
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.serve import channel, messages
from trimtab.serve.channel import AsyncChannel, BlockingChannel, ChannelClosed, Frames, encode
from trimtab.serve.messages import Cancel, Pause, Piece, Stats, Tokens

TO_ENGINE = typing.get_args(messages.ToEngine)
TO_FRONT = typing.get_args(messages.ToFront)


def strategy(hint: object) -> st.SearchStrategy:
    """Values of a field; floats that msgpack keeps and `==` can compare."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1:] == (...,):
        return st.lists(strategy(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy, arguments))
    if arguments:  # a union
        return st.one_of(*map(strategy, arguments))
    if isinstance(hint, type) and issubclass(hint, messages.Part | messages.Message):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: strategy(hints[name]) for name in hint.__struct_fields__})
    plain = {
        int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False), bool: st.booleans(),
        str: st.text(st.characters(exclude_categories=["Cs"]), max_size=20), bytes: st.binary(max_size=20), type(None): st.none(),
    }  # fmt: skip
    return plain[hint]


front_messages = st.one_of(*map(strategy, TO_FRONT))
engine_messages = st.one_of(*map(strategy, TO_ENGINE))


@given(st.lists(front_messages, max_size=5), st.data())
@settings(max_examples=40, deadline=None)
def test_any_cut_of_the_stream_gives_the_same_messages(sent: list, data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    frames: Frames = Frames(messages.ToFront)
    got = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += frames.feed(stream[begin:end])
    assert got == sent
    assert frames.pending == 0


@given(engine_messages)
@settings(max_examples=40, deadline=None)
def test_messages_to_the_engine_survive_the_wire(message: messages.Message) -> None:
    assert Frames(messages.ToEngine).feed(encode(message)) == [message]


@given(st.binary(min_size=1, max_size=64))
@settings(max_examples=40, deadline=None)
def test_bytes_that_are_no_message_close_the_channel_or_are_one(body: bytes) -> None:
    frames: Frames = Frames(messages.ToFront)
    try:
        (message,) = frames.feed(len(body).to_bytes(4, "big") + body)
    except ChannelClosed:
        return
    assert isinstance(message, TO_FRONT)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(ChannelClosed, match="no message"):
        Frames(messages.ToEngine).feed(encode(Stats(at_s=1.0)))


def test_a_frame_that_announces_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(ChannelClosed, match="at most"):
        Frames(messages.ToFront).feed((channel.MAX_FRAME + 1).to_bytes(4, "big"))


def test_a_newer_side_may_add_fields_at_the_end() -> None:
    body = channel._encoder.encode(["Cancel", "a", "request", "something new"])
    assert Frames(messages.ToEngine).feed(len(body).to_bytes(4, "big") + body) == [Cancel("a")]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def test_both_ends_of_a_socket(pair: tuple[socket.socket, socket.socket]) -> None:
    engine = BlockingChannel(pair[1])

    async def talk() -> list:
        front = await AsyncChannel.open(pair[0])
        front.send(Cancel("a", "disconnect"))
        front.send(Pause("b"))
        got = []
        while len(got) < 2:  # the sends of asyncio may come apart
            got += await asyncio.to_thread(engine.receive, 5.0)
        engine.send(Tokens((Piece(id="a", text="é", ids=(1, 2)),), 0.5))
        got += await front.receive()
        await front.close()
        return got

    assert asyncio.run(talk()) == [
        Cancel("a", "disconnect"),
        Pause("b"),
        Tokens((Piece(id="a", text="é", ids=(1, 2)),), 0.5),
    ]
    with pytest.raises(ChannelClosed):
        engine.receive(5.0)


def test_what_was_sent_before_the_other_side_went_is_still_received(pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = BlockingChannel(pair[0]), BlockingChannel(pair[1])
    left.send(Pause("x"))
    left.close()
    assert right.receive(5.0) == [Pause("x")]
    with pytest.raises(ChannelClosed):
        right.receive(5.0)


def test_a_receive_without_messages_returns_in_time(pair: tuple[socket.socket, socket.socket]) -> None:
    assert BlockingChannel(pair[0]).receive(0.01) == []


def test_a_reader_that_reads_nothing_ends_the_sender_with_bounded_memory(
    pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "MAX_PENDING", 1 << 20)
    sender = BlockingChannel(pair[0])
    piece = Tokens((Piece(id="a", text="x" * 100_000),), 0.0)
    with pytest.raises(ChannelClosed, match="took nothing"):
        for _ in range(100):
            sender.send(piece, timeout_s=0.05)
    assert sender.pending < (1 << 20) + 200_000
