"""The C client against a daemon that answers as the test says: what it reads, and what it does of nonsense."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from c_client import CClient, compiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from msharefs import protocol

SIZE = 2 << 20
OFFER = {"op": "offer", "offer": 1, "inode": 16, "addr": 0x5100_0000_0000, "size": SIZE, "readonly": False}
OFFER |= {"device": False, "page": 4096, "used": None}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("c"))


@pytest.fixture
def c(program: Path, fake_daemon: Any) -> Iterator[CClient]:
    (fake_daemon.mount / "it").touch()
    with contextlib.closing(CClient(program, fake_daemon.mount)) as c:
        yield c


def packet(body: object, descriptors: int = 0) -> bytes:
    """One of this protocol, whatever it says."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return protocol.HEADER.pack(protocol.MAGIC, protocol.VERSION, descriptors) + text


@pytest.fixture
def offers(fake_daemon: Any) -> Callable[..., None]:
    """Have the daemon answer an attach with an offer of a memfd, some fields changed."""

    def answer(changed: dict[str, Any], count: int = 1) -> None:
        def offer(_request: object, _fds: list[int]) -> tuple[bytes, list[int]]:
            fds = [os.memfd_create("backing") for _ in range(count)]
            os.ftruncate(fds[0], SIZE)
            body = {key: value for key, value in (OFFER | changed).items() if value != "absent"}
            return packet(body, count), fds

        fake_daemon.on[protocol.Attach] = offer
        fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Attached(7)
        fake_daemon.on[protocol.Abort] = lambda _request, _fds: protocol.Done()

    return answer


def test_it_says_what_python_says(c: CClient, fake_daemon: Any, offers: Callable[..., None]) -> None:
    """The same messages in the same order; the ticket, and two userfaultfds, go along."""
    offers({"used": 5000, "news": "to be ignored"})
    counts: list[int] = []
    fake_daemon.on[protocol.Mapped] = lambda _request, fds: counts.append(len(fds)) or protocol.Attached(7)
    fake_daemon.on[protocol.Detach] = lambda _request, _fds: protocol.Done()
    c.do("attach 0 it")
    assert c.ask("show 0") == f"0x510000000000 {SIZE} 5000 0"
    c.do("touch 0 0 1")
    c.do("detach 0")
    hello, attach, mapped, detach = fake_daemon.heard
    assert hello == protocol.Hello(f"C pid {c.process.pid}", hello.session)
    assert attach == protocol.Attach(None, 0)
    assert (mapped.offer, mapped.addr, mapped.staged) == (1, OFFER["addr"], ())
    assert mapped.anchor % 4096 == 0
    assert detach == protocol.Detach(7)
    assert counts == [2]


@pytest.mark.parametrize(
    "answer",
    [
        b"MSHR",
        b"nonsense and more",
        protocol.HEADER.pack(b"MSHR", 2, 0) + b'{"op":"done"}',
        protocol.HEADER.pack(b"MSHR", 257, 0) + b'{"op":"done"}',
        packet(b""),
        packet(b"[]"),
        packet(b"{"),
        packet(b"{}"),
        packet(b"{} {}"),
        packet(b'{"op"}'),
        packet(b'{"op":}'),
        packet(b'{"op":"offer",}'),
        packet(b'{"op":"off'),
        packet(b'{"op":"offer"'),
        packet(b'{"op":"offer" "offer":1}'),
        packet(b"{'op':'offer'}"),
        packet(b'{"op":"offer\\q"}'),
        packet(b'{"op":"offer\\u12"}'),
        packet(b'{"op":"offer\n"}'),
        packet(b'{"op":"offer"}\0'),
        packet(b'{"op":["offer"]}'),
        packet(b'{"op":{}}'),
        packet(b'{"op":tru}'),
        packet(b'{"op":5}'),
        packet({"op": "done"}),
        packet({"op": "x" * 5000}),
        packet({"op": "failed"}),
        packet({"op": "failed", "errno": 0, "message": ""}),
        packet({"op": "failed", "errno": 1 << 40, "message": ""}),
        packet({"op": "failed", "errno": -1, "message": ""}),
        packet({"op": "failed", "errno": True, "message": ""}),
    ],
)
def test_what_is_not_understood_is_eproto(c: CClient, fake_daemon: Any, answer: bytes) -> None:
    """And what comes next is."""
    fake_daemon.on[protocol.Attach] = lambda _request, _fds: answer
    assert c.errno_of("attach 0 it") == errno.EPROTO
    fake_daemon.on[protocol.Attach] = lambda _request, _fds: protocol.Failed(errno.EXDEV, 'no: "quotes", \\ and ä𝄞\t')
    assert c.ask("attach 0 it") == f'errno {errno.EXDEV} no: "quotes", \\ and ä𝄞\t'


@pytest.mark.parametrize(
    ("changed", "count"),
    [
        *(({key: "absent"}, 1) for key in ("offer", "inode", "addr", "size", "readonly", "device")),
        *(({key: None}, 1) for key in ("offer", "inode", "addr", "size", "readonly", "device")),
        ({"size": 1 << 64}, 1),
        ({"size": 1.5}, 1),
        ({"readonly": "yes"}, 1),
        ({}, 2),
        ({"device": True}, 1),
        ({"device": True}, 3),
    ],
)
def test_an_offer_that_lacks_something_is_eproto_and_leaves_nothing(
    c: CClient, offers: Callable[..., None], changed: dict[str, Any], count: int
) -> None:
    offers(changed, count)
    assert c.errno_of("attach 0 it") == errno.EPROTO
    before = c.descriptors()
    assert c.errno_of("attach 0 it") == errno.EPROTO
    assert c.descriptors() == before


def test_a_window_that_the_daemon_refuses_is_given_up(
    c: CClient, fake_daemon: Any, offers: Callable[..., None]
) -> None:
    offers({})
    fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Failed(errno.ENOENT, "gone meanwhile")
    for _ in range(2):
        assert c.ask("attach 0 it") == f"errno {errno.ENOENT} gone meanwhile"
    assert protocol.Abort(1) in fake_daemon.heard
    fake_daemon.on[protocol.Mapped] = lambda _request, _fds: protocol.Attached(7)
    c.do("attach 0 it")


def test_while_a_region_is_being_made_it_asks_again(c: CClient, fake_daemon: Any, offers: Callable[..., None]) -> None:
    offers({})
    offer = fake_daemon.on[protocol.Attach]
    left = [5]

    def later(request: object, fds: list[int]) -> object:
        left[0] -= 1
        return offer(request, fds) if not left[0] else protocol.Failed(errno.EAGAIN, "try again")

    fake_daemon.on[protocol.Attach] = later
    c.do("attach 0 it")
    assert left == [0]


@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_it_compiles_without_a_warning(tmp_path: Path, level: str) -> None:
    """Some warnings are of the optimiser's; all are errors here."""
    assert compiled(tmp_path, level, "-fno-sanitize=all").exists()


@pytest.mark.usefixtures("creates")
class TestCreating:
    @pytest.fixture
    def creates(self, fake_daemon: Any, offers: Callable[..., None]) -> None:
        """An attach and a create are both answered by an offer."""
        offers({})
        fake_daemon.on[protocol.Create] = fake_daemon.on[protocol.Attach]

    def test_it_asks_for_what_was_asked(self, c: CClient, fake_daemon: Any) -> None:
        """The mode less the umask; an address is a number, and none is null."""
        before = os.umask(0o027)
        try:
            with contextlib.closing(CClient(c.program, fake_daemon.mount)) as masked:
                masked.do(f"open 0 it rwcx 0 {SIZE} 666")
        finally:
            os.umask(before)
        assert fake_daemon.heard[1] == protocol.Create("it", None, SIZE, 0o640, exclusive=True, empty=False)
        assert isinstance(fake_daemon.heard[2], protocol.Mapped)
        c.do(f"open 0 caf\udcff rc 510000000000 {SIZE} 0")
        told = [message for message in fake_daemon.heard if isinstance(message, protocol.Create)][1]
        assert told == protocol.Create("caf\udcff", OFFER["addr"], SIZE, 0, exclusive=False, empty=False, readonly=True)

    def test_what_exists_is_attached_to(self, c: CClient, fake_daemon: Any) -> None:
        fake_daemon.on[protocol.Create] = lambda _request, _fds: protocol.Exists()
        c.do(f"open 0 it rwc 0 {SIZE} 600")
        assert protocol.Attach(None, SIZE) in fake_daemon.heard

    def test_what_goes_meanwhile_is_created_after_all(self, c: CClient, fake_daemon: Any) -> None:
        """It was there when it was to be made, and had gone when it was to be opened."""
        create, exists = fake_daemon.on[protocol.Create], [True, True, False]
        fake_daemon.on[protocol.Create] = lambda request, fds: (
            protocol.Exists() if exists.pop(0) else create(request, fds)
        )
        c.do(f"open 0 gone rwc 0 {SIZE} 600")
        assert fake_daemon.kinds().count(protocol.Create) == 3
        assert protocol.Attach not in fake_daemon.kinds()

    def test_an_address_that_is_taken_here_is_not_the_daemons_last_word(self, c: CClient, fake_daemon: Any) -> None:
        c.do("attach 0 it")
        create, at = fake_daemon.on[protocol.Create], [0x5200_0000_0000, OFFER["addr"]]

        def elsewhere(request: object, fds: list[int]) -> tuple[bytes, list[int]]:
            _, made = create(request, fds)
            return packet(OFFER | {"addr": at.pop()}, 1), made

        fake_daemon.on[protocol.Create] = elsewhere
        c.do(f"open 1 it rwc 0 {SIZE} 600")
        assert c.ask("show 1").startswith("0x520000000000 ")
        assert fake_daemon.kinds().count(protocol.Abort) == 1

    def test_one_that_was_asked_for_is(self, c: CClient, fake_daemon: Any) -> None:
        c.do("attach 0 it")
        assert c.errno_of(f"open 1 it rwcx 510000000000 {SIZE} 600") == errno.EINVAL
        assert fake_daemon.kinds().count(protocol.Create) == 1
        assert fake_daemon.heard[-1] == protocol.Abort(1)

    @pytest.mark.parametrize("lost", [protocol.Create, protocol.Mapped])
    def test_with_another_daemon_it_starts_over(self, c: CClient, fake_daemon: Any, lost: type[Any]) -> None:
        """Of an offer nothing is left; one that was not heard of is asked for once more."""
        answer, left = fake_daemon.on[lost], [1]

        def once(request: object, fds: list[int]) -> object:
            left[0] -= 1
            return None if left[0] >= 0 else answer(request, fds)

        fake_daemon.on[lost] = once
        c.do(f"open 0 it rwcx 0 {SIZE} 600")
        assert fake_daemon.kinds().count(protocol.Create) == 2

    def test_words_that_it_does_not_know_are_refused_here(self, c: CClient, fake_daemon: Any) -> None:
        assert c.errno_of(f"open 0 it rwct 0 {SIZE} 600") == errno.EINVAL
        assert c.errno_of(f"open 0 a/b rwc 0 {SIZE} 600") == errno.EINVAL
        assert c.errno_of(f"open 0 {'x' * 256} rwc 0 {SIZE} 600") == errno.ENAMETOOLONG
        assert c.errno_of("remove .x") == errno.EINVAL
        assert fake_daemon.heard == []

    def test_a_name_is_removed_by_its_bytes(self, c: CClient, fake_daemon: Any) -> None:
        fake_daemon.on[protocol.Remove] = lambda _request, _fds: protocol.Done()
        c.do("remove é\udced")
        assert fake_daemon.heard[-1] == protocol.Remove("é\udced")


class TestAnotherDaemon:
    """The daemon was killed, and another is there, or will be."""

    @pytest.fixture
    def attached(self, c: CClient, fake_daemon: Any, offers: Callable[..., None]) -> CClient:
        offers({})
        fake_daemon.on[protocol.Detach] = lambda _request, _fds: protocol.Done()
        c.do("attach 0 it")
        return c

    def test_between_two_requests_it_makes_no_difference(self, attached: CClient, fake_daemon: Any) -> None:
        fake_daemon.stop()
        fake_daemon.start()
        attached.do("detach 0")
        assert fake_daemon.kinds().count(protocol.Detach) == 1

    def test_one_that_is_being_restarted_is_waited_for(self, attached: CClient, fake_daemon: Any) -> None:
        fake_daemon.stop()
        threading.Timer(0.2, fake_daemon.start).start()
        attached.do("detach 0")

    def test_a_request_that_it_does_not_know_of_is_made_again(self, attached: CClient, fake_daemon: Any) -> None:
        answers: list[Any] = [None, protocol.Done()]
        fake_daemon.on[protocol.Detach] = lambda _request, _fds: answers.pop(0)
        attached.do("detach 0")
        first, second = (message for message in fake_daemon.heard if isinstance(message, protocol.Hello))
        assert len(first.session) == 32
        assert (first.answered, first.waiting) == (0, False)
        assert (second.session, second.answered, second.waiting) == (first.session, 2, True)

    def test_of_one_that_was_carried_out_only_the_answer_is_asked_for(
        self, attached: CClient, fake_daemon: Any
    ) -> None:
        fake_daemon.on[protocol.Detach] = lambda _request, _fds: None
        known = protocol.Welcome("fake", "/m", fork_events=True, known=True)
        failed = protocol.Failed(errno.EXDEV, "the answer")
        fake_daemon.on[protocol.Hello] = lambda hello, _fds: [known, failed] if hello.waiting else fake_daemon.welcome
        assert attached.ask("detach 0") == f"errno {errno.EXDEV} the answer"
        assert fake_daemon.kinds().count(protocol.Detach) == 1

    @pytest.mark.parametrize("lost", [protocol.Attach, protocol.Mapped])
    def test_attaching_starts_over(
        self, c: CClient, fake_daemon: Any, offers: Callable[..., None], lost: type[Any]
    ) -> None:
        """A new ticket, a new offer; of the first nothing is left."""
        offers({})
        answer, left = fake_daemon.on[lost], [2]

        def once(request: object, fds: list[int]) -> object:
            left[0] -= 1
            return None if left[0] >= 0 else answer(request, fds)

        fake_daemon.on[protocol.Detach] = lambda _request, _fds: protocol.Done()
        c.do("attach 0 it")
        c.do("detach 0")
        before = c.descriptors()
        fake_daemon.on[lost] = once
        c.do("attach 0 it")
        c.do("detach 0")
        assert c.descriptors() == before
        assert fake_daemon.kinds().count(protocol.Attach) == 4

    def test_one_that_always_hangs_up_is_left_alone_in_the_end(self, c: CClient, fake_daemon: Any) -> None:
        fake_daemon.on[protocol.Attach] = lambda _request, _fds: None
        assert c.errno_of("attach 0 it") == errno.EAGAIN
        assert fake_daemon.kinds().count(protocol.Attach) <= 100

    def test_a_child_has_a_session_of_its_own(self, attached: CClient, fake_daemon: Any) -> None:
        fake_daemon.on[protocol.Adopt] = lambda _request, _fds: protocol.Attached(8)
        assert attached.ask("child detach 0") == "ok"
        first, second = (message for message in fake_daemon.heard if isinstance(message, protocol.Hello))
        assert first.session != second.session
        assert (second.answered, second.waiting) == (0, False)

    def test_after_nonsense_the_session_is_another(self, attached: CClient, fake_daemon: Any) -> None:
        """An answer that comes late must not be taken for that to the next request."""
        fake_daemon.on[protocol.Detach] = lambda _request, _fds: b"nonsense"
        assert attached.errno_of("detach 0") == errno.EPROTO
        attached.do("attach 1 it")
        first, second = (message for message in fake_daemon.heard if isinstance(message, protocol.Hello))
        assert first.session != second.session


def test_a_daemon_that_does_not_welcome_it_is_told(c: CClient, fake_daemon: Any) -> None:
    fake_daemon.welcome = protocol.Failed(errno.EPERM, "not you")
    assert c.ask("attach 0 it") == f"errno {errno.EPERM} not you"
    fake_daemon.welcome = protocol.Done()
    assert c.errno_of("attach 0 it") == errno.EPROTO


LETTERS = st.characters(exclude_characters="\n\0", exclude_categories=("Cs",)) | st.integers(0xDC80, 0xDCFF).map(chr)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(LETTERS, max_size=40), ascii_only=st.booleans())
def test_any_text_is_read_as_it_was_written(c: CClient, fake_daemon: Any, text: str, *, ascii_only: bool) -> None:
    """Escaped, as our own daemon does, or as UTF-8 where that can be."""
    plain = all(ord(letter) < 0xDC80 or ord(letter) > 0xDCFF for letter in text)
    body = json.dumps({"op": "failed", "errno": 5, "message": text}, ensure_ascii=ascii_only or not plain)
    fake_daemon.on[protocol.Attach] = lambda _request, _fds: packet(body.encode())
    assert os.fsencode(c.ask("attach 0 it")) == b"errno 5 " + os.fsencode(text)
