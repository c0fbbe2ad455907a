"""The connection against a daemon that answers as the test says: replies, failures, restarts, and nothing left open."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mshare import connection
from mshare.connection import Connection, Ticket, collect_maps, connect, reply_of
from msharefs import protocol

Apart = Callable[[Callable[[], object]], None]

DONE = protocol.Done()
ASK = protocol.GetList()
LISTING = protocol.Listing(())


@pytest.fixture
def daemon(fake_daemon: Any) -> Any:
    """The fake; listings are empty until the test says otherwise."""
    fake_daemon.on[protocol.GetList] = lambda _request, _fds: LISTING
    return fake_daemon


@pytest.fixture
def link(daemon: Any) -> Iterator[Connection]:
    link = Connection(daemon.mount)
    yield link
    link.forget()


def same(one: int, two: int) -> bool:
    return os.fstat(one).st_ino == os.fstat(two).st_ino


class TestGreeting:
    """Hello and welcome."""

    def test_nothing_is_sent_before_the_first_request(self, link: Connection, daemon: Any) -> None:
        assert daemon.heard == []
        link.call(ASK, protocol.Listing)
        assert daemon.kinds() == [protocol.Hello, protocol.GetList]
        assert daemon.heard[0].client == f"mshare pid {os.getpid()}"

    def test_one_hello_serves_all_requests(self, link: Connection, daemon: Any) -> None:
        for _ in range(3):
            link.call(ASK, protocol.Listing)
        assert daemon.kinds() == [protocol.Hello] + 3 * [protocol.GetList]

    @pytest.mark.parametrize("fork_events", [True, False])
    def test_the_welcome_says_whether_forks_are_reported(
        self, link: Connection, daemon: Any, fork_events: bool
    ) -> None:
        daemon.welcome = protocol.Welcome("fake", "/m", fork_events)
        link.call(ASK, protocol.Listing)
        assert link.fork_events is fork_events

    def test_no_welcome_is_the_daemons_error_in_its_words(self, link: Connection, daemon: Any) -> None:
        daemon.welcome = protocol.Failed(errno.EPROTO, "speak up")
        with pytest.raises(OSError, match="does not welcome this client: speak up") as caught:
            link.call(ASK, protocol.Listing)
        assert caught.value.errno == errno.EPROTO
        assert protocol.GetList not in daemon.kinds()

    def test_a_strange_welcome_is_an_error_too(self, link: Connection, daemon: Any) -> None:
        daemon.welcome = DONE
        with pytest.raises(OSError, match=r"does not welcome this client: Done\(\)"):
            link.call(ASK, protocol.Listing)

    @pytest.mark.parametrize("welcome", [None, b"nonsense", b"MSHR\2\0\0\0{}"])
    def test_a_daemon_of_another_kind_is_none(self, link: Connection, daemon: Any, welcome: Any) -> None:
        daemon.welcome = welcome
        with pytest.raises(OSError, match=r"no daemon answers at .* start one with `mshare up`"):
            link.call(ASK, protocol.Listing)

    def test_after_a_failed_greeting_the_next_request_greets_again(self, link: Connection, daemon: Any) -> None:
        good = daemon.welcome
        daemon.welcome = None
        with pytest.raises(OSError, match="no daemon answers"):
            link.call(ASK, protocol.Listing)
        daemon.welcome = good
        assert link.call(ASK, protocol.Listing) == LISTING


class TestReplies:
    """One request, one reply."""

    def test_the_reply_that_is_expected(self, link: Connection, daemon: Any) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: DONE
        assert link.call(protocol.Detach(5), protocol.Done) == DONE
        assert daemon.heard[-1] == protocol.Detach(5)

    def test_another_one_is_an_error_that_names_both(self, link: Connection, daemon: Any) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: LISTING
        with pytest.raises(OSError, match="answered Listing instead of Done") as caught:
            link.call(protocol.Detach(5), protocol.Done)
        assert caught.value.errno == errno.EPROTO
        with pytest.raises(OSError, match="Done instead of Listing"):
            reply_of(DONE, protocol.Listing)

    @pytest.mark.parametrize(
        ("number", "kind"),
        [
            (errno.ENOENT, FileNotFoundError),
            (errno.EEXIST, FileExistsError),
            (errno.EACCES, PermissionError),
            (errno.EPERM, PermissionError),
            (errno.EAGAIN, BlockingIOError),
            (errno.EDQUOT, OSError),
            (errno.EINVAL, OSError),
        ],
    )
    def test_a_failure_is_the_oserror_of_its_errno(
        self, link: Connection, daemon: Any, number: int, kind: type[OSError]
    ) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: protocol.Failed(number, "in these words")
        with pytest.raises(kind, match="in these words") as caught:
            link.call(protocol.Detach(5), protocol.Done)
        assert type(caught.value) is kind
        assert caught.value.errno == number
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds().count(protocol.Hello) == 1

    @pytest.mark.parametrize("reply", [b"nonsense", b"MSHR\1\0\0\0[]", None])
    def test_what_is_no_reply_ends_the_conversation(self, link: Connection, daemon: Any, reply: Any) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: reply
        with pytest.raises(OSError, match=r"."):
            link.call(protocol.Detach(5), protocol.Done)
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds().count(protocol.Hello) > 1

    def test_a_request_that_is_too_long_is_not_sent(self, link: Connection, daemon: Any) -> None:
        with pytest.raises(OSError, match="more than 64 KiB") as caught:
            link.call(protocol.Unlink("x" * protocol.MAX_PACKET), protocol.Done)
        assert caught.value.errno == errno.E2BIG
        assert protocol.Unlink not in daemon.kinds()
        assert link.call(ASK, protocol.Listing) == LISTING

    def test_lists_of_any_length_are_collected(self) -> None:
        pieces = {None: ([0, 1], True), 1: ([2], True), 2: ([], False)}
        asked: list[int | None] = []

        def ask(after: int | None) -> protocol.Maps:
            asked.append(after)
            offsets, more = pieces[after]
            return protocol.Maps(tuple(protocol.Vma(at, 1, 3, False, 0) for at in offsets), more)

        assert [vma.offset for vma in collect_maps(ask)] == [0, 1, 2]
        assert asked == [None, 1, 2]


class TestDescriptors:
    """They go with requests and come with replies; none is lost."""

    def test_those_of_a_request_arrive_and_stay_the_callers(
        self, link: Connection, daemon: Any, pipe: tuple[int, int]
    ) -> None:
        seen: list[bool] = []
        daemon.on[protocol.GetStat] = lambda _request, fds: (seen.extend(map(same, fds, pipe)), DONE)[1]
        link.call(protocol.GetStat(), protocol.Done, pipe)
        assert seen == [True, True]
        assert all(os.fstat(fd) for fd in pipe)

    def test_those_of_a_reply_are_the_callers_and_inherited_by_nobody(
        self, link: Connection, daemon: Any, pipe: tuple[int, int]
    ) -> None:
        daemon.on[protocol.GetStat] = lambda _request, _fds: (DONE, list(pipe))
        reply, fds = link.exchange(protocol.GetStat())
        assert reply == DONE
        assert list(map(same, fds, pipe)) == [True, True]
        assert not any(map(os.get_inheritable, fds))
        for fd in fds:
            os.close(fd)

    @pytest.mark.parametrize(
        ("reply", "words"),
        [
            (LISTING, "Listing instead of Done"),
            (protocol.Failed(errno.ENOENT, "not there"), "not there"),
            (b"nonsense", "packet"),
            (protocol.encode(DONE, 1), "1 descriptors were sent, 2 came"),
            (protocol.encode(DONE, 3), "3 descriptors were sent, 2 came; raise `ulimit -n`"),
        ],
    )
    def test_those_of_a_failure_are_closed(
        self,
        link: Connection,
        daemon: Any,
        pipe: tuple[int, int],
        copies: Callable[[], int],
        reply: Any,
        words: str,
    ) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: (reply, list(pipe))
        with pytest.raises(OSError, match=words):
            link.call(protocol.Detach(1), protocol.Done)
        assert copies() == 0

    def test_those_that_nobody_expects_are_closed(
        self, link: Connection, daemon: Any, pipe: tuple[int, int], copies: Callable[[], int]
    ) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: (DONE, list(pipe))
        assert link.call(protocol.Detach(1), protocol.Done) == DONE
        assert copies() == 0

    def test_more_than_there_is_room_for_are_closed(
        self, link: Connection, daemon: Any, pipe: tuple[int, int], copies: Callable[[], int]
    ) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: (DONE, [pipe[0]] * 7)
        with pytest.raises(OSError, match="7 descriptors were sent") as caught:
            link.call(protocol.Detach(1), protocol.Done)
        assert caught.value.errno == errno.EMFILE
        assert copies() == 0

    @pytest.mark.parametrize("welcome", [protocol.Welcome("fake", "/m", fork_events=True), DONE])
    def test_those_of_a_greeting_are_closed(
        self, link: Connection, daemon: Any, pipe: tuple[int, int], copies: Callable[[], int], welcome: Any
    ) -> None:
        daemon.welcome = (welcome, list(pipe))
        with contextlib.suppress(OSError):
            link.call(ASK, protocol.Listing)
        assert copies() == 0


class TestAnotherDaemon:
    """A daemon that goes, and one that comes."""

    def test_a_restarted_one_is_greeted_and_asked(self, link: Connection, daemon: Any) -> None:
        link.call(ASK, protocol.Listing)
        daemon.stop()
        daemon.start()
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds() == [protocol.Hello, protocol.GetList] * 2

    def test_what_it_says_of_forks_holds_from_then_on(self, link: Connection, daemon: Any) -> None:
        link.call(ASK, protocol.Listing)
        daemon.stop()
        daemon.welcome = protocol.Welcome("fake", "/m", fork_events=False)
        daemon.start()
        link.call(ASK, protocol.Listing)
        assert not link.fork_events

    def test_one_that_moved_is_found_by_the_mount(self, link: Connection, daemon: Any) -> None:
        link.call(ASK, protocol.Listing)
        daemon.stop()
        daemon.socket = daemon.socket.with_name("elsewhere")
        (daemon.mount / "mshare_info").write_text(f"2097152\nsocket {daemon.socket}\n")
        daemon.start()
        assert link.call(ASK, protocol.Listing) == LISTING

    def test_one_that_hangs_up_on_every_request_is_left_alone_in_the_end(self, link: Connection, daemon: Any) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: None
        link.call(ASK, protocol.Listing)
        with pytest.raises(ConnectionResetError, match="again and again"):
            link.call(protocol.Detach(1), protocol.Done)
        assert 1 < daemon.kinds().count(protocol.Detach) < 100

    def test_a_request_that_it_does_not_know_of_is_made_again(self, link: Connection, daemon: Any) -> None:
        answers: list[Any] = [None, DONE]
        daemon.on[protocol.Detach] = lambda _request, _fds: answers.pop(0)
        link.call(ASK, protocol.Listing)
        assert link.call(protocol.Detach(1), protocol.Done) == DONE
        first, second = (message for message in daemon.heard if isinstance(message, protocol.Hello))
        assert (second.session, second.answered, second.waiting) == (first.session, 1, True)
        assert (first.answered, first.waiting) == (0, False)

    @pytest.mark.parametrize("refused", [1, 3, 1000])
    def test_a_ticket_of_a_mount_before_is_opened_again(self, link: Connection, daemon: Any, refused: int) -> None:
        """Whoever asked something else meanwhile has found the next daemon already. In the end it is an error."""

        def ticket() -> Ticket:
            made = Ticket([os.memfd_create("ticket")])
            made.again = ticket
            opened.append(made[0])
            return made

        def stat(_request: object, fds: list[int]) -> protocol.Message:
            seen.append(os.fstat(fds[0]).st_ino)
            return protocol.Failed(errno.EBADF, "not of this mount") if len(seen) <= refused else DONE

        opened: list[int] = []
        seen: list[int] = []
        daemon.on[protocol.GetStat] = stat
        with contextlib.nullcontext() if refused < 20 else pytest.raises(OSError, match="not of this mount"):
            assert link.call(protocol.GetStat(None), protocol.Done, ticket()) == DONE
        inodes = [os.fstat(fd).st_ino for fd in opened]
        for fd in opened:
            os.close(fd)
        assert seen == inodes
        assert len(set(seen)) == min(refused + 1, 20)
        daemon.stop()
        daemon.start()
        assert link.call(ASK, protocol.Listing) == LISTING
        assert [message.answered for message in daemon.heard if isinstance(message, protocol.Hello)] == [0, len(seen)]

    def test_of_one_that_was_carried_out_the_answer_comes_and_it_is_not_repeated(
        self, link: Connection, daemon: Any
    ) -> None:
        daemon.on[protocol.Detach] = lambda _request, _fds: None
        link.call(ASK, protocol.Listing)
        known = protocol.Welcome("fake", "/m", fork_events=True, known=True)
        daemon.on[protocol.Hello] = lambda hello, _fds: [known, DONE] if hello.waiting else daemon.welcome
        assert link.call(protocol.Detach(1), protocol.Done) == DONE
        assert daemon.kinds().count(protocol.Detach) == 1
        assert link.call(ASK, protocol.Listing) == LISTING

    @pytest.mark.parametrize(
        "request_", [protocol.Mapped(1, 0, 0), protocol.Settled(1), protocol.Abort(1)], ids=lambda r: type(r).__name__
    )
    def test_what_belongs_to_an_offer_is_not_made_again(self, link: Connection, daemon: Any, request_: Any) -> None:
        """The next daemon does not know the offer: whoever asked starts over."""
        daemon.on[type(request_)] = lambda _request, _fds: None
        with pytest.raises(connection.RestartedError, match="nothing has changed"):
            link.call(request_, protocol.Done)
        assert daemon.kinds().count(type(request_)) == 1
        assert link.call(ASK, protocol.Listing) == LISTING

    def test_a_request_that_failed_here_starts_another_session(self, link: Connection, daemon: Any) -> None:
        """Its answer, should there be one, must not be taken for that to the next."""
        daemon.on[protocol.Detach] = lambda _request, _fds: b"nonsense"
        with pytest.raises(OSError, match="packet"):
            link.call(protocol.Detach(1), protocol.Done)
        link.call(ASK, protocol.Listing)
        sessions = [message.session for message in daemon.heard if isinstance(message, protocol.Hello)]
        assert len(set(sessions)) == len(sessions) == 2

    def test_one_that_is_being_restarted_is_waited_for(self, link: Connection, daemon: Any) -> None:
        link.call(ASK, protocol.Listing)
        daemon.stop()
        threading.Timer(0.2, daemon.start).start()
        assert link.call(ASK, protocol.Listing) == LISTING

    def test_one_that_went_for_good_is_missed_with_the_cure(
        self, link: Connection, daemon: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "PATIENCE", 0.1)
        link.call(ASK, protocol.Listing)
        daemon.stop()
        for _ in range(2):
            with pytest.raises(OSError, match=r"no daemon answers at .* start one with `mshare up`") as caught:
                link.call(ASK, protocol.Listing)
            assert caught.value.errno == errno.ENOENT
        daemon.start()

    def test_a_socket_where_nobody_listens_is_refused_with_the_cure(self, link: Connection, daemon: Any) -> None:
        daemon.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(daemon.socket))
        with pytest.raises(ConnectionRefusedError, match=r"no daemon answers at .* start one with `mshare up`"):
            link.call(ASK, protocol.Listing)
        daemon.socket.unlink()
        daemon.start()

    def test_a_place_that_is_no_mount_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="is no msharefs mount"):
            Connection(tmp_path).call(ASK, protocol.Listing)


class TestInterrupted:
    """Half a conversation is none."""

    def test_a_reply_that_was_not_waited_for_is_not_taken_for_the_next(
        self, link: Connection, daemon: Any, pipe: tuple[int, int], copies: Callable[[], int]
    ) -> None:
        main, gone = threading.main_thread().ident, threading.Event()
        assert main is not None

        def interrupt(_request: object, _fds: object) -> Any:
            signal.pthread_kill(main, signal.SIGINT)
            assert gone.wait(60)
            return DONE, list(pipe)

        daemon.on[protocol.Detach] = interrupt
        with pytest.raises(KeyboardInterrupt):
            link.call(protocol.Detach(1), protocol.Done)
        gone.set()
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds().count(protocol.Hello) == 2
        assert copies() == 0

    def test_so_is_half_a_greeting(self, link: Connection, daemon: Any) -> None:
        main = threading.main_thread().ident
        assert main is not None
        plain = daemon.on[protocol.Hello]

        def interrupt(_request: object, _fds: object) -> None:
            signal.pthread_kill(main, signal.SIGINT)

        daemon.on[protocol.Hello] = interrupt
        with pytest.raises(KeyboardInterrupt):
            link.call(ASK, protocol.Listing)
        daemon.on[protocol.Hello] = plain
        assert link.call(ASK, protocol.Listing) == LISTING


class TestThreads:
    """Any thread may ask; one does at a time."""

    def test_each_gets_its_own_reply(self, link: Connection, daemon: Any) -> None:
        daemon.on[protocol.Detach] = lambda request, _fds: protocol.Attached(request.attachment)
        answers: dict[int, int] = {}

        def ask(first: int) -> None:
            for number in range(first, first + 50):
                answers[number] = link.call(protocol.Detach(number), protocol.Attached).attachment

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(0, 400, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [number for number, answer in answers.items() if number != answer] == []
        assert daemon.kinds().count(protocol.Hello) == 1
        assert daemon.kinds().count(protocol.Detach) == 200


class TestConnections:
    """One a mount and process."""

    def test_the_same_for_the_same_mount(self, daemon: Any, tmp_path: Path) -> None:
        assert connect(daemon.mount) is connect(daemon.mount)
        assert connect(daemon.mount) is not connect(tmp_path)

    def test_a_forked_child_has_one_of_its_own(self, daemon: Any, apart: Apart) -> None:
        link = connect(daemon.mount)
        link.call(ASK, protocol.Listing)
        pid = os.getpid()

        def work() -> None:
            assert os.getpid() != pid
            link.call(ASK, protocol.Listing)

        apart(work)
        link.call(ASK, protocol.Listing)
        hellos = [message.client for message in daemon.heard if isinstance(message, protocol.Hello)]
        assert len(hellos) == 2
        assert hellos[0] == f"mshare pid {pid}" != hellos[1]
        link.forget()

    def test_it_knows_where_the_daemon_listens(self, link: Connection, daemon: Any) -> None:
        """The mount need not be asked, which takes longer than all else."""
        link.call(ASK, protocol.Listing)
        info = daemon.mount / "mshare_info"
        info.rename(info.with_name("away"))
        link.forget()
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds().count(protocol.Hello) == 2

    def test_and_finds_one_that_has_moved_since(self, link: Connection, daemon: Any) -> None:
        link.call(ASK, protocol.Listing)
        link.forget()
        daemon.stop()
        daemon.socket = daemon.socket.with_name("elsewhere")
        (daemon.mount / "mshare_info").write_text(f"2097152\nsocket {daemon.socket}\n")
        daemon.start()
        assert link.call(ASK, protocol.Listing) == LISTING

    def test_a_child_forked_in_the_middle_of_a_request_is_not_kept_waiting(self, daemon: Any, apart: Apart) -> None:
        """The lock is held by a thread of the parent, which the child does not have."""
        link = connect(daemon.mount)
        asked, answer = threading.Event(), threading.Event()
        daemon.on[protocol.Detach] = lambda _request, _fds: (asked.set(), answer.wait(60), DONE)[2]
        thread = threading.Thread(target=link.call, args=(protocol.Detach(1), protocol.Done))
        thread.start()
        assert asked.wait(60)
        try:
            apart(lambda: link.call(ASK, protocol.Listing))
        finally:
            answer.set()
            thread.join()
        assert link.call(ASK, protocol.Listing) == LISTING
        assert daemon.kinds().count(protocol.Hello) == 2
        link.forget()

    def test_at_the_end_of_the_process_all_are_hung_up(self, daemon: Any) -> None:
        link = connect(daemon.mount)
        link.call(ASK, protocol.Listing)
        connection._hang_up_all()
        assert link._sock is None


class TestPostponed:
    """What the collector comes upon while a thread is in the middle of an exchange."""

    def test_otherwise_it_is_done_at_once(self) -> None:
        done: list[int] = []
        connection.when_idle(lambda: done.append(1))
        assert done == [1]

    def test_it_is_done_right_after_in_order(self, link: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[str] = []
        plain = connection._receive

        def receive(sock: Any) -> Any:
            connection.when_idle(lambda: done.append("first"))
            connection.when_idle(lambda: done.append("second"))
            answer = plain(sock)
            assert done == []
            return answer

        link.call(protocol.GetList("1"), protocol.Listing)
        monkeypatch.setattr(connection, "_receive", receive)
        link.call(protocol.GetList("2"), protocol.Listing)
        assert done == ["first", "second"]

    def test_it_may_itself_make_requests(self, link: Connection, daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = connection._receive

        def receive(sock: Any) -> Any:
            monkeypatch.setattr(connection, "_receive", plain)
            connection.when_idle(lambda: link.call(protocol.GetList("8"), protocol.Listing))
            return plain(sock)

        link.call(protocol.GetList("6"), protocol.Listing)
        monkeypatch.setattr(connection, "_receive", receive)
        link.call(protocol.GetList("7"), protocol.Listing)
        assert [each.after for each in daemon.heard[1:]] == ["6", "7", "8"]

    def test_it_is_done_though_the_exchange_fails(self, link: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
        done: list[int] = []

        def receive(_sock: Any) -> Any:
            connection.when_idle(lambda: done.append(1))
            raise OSError(errno.EPROTO, "nonsense")

        link.call(protocol.GetList("1"), protocol.Listing)
        monkeypatch.setattr(connection, "_receive", receive)
        with pytest.raises(OSError, match="nonsense"):
            link.call(protocol.GetList("2"), protocol.Listing)
        assert done == [1]
