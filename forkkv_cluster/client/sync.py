"""The synchronous client. ``aio`` has the same methods, awaited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from forkkv_cluster.api.v1 import adapters_pb2, cluster_pb2, sessions_pb2
from forkkv_cluster.client import messages
from forkkv_cluster.client.channel import CHANNEL_OPTIONS, call_metadata, call_timeout, make_stubs
from forkkv_cluster.client.errors import from_rpc_error
from forkkv_cluster.client.messages import GenerateOptions
from forkkv_cluster.client.results import BranchInfo, Event, Generation, GenerationBuilder, JoinResult, SessionInfo, Status
from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.core.session import BranchSpec, JoinWhat


class ForkKVClient:
    """A connection to one cluster, for any number of threads. Every method raises ForkKVError.

    A value that no server could take is refused here, as InvalidArgument with field, value and remedy, before it is sent.

    ``address`` is HOST:PORT of the gRPC proxy. ``token`` is needed where the server names api_tokens. ``timeout_s`` bounds
    every call that is not a generation; generations take their own.
    """

    def __init__(
        self, address: str, *, token: str | None = None, timeout_s: float | None = 60.0, app_name: str | None = None
    ) -> None:
        self._channel = grpc.insecure_channel(address, options=list(CHANNEL_OPTIONS))
        self._metadata = call_metadata(token, app_name)
        self._timeout_s = timeout_s
        self.stubs = make_stubs(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def call(self, method: Any, request: Any) -> Any:
        """One unary rpc."""
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None

    def events(self, request: sessions_pb2.GenerateRequest) -> Iterator[Event]:
        """One Generate rpc. Closing the iterator cancels it."""
        call = self.stubs.sessions.Generate(request, timeout=call_timeout(request.timeout_s or None), metadata=self._metadata)
        try:
            for message in call:
                event = messages.read_event(message)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise from_rpc_error(error) from None
        finally:
            call.cancel()

    def create_session(
        self,
        document: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        adapters: Sequence[str] = (),
        sharing: Sharing | str | None = None,
        sharing_group: str = "",
        tenant: str = "",
        keep_s: float = 0.0,
    ) -> Session:
        """A session over a document, or over token ids, that ``adapters`` may fork. ``keep_s`` asks workers to evict its
        context after all others for so many seconds, or until it is closed."""
        request = messages.create_session_request(
            document=document,
            token_ids=token_ids,
            adapters=adapters,
            sharing=sharing,
            sharing_group=sharing_group,
            tenant=tenant,
            keep_s=keep_s,
        )
        return Session(self, messages.read_session(self.call(self.stubs.sessions.CreateSession, request)))

    def session(self, session_id: str) -> Session:
        """A session that exists, for example after a reconnect."""
        request = messages.get_session_request(session_id)
        return Session(self, messages.read_session(self.call(self.stubs.sessions.GetSession, request)))

    def list_sessions(self, tenant: str = "") -> list[SessionInfo]:
        """Oldest first."""
        response = self.call(self.stubs.sessions.ListSessions, messages.list_sessions_request(tenant))
        return [messages.read_session(session) for session in response.sessions]

    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        adapter: str | None = None,
        sharing: Sharing | str | None = None,
        shared_prefix_tokens: int | None = None,
        sharing_group: str = "",
        tenant: str = "",
        **options: Unpack[GenerateOptions],
    ) -> Iterator[Event]:
        """A request of its own, event by event."""
        return self.events(
            messages.stateless_request(
                prompt=prompt,
                token_ids=token_ids,
                adapter=adapter,
                sharing=sharing,
                shared_prefix_tokens=shared_prefix_tokens,
                sharing_group=sharing_group,
                tenant=tenant,
                options=options,
            )
        )

    def generate(self, prompt: str | None = None, **arguments: Any) -> Generation:
        """A request of its own, as a whole; arguments as of ``stream``."""
        return collect(self.stream(prompt, **arguments))

    def load_adapter(self, name: str, path: str, *, sharing: Sharing | str | None = None) -> AdapterInfo:
        """``path`` is a PEFT directory on the workers' hosts. ``sharing``: how requests with ``auto`` are served on it, where
        ``auto`` starts measuring it, and ``list_adapters`` says with what verdict."""
        request = messages.load_adapter_request(name, path, sharing)
        return messages.read_adapter(self.call(self.stubs.adapters.LoadAdapter, request))

    def unload_adapter(self, name: str) -> None:
        self.call(self.stubs.adapters.UnloadAdapter, messages.unload_adapter_request(name))

    def list_adapters(self) -> list[AdapterInfo]:
        response = self.call(self.stubs.adapters.ListAdapters, adapters_pb2.ListAdaptersRequest())
        return [messages.read_adapter(adapter) for adapter in response.adapters]

    def status(self) -> Status:
        return messages.read_status(self.call(self.stubs.cluster.GetClusterStatus, cluster_pb2.GetClusterStatusRequest()))


class Session:
    """A shared context on the server. ``info`` is as of the last call that returned it."""

    def __init__(self, client: ForkKVClient, info: SessionInfo) -> None:
        self._client = client
        self._stub = client.stubs.sessions
        self.info = info

    @property
    def session_id(self) -> str:
        return self.info.session_id

    def refresh(self, *, include_tokens: bool = False) -> SessionInfo:
        """As the server has it now."""
        request = messages.get_session_request(self.session_id, include_tokens=include_tokens)
        self.info = messages.read_session(self._client.call(self._stub.GetSession, request))
        return self.info

    def fork(self, branches: Sequence[BranchSpec], *, parent: str | None = None) -> list[Branch]:
        """All of them or none; ``parent`` names the branch to fork instead of the session's context."""
        response = self._client.call(self._stub.Fork, messages.fork_request(self.session_id, branches, parent))
        return [Branch(self._client, self.session_id, messages.read_branch(branch)) for branch in response.branches]

    def branch(self, name: str) -> Branch:
        """A branch that exists. Raises NotFound when ``info`` does not have it: ``refresh`` first."""
        info = self.info.branch(name)
        return Branch(self._client, self.session_id, info)

    def join(self, branch: str, what: JoinWhat | str = JoinWhat.ALL) -> JoinResult:
        """Append what the branch added to the shared context; fork anew to read it."""
        response = self._client.call(self._stub.Join, messages.join_request(self.session_id, branch, what))
        return messages.read_join(response)

    def close(self) -> None:
        """Forget the session on the server."""
        self._client.call(self._stub.CloseSession, sessions_pb2.CloseSessionRequest(session_id=self.session_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Branch:
    """One agent of a session."""

    def __init__(self, client: ForkKVClient, session_id: str, info: BranchInfo) -> None:
        self._client = client
        self.session_id = session_id
        self.info = info

    @property
    def name(self) -> str:
        return self.info.name

    def stream(
        self, text: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[GenerateOptions]
    ) -> Iterator[Event]:
        """A turn, event by event: appends text or token ids, and generates. Closing the iterator cancels the turn."""
        return self._client.events(messages.turn_request(self.session_id, self.name, text, token_ids, options))

    def generate(
        self, text: str | None = None, *, token_ids: Sequence[int] | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """A turn as a whole."""
        return collect(self.stream(text, token_ids=token_ids, **options))


def collect(events: Iterator[Event]) -> Generation:
    """All events of a stream as one ``Generation``."""
    builder = GenerationBuilder()
    for event in events:
        builder.add(event)
    return builder.build()
